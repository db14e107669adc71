"""Where to divide the decoder so that each engine is built in the memory that there is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from patchsieve.contract.engine_memory import ALWAYS, expected, tenths
from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.formats import Chosen
from patchsieve.contract.sizes import Group
from patchsieve.contract.weights import HEAD, JOINT, LAYER, SCORER, TOWER

Counts = Mapping[str, int]  # bytes of weights by format


def cuts_for(
    memory: int, cuts: Sequence[int], groups: Sequence[Group], chosen: Chosen
) -> list[int]:
    """Cuts of the decoder by which every engine is built in a memory.

    Args:
        memory: Bytes that building an engine may take.
        cuts: Layers at which it is divided in any case, ascending.
        groups: The model's tensors.
        chosen: How they are stored.

    Raises:
        PatchsieveError: Something that cannot be divided takes more than `memory`.
    """
    counts = [(group.part, group.num_bytes(chosen.types, chosen.formats)) for group in groups]
    layers = [each for part, each in counts if part == LAYER]
    layer = max(layers, key=tenths)  # they may differ, by decisions= and exceptions
    head = _sum(each for part, each in counts if part == HEAD)
    both = _sum((layer, head))
    whole = {
        "the vision tower": _sum(each for part, each in counts if part in (TOWER, JOINT)),
        "the scorer": _sum(each for part, each in counts if part == SCORER),
        "one layer and the output head": both,
    }
    _check(whole, memory)
    room = 10 * (memory - ALWAYS)
    return divide(len(layers), cuts, tenths(layer), tenths(head), room)


def divide(num_layers: int, cuts: Sequence[int], layer: int, head: int, memory: int) -> list[int]:
    """Cuts of the decoder, the fewest that fit the memory, and those that must be.

    Args:
        num_layers: Layers of the decoder.
        cuts: Layers at which it is divided in any case, ascending.
        layer: Memory that one layer takes.
        head: What the output matrix takes, which the last stage holds too.
        memory: What a stage may take, enough for a layer and the head.
    """
    found: list[int] = []
    for first, last in pairwise([0, *cuts, num_layers]):
        tail = head if last == num_layers else 0
        at = first
        for count in _fewest(last - first, layer, tail, memory):
            found += [at] if at else []
            at += count
    return found


def _sum(counts: Iterable[Counts]) -> dict[str, int]:
    total: dict[str, int] = {}
    for each in counts:
        total |= {form: total.get(form, 0) + count for form, count in each.items()}
    return total


def _check(parts: Mapping[str, Counts], memory: int) -> None:
    """Refuse what takes more memory than there may be, however the decoder is divided."""
    what, weights = max(parts.items(), key=lambda part: expected(part[1]))
    needed, stored = expected(weights), sum(weights.values())
    if needed > memory:
        raise PatchsieveError(
            "the memory is too small for an engine that cannot be divided",
            found=f"about {needed / 1e9:.2f} GB for {what} ({stored / 1e9:.2f} GB of weights)",
            expected=f"at most {memory / 1e9:.2f} GB",
            do=f"give --build-memory {-(-needed // 10**8) / 10:g}, or a smaller --precision",
        )


def _fewest(count: int, layer: int, tail: int, memory: int) -> list[int]:
    """Layers of each of the fewest parts, of which the largest is as small as it can be.

    Args:
        count: Layers in all.
        layer: Memory that each takes.
        tail: What the last part takes too.
        memory: What a part may take, enough for a layer and the tail.
    """
    sizes = sorted({n * layer + extra for n in range(1, count + 1) for extra in (0, tail)})
    fitting = [_fill(count, layer, tail, size) for size in sizes if size <= memory]
    whole = [parts for parts in fitting if parts]
    return min(whole, key=len)  # of equally many the first, whose largest is smallest


def _fill(count: int, layer: int, tail: int, limit: int) -> list[int]:
    """Parts filled from the back with at most `limit` each; none if that cannot be."""
    parts: list[int] = []
    room = limit - tail
    while count:
        taken = min(count, max(0, room) // layer)
        if not taken:
            return []
        parts.insert(0, taken)
        count, room = count - taken, limit
    return parts
