"""Tokens per layer under each pruning method: what a method costs, not how it chooses.

`of_plan` counts a plan, the same whether it stands in a bundle, in a file or in options. The
functions before it count what the papers' tables need and no plan says.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from patchsieve.contract.errors import PatchsieveError, ShapeError
from patchsieve.contract.plan import MethodPlan, Plan, SitePlan
from patchsieve.cost.config import ModelShape
from patchsieve.cost.flops import Schedule
from patchsieve.pruning import recipes
from patchsieve.pruning.heads import load_config
from patchsieve.pruning.schedules import (
    SCHEDULE_OPTIONS,
    TowerSchedule,
    group_ends,
    linear,
    num_to_keep,
    pooled_side,
)

PLACEMENTS = ("start", "mid", "end")
# Decoder methods by what they leave: a fraction or a number that is fixed, or what an image needs.
DEFAULT_KEEP_RATIO, DEFAULT_NUM_KEEP = 0.5, 64
FIXED_RATIO = ("random", "fastv")
FIXED_NUMBER = ("topk", "tome", "ivtp")
ADAPTIVE = ("atp",)
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
    num_kept: int = DEFAULT_NUM_KEEP,
    *,
    counts: Sequence[int] | None = None,
    group_layers: int = 3,
    decoder_layers: int | None = None,
    text_tokens: int = 512,
) -> Schedule:
    """IVTP: groups of layers in the tower, then in the first layers of the decoder.

    Args:
        shape: The model.
        num_kept: Visual tokens behind the last site.
        counts: Tokens left by each group of the tower, then of the decoder, instead.
        group_layers: Layers of a group.
        decoder_layers: First layers of the decoder that are grouped (see `recipes.ivtp`).
        text_tokens: Decoder tokens of the text, for the windows of the text scorer.

    Raises:
        PatchsieveError: The decoder is too shallow, or the counts cannot be.
    """
    plan = ivtp_plan(shape, num_kept, counts, group_layers, decoder_layers)
    return of_plan(shape, plan, text_tokens=text_tokens)[0]


def ivtp_plan(
    shape: ModelShape,
    num_kept: int = DEFAULT_NUM_KEEP,
    counts: Sequence[int] | None = None,
    group_layers: int = 3,
    decoder_layers: int | None = None,
) -> Plan:
    """The plan that `export --method ivtp` makes for a model of this shape (see `ivtp`)."""
    size = recipes.Size(shape.vision.num_patches, shape.text.num_layers)
    plan = recipes.ivtp(size, num_kept, group=group_layers, layers=decoder_layers)
    if counts is None:
        return plan
    ends = len(group_ends(shape.vision.num_layers_run, group_layers))
    if len(counts) != ends + len(plan.sites):
        raise ShapeError(
            "IVTP's groups and their counts do not pair",
            found=f"{len(counts)} counts",
            expected=f"{ends} of the tower and {len(plan.sites)} of the decoder",
        )
    encoder = MethodPlan("gtp", {"counts": list(counts[:ends]), "group_layers": group_layers})
    pairs = zip(plan.sites, counts[ends:], strict=True)
    sites = [replace(site, params=site.params | {"num_keep": count}) for site, count in pairs]
    return replace(plan, encoder=encoder, sites=tuple(sites))


def of_plan(
    shape: ModelShape,
    plan: Plan,
    survivors: Sequence[int] | None = None,
    *,
    text_tokens: int = 512,
    placement: str | None = None,
) -> tuple[Schedule, bool]:
    """Tokens per layer of a plan, and whether they are known or only bounded.

    Args:
        shape: The model.
        plan: The plan.
        survivors: Tokens left at each decoder site, where the method adapts them to the image.
        text_tokens: Decoder tokens of the text, for the windows of a text scorer.
        placement: Where in its layer the tower's method is counted; by default where it acts.

    Raises:
        PatchsieveError: A site adapts, has no budget, and no survivors are given; or the plan
            cannot be, or the cost of a method is not known.
    """
    schedule = before_decoder(shape, plan, placement)
    is_exact = True
    if plan.sites:
        counts, is_exact = list(survivors or ()), True
        if survivors is None:
            counts, is_exact = _left_by_sites(plan.sites, schedule.llm[0])
        schedule = in_decoder(shape, counts, plan.layers, schedule)
    return _with_pseudo_cls(shape, plan, schedule, text_tokens), is_exact


def reads_side_row(site: SitePlan) -> bool:
    """Whether a site judges by the pseudo-CLS, a row of its own that is fed up to there."""
    return site.method == "ivtp" or (
        site.method == "topk" and site.params.get("row", "cls") == "cls"
    )


def _left_by_sites(sites: Sequence[SitePlan], entering: int) -> tuple[list[int], bool]:
    """Tokens left at each site of `entering`, and whether none of them adapts to the image."""
    n, counts = entering, []
    for site in sites:
        _check_known("in the decoder", site.method, (*FIXED_RATIO, *FIXED_NUMBER, *ADAPTIVE))
        budget = _budget(site)
        if site.method in FIXED_RATIO:
            kept = num_to_keep(site.params.get("keep_ratio", DEFAULT_KEEP_RATIO), entering)
        elif site.method in FIXED_NUMBER:
            kept = site.params.get("num_keep", DEFAULT_NUM_KEEP)
            _check_number(site, kept)
        elif budget is None:
            raise PatchsieveError(
                f"{site.method} at layer {site.layer} keeps as many tokens as the image needs",
                expected="how many it keeps",
                do="give --survivors, one for each site, as `run --json` reports them, or --budget "
                "for an upper bound",
            )
        else:
            kept = n
        left = min(n, kept, budget or n)
        if site.method == "tome":
            _check_merging(f"decoder layer {site.layer}", n, left)
        n = left
        counts.append(n)
    return counts, not any(site.method in ADAPTIVE for site in sites)


def _budget(site: SitePlan) -> int | None:
    """The budget of a site, or what its heads propose; None if neither says."""
    if site.budget is not None or "heads" not in site.params:
        return site.budget
    heads = load_config(Path(site.params["heads"]))
    return dict(zip(heads.sites, heads.budgets, strict=False)).get(site.layer)


def _with_pseudo_cls(
    shape: ModelShape, plan: Plan, schedule: Schedule, text_tokens: int
) -> Schedule:
    """Add what makes the row that sites judge by, and feeds it up to the last of them."""
    side_layers = max((site.layer for site in plan.sites if reads_side_row(site)), default=0)
    judge = plan.pseudo_cls
    if (side_layers > 0) != (judge is not None):
        raise PatchsieveError(
            "the plan's sites and its pseudo_cls do not belong together",
            found="sites that judge by one, and none" if side_layers else "one that no site reads",
            expected='"pseudo_cls": {"text": "clip"} beside sites of ivtp or topk',
            do="correct the plan",
        )
    if judge is None:
        return schedule
    schedule = replace(schedule, side_layers=side_layers, has_cls=True)
    if not judge.needs_scorer:
        return schedule
    further = shape.vision.num_layers - shape.vision.num_layers_run if judge.cls == "last" else 0
    left = schedule.llm[0] - (shape.num_visual - shape.vision.num_patches)
    pools = plan.projector is not None and plan.projector.method == "pooling"
    rows = (shape.vision.num_patches if pools else left) + shape.vision.has_cls
    return replace(
        schedule,
        vision=schedule.vision + (rows,) * further,
        vision_mlp=schedule.vision_mlp + (rows,) * further,
        windows=shape.scorer.windows(text_tokens),
        has_joint_cls=True,
    )


def before_decoder(shape: ModelShape, plan: Plan, placement: str | None = None) -> Schedule:
    """Tokens per layer of what a plan prunes inside the tower and behind it.

    Raises:
        PatchsieveError: The cost of a method is not known, or its options do not fit.
    """
    run, patches = shape.vision.num_layers_run, shape.vision.num_patches
    schedule, further, left = no_pruning(shape), shape.num_visual - patches, patches
    if plan.encoder is not None:
        method, params = plan.encoder.method, plan.encoder.params
        _check_known("inside the tower", method, TOWER_PLACEMENTS)
        options = {name: params[name] for name in SCHEDULE_OPTIONS if name in params}
        places = TowerSchedule(**options).places(method, patches, run)
        if method == "tome":
            for layer, (n, count) in zip(
                places, pairwise([patches, *places.values()]), strict=True
            ):
                _check_merging(f"tower layer {layer}", n, count)
        where = TOWER_PLACEMENTS[method] if placement is None else placement
        schedule = in_tower(shape, list(places.values()), list(places), where)
        left = min(places.values())
    if plan.projector is None:
        return schedule
    method, params = plan.projector.method, plan.projector.params
    _check_known("after the tower", method, OUTPUT_METHODS)
    keep = params.get("keep")
    if method == "pooling":
        if plan.encoder is not None:
            raise PatchsieveError(
                "pooling needs every patch of the grid",
                found=f"{plan.encoder.method} in the tower before it",
                do="remove one of them",
            )
        side = math.isqrt(patches)
        count = pooled_side(keep, (side, side)) ** 2
    else:
        places = TowerSchedule(keep=keep, layers=(run - 1,)).places(method, patches, run)
        count = places[run - 1]
        if plan.encoder is not None and count >= left:
            raise PatchsieveError(
                f"{method} after {plan.encoder.method} would drop nothing",
                found=f"{count} to keep of {left}",
                expected=f"fewer than {left}",
            )
    is_late = params.get("place") == "after"  # pooled behind the projector
    return replace(
        schedule,
        llm=(count + further,) * shape.text.num_layers,
        projected=schedule.llm[0] if is_late else 0,
    )


def _check_number(site: SitePlan, num_keep: object) -> None:
    """Refuse a number of tokens that keeps none; a method says the same in its own words."""
    if type(num_keep) is not int or num_keep < 1:
        raise PatchsieveError(
            f"{site.method} at layer {site.layer} cannot keep this many tokens",
            found=repr(num_keep)[:80],
            expected="a whole number of at least 1",
            do="correct num_keep",
        )


def _check_merging(where: str, before: int, left: int) -> None:
    """Refuse more merges at one place than there are pairs."""
    if before - left > before // 2:
        raise PatchsieveError(
            f"tome merges at most every other token, not so many at {where}",
            found=f"{before} to {left}",
            expected=f"at least {before - before // 2} left",
            do="keep more, or merge at several places",
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
