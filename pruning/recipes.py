"""Whole published methods as plans, fitted to the size of a model. No torch is imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.plan import MethodPlan, Plan, PseudoCls, SitePlan
from patchsieve.pruning.entries.shared import IVTP_TOWER_SHARE
from patchsieve.pruning.schedules import geometric

IVTP_LAYERS = 12  # of the decoder, from its first, among which IVTP prunes


@dataclass(frozen=True)
class Size:
    """What a recipe must know of a model.

    Attributes:
        num_patches: Patches of an image.
        num_layers: Layers of the decoder.
    """

    num_patches: int
    num_layers: int


def ivtp(
    size: Size,
    num_keep: int = 64,
    *,
    group: int = 3,
    fusion: str = "rollout",
    block: str = "visual",
    pseudo_cls: PseudoCls | None = None,
    layers: int | None = None,
    counts: Sequence[int] | None = None,
) -> Plan:
    """IVTP: groups of layers in the tower by the class token, then in the decoder by a pseudo-CLS.

    The paper leaves open: the counts (see `IVTP_TOWER_SHARE`). The tower takes 576 tokens to 120,
    four sites in the decoder take them to 103, 88, 75 and 64.

    Args:
        size: The model.
        num_keep: Tokens of an image after the last site.
        group: Layers of a group, in tower and decoder; 1 is layer-wise.
        fusion: How a group's attention is joined (see `patchsieve.pruning.decoder.ivtp.IVTP`).
        block: Rows of its maps in the decoder.
        pseudo_cls: Which words judge; the paper's by default.
        layers: First layers of the decoder that are grouped (see `_ivtp_sites`).
        counts: Tokens left by each group of the tower, then of the decoder, instead of `num_keep`.

    Raises:
        PatchsieveError: The model has fewer patches than are to be kept, or too few layers.
    """
    sites = _ivtp_sites(size, group, layers)
    if counts is None:
        encoder, left = _ivtp_counts(size.num_patches, num_keep, len(sites))
    else:
        encoder, left = _ivtp_given(counts, len(sites))
    params = {"group": sites.step, "fusion": fusion, "block": block}
    return Plan(
        tuple(
            SitePlan(layer, "ivtp", {"num_keep": count, **params})
            for layer, count in zip(sites, left, strict=True)
        ),
        encoder=MethodPlan("gtp", encoder | {"group_layers": group, "fusion": fusion}),
        pseudo_cls=PseudoCls() if pseudo_cls is None else pseudo_cls,
    )


def _ivtp_sites(size: Size, group: int, layers: int | None) -> range:
    """The decoder layers at whose input IVTP prunes: the ends of its groups.

    A decoder of 13 layers or more has sites at 3, 6, 9 and 12. A shorter one has as many groups as
    end before its last layer: 12 layers have sites at 3, 6 and 9. A group longer than that is one
    group of all.

    Args:
        size: The model.
        group: Layers of a group.
        layers: First layers that are grouped; by default 12, or all but the last of a decoder that
            has no more.
    """
    most = min(IVTP_LAYERS, size.num_layers - 1) if layers is None else layers
    if not 1 <= most < size.num_layers:
        asked = "" if layers is None else f"{layers} grouped layers of "
        raise PatchsieveError(
            "ivtp's groups do not fit the decoder",
            found=f"{asked}{size.num_layers} layers",
            expected="a decoder of 2 layers or more, of which the last is in no group",
            do="choose another --method"
            if layers is None
            else f"lower --decoder-layers to {size.num_layers - 1} or less",
        )
    return range(min(group, most), most + 1, min(group, most))


def _ivtp_counts(
    num_patches: int, num_keep: int, groups: int
) -> tuple[dict[str, object], list[int]]:
    """What says how many tokens leave the tower, and those left by each group of the decoder."""
    if not 1 <= num_keep <= num_patches:
        raise PatchsieveError(
            "ivtp cannot keep this many tokens",
            found=num_keep,
            expected=f"1 to {num_patches}, the patches of an image",
            do="change --num-keep",
        )
    in_tower = max(num_keep, round(num_patches * (num_keep / num_patches) ** IVTP_TOWER_SHARE))
    return {"keep": in_tower}, geometric(in_tower, num_keep, groups)


def _ivtp_given(counts: Sequence[int], groups: int) -> tuple[dict[str, object], list[int]]:
    """The same from given counts, of which the last `groups` are the decoder's."""
    if len(counts) <= groups:
        raise PatchsieveError(
            "IVTP's groups and their counts do not pair",
            found=f"{len(counts)} counts",
            expected=f"one for each group of the tower, and {groups} of the decoder",
            do="give more counts to --survivors",
        )
    return {"counts": list(counts[:-groups])}, list(counts[-groups:])
