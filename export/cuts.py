"""Where to divide the decoder so that each engine is built in the memory that there is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from torch import nn

from patchsieve.contract.engine_memory import expected
from patchsieve.contract.errors import PatchsieveError


def num_bytes(*modules: nn.Module) -> int:
    """Bytes of the parameters of modules."""
    return sum(p.numel() * p.dtype.itemsize for module in modules for p in module.parameters())


def divide(
    num_layers: int,
    cuts: Sequence[int],
    layer: int,
    head: int,
    memory: int,
    others: Mapping[str, int],
) -> list[int]:
    """Cuts of the decoder, the fewest that fit the memory, and those that must be.

    Args:
        num_layers: Layers of the decoder.
        cuts: Layers at which it is divided in any case, ascending.
        layer: Bytes of the weights of one layer.
        head: Bytes of the output matrix, which the last stage holds too.
        memory: Bytes that building an engine may take.
        others: Bytes of the weights of engines that cannot be divided, by name.

    Raises:
        PatchsieveError: Something that cannot be divided takes more than `memory`.
    """
    _check({**others, "one layer and the output head": layer + head}, memory)
    found: list[int] = []
    for first, last in pairwise([0, *cuts, num_layers]):
        tail = head if last == num_layers else 0
        at = first
        for count in _fewest(last - first, layer, tail, memory):
            found += [at] if at else []
            at += count
    return found


def _check(parts: Mapping[str, int], memory: int) -> None:
    """Refuse what takes more memory than there may be, however the decoder is divided."""
    what, weights = max(parts.items(), key=lambda part: part[1])
    needed = expected(weights)
    if needed > memory:
        raise PatchsieveError(
            "the memory is too small for an engine that cannot be divided",
            found=f"about {needed / 1e9:.2f} GB for {what} ({weights / 1e9:.2f} GB of weights)",
            expected=f"at most {memory / 1e9:.2f} GB",
            do=f"give --build-memory {-(-needed // 10**8) / 10:g}, or a smaller --precision",
        )


def _fewest(count: int, layer: int, tail: int, memory: int) -> list[int]:
    """Layers of each of the fewest parts, of which the largest is as small as it can be.

    Args:
        count: Layers in all.
        layer: Bytes of each.
        tail: Bytes that the last part holds too.
        memory: Bytes that a part may take, enough for a layer and the tail.
    """
    sizes = sorted({n * layer + extra for n in range(1, count + 1) for extra in (0, tail)})
    fitting = [_fill(count, layer, tail, size) for size in sizes if expected(size) <= memory]
    whole = [parts for parts in fitting if parts]
    return min(whole, key=len)  # of equally many the first, whose largest is smallest


def _fill(count: int, layer: int, tail: int, limit: int) -> list[int]:
    """Parts filled from the back with at most `limit` bytes each; none if that cannot be."""
    parts: list[int] = []
    room = limit - tail
    while count:
        taken = min(count, max(0, room) // layer)
        if not taken:
            return []
        parts.insert(0, taken)
        count, room = count - taken, limit
    return parts
