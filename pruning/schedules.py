"""How many tokens are left after each of several prunings: plain numbers, without torch.

A method inside the vision tower prunes at fixed layers to fixed counts, so that every shape of the
graph is known when it is made. `TowerSchedule` says which; the cost model reads the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

from patchsieve.contract.errors import PatchsieveError
from patchsieve.pruning.catalogue import in_tower
from patchsieve.pruning.entry import TowerRule


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
            "this keep ratio cannot be used",
            found=keep_ratio,
            expected="above 0, up to 1",
            do="correct --keep-ratio",
        )
    return max(1, _half_up(keep_ratio * num_visual))


def _half_up(value: float) -> int:
    return math.floor(value + 0.5)


def _check(n0: int, n: int, groups: int) -> None:
    if not 1 <= n <= n0:
        raise PatchsieveError(
            "a schedule cannot end with this many tokens",
            found=n,
            expected=f"1 to {n0}",
            do="keep fewer tokens, and at least one",
        )
    if groups < 1:
        raise PatchsieveError(
            "a schedule needs a pruning", found=f"{groups} groups", do="give at least one group"
        )


_FINAL = 1 / 9  # what the papers keep in the end: 64 of 576
CURVES = {"geometric": geometric, "linear": linear}


@dataclass(frozen=True)
class TowerSchedule:
    """Where a tower method prunes and how many tokens it leaves; None takes the method's default.

    Attributes:
        keep: Tokens left by the last pruning, the class token not counted.
        counts: Tokens left by each pruning, instead of `keep` and `curve`.
        layers: Tower layers that prune, from 0; a method acts inside its layer or right after it.
        group_layers: Layers of a group, whose last one prunes, instead of `layers`; as many as the
            tower runs, or more, make one group.
        curve: "geometric" (one ratio) or "linear" (one number) for each pruning.

    Raises:
        PatchsieveError: An option is no such number, or two of them contradict each other.
    """

    keep: int | None = None
    counts: tuple[int, ...] | None = None
    layers: tuple[int, ...] | None = None
    group_layers: int | None = None
    curve: str | None = None

    def __post_init__(self) -> None:
        """Check each by itself; `places` checks them against a tower."""
        for name in ("keep", "group_layers"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                _refuse(name, value, "a whole number of at least 1")
        for name in ("counts", "layers"):
            value = getattr(self, name)
            if value is not None:
                if not isinstance(value, (tuple, list)) or any(type(v) is not int for v in value):
                    _refuse(name, value, "a list of whole numbers")
                object.__setattr__(self, name, tuple(value))
        if self.curve is not None and self.curve not in CURVES:
            _refuse("curve", self.curve, " or ".join(CURVES))
        for first, second in (("keep", "counts"), ("layers", "group_layers"), ("counts", "curve")):
            if None not in (getattr(self, first), getattr(self, second)):
                raise PatchsieveError(
                    "two options of a tower method say the same thing",
                    found=f"{first} and {second}",
                    do="remove one",
                )

    def places(self, method: str, num_patches: int, num_layers: int) -> dict[int, int]:
        """Tokens left at each layer that prunes.

        Args:
            method: The method's name, for its defaults.
            num_patches: Patches of an image, N.
            num_layers: Tower layers that run.

        Raises:
            PatchsieveError: Layers and counts do not pair, or do not fit the tower.
        """
        merges, rule = in_tower(method).merges, in_tower(method).tower
        layers = self.layers or self._default_layers(rule, num_layers)
        if list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < num_layers:
            _refuse("layers", list(layers), f"ascending layers from 0 to {num_layers - 1}")
        counts = self.counts
        if counts is None:
            keep = default_keep(num_patches, rule.share) if self.keep is None else self.keep
            if keep > num_patches:
                _refuse("keep", keep, f"1 to {num_patches}, the patches of an image")
            curve = CURVES[self.curve or rule.curve]
            counts = tuple(curve(num_patches, keep, len(layers)))
        if len(counts) != len(layers):
            _refuse("counts", list(counts), f"{len(layers)}, one for each of the layers {layers}")
        if any(b > a for a, b in pairwise([num_patches, *counts])) or min(counts) < rule.fewest:
            _refuse("counts", list(counts), f"falling numbers from {num_patches} to {rule.fewest}")
        if merges:
            for layer, pair in zip(layers, pairwise([num_patches, *counts]), strict=True):
                check_merging(method, f"tower layer {layer}", *pair)
        return dict(zip(layers, counts, strict=True))

    def _default_layers(self, rule: TowerRule, num_layers: int) -> tuple[int, ...]:
        if self.group_layers is None and rule.at_quarters and num_layers >= 4:
            # EViT's published layers 3, 6, 9 of 12: the ends of the first three quarters.
            return tuple(num_layers * quarter // 4 for quarter in (1, 2, 3))
        return group_ends(num_layers, self.group_layers or rule.group_layers)


SCHEDULE_OPTIONS = tuple(field.name for field in fields(TowerSchedule))


def group_ends(num_layers: int, group_layers: int) -> tuple[int, ...]:
    """Last layer of each group; the last group may be short: 2, 5, ..., 20, 22 of 23 layers."""
    ends = range(group_layers, num_layers + group_layers, group_layers)
    return tuple(min(end, num_layers) - 1 for end in ends)


def default_keep(num_patches: int, share: float = 1.0) -> int:
    """Tokens that a method leaves if nobody says how many: 64 of 576; 120 with IVTP's share."""
    return max(1, _half_up(num_patches * _FINAL**share))


def fewest_after_merging(num_tokens: int) -> int:
    """Fewest tokens that merging pairs leaves of so many at one place."""
    return num_tokens - num_tokens // 2


def check_merging(method: str, where: str, before: int, left: int) -> None:
    """Refuse more merges at one place than there are pairs.

    Raises:
        PatchsieveError: More than every other token would go.
    """
    fewest = fewest_after_merging(before)
    if left < fewest:
        raise PatchsieveError(
            f"{method} merges at most every other token, not so many at {where}",
            found=f"{before} to {left}",
            expected=f"at least {fewest} left",
            do="keep more, or merge at several places (--plan gives each its own count)",
        )


def pooled_side(keep: int | None, grid: tuple[int, int]) -> int:
    """Cells of a row and of a column, where a grid of patches is pooled to `keep` tokens.

    Raises:
        PatchsieveError: `keep` is no square, or more than the grid holds.
    """
    if keep is None:
        return max(1, math.isqrt(default_keep(grid[0] * grid[1])))
    side = math.isqrt(keep)
    if side * side != keep or side > min(grid):
        raise PatchsieveError(
            "pooling leaves a square grid of tokens",
            found=keep,
            expected=f"a square number up to {min(grid) ** 2}",
            do=f"keep {max(1, min(side, *grid)) ** 2}, for instance",
        )
    return side


def _refuse(name: str, found: Any, expected: str) -> None:
    raise PatchsieveError(
        f"the option {name} of a tower method cannot be used",
        found=repr(found)[:80],
        expected=expected,
        do=f"correct {name} (docs/methods.md lists the options)",
    )
