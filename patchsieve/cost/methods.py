"""Tokens per layer under each pruning method: what a method costs, not how it chooses.

`of_plan` counts a plan, the same whether it is in a bundle, in a file or in options. The
functions before it count what the papers' tables need and no plan says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from patchsieve.contract.errors import PatchsieveError, ShapeError
from patchsieve.contract.plan import Plan, SitePlan
from patchsieve.cost.config import ModelShape
from patchsieve.cost.flops import Schedule
from patchsieve.pruning import counts as token_counts
from patchsieve.pruning import recipes
from patchsieve.pruning.catalogue import entry
from patchsieve.pruning.counts import BeforeDecoder, Left, left_by_sites
from patchsieve.pruning.entry import DECODER, ENCODER, PROJECTOR
from patchsieve.pruning.schedules import linear

PLACEMENTS = ("start", "mid", "end")


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
        raise PatchsieveError(
            "unknown placement",
            found=placement,
            expected=", ".join(PLACEMENTS),
            do="correct --placement",
        )
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
        counts: Visual tokens left after each site.
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
    num_kept: int = 64,
    *,
    counts: Sequence[int] | None = None,
    group_layers: int = 3,
    decoder_layers: int | None = None,
    text_tokens: int = 512,
) -> Schedule:
    """IVTP: groups of layers in the tower, then in the first layers of the decoder.

    Args:
        shape: The model.
        num_kept: Visual tokens after the last site.
        counts: Tokens left by each group of the tower, then of the decoder, instead.
        group_layers: Layers of a group.
        decoder_layers: First layers of the decoder that are grouped (see `recipes.ivtp`).
        text_tokens: Decoder tokens of the text, for the windows of the text scorer.

    Raises:
        PatchsieveError: The decoder is too shallow, or the counts cannot be.
    """
    size = recipes.Size(shape.vision.num_patches, shape.text.num_layers)
    plan = recipes.ivtp(size, num_kept, group=group_layers, layers=decoder_layers, counts=counts)
    return of_plan(shape, plan, text_tokens=text_tokens)[0]


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
    is_exact = _before_decoder(shape, plan).is_exact
    if plan.sites:
        counts = list(survivors or ())
        if survivors is None:
            left = left_by_sites(plan.sites, schedule.llm[0])
            _check_given(plan.sites, left)
            counts = [each.count for each in left]
            is_exact = is_exact and all(each.is_exact for each in left)
        schedule = in_decoder(shape, counts, plan.layers, schedule)
    return _with_pseudo_cls(shape, plan, schedule, text_tokens), is_exact


def _check_given(sites: Sequence[SitePlan], left: Sequence[Left]) -> None:
    """Refuse to count a plan that does not say how many tokens a site leaves."""
    for site, each in zip(sites, left, strict=True):
        if not each.is_given:
            raise PatchsieveError(
                f"the tokens that {site.method} at layer {site.layer} keeps are not known: the "
                "image decides",
                expected="their number",
                do="give --survivors, one for each site, as `run --json` reports them, or --budget "
                "for an upper bound",
            )


def _with_pseudo_cls(
    shape: ModelShape, plan: Plan, schedule: Schedule, text_tokens: int
) -> Schedule:
    """Add what makes the row that sites judge by, and feeds it up to the last of them."""
    side_layers = max((site.layer for site in plan.sites if _is_judged_by_cls(site)), default=0)
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
    pools = plan.projector is not None and entry(PROJECTOR, plan.projector.method).is_grid
    rows = (shape.vision.num_patches if pools else left) + shape.vision.has_cls
    return replace(
        schedule,
        vision=schedule.vision + (rows,) * further,
        vision_mlp=schedule.vision_mlp + (rows,) * further,
        windows=shape.scorer.windows(text_tokens),
        has_joint_cls=True,
    )


def _is_judged_by_cls(site: SitePlan) -> bool:
    """Whether a site judges by the pseudo-CLS, a row of its own that is fed up to there."""
    return entry(DECODER, site.method).is_judged_by_cls(site.params)


def before_decoder(shape: ModelShape, plan: Plan, placement: str | None = None) -> Schedule:
    """Tokens per layer of what a plan prunes inside the tower and after it.

    Raises:
        PatchsieveError: A method is not known, or its options do not fit.
    """
    left, schedule = _before_decoder(shape, plan), no_pruning(shape)
    if plan.encoder is not None:
        is_inside = entry(ENCODER, plan.encoder.method).tower.is_inside
        where = placement or ("mid" if is_inside else "end")
        schedule = in_tower(shape, list(left.in_tower.values()), list(left.in_tower), where)
    if plan.projector is None:
        return schedule
    # A method may act on what the projector has made: then that takes all that leave the tower.
    found = entry(PROJECTOR, plan.projector.method)
    is_late = found.is_projected or plan.projector.params.get("place") == "after"
    further = shape.num_visual - shape.vision.num_patches
    return replace(
        schedule,
        llm=(left.count + further,) * shape.text.num_layers,
        projected=schedule.llm[0] if is_late else 0,
    )


def _before_decoder(shape: ModelShape, plan: Plan) -> BeforeDecoder:
    return token_counts.before_decoder(plan, shape.vision.num_patches, shape.vision.num_layers_run)


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
            do="correct --survivors or --sites",
        )
    if layers[0] < first or layers[-1] >= num_layers:
        raise ShapeError(
            f"a pruning layer is no layer of the {where}",
            found=layers,
            expected=f"layers {first} to {num_layers - 1}",
            do="correct --sites",
        )
    _check_counts(counts, n)
    return dict(zip(layers, counts, strict=True))


def _check_counts(counts: Sequence[int], n: int) -> None:
    if any(b > a for a, b in pairwise([n, *counts])) or min(counts) < 1:
        raise PatchsieveError(
            "pruning cannot leave this many tokens",
            found=list(counts),
            expected=f"{n} or fewer, at least 1, never more than at the place before",
            do="correct --survivors or --visual-tokens",
        )


def layerwise(shape: ModelShape, num_kept: int) -> list[int]:
    """Counts that fall by one number in every tower layer (the paper's TopK and ToMe)."""
    return linear(shape.vision.num_patches, num_kept, shape.vision.num_layers_run)
