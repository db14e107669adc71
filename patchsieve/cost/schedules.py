"""How many tokens are left after each of several prunings: plain lists of counts."""

from __future__ import annotations

import math

from patchsieve.errors import PatchsieveError


def geometric(n0: int, n: int, groups: int) -> list[int]:
    """Counts that fall by one ratio from `n0` to `n` in `groups` prunings.

    The k-th is n0 (n / n0)^(k / groups), rounded half up: from 576 to 120 in 8 groups 473, 389,
    320, 263, 216, 178, 146, 120; from 120 to 64 in 4 groups 103, 88, 75, 64.

    Args:
        n0: Tokens before the first pruning.
        n: Tokens after the last.
        groups: Prunings.

    Raises:
        PatchsieveError: `n` is not 1 to `n0`, or there is no group.
    """
    _check(n0, n, groups)
    return [_half_up(n0 * (n / n0) ** (k / groups)) for k in range(1, groups)] + [n]


def linear(n0: int, n: int, groups: int) -> list[int]:
    """Counts that fall by one number from `n0` to `n` in `groups` prunings, rounded half up.

    From 576 to 64 in 23 layers the step is 22.26 tokens: ToMe's constant r.

    Raises:
        PatchsieveError: `n` is not 1 to `n0`, or there is no group.
    """
    _check(n0, n, groups)
    return [_half_up(n0 - (n0 - n) * k / groups) for k in range(1, groups)] + [n]


def num_to_keep(keep_ratio: float, num_visual: int) -> int:
    """Tokens that a fraction of the original count stands for: rounded half up, at least 1.

    The rule of the pruning methods, here without torch.
    """
    if not 0 < keep_ratio <= 1:
        raise PatchsieveError(
            "a keep ratio is the fraction that is kept",
            found=keep_ratio,
            expected="above 0, up to 1",
        )
    return max(1, _half_up(keep_ratio * num_visual))


def _half_up(value: float) -> int:
    return math.floor(value + 0.5)


def _check(n0: int, n: int, groups: int) -> None:
    if not 1 <= n <= n0:
        raise PatchsieveError(
            "a schedule cannot end with this many tokens", found=n, expected=f"1 to {n0}"
        )
    if groups < 1:
        raise PatchsieveError("a schedule needs a pruning", found=f"{groups} groups")
