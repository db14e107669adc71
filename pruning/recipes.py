"""Whole published methods as plans, fitted to the size of a model."""

from __future__ import annotations

from dataclasses import dataclass

from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.plan import MethodPlan, Plan, PseudoCls, SitePlan
from patchsieve.pruning.schedules import IVTP_TOWER_SHARE, geometric

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
) -> Plan:
    """IVTP: groups of layers in the tower by the class token, then in the decoder by a pseudo-CLS.

    The paper leaves open: the counts (see `patchsieve.pruning.schedules`). The tower takes 576
    tokens to 120, four sites in the decoder take them to 103, 88, 75 and 64.

    A decoder of 13 layers or more has sites at 3, 6, 9 and 12. A shorter one has as many groups as
    end before its last layer: 12 layers have sites at 3, 6 and 9. A group longer than that is one
    group of all.

    Args:
        size: The model.
        num_keep: Tokens of an image behind the last site.
        group: Layers of a group, in tower and decoder; 1 is layer-wise.
        fusion: How a group's attention is joined (see `patchsieve.pruning.decoder.ivtp.IVTP`).
        block: Rows of its maps in the decoder.
        pseudo_cls: Which words judge; the paper's by default.
        layers: First layers of the decoder that are grouped; by default 12, or all but the last of
            a decoder that has no more.

    Raises:
        PatchsieveError: The model has fewer patches than are to be kept, or too few layers.
    """
    most = min(IVTP_LAYERS, size.num_layers - 1) if layers is None else layers
    if not 1 <= most < size.num_layers:
        raise PatchsieveError(
            "ivtp's groups do not fit the decoder",
            found=f"{layers} grouped layers of {size.num_layers}"
            if layers is not None
            else f"{size.num_layers} layers",
            expected="a decoder of 2 layers or more, of which the last is in no group",
        )
    if not 1 <= num_keep <= size.num_patches:
        raise PatchsieveError(
            "ivtp cannot keep this many tokens",
            found=num_keep,
            expected=f"1 to {size.num_patches}, the patches of an image",
            do="change --num-keep",
        )
    in_tower = max(
        num_keep, round(size.num_patches * (num_keep / size.num_patches) ** IVTP_TOWER_SHARE)
    )
    own_group = min(group, most)
    sites = range(own_group, most + 1, own_group)
    params = {"group": own_group, "fusion": fusion, "block": block}
    counts = geometric(in_tower, num_keep, len(sites))
    return Plan(
        tuple(
            SitePlan(layer, "ivtp", {"num_keep": count, **params})
            for layer, count in zip(sites, counts, strict=True)
        ),
        encoder=MethodPlan("gtp", {"keep": in_tower, "group_layers": group, "fusion": fusion}),
        pseudo_cls=PseudoCls() if pseudo_cls is None else pseudo_cls,
    )
