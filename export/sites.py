"""What the decoder sites of a plan read, and how many tokens they leave room for."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from patchsieve.contract import names, reads
from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.plan import Plan
from patchsieve.pruning.counts import left_by_sites

if TYPE_CHECKING:
    from patchsieve.pruning.decoder.site import Method


def layers_read(method: Method, layer: int) -> list[int]:
    """Layers whose queries or keys the decision of a site takes, the one before the site first.

    Raises:
        PatchsieveError: The method looks back further than the decoder reaches.
    """
    back = reads.depths(method.reads)
    if back and back[-1] >= layer:
        raise PatchsieveError(
            f"{method.name} at layer {layer} needs {back[-1] + 1} layers before it, but only "
            f"{layer} exist",
            do="lower group in the plan, or correct --sites",
        )
    return [layer - 1 - k for k in back]


def check_sites(plan: Plan, methods: list[Method]) -> None:
    """Refuse sites that read what the plan does not give them.

    Raises:
        PatchsieveError: A group of layers reaches over another site, or a side row is read that no
            pseudo_cls makes, or made and not read.
    """
    before = 0
    for site, method in zip(plan.sites, methods, strict=True):
        read = layers_read(method, site.layer)
        if read and read[-1] < before:
            raise PatchsieveError(
                f"the group of {site.method} at layer {site.layer} reaches over another site",
                found=f"layers {read[-1]} to {site.layer - 1}, with a site at {before}",
                expected=f"at most {site.layer - before} layers",
                do="lower group in the plan, or move the sites apart",
            )
        before = site.layer
    is_read = side_layer(plan, methods) > 0
    if is_read != (plan.pseudo_cls is not None):
        raise PatchsieveError(
            "the plan's sites and its pseudo_cls do not belong together",
            found="sites that judge by one, and none" if is_read else "one that no site reads",
            expected='"pseudo_cls": {"text": "clip"} beside sites of ivtp or topk',
            do="correct the plan",
        )


def side_layer(plan: Plan, methods: list[Method]) -> int:
    """The last site that reads side rows, 0 for none."""
    pairs = zip(plan.sites, methods, strict=True)
    return max((site.layer for site, method in pairs if names.SIDE_ROW in method.reads), default=0)


def resolve_budgets(plan: Plan, num_visual: int) -> Plan:
    """Give each site the number of tokens per image that the layers after it reserve.

    Args:
        plan: The plan.
        num_visual: Tokens of an image that enter the decoder.

    Raises:
        PatchsieveError: A budget is larger than what enters its site, or more would merge than can.
    """
    left = left_by_sites(plan.sites, num_visual)
    pairs = zip(plan.sites, left, strict=True)
    return replace(plan, sites=tuple(replace(site, budget=each.budget) for site, each in pairs))
