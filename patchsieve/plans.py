"""Plans from a few words, as `patchsieve export` and `patchsieve cost` take them, from Python.

    from patchsieve import plans

    half = plans.build("fastv", sites=[2], keep_ratio=0.5)
    both = plans.build("atp", heads="heads", encoder="gtp", encoder_keep=120)
    ivtp = plans.build("ivtp", size=plans.Size(num_patches=576, num_layers=32), num_keep=64)

docs/methods.md lists the methods and their options. No torch is imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.plan import NO_PRUNING, MethodPlan, Plan, PseudoCls, SitePlan
from patchsieve.pruning import catalogue
from patchsieve.pruning.entry import DECODER, ENCODER, PROJECTOR, RECIPE, Entry
from patchsieve.pruning.heads import load_config
from patchsieve.pruning.recipes import Size

__all__ = ["Size", "build", "free_name", "name_of", "needs_size"]

T = TypeVar("T")
KEYWORDS = frozenset(entry.keyword(o) for entry in catalogue.ENTRIES for o in entry.options)


def build(
    method: str | None = None,
    sites: Sequence[int] | None = None,
    *,
    budget: int | Sequence[int] | None = None,
    encoder: str | None = None,
    projector: str | None = None,
    positions: str | None = None,
    size: Size | None = None,
    **options: Any,
) -> Plan:
    """Make a plan.

    Args:
        method: What prunes in the decoder, or a whole recipe such as "ivtp"; None or "none" for
            nothing.
        sites: Decoder layers at whose input it prunes; by default those of its heads or its paper.
        budget: Visual tokens of an image to reserve after the sites, one number or one per site;
            by default what the method keeps.
        encoder: What prunes inside the vision tower.
        projector: What prunes between the tower and the decoder.
        positions: How the tokens that enter the decoder are numbered (see `Plan.position_rule`).
        size: The model (see `needs_size`).
        **options: Those of the methods by their names on the command line, with underscores:
            keep_ratio, num_keep, encoder_keep, projector_score. None leaves one out.

    Raises:
        PatchsieveError: A method or an option is unknown, missing or without effect.
    """
    given = _known(options)
    if method is not None and catalogue.find(RECIPE, method):
        others = {"sites": sites, "budget": budget, "encoder": encoder, "projector": projector}
        return _recipe(method, size, given, others | {"positions": positions})
    decoder = {name: given.pop(name) for name in list(given) if not _is_before_decoder(name)}
    entry = _chosen(DECODER, method, decoder | {"sites": sites, "budget": budget})
    plan = Plan(
        () if entry is None else _sites(entry, sites, budget, decoder, size),
        _method(ENCODER, encoder, given),
        _method(PROJECTOR, projector, given),
        positions,
    )
    if entry is not None and any(entry.is_judged_by_cls(site.params) for site in plan.sites):
        plan = replace(plan, pseudo_cls=_pseudo_cls(entry, decoder))
    if positions == "contiguous" and not plan.prunes_before:
        raise PatchsieveError(
            "--positions contiguous has no effect",
            expected="--encoder or --projector beside it",
            do="remove --positions",
        )
    return plan


def needs_size(method: str | None, sites: Sequence[int] | None) -> bool:
    """Whether a plan is fitted to the model: a recipe's, or one with the sites of a paper."""
    if method is None or catalogue.find(RECIPE, method):
        return method is not None
    found = catalogue.find(DECODER, method)
    return sites is None and found is not None and found.published is not None


