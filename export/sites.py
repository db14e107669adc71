"""What the decoder sites of a plan read, and how many tokens they leave room for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.plan import Plan
from patchsieve.pruning.decoder.tome import DecoderToMe
from patchsieve.pruning.heads import load_heads
from patchsieve.pruning.schedules import num_to_keep

if TYPE_CHECKING:
    from patchsieve.pruning.decoder.site import Method


def layers_read(method: Method, layer: int) -> list[int]:
    """Layers whose queries the decision of a site takes, the one before the site first.

    Raises:
        PatchsieveError: The method looks back further than the decoder reaches.
    """
    words = (word.partition(".") for word in method.reads)
    back = sorted(int(k or 0) for what, _, k in words if what == "query")
    if back and back[-1] >= layer:
        raise PatchsieveError(
            f"{method.name} at layer {layer} looks back on layers that are not there",
            found=f"a group of {back[-1] + 1} layers",
            expected=f"at most {layer}",
            do="lower group, or prune at a later layer",
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
                do="lower group, or move the sites apart",
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
    return max((site.layer for site, method in pairs if "side_row" in method.reads), default=0)


def resolve_budgets(plan: Plan, methods: list[Method], num_visual: int) -> Plan:
    """Give each site the number of tokens per image that the layers behind it reserve.

    `num_visual` tokens of an image enter the decoder, of which a site's ratio keeps its fraction.
    A given budget holds; it may not exceed what enters the site. Otherwise a fixed ratio or number
    needs what it keeps, heads propose theirs, and a method whose count adapts without a proposal
    reserves what the site before it does.
    """
    sites, most = [], num_visual
    for site, method in zip(plan.sites, methods, strict=True):
        budget = site.budget
        if budget is None and hasattr(method, "keep_ratio"):
            budget = num_to_keep(method.keep_ratio, num_visual)
        if budget is None and hasattr(method, "num_keep"):
            budget = method.num_keep
        if budget is None and "heads" in site.params:
            config, _ = load_heads(Path(site.params["heads"]))
            proposed = dict(zip(config.sites, config.budgets, strict=False))
            budget = proposed.get(site.layer)
        if site.budget is not None and site.budget > most:
            raise PatchsieveError(
                f"the budget of the site at layer {site.layer} is larger than what enters it",
                found=site.budget,
                expected=f"at most {most} visual tokens per image",
                do="lower --budget, or remove it",
            )
        left = min(most, budget or most)
        if isinstance(method, DecoderToMe) and left < method.fewest_left(most):
            raise PatchsieveError(
                f"tome merges at most every other token, not so many at layer {site.layer}",
                found=f"{most} to {left}",
                expected=f"at least {method.fewest_left(most)} left",
                do="keep more, or merge at several sites, whose counts a plan file gives (--plan)",
            )
        most = left
        sites.append(replace(site, budget=most))
    return replace(plan, sites=tuple(sites))
