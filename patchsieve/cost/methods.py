"""Tokens per layer under each pruning method: what a method costs, not how it chooses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

from patchsieve.cost.flops import Schedule
from patchsieve.cost.shapes import ModelShape, ScorerShape
from patchsieve.errors import PatchsieveError, ShapeError
from patchsieve.plan import Plan
from patchsieve.pruning.schedules import (
    IVTP_TOWER_SHARE,
    SCHEDULE_OPTIONS,
    TowerSchedule,
    geometric,
    group_ends,
    linear,
    num_to_keep,
    pooled_side,
)

PLACEMENTS = ("start", "mid", "end")
NUM_KEPT = 64  # what the papers' tables keep of 576
DEFAULT_KEEP_RATIO = 0.5  # of the decoder methods that keep a fixed fraction
FIXED_RATIO = ("random", "fastv")
# Methods that `export` has, and where in its tower layer each of them acts.
TOWER_PLACEMENTS = {"gtp": "end", "topk": "end", "random": "end", "evit": "mid", "tome": "mid"}
OUTPUT_METHODS = ("pooling", "topk", "random")


def no_pruning(shape: ModelShape) -> Schedule:
    """Every layer works on everything."""
    rows = (shape.vision.num_patches + shape.vision.has_cls,) * shape.vision.num_layers_run
    return Schedule(rows, rows, (shape.num_visual,) * shape.text.num_layers)


def in_tower(
    shape: ModelShape,
    counts: Sequence[int],
    layers: Sequence[int] | None = None,
    placement: str = "start",
) -> Schedule:
    """Prune or merge patches inside the vision tower.

    Args:
        shape: The model.
        counts: Patches left after each pruning, CLS not counted.
        layers: Tower layers that prune, ascending, one for each count; by default all that run.
        placement: Where in its layer a pruning acts. "start": the layer works on what is left (so
            the papers' figures come out); "mid": between attention and MLP (EViT, ToMe); "end": at
            the input of the next layer.

    Raises:
        ShapeError: Counts and layers do not pair.
        PatchsieveError: The counts or the placement cannot be.
    """
    run = shape.vision.num_layers_run
    layers = range(run) if layers is None else layers
    if placement not in PLACEMENTS:
        raise PatchsieveError("unknown placement", found=placement, expected=", ".join(PLACEMENTS))
    left = _at(layers, counts, run, shape.vision.num_patches, first=0, where="tower")
    n, attention, mlp = shape.vision.num_patches, [], []
    for layer in range(run):
        before, n = n, left.get(layer, n)
        attention.append((n if placement == "start" else before) + shape.vision.has_cls)
        mlp.append((before if placement == "end" else n) + shape.vision.has_cls)
    n += shape.num_visual - shape.vision.num_patches  # a class token that leaves the tower too
    return Schedule(tuple(attention), tuple(mlp), (n,) * shape.text.num_layers)


def after_tower(shape: ModelShape, count: int) -> Schedule:
    """Leave `count` tokens between the tower and the decoder: pooling, or a choice there."""
    _check_counts([count], shape.num_visual)
    return replace(no_pruning(shape), llm=(count,) * shape.text.num_layers)


def resampler(shape: ModelShape, count: int) -> Schedule:
    """Replace the patches by `count` learned queries that attend to them (Qwen-VL)."""
    return replace(after_tower(shape, count), queries=count)


def in_decoder(
    shape: ModelShape,
    counts: Sequence[int],
    sites: Sequence[int],
    after: Schedule | None = None,
) -> Schedule:
    """Drop tokens at decoder sites: fastv, atp, random.

    Args:
        shape: The model.
        counts: Visual tokens left behind each site.
        sites: Decoder layers at whose input tokens are dropped, ascending, from 1.
        after: What pruned before the decoder; by default nothing did.

    Raises:
        ShapeError: Counts and sites do not pair, or a site is no layer of the decoder.
        PatchsieveError: A count is larger than the one before it.
    """
    after = no_pruning(shape) if after is None else after
    n = after.llm[0]
    left, llm = _at(sites, counts, shape.text.num_layers, n, first=1, where="decoder"), []
    for layer in range(shape.text.num_layers):
        n = left.get(layer, n)
        llm.append(n)
    return replace(after, llm=tuple(llm))


def ivtp(
    shape: ModelShape,
    num_kept: int = NUM_KEPT,
    *,
    counts: Sequence[int] | None = None,
    group_layers: int = 3,
    decoder_layers: int = 12,
    text_tokens: int = 512,
    has_side_row: bool = False,
    has_joint_cls: bool = False,
    scorer: ScorerShape | None = None,
) -> Schedule:
    """IVTP: groups of layers in the tower, then in the first layers of the decoder.

    The paper leaves open: the counts. By default they fall geometrically to the share of
    `IVTP_TOWER_SHARE` in the tower and from there to `num_kept`: 473, 389, 320, 263, 216, 178, 146,
    120, then 103, 88, 75, 64. Each group prunes at its end, the last of the tower at its output.

    Args:
        shape: The model.
        num_kept: Visual tokens behind the last site.
        counts: Tokens left by each group of the tower, then of the decoder, instead.
        group_layers: Layers of a group.
        decoder_layers: First layers of the decoder that are grouped.
        text_tokens: Decoder tokens of the text, for the windows of the text scorer.
        has_side_row: Count the pseudo-CLS row through the grouped decoder layers.
        has_joint_cls: Count one more tower layer on the survivors, which gives the CLS that the
            scorer compares with the text.
        scorer: The text tower; CLIP-L's by default.

    Raises:
        PatchsieveError: The decoder is too shallow, or the counts cannot be.
    """
    if group_layers < 1 or not 1 <= decoder_layers < shape.text.num_layers:
        raise PatchsieveError(
            "IVTP's groups do not fit the decoder",
            found=f"groups of {group_layers} in the first {decoder_layers} layers",
            expected=f"fewer than its {shape.text.num_layers} layers",
            do="group fewer decoder layers",
        )
    run = shape.vision.num_layers_run
    ends = group_ends(run, group_layers)
    sites = list(range(group_layers, decoder_layers, group_layers)) + [decoder_layers]
    if counts is None:
        n = shape.vision.num_patches
        _check_counts([num_kept], n)
        middle = int(n * (num_kept / n) ** IVTP_TOWER_SHARE + 0.5)
        counts = geometric(n, middle, len(ends)) + geometric(middle, num_kept, len(sites))
    tower, decoder = counts[: len(ends)], counts[len(ends) :]
    schedule = in_decoder(shape, decoder, sites, in_tower(shape, tower, ends, "end"))
    if has_joint_cls and run < shape.vision.num_layers:
        one = (schedule.llm[0] + shape.vision.has_cls,)
        schedule = replace(
            schedule, vision=schedule.vision + one, vision_mlp=schedule.vision_mlp + one
        )
    return replace(
        schedule,
        side_layers=decoder_layers if has_side_row else 0,
        windows=(scorer or ScorerShape()).windows(text_tokens),
    )


def of_plan(
    shape: ModelShape, plan: Plan, survivors: Sequence[int] | None = None
) -> tuple[Schedule, bool]:
    """Tokens per layer of a plan, and whether they are known or only bounded.

    Args:
        shape: The model.
        plan: The plan.
        survivors: Tokens left at each decoder site, where the method adapts them to the image.

    Raises:
        PatchsieveError: A site has neither a ratio nor a budget, and no survivors are given; or the
            cost of a method is not known.
    """
    before = before_decoder(shape, plan)
    if not plan.sites:
        return before, True
    counts, is_exact = list(survivors or ()), True
    n = entering = before.llm[0]
    for site in plan.sites if survivors is None else ():
        default = DEFAULT_KEEP_RATIO if site.method in FIXED_RATIO else None
        ratio = site.params.get("keep_ratio", default)
        if ratio is None and site.budget is None:
            raise PatchsieveError(
                f"{site.method} at layer {site.layer} keeps as many tokens as the image needs",
                expected="how many it keeps",
                do="give --survivors, one for each site, as `run --json` reports them",
            )
        is_exact = is_exact and ratio is not None
        kept = num_to_keep(ratio, entering) if ratio is not None else n
        n = min(n, kept, site.budget or n)
        counts.append(n)
    return in_decoder(shape, counts, plan.layers, before), is_exact


def before_decoder(shape: ModelShape, plan: Plan) -> Schedule:
    """Tokens per layer of what a plan prunes inside the tower and behind it.

    Raises:
        PatchsieveError: The cost of a method is not known, or its options do not fit.
    """
    run, patches = shape.vision.num_layers_run, shape.vision.num_patches
    schedule, further = no_pruning(shape), shape.num_visual - patches
    if plan.encoder is not None:
        _check_known("inside the tower", plan.encoder.method, TOWER_PLACEMENTS)
        params = plan.encoder.params
        options = {name: params[name] for name in SCHEDULE_OPTIONS if name in params}
        places = TowerSchedule(**options).places(plan.encoder.method, patches, run)
        placement = TOWER_PLACEMENTS[plan.encoder.method]
        schedule = in_tower(shape, list(places.values()), list(places), placement)
    if plan.projector is None:
        return schedule
    method, params = plan.projector.method, plan.projector.params
    _check_known("behind the tower", method, OUTPUT_METHODS)
    keep = params.get("keep")
    if method == "pooling":
        side = math.isqrt(patches)
        count = pooled_side(keep, (side, side)) ** 2
    else:
        places = TowerSchedule(keep=keep, layers=(run - 1,)).places(method, patches, run)
        count = places[run - 1]
    is_late = params.get("place") == "after"  # pooled behind the projector
    return replace(
        schedule,
        llm=(count + further,) * shape.text.num_layers,
        projected=schedule.llm[0] if is_late else 0,
    )


def _check_known(where: str, method: str, known: Iterable[str]) -> None:
    if method not in known:
        raise PatchsieveError(
            f"the cost of this method {where} is not known", found=method, expected=", ".join(known)
        )


def _at(
    layers: Sequence[int], counts: Sequence[int], num_layers: int, n: int, *, first: int, where: str
) -> dict[int, int]:
    """Pair layers with what is left there, refusing what does not pair."""
    layers = list(layers)
    if len(layers) != len(counts) or not layers or layers != sorted(set(layers)):
        raise ShapeError(
            f"the {where}'s pruning layers and their counts do not pair",
            found=f"{len(counts)} counts for layers {layers}",
            expected="one count for each layer, layers ascending",
        )
    if layers[0] < first or layers[-1] >= num_layers:
        raise ShapeError(
            f"a pruning layer is no layer of the {where}",
            found=layers,
            expected=f"layers {first} to {num_layers - 1}",
        )
    _check_counts(counts, n)
    return dict(zip(layers, counts, strict=True))


def _check_counts(counts: Sequence[int], n: int) -> None:
    if any(b > a for a, b in pairwise([n, *counts])) or min(counts) < 1:
        raise PatchsieveError(
            "pruning cannot leave this many tokens",
            found=list(counts),
            expected=f"{n} or fewer, at least 1, never more than at the place before",
        )


def layerwise(shape: ModelShape, num_kept: int) -> list[int]:
    """Counts that fall by one number in every tower layer (the paper's TopK and ToMe)."""
    return linear(shape.vision.num_patches, num_kept, shape.vision.num_layers_run)