def _known(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are given, each of which some method has."""
    given = {name: value for name, value in options.items() if value is not None}
    if unknown := [name for name in given if name not in KEYWORDS]:
        raise PatchsieveError(
            "no method has such options",
            found=", ".join(unknown),
            expected=", ".join(sorted(KEYWORDS)),
            do="correct their names (docs/methods.md lists them)",
        )
    return given


def _recipe(
    name: str, size: Size | None, given: Mapping[str, Any], others: Mapping[str, Any]
) -> Plan:
    """The plan of a recipe, which chooses what `others` would say."""
    entry = catalogue.entry(RECIPE, name)
    own = {entry.keyword(option): option for option in entry.options}
    wrong = [k for k, v in {**others, **given}.items() if v is not None and k not in own]
    if wrong:
        raise PatchsieveError(
            f"{name} chooses its sites and counts by the model",
            found=", ".join(map(_flag, wrong)),
            expected=", ".join(["--method", *(_flag(keyword) for keyword in own)]),
            do="remove them, or write the plan into a file for --plan",
        )
    if size is None:
        raise PatchsieveError(
            f"{name} is fitted to a model, and none is given",
            expected="the model's size",
            do="give size=Size(num_patches, num_layers)",
        )
    params = _params(entry, given)
    entry.check(params)
    made: Plan = entry.load()(size, pseudo_cls=_pseudo_cls(entry, given), **params)
    return made


def _sites(
    entry: Entry,
    sites: Sequence[int] | None,
    budget: int | Sequence[int] | None,
    given: Mapping[str, Any],
    size: Size | None,
) -> tuple[SitePlan, ...]:
    """What prunes in the decoder."""
    params, published = _params(entry, given), entry.published
    if sites is None and "heads" in params:
        sites = load_config(Path(params["heads"])).sites
    if sites is None and published is not None and size is not None:
        sites = published.fitted(size.num_layers)
    if sites is None:
        raise PatchsieveError(
            f"--method {entry.name} needs --sites",
            expected="layers at whose input to prune",
            do="add --sites, such as --sites 2",
        )
    if published is not None and len(sites) == len(published.sites):
        params = {**published.values, **params}
    own = [option.name for option in entry.params if option.is_per_site and option.name in params]
    each: dict[str, Iterable[Any]] = {
        name: _per_site(_flag(name), params.pop(name), len(sites)) for name in own
    }
    budgets = _per_site("--budget", budget, len(sites))
    varied = [dict(zip(each, values, strict=True)) for values in zip(*each.values(), strict=True)]
    rows = zip(sites, varied or [{}] * len(sites), budgets, strict=True)
    return tuple(SitePlan(layer, entry.name, params | more, room) for layer, more, room in rows)


def _method(place: str, name: str | None, given: Mapping[str, Any]) -> MethodPlan | None:
    """What prunes inside the tower, or after it."""
    own = {k: v for k, v in given.items() if k.startswith(f"{place}_")}
    entry = _chosen(place, name, own)
    return None if entry is None else MethodPlan(entry.name, _params(entry, own))


def _chosen(place: str, name: str | None, given: Mapping[str, Any]) -> Entry | None:
    """The method of a place, whose options `given` must be; None without.

    Raises:
        PatchsieveError: The method is unknown or lacks an option, or options come without one.
    """
    flag = "--method" if place == DECODER else f"--{place}"
    used = [keyword for keyword, value in given.items() if value is not None]
    if name in (None, NO_PRUNING):
        if used:
            raise PatchsieveError(
                "options of a pruning method, but no method",
                found=", ".join(map(_flag, used)),
                do=f"add {flag} {', '.join(catalogue.names(place))}",
            )
        return None
    entry = catalogue.entry(place, str(name))
    own = {entry.keyword(option) for option in entry.options} | {"sites", "budget"}
    if others := [keyword for keyword in used if keyword not in own]:
        having = [e.name for e in catalogue.ENTRIES if others[0] in map(e.keyword, e.options)]
        raise PatchsieveError(
            f"{entry.name} has no such options",
            found=", ".join(map(_flag, others)),
            expected=", ".join(sorted(_flag(keyword) for keyword in own)),
            do=f"remove them, or take {flag} {' or '.join(dict.fromkeys(having))}",
        )
    return entry


def _params(entry: Entry, given: Mapping[str, Any]) -> dict[str, Any]:
    """A method's parameters among the options, as JSON has them."""
    pairs = ((option, given.get(entry.keyword(option))) for option in entry.params)
    made = {option.name: value for option, value in pairs if value is not None}
    return {k: str(v) if isinstance(v, Path) else _list(v) for k, v in made.items()}


def _list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _pseudo_cls(entry: Entry, given: Mapping[str, Any]) -> PseudoCls:
    """The row by which a method judges: its own defaults, but for what is given."""
    own = [option for option in entry.options if option.is_of_plan]
    return PseudoCls(**{o.name: given.get(entry.keyword(o), o.default) for o in own})


def _per_site(flag: str, values: T | Sequence[T] | None, count: int) -> list[T | None]:
    """One value for each of `count` sites, of one value or as many."""
    if not isinstance(values, (list, tuple)):
        return [values] * count  # type: ignore[list-item]
    if len(values) not in (1, count):
        raise PatchsieveError(
            f"{flag} needs one value, or one per site",
            found=len(values),
            expected=count,
            do=f"correct {flag}",
        )
    return list(values) * (count if len(values) == 1 else 1)


def _is_before_decoder(keyword: str) -> bool:
    return keyword.startswith((f"{ENCODER}_", f"{PROJECTOR}_"))


def _flag(keyword: str) -> str:
    return "--" + keyword.replace("_", "-")


def name_of(plan: Plan) -> str:
    """A name that says what a plan does: gtp64-fastv-2-50, ivtp-64."""
    if plan.sites and all(catalogue.find(RECIPE, site.method) for site in plan.sites):
        last = plan.sites[-1]
        return f"{last.method}-{last.params.get('num_keep', '')}".rstrip("-")
    parts = [
        f"{method.method}{method.params.get('keep', '')}"
        for method in (plan.encoder, plan.projector)
        if method is not None
    ]
    if plan.sites:
        parts += dict.fromkeys(site.method for site in plan.sites)
        parts += [str(layer) for layer in plan.layers]
        ratios = [site.params.get("keep_ratio") for site in plan.sites]
        if len(set(map(repr, ratios))) == 1:
            ratios = ratios[:1]
        parts += [f"{ratio * 100:.0f}" for ratio in ratios if isinstance(ratio, (int, float))]
    return "-".join(parts)[:56] or NO_PRUNING


def free_name(plan: Plan, taken: Mapping[str, Plan]) -> str:
    """A name that no other plan of a bundle has; the same plan keeps its own.

    Args:
        plan: The plan.
        taken: The bundle's plans by name.
    """
    name = name_of(plan)
    candidates = (f"{name}{suffix}" for suffix in ("", *(f"-v{n}" for n in range(2, 1000))))
    return next(c for c in candidates if c not in taken or _is_same(plan, taken[c]))


def _is_same(plan: Plan, stored: Plan) -> bool:
    """Whether a plan is the stored one, whose budgets export may have worked out."""
    rule = plan.position_rule or stored.position_rule
    if replace(plan, sites=(), position_rule=rule) != replace(stored, sites=()):
        return False
    return len(plan.sites) == len(stored.sites) and all(
        (a.layer, a.method, a.params) == (b.layer, b.method, b.params)
        and a.budget in (None, b.budget)
        for a, b in zip(plan.sites, stored.sites, strict=True)
    )
