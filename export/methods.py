"""From a plan's words to pruning methods."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchsieve.contract.plan import MethodPlan, SitePlan
from patchsieve.export.heads import build_atp
from patchsieve.pruning import catalogue
from patchsieve.pruning.counts import once_after, schedule_of
from patchsieve.pruning.entry import DECODER, ENCODER, PROJECTOR
from patchsieve.pruning.projector.pooling import Pooling
from patchsieve.pruning.schedules import SCHEDULE_OPTIONS

if TYPE_CHECKING:
    from patchsieve.pruning.decoder.site import Method
    from patchsieve.pruning.encoder.walk import TowerMethod


def build_method(site: SitePlan, folder: Path = Path()) -> Method:
    """Build the method of one site.

    Args:
        site: What the plan says of it.
        folder: What the path of its heads is relative to: a bundle, for a bundle's plan.

    Raises:
        PatchsieveError: The method or one of its parameters is unknown, or heads are missing.
    """
    where = f" at layer {site.layer}"
    found = catalogue.entry(DECODER, site.method, where)
    found.check(site.params, where)
    if found.has("heads"):
        return build_atp(site, folder)
    return found.load()(**site.params)  # type: ignore[no-any-return]


def build_encoder(plan: MethodPlan | None) -> TowerMethod | None:
    """Build the method inside the vision tower.

    Raises:
        PatchsieveError: The method or one of its parameters is unknown.
    """
    if plan is None:
        return None
    found = catalogue.entry(ENCODER, plan.method)
    found.check(plan.params)
    return found.load()(schedule=schedule_of(plan), **_own(plan))  # type: ignore[no-any-return]


def build_projector(plan: MethodPlan | None, num_layers: int) -> TowerMethod | Pooling | None:
    """Build the method between a tower that runs `num_layers` layers and the decoder.

    Raises:
        PatchsieveError: The method or one of its parameters is unknown.
    """
    if plan is None:
        return None
    found = catalogue.entry(PROJECTOR, plan.method)
    found.check(plan.params)
    if found.is_grid:
        return found.load()(**plan.params)  # type: ignore[no-any-return]
    schedule = once_after(plan, num_layers)
    return found.load()(schedule=schedule, **_own(plan))  # type: ignore[no-any-return]


def _own(plan: MethodPlan) -> dict[str, Any]:
    """The parameters of a method that its schedule does not hold."""
    return {name: value for name, value in plan.params.items() if name not in SCHEDULE_OPTIONS}
