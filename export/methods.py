"""From a plan's words to pruning methods, and from methods to budgets."""

from __future__ import annotations

import hashlib
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchsieve.contract import names, reads
from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.plan import MethodPlan, Plan, SitePlan
from patchsieve.contract.writing import write_whole
from patchsieve.pruning.decoder.atp import ATP
from patchsieve.pruning.decoder.thresholds import ConstantThresholds, Thresholds
from patchsieve.pruning.decoder.tome import DecoderToMe
from patchsieve.pruning.heads import CONFIG, TENSORS, HeadsConfig, load_heads
from patchsieve.pruning.projector.pooling import Pooling
from patchsieve.pruning.schedules import SCHEDULE_OPTIONS, TowerSchedule, num_to_keep
from patchsieve.pruning.table import ENCODERS, METHODS, PROJECTORS

if TYPE_CHECKING:
    from patchsieve.pruning.decoder.site import Method
    from patchsieve.pruning.encoder.walk import TowerMethod

HEADS = "heads"  # folder of a bundle


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
        return _build_atp(site, folder)
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


def layers_read(method: Method, layer: int) -> list[int]:
    """Layers whose queries or keys the decision of a site takes, the one before the site first.

    Raises:
        PatchsieveError: The method looks back further than the decoder reaches.
    """
    back = reads.depths(method.reads)
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
    return max((site.layer for site, method in pairs if names.SIDE_ROW in method.reads), default=0)


def _default(name: str) -> object:
    """What ATP takes for an option that is not given."""
    defaults = {f.name: f.default for f in fields(ATP)}
    return defaults.get(name)


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


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


def store_heads(bundle: Path, plan: Plan, written: list[Path]) -> Plan:
    """Copy a plan's heads into a bundle, under a name made from their content.

    Args:
        bundle: The directory.
        plan: Its heads may lie anywhere.
        written: Takes each file before it is written.

    Returns:
        The plan, the paths of its heads relative to the bundle.
    """
    sites = []
    for site in plan.sites:
        if "heads" in site.params:
            parts = [Path(site.params["heads"]) / name for name in (CONFIG, TENSORS)]
            contents = [part.read_bytes() for part in parts]
            folder = f"{HEADS}/{hashlib.sha256(b''.join(contents)).hexdigest()[:12]}"
            (bundle / folder).mkdir(parents=True, exist_ok=True)
            for part, content in zip(parts, contents, strict=True):
                written.append(bundle / folder / part.name)
                write_whole(written[-1], content)
            site = replace(site, params=site.params | {"heads": folder})
        sites.append(site)
    return replace(plan, sites=tuple(sites))


def _build_atp(site: SitePlan, folder: Path) -> ATP:
    params = dict(site.params)
    heads, constants = params.pop("heads", None), ("theta_r", "theta_s")
    given = {name: params.pop(name) for name in constants if name in params}
    if (heads is None) == (not given) or (given and len(given) < 2):
        raise PatchsieveError(
            f"atp at layer {site.layer} needs its thresholds, one way or the other",
            found=", ".join([*(["heads"] if heads else []), *given]) or "none",
            expected="heads (a directory that training made), or both theta_r and theta_s",
            do="train heads for this checkpoint and pass --heads DIR (the format is described in "
            "pruning/heads.py), or fix thresholds by --theta-r 0.5 --theta-s 0.9",
        )
    if given and "parts" in params:
        raise PatchsieveError(
            f"the parameter parts of atp at layer {site.layer} belongs to learned heads",
            found=params["parts"],
            do="remove it: constants of 2 switch a part off, theta_s for redundant pruning alone, "
            "theta_r for spatial pruning alone",
        )
    try:
        if given:
            return ATP(thresholds=ConstantThresholds(**given), **params)
        config, thresholds = _learned(folder / heads, site.layer)
        trained = {k: config.scores.get(k, _default(k)) for k in params}
        other = {k: v for k, v in params.items() if _plain(v) != _plain(trained[k])}
        if other:
            raise PatchsieveError(
                f"the heads for layer {site.layer} were trained with other options",
                found=other,
                expected={k: trained[k] for k in other},
                do="remove these options: heads bring their own",
            )
        return ATP(thresholds=thresholds, **config.scores)
    except TypeError as error:
        raise PatchsieveError(
            f"the parameters of atp at layer {site.layer} do not fit", found=error
        ) from error


def _learned(directory: Path, layer: int) -> tuple[HeadsConfig, Thresholds]:
    config, tensors = load_heads(directory)
    if layer not in config.sites:
        raise PatchsieveError(
            f"the heads in {directory} were not learned for layer {layer}",
            expected=f"one of {list(config.sites)}",
            do="remove --sites: the heads' own are taken",
        )
    module = Thresholds(config.hidden, config.grid, config.activation)
    prefix = f"layer.{layer}."
    state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise PatchsieveError(
            f"the tensors in {directory} do not fit its config", found=str(error)
        ) from error
    return config, module.eval().requires_grad_(False)
