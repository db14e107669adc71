"""A pruning plan: what drops visual tokens, where, and how many places are reserved for survivors.

A plan is a small JSON object:

    {"position_rule": "original",
     "encoder": {"method": "gtp", "params": {"keep": 120}}, "projector": null,
     "sites": [{"layer": 2, "method": "fastv", "params": {"keep_ratio": 0.5}, "budget": 60}],
     "pseudo_cls": null}
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from patchsieve.contract.errors import PatchsieveError

GRID2D = "grid2d"
TRAINED_RULES = ("original", GRID2D)  # that a language model can have been trained with
POSITION_RULES = ("original", "contiguous", GRID2D)
PLACES = ("encoder", "projector")  # inside the vision tower, and between it and the decoder
TEXTS = ("clip", "similarity", "all", "none")
CLS_SOURCES = ("last", "penultimate")
NO_PRUNING = "none"  # the plan that every bundle holds


@dataclass(frozen=True)
class MethodPlan:
    """What prunes inside the vision tower, or between it and the decoder.

    Attributes:
        method: Name in the table of such methods.
        params: The method's own parameters.
    """

    method: str
    params: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.method, str) or not isinstance(self.params, dict):
            raise PatchsieveError(
                "a method of a plan is not well formed",
                found=f"method {self.method!r}, params {self.params!r}"[:120],
                expected="a method's name and an object of its parameters",
                do="correct the plan",
            )

    @classmethod
    def from_dict(cls, data: Any, place: str) -> MethodPlan | None:
        """Read a method from its JSON object; null is none."""
        if data is None:
            return None
        if not isinstance(data, dict) or "method" not in data:
            raise PatchsieveError(
                f"a plan's {place} is neither null nor an object with a method",
                found=repr(data)[:80],
                do="correct the plan",
            )
        _refuse_unknown(place, data, {"method", "params"})
        return cls(**data)


@dataclass(frozen=True)
class SitePlan:
    """One place in the decoder where tokens are dropped.

    Attributes:
        layer: Tokens are dropped at the input of this decoder layer, counted from 0; at least 1.
        method: Name in the table of pruning methods.
        params: The method's own parameters.
        budget: Most visual tokens per image that the layers from here on reserve slots for;
            None until export has worked it out.
    """

    layer: int
    method: str
    params: dict[str, Any] = field(default_factory=dict)
    budget: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.layer, int) or isinstance(self.layer, bool) or self.layer < 1:
            raise PatchsieveError(
                "a pruning site is not the index of a decoder layer whose input is pruned",
                found=repr(self.layer)[:80],
                expected="a whole number from 1 to the number of layers less one",
                do="correct --sites",
            )
        if not isinstance(self.method, str) or not isinstance(self.params, dict):
            raise PatchsieveError(
                f"the site at layer {self.layer} is not well formed",
                found=f"method {self.method!r}, params {self.params!r}"[:120],
                expected="a method's name and an object of its parameters",
                do="correct the plan",
            )
        if self.budget is not None and (type(self.budget) is not int or self.budget < 1):
            raise PatchsieveError(
                f"the budget of the site at layer {self.layer} is not a number of tokens",
                found=repr(self.budget)[:80],
                expected="a whole number of at least 1",
                do="correct --budget",
            )


@dataclass(frozen=True)
class PseudoCls:
    """The row that stands for the question where decoder sites judge an image (IVTP, eqs. 5-8).

    Attributes:
        text: Which of the question's tokens it is the mean of. "clip": those that CLIP's text tower
            finds like the image (eqs. 5-7); "similarity": those whose own embedding is like the
            projected visual CLS; "all"; or "none": it is the projected visual CLS itself.
        tau: Least cosine of a token that counts, for "clip" and "similarity".
        cls: Where the visual CLS of eq. 6 leaves the tower. "last": after its last layer, which
            CLIP was trained with; "penultimate": after the layer that the projector reads.
    """

    text: str = "clip"
    tau: float = 0.2
    cls: str = "last"

    def __post_init__(self) -> None:
        for name, known in (("text", TEXTS), ("cls", CLS_SOURCES)):
            if getattr(self, name) not in known:
                raise PatchsieveError(
                    f"a plan's pseudo_cls has an unknown {name}",
                    found=repr(getattr(self, name))[:80],
                    expected=", ".join(known),
                    do=f"correct --{'visual-cls' if name == 'cls' else name}",
                )
        if isinstance(self.tau, bool) or not isinstance(self.tau, (int, float)):
            raise PatchsieveError(
                "a plan's pseudo_cls has no threshold",
                found=f"tau {self.tau!r}"[:80],
                expected="a number; the paper's is 0.2",
                do="correct --tau",
            )

    @property
    def needs_scorer(self) -> bool:
        """Whether CLIP's text tower judges the question's tokens."""
        return self.text == "clip"


@dataclass(frozen=True)
class Plan:
    """What prunes where.

    Attributes:
        sites: Decoder sites, ascending by layer.
        encoder: Method inside the vision tower.
        projector: Method between the tower and the decoder.
        position_rule: How the tokens that enter the decoder are numbered. "original": a patch by
            its raster index, with gaps; tokens that are no patches as if the image had that many.
            "contiguous": every token by its place. "grid2d": a patch by its row and column, for a
            model that was trained so. What the decoder drops renumbers nothing. None until export
            has taken what the checkpoint says.
        pseudo_cls: The side row that some sites judge by; None if none does.
    """

    sites: tuple[SitePlan, ...] = ()
    encoder: MethodPlan | None = None
    projector: MethodPlan | None = None
    position_rule: str | None = None
    pseudo_cls: PseudoCls | None = None

    def __post_init__(self) -> None:
        layers = [site.layer for site in self.sites]
        if layers != sorted(set(layers)):
            raise PatchsieveError(
                "a plan's sites are out of order or repeated",
                found=layers,
                expected="ascending layers, each once",
                do="correct --sites",
            )
        if self.position_rule not in (None, *POSITION_RULES):
            raise PatchsieveError(
                "unknown position rule",
                found=repr(self.position_rule)[:80],
                expected=" or ".join(POSITION_RULES),
                do="correct --positions",
            )

    def with_positions(self, trained: str) -> Plan:
        """The plan with its position rule worked out.

        Args:
            trained: The rule that the language model was trained with.

        Raises:
            PatchsieveError: The plan asks for one that the model does not know.
        """
        rule = trained if self.position_rule is None else self.position_rule
        if rule != trained and GRID2D in (rule, trained):
            raise PatchsieveError(
                "the language model was not trained with these positions",
                found=rule,
                expected=trained,
                do="remove --positions and position_rule"
                if trained == GRID2D
                else "train it with them: patchsieve calibrate --train-lm --positions grid2d",
            )
        return replace(self, position_rule=rule)

    @property
    def layers(self) -> list[int]:
        """The layers at whose input tokens are dropped."""
        return [site.layer for site in self.sites]

    @property
    def has_vision(self) -> bool:
        """Whether the plan has a vision graph of its own."""
        return self.prunes_before or self.pseudo_cls is not None

    @property
    def prunes_before(self) -> bool:
        """Whether the plan drops anything before the decoder."""
        return self.encoder is not None or self.projector is not None

    @property
    def prunes(self) -> bool:
        """Whether the plan drops anything anywhere."""
        return self.prunes_before or bool(self.sites)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON holds it."""
        return asdict(self) | {"sites": [asdict(site) for site in self.sites]}

    @classmethod
    def from_dict(cls, data: Any) -> Plan:
        """Read a plan from its JSON object, refusing what it does not know."""
        if not isinstance(data, dict):
            raise PatchsieveError(
                "this plan is not a JSON object", found=type(data).__name__, do="correct the plan"
            )
        known = {"sites", *PLACES, "position_rule", "pseudo_cls"}
        _refuse_unknown("plan", data, known)
        sites = data.get("sites", [])
        if not isinstance(sites, list) or not all(isinstance(site, dict) for site in sites):
            raise PatchsieveError(
                "a plan's sites are not a list of objects",
                found=repr(sites)[:80],
                do="correct the plan",
            )
        for site in sites:
            _refuse_unknown("site", site, {"layer", "method", "params", "budget"})
            if "layer" not in site or "method" not in site:
                raise PatchsieveError(
                    "a site of the plan lacks its layer or its method",
                    found=", ".join(site) or "nothing",
                    do="add them to the plan",
                )
        pseudo_cls = data.get("pseudo_cls")
        if pseudo_cls is not None:
            if not isinstance(pseudo_cls, dict):
                raise PatchsieveError(
                    "a plan's pseudo_cls is not an object",
                    found=repr(pseudo_cls)[:80],
                    do="correct the plan",
                )
            _refuse_unknown("plan's pseudo_cls", pseudo_cls, {"text", "tau", "cls"})
        return cls(
            sites=tuple(SitePlan(**site) for site in sites),
            **{place: MethodPlan.from_dict(data.get(place), place) for place in PLACES},
            position_rule=data.get("position_rule"),
            pseudo_cls=None if pseudo_cls is None else PseudoCls(**pseudo_cls),
        )

    @classmethod
    def from_file(cls, path: Path) -> Plan:
        """Read a plan from a JSON file."""
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON
            raise PatchsieveError(
                f"cannot read the plan {path}",
                found=error,
                expected="a JSON object",
                do="correct --plan",
            ) from error


def check_plan_name(name: str) -> str:
    """Refuse a plan's name that cannot be part of a file's name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
        raise PatchsieveError(
            "a plan's name cannot be part of file names",
            found=repr(name)[:80],
            expected="letters, digits, - and _, at most 64",
            do="choose another --plan-name",
        )
    return name


def _refuse_unknown(what: str, data: dict[str, Any], known: set[str]) -> None:
    unknown = sorted(set(data) - known)
    if unknown:
        raise PatchsieveError(
            f"a {what} has unknown entries",
            found=", ".join(unknown)[:80],
            expected=sorted(known),
            do="correct the plan (docs/plan.md lists the entries)",
        )
