"""How many tokens a plan leaves at each of its places: plain numbers, without torch.

Export reserves slots by these numbers and the cost model counts by them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.plan import MethodPlan, Plan, SitePlan
from patchsieve.pruning import catalogue
from patchsieve.pruning.entry import ADAPTS, DECODER, ENCODER, NUMBER, PROJECTOR, RATIO, Entry
from patchsieve.pruning.heads import load_config
from patchsieve.pruning.schedules import (
    SCHEDULE_OPTIONS,
    TowerSchedule,
    check_merging,
    num_to_keep,
    pooled_side,
)


class Left(NamedTuple):
    """What a decoder site leaves of an image.

    Attributes:
        count: Most tokens that go on.
        budget: Tokens that the layers from here on reserve slots for; at least `count`.
        is_exact: Every image keeps `count`; else the image decides, and that is the most.
        is_given: The plan says how many; else it is simply all that enter.
    """

    count: int
    budget: int
    is_exact: bool
    is_given: bool


class BeforeDecoder(NamedTuple):
    """What a plan leaves of an image's patches before the decoder.

    Attributes:
        in_tower: Patches left by each pruning tower layer; empty where none prunes.
        count: Most patches, or tokens made of them, that enter the decoder.
        is_exact: Every image has so many; else the image decides, and that is the most.
    """

    in_tower: dict[int, int]
    count: int
    is_exact: bool


def left_by_sites(sites: Sequence[SitePlan], num_visual: int) -> list[Left]:
    """Tokens that each site leaves of the `num_visual` that enter the decoder.

    A given budget holds; it may not exceed what enters the site. Otherwise a fixed ratio or number
    needs what it keeps, heads propose theirs, and a method whose count adapts without a proposal
    reserves what the site before it does.

    Raises:
        PatchsieveError: A method is unknown, a budget is too large, or more would merge than can.
    """
    left, count, most = [], num_visual, num_visual
    for site in sites:
        if site.budget is not None and site.budget > most:
            raise PatchsieveError(
                f"the budget of the site at layer {site.layer} is larger than what enters it",
                found=site.budget,
                expected=f"at most {most} visual tokens per image",
                do="lower --budget, or remove it",
            )
        kept = _kept(site, num_visual)
        budget = site.budget or kept or _proposed(site)
        before, count = count, min(n for n in (count, kept, budget) if n is not None)
        found = catalogue.entry(DECODER, site.method)
        if found.merges:
            check_merging(site.method, f"decoder layer {site.layer}", before, count)
        most = min(most, budget or most)
        left.append(Left(count, most, found.leaves != ADAPTS, budget is not None))
    return left


def before_decoder(plan: Plan, num_patches: int, num_layers: int) -> BeforeDecoder:
    """Patches that a plan leaves inside the tower and behind it.

    Args:
        plan: The plan.
        num_patches: Patches of an image, N.
        num_layers: Tower layers that run.

    Raises:
        PatchsieveError: A method is unknown, its options do not fit the tower, or the second of two
            methods would drop nothing.
    """
    in_tower: dict[int, int] = {}
    left, is_exact = num_patches, True
    chain: list[tuple[Entry, int]] = []
    if plan.encoder is not None:
        found = catalogue.entry(ENCODER, plan.encoder.method)
        in_tower = schedule_of(plan.encoder).places(found.name, num_patches, num_layers)
        left, is_exact = min(in_tower.values()), found.leaves != ADAPTS
        chain.append((found, len(in_tower)))
    if plan.projector is not None:
        found = catalogue.entry(PROJECTOR, plan.projector.method)
        is_exact = is_exact and found.leaves != ADAPTS
        chain.append((found, 1))
        left = _after_tower(plan.projector, plan.encoder, left, num_patches, num_layers)
    check_adapting(chain)
    return BeforeDecoder(in_tower, left, is_exact)


def check_adapting(chain: Sequence[tuple[Entry, int]]) -> None:
    """Refuse methods before the decoder that would prune padding.

    Where a method's count adapts to the image, rows up to its bound leave it, the last of which are
    padding. So it prunes once, and nothing prunes after it in the vision graph.

    Args:
        chain: The methods in their order, each with how many layers prune by it.
    """
    for place, (found, num_layers) in enumerate(chain):
        if found.leaves != ADAPTS:
            continue
        if place + 1 < len(chain):
            raise PatchsieveError(
                f"{chain[place + 1][0].name} cannot prune after {found.name}, whose number of "
                "tokens depends on the image",
                expected=f"{found.name} as the last method before the decoder",
                do="remove --encoder or --projector",
            )
        if num_layers > 1:
            raise PatchsieveError(
                f"{found.name} cannot prune at several layers, because its number of tokens "
                "depends on the image",
                found=f"{num_layers} layers",
                expected="one",
                do="give --encoder-layers one layer",
            )


def schedule_of(method: MethodPlan) -> TowerSchedule:
    """The schedule of a method inside the tower."""
    given = {name: method.params[name] for name in SCHEDULE_OPTIONS if name in method.params}
    return TowerSchedule(**given)


def once_behind(method: MethodPlan, num_layers: int) -> TowerSchedule:
    """The schedule of a method that acts once, behind the last of the tower's layers."""
    return TowerSchedule(keep=method.params.get("keep"), layers=(num_layers - 1,))


def _kept(site: SitePlan, num_visual: int) -> int | None:
    """Tokens that a site's rule keeps; None where the image decides."""
    found = catalogue.entry(DECODER, site.method, f" at layer {site.layer}")
    found.check(site.params, f" at layer {site.layer}")
    if found.leaves == RATIO:
        return num_to_keep(found.value("keep_ratio", site.params), num_visual)
    return int(found.value("num_keep", site.params)) if found.leaves == NUMBER else None


def _proposed(site: SitePlan) -> int | None:
    """The budget that learned heads propose for a site; None without."""
    if "heads" not in site.params:
        return None
    heads = load_config(Path(site.params["heads"]))
    return dict(zip(heads.sites, heads.budgets, strict=False)).get(site.layer)


def _after_tower(
    method: MethodPlan, encoder: MethodPlan | None, left: int, num_patches: int, num_layers: int
) -> int:
    """Patches that a method leaves of the `left` that come out of the tower."""
    if catalogue.entry(PROJECTOR, method.method).is_grid:
        if encoder is not None:
            raise PatchsieveError(
                f"{method.method} needs every patch of the grid",
                found=f"{encoder.method} in the tower before it",
                do="remove --encoder or --projector",
            )
        side = math.isqrt(num_patches)
        return pooled_side(method.params.get("keep"), (side, side)) ** 2
    count = once_behind(method, num_layers).places(method.method, num_patches, num_layers)
    last = count[num_layers - 1]
    adapts = catalogue.entry(PROJECTOR, method.method).leaves == ADAPTS
    if encoder is not None and (last > left or (last == left and not adapts)):
        raise PatchsieveError(
            f"{method.method} after {encoder.method} would drop nothing",
            found=f"{last} to keep of {left}",
            expected=f"fewer than {left}",
            do="lower --projector-keep",
        )
    return last
