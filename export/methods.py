"""From a plan's words to pruning methods."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.plan import MethodPlan, SitePlan
from patchsieve.export.heads import build_atp
from patchsieve.pruning.decoder.atp import ATP
from patchsieve.pruning.projector.pooling import Pooling
from patchsieve.pruning.schedules import SCHEDULE_OPTIONS, TowerSchedule
from patchsieve.pruning.table import ENCODERS, METHODS, PROJECTORS

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
    if site.method not in METHODS:
        raise PatchsieveError(
            f"unknown method at layer {site.layer}",
            found=site.method,
            expected=", ".join(METHODS) + ' (no pruning is a plan without sites: "none")',
        )
    _check_types(site)
    if site.method == ATP.name:
        return build_atp(site, folder)
    try:
        return METHODS[site.method](**site.params)
    except TypeError as error:
        raise PatchsieveError(
            f"the parameters of {site.method} at layer {site.layer} do not fit", found=error
        ) from error


def build_encoder(plan: MethodPlan | None) -> TowerMethod | None:
    """Build the method inside the vision tower.

    Raises:
        PatchsieveError: The method or one of its parameters is unknown.
    """
    if plan is None:
        return None
    kind = _known(plan, ENCODERS, "inside the vision tower")
    given = dict(plan.params)
    options = {name: given.pop(name) for name in SCHEDULE_OPTIONS if name in given}
    return _made(kind, plan, given | {"schedule": TowerSchedule(**options)})


def build_projector(plan: MethodPlan | None, num_layers: int) -> TowerMethod | Pooling | None:
    """Build the method between a tower that runs `num_layers` layers and the decoder.

    Raises:
        PatchsieveError: The method or one of its parameters is unknown.
    """
    if plan is None:
        return None
    kind = _known(plan, PROJECTORS, "between tower and decoder")
    given = dict(plan.params)
    if kind is not Pooling:  # once, behind the last layer
        schedule = TowerSchedule(keep=given.pop("keep", None), layers=(num_layers - 1,))
        given["schedule"] = schedule
    return _made(kind, plan, given)


def _known(plan: MethodPlan, table: dict[str, type], where: str) -> type:
    if plan.method not in table:
        raise PatchsieveError(
            f"unknown method {where}", found=plan.method[:80], expected=", ".join(table)
        )
    return table[plan.method]


def _made(kind: type, plan: MethodPlan, options: dict[str, Any]) -> Any:
    flags = {f.name for f in fields(kind) if f.type == "bool"}
    wrong = [name for name in flags & set(options) if not isinstance(options[name], bool)]
    if "schedule" in plan.params or wrong:
        name = "schedule" if "schedule" in plan.params else wrong[0]
        raise PatchsieveError(
            f"the parameter {name} of {plan.method} cannot be used",
            found=repr(plan.params[name])[:80],
            expected="true or false" if wrong else ", ".join(SCHEDULE_OPTIONS),
        )
    try:
        return kind(**options)
    except TypeError as error:
        raise PatchsieveError(f"the parameters of {plan.method} do not fit", found=error) from error


_NUMBER = (int, float)
_TYPES: dict[str, tuple[type, ...]] = {
    "keep_ratio": _NUMBER,
    "num_keep": (int,),
    "group": (int,),
    "fusion": (str,),
    "block": (str,),
    "identity_first": (bool,),
    "row": (str,),
    "rows": (str,),
    "heads": (str,),
    "theta_r": _NUMBER,
    "theta_s": _NUMBER,
    "normalisation": (str,),
    "modality": (str,),
    "parts": (str,),
    "causal": (bool,),
    "granularities": (list, tuple),
    "spatial_lambda": _NUMBER,
}


def _check_types(site: SitePlan) -> None:
    """Refuse JSON of another type, which a method would take for what it is not."""
    for name, value in site.params.items():
        kinds = _TYPES.get(name, (object,))
        fits = isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds)
        if name == "granularities" and fits:
            fits = all(type(stride) is int for stride in value)
        if not fits and name in _TYPES:
            raise PatchsieveError(
                f"the parameter {name} of {site.method} at layer {site.layer} has the wrong type",
                found=repr(value),
                expected="a list of whole numbers"
                if name == "granularities"
                else " or ".join(kind.__name__ for kind in kinds),
            )
