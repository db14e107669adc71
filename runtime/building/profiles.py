"""The shapes that an engine must take, from the limits and budgets of its bundle."""

from __future__ import annotations

from patchsieve.contract import names
from patchsieve.contract.manifest import Manifest

Shape = tuple[int, ...]
Profile = dict[str, tuple[Shape, Shape, Shape]]  # input name -> (min, opt, max)
Ranges = dict[str, tuple[int, int, int]]  # axis -> (min, opt, max)

USUAL_TEXT = 64  # rows of text that the prefill kernels are tuned for


def profiles(facts: Manifest, graph: str, target: str) -> list[Profile]:
    """Profiles of a graph's engine, in the order in which the runtime numbers them.

    A stage gets a profile for prefill and one for decode. The latter admits two rows, because
    exactly one makes TensorRT-RTX 1.7.1 store float16 weights twice.

    Args:
        facts: The bundle's manifest.
        graph: The graph.
        target: Whose form of the graph; targets differ in how they take caches.
    """
    limits = facts.limits
    most = [_most_rows(facts, index) for index in range(len(facts.stages))]
    ranges: Ranges = {
        names.AXIS_IMAGES: (1, 1, limits.max_images),
        names.AXIS_ROWS: (1, most[0], most[0]),
        names.AXIS_WINDOWS: (1, 1, names.MOST_WINDOWS),
    }
    identity = facts.graphs[graph].identity
    if identity.stage is not None:
        chosen = _stage(facts, identity.stage, ranges, most)
    elif identity.layer is not None:
        chosen = [_decision(facts, identity.layer, ranges, most)]
    else:
        chosen = [ranges]
    return [_profile(facts, graph, target, given) for given in chosen]


def _stage(facts: Manifest, index: int, ranges: Ranges, most: list[int]) -> list[Ranges]:
    """Prefill, then decode."""
    before, slots = max(0, index - 1), facts.stages[index].slots
    usual, usual_in = _budget(facts, index) + USUAL_TEXT, _budget(facts, before) + USUAL_TEXT
    prefill = ranges | {
        names.AXIS_ROWS: (1, min(usual, most[index]), most[index]),
        names.AXIS_ROWS_IN: (1, min(usual_in, most[before]), most[before]),
        # A first turn has no past. The kernels are tuned for one row of it: none cannot be timed.
        names.AXIS_PAST: (0, 1, slots),
    }
    decode = prefill | {
        names.AXIS_ROWS: (1, 1, 2),
        names.AXIS_ROWS_IN: (1, 1, 2),
        names.AXIS_PAST: (0, min(usual, slots), slots),
    }
    return [prefill, decode]


def _decision(facts: Manifest, layer: int, ranges: Ranges, most: list[int]) -> Ranges:
    index = next(i for i, stage in enumerate(facts.stages) if stage.last == layer)
    tokens, slots = _budget(facts, index), facts.stages[index].slots
    usual = min(tokens + USUAL_TEXT, most[index])
    return ranges | {
        names.AXIS_ROWS: (1, usual, most[index]),
        names.AXIS_PRESENT: (1, usual, slots),
        names.AXIS_VISUAL: (1, tokens, tokens),
        names.AXIS_TEXT: (1, min(USUAL_TEXT, most[index]), most[index]),
    }


def _profile(facts: Manifest, graph: str, target: str, ranges: Ranges) -> Profile:
    """Shapes of the inputs that have an axis of changing length; fixed caches have none."""
    profile: Profile = {}
    for tensor in facts.signature(target, graph).inputs:
        if any(axis in ranges for axis in tensor.shape):
            axes = [_lengths(axis, ranges) for axis in tensor.shape]
            low, usual, high = (tuple(axis[i] for axis in axes) for i in range(3))
            profile[tensor.name] = (low, usual, high)
    return profile


def _lengths(axis: int | str, ranges: Ranges) -> tuple[int, int, int]:
    """(min, opt, max) of an axis."""
    return (axis, axis, axis) if isinstance(axis, int) else ranges[axis]


def _budget(facts: Manifest, index: int) -> int:
    """Visual tokens per image that a stage's engine has room for."""
    limits = facts.limits
    text = limits.max_text_tokens + limits.max_new_tokens
    return (facts.stages[index].slots - text) // limits.max_images


def _most_rows(facts: Manifest, index: int) -> int:
    """Rows of the longest prefill: the pending token of the turn before counts as text."""
    return facts.stages[index].slots - facts.limits.max_new_tokens
