"""How many tokens a plan leaves at each of its places: plain numbers, without torch.

Export reserves slots by these numbers and the cost model counts by them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Left:
    """What a decoder site leaves of an image.

    Attributes:
        count: Most tokens that stay.
        budget: Tokens that the layers from here on reserve slots for; at least `count`.
        is_exact: Every image keeps `count`; else the image decides, and that is the most.
        is_given: The plan says how many; else it is simply all that enter.
    """

    count: int
    budget: int
    is_exact: bool
    is_given: bool


@dataclass(frozen=True)
class BeforeDecoder:
    """What a plan leaves of an image's patches before the decoder.

    Attributes:
        in_tower: Patches left by each pruning tower layer; empty where none prunes.
        count: Most patches, or tokens made of them, that enter the decoder.
        is_exact: Every image has so many; else the image decides, and that is the most.
    """

    in_tower: Mapping[int, int]
    count: int
    is_exact: bool


class Pruned(NamedTuple):
    """A method before the decoder.

    Attributes:
        entry: What the catalogue says of it.
        places: Patches, or tokens made of them, left at each tower layer at which it prunes.
    """

    entry: Entry
    places: Mapping[int, int]


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
    """Patches that a plan leaves inside the tower and after it.

    Args:
        plan: The plan.
        num_patches: Patches of an image, N.
        num_layers: Tower layers that run.

    Raises:
        PatchsieveError: A method is unknown, its options do not fit the tower, or the second of two
            methods would remove no tokens.
    """
    chain: list[Pruned] = []
    if plan.encoder is not None:
        found = catalogue.entry(ENCODER, plan.encoder.method)
        found.check(plan.encoder.params)
        places = schedule_of(plan.encoder).places(found.name, num_patches, num_layers)
        chain.append(Pruned(found, places))
    in_tower = chain[0].places if chain else {}
    if plan.projector is not None:
        found = catalogue.entry(PROJECTOR, plan.projector.method)
        found.check(plan.projector.params)
        if found.is_grid:
            side = math.isqrt(num_patches)
            cells = pooled_side(plan.projector.params.get("keep"), (side, side))
            places = {num_layers - 1: cells**2}
        else:
            schedule = once_after(plan.projector, num_layers)
            places = schedule.places(found.name, num_patches, num_layers)
        chain.append(Pruned(found, places))
    is_exact = not any(each.entry.leaves == ADAPTS for each in chain)
    return BeforeDecoder(in_tower, left_by_chain(chain, num_patches), is_exact)


def left_by_chain(chain: Sequence[Pruned], num_patches: int) -> int:
    """Patches that methods before the decoder leave, one after the other, at most.

    Raises:
        PatchsieveError: One of them cannot follow the one before it, or would remove no tokens.
    """
    left = num_patches
    for place, (found, places) in enumerate(chain):
        last = min(places.values())
        _check_adapting(found, places, chain[place + 1 :])
        if place and found.is_grid:
            raise PatchsieveError(
                f"{found.name} needs every patch of the grid",
                found=f"{chain[0].entry.name} in the tower before it",
                do="remove --encoder or --projector",
            )
        is_idle = last == left and place and found.leaves != ADAPTS
        if last > left or is_idle:
            raise PatchsieveError(
                f"{found.name} after {chain[0].entry.name} would remove no tokens",
                found=f"{last} to keep of {left}",
                expected=f"fewer than {left}",
                do=f"lower --{found.place}-keep",
            )
        fewest = chain[0].entry.tower.fewest
        if last < fewest:
            raise PatchsieveError(
                f"{found.name} after {chain[0].entry.name} would leave too few tokens",
                found=last,
                expected=f"at least {fewest}",
                do=f"raise --{found.place}-keep",
            )
        left = last
    return left


def _check_adapting(found: Entry, places: Mapping[int, int], later: Sequence[Pruned]) -> None:
    """Refuse methods before the decoder that would prune padding.

    Where a method's count adapts to the image, rows up to its bound leave it, the last of which are
    padding. So it prunes once, and nothing prunes after it in the vision graph.
    """
    if found.leaves != ADAPTS:
        return
    if later:
        raise PatchsieveError(
            f"{later[0].entry.name} cannot prune after {found.name}, whose number of tokens "
            "depends on the image",
            expected=f"{found.name} as the last method before the decoder",
            do="remove --encoder or --projector",
        )
    if len(places) > 1:
        raise PatchsieveError(
            f"{found.name} cannot prune at several layers, because its number of tokens depends "
            "on the image",
            found=f"{len(places)} layers",
            expected="one",
            do="give --encoder-layers one layer",
        )


def schedule_of(method: MethodPlan) -> TowerSchedule:
    """The schedule of a method inside the tower."""
    given = {name: method.params[name] for name in SCHEDULE_OPTIONS if name in method.params}
    return TowerSchedule(**given)


def once_after(method: MethodPlan, num_layers: int) -> TowerSchedule:
    """The schedule of a method that acts once, after the last of the tower's layers."""
    return TowerSchedule(keep=method.params.get("keep"), layers=(num_layers - 1,))


def _kept(site: SitePlan, num_visual: int) -> int | None:
    """Tokens that a site's rule keeps; None if the image decides."""
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
