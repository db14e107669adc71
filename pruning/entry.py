"""What the catalogue says of a method: its options, what it leaves and where its class is.

Plain data, without torch. `patchsieve.pruning.catalogue` holds one entry for each method and place.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from patchsieve.contract.errors import PatchsieveError

# Where a method acts; RECIPE is a whole published method, which makes a plan of several places.
DECODER, ENCODER, PROJECTOR, RECIPE = "decoder", "encoder", "projector", "recipe"
PLACES = (RECIPE, DECODER, ENCODER, PROJECTOR)
# What it leaves: a fraction of what enters the decoder, a number, or as many as an image needs.
RATIO, NUMBER, ADAPTS = "ratio", "number", "adapts"


class Kind(NamedTuple):
    """A type of option.

    Attributes:
        expected: Its values, in words.
        types: Types that it has in JSON.
        is_within: Whether a value of these types can be used.
    """

    expected: str
    types: tuple[type, ...]
    is_within: Callable[[Any], bool] = lambda _: True


KINDS = {
    "count": Kind("a whole number of at least 1", (int,), lambda value: value >= 1),
    "integers": Kind(
        "a list of whole numbers", (list, tuple), lambda given: all(type(v) is int for v in given)
    ),
    "ratio": Kind(
        "a number above 0, up to 1: the fraction kept (where a paper prunes R, 1 - R)",
        (int, float),
        lambda value: 0 < value <= 1,
    ),
    "number": Kind("a number", (int, float)),
    "text": Kind("a word", (str,)),
    "flag": Kind("true or false", (bool,)),
    "folder": Kind("the path of a folder", (str,)),
}


@dataclass(frozen=True)
class Option:
    """An option of a method.

    Attributes:
        name: In a plan's parameters and in Python.
        kind: A key of KINDS.
        help: What it sets, for people; neither its values nor its default.
        default: The method's own; None if `shown` says what happens.
        choices: All values of a text, where they are few.
        word: On the command line, after the dashes and the place; by default its name. None: only
            plans and Python set it.
        metavar: What stands for its value in the help.
        shown: The default in words.
        is_per_site: The command line takes one value, or one for each site.
        is_of_plan: It belongs to the plan's pseudo_cls and not to the method.
    """

    name: str
    kind: str
    help: str
    default: Any = None
    choices: tuple[str, ...] = ()
    word: str | None = ""
    metavar: str | None = None
    shown: str = ""
    is_per_site: bool = False
    is_of_plan: bool = False

    @property
    def expected(self) -> str:
        """Its values, in words."""
        return " or ".join(self.choices) or KINDS[self.kind].expected

    def check(self, value: Any, who: str, flag: str) -> None:
        """Refuse a value that the option cannot have.

        Args:
            value: The value.
            who: Whose option it is, in words.
            flag: The option as it is typed.

        Raises:
            PatchsieveError: It has another type, or is out of range.
        """
        if value is None and self.shown:
            return
        kind = KINDS[self.kind]
        is_typed = isinstance(value, kind.types) and isinstance(value, bool) == (bool in kind.types)
        is_within = is_typed and kind.is_within(value)
        if is_within and (not self.choices or value in self.choices):
            return
        has_type = is_typed and (is_within or list not in kind.types)
        default = "" if self.default is None else f", or remove it: the default is {self.default}"
        raise PatchsieveError(
            f"the parameter {self.name} of {who} "
            + ("cannot be used" if has_type else "has the wrong type"),
            found=repr(value)[:80],
            expected=self.expected,
            do=f"correct {flag}{default}",
        )


@dataclass(frozen=True)
class TowerRule:
    """Where and how far a method prunes inside the vision tower, if its options do not say.

    Attributes:
        is_inside: It acts between attention and MLP of its layer, as published; else after it.
        group_layers: Layers of a group, whose last one prunes.
        at_quarters: It prunes at the ends of the first three quarters of the layers instead.
        curve: How its counts fall, a key of `schedules.CURVES`.
        share: How far its last count goes from all patches to a ninth of them, on a log scale.
        fewest: Tokens that it must leave at every layer.
    """

    is_inside: bool = False
    group_layers: int = 1
    at_quarters: bool = False
    curve: str = "linear"
    share: float = 1.0
    fewest: int = 1


class Published(NamedTuple):
    """Where a paper prunes in the decoder, for plans that name no sites.

    Attributes:
        sites: Layers at whose input it prunes.
        num_layers: Layers of the paper's decoder.
        values: An option's values at these sites, if a plan with as many sites gives none.
    """

    sites: tuple[int, ...]
    num_layers: int
    values: Mapping[str, tuple[float, ...]]

    def fitted(self, num_layers: int) -> list[int]:
        """The sites in proportion in a decoder of `num_layers`, rounded half up, each its own.

        8, 16, 24 of 32 layers are 10, 20, 30 of 40; 3, 7, 16 of 32 are 1, 2, 3 of 4.

        Raises:
            PatchsieveError: The decoder has too few layers.
        """
        fitted: list[int] = []
        for site in self.sites:
            nearest = (2 * site * num_layers + self.num_layers) // (2 * self.num_layers)
            fitted.append(max(nearest, fitted[-1] + 1 if fitted else 1))
        if fitted[-1] >= num_layers:
            raise PatchsieveError(
                "the paper's sites do not fit this decoder",
                found=f"{num_layers} layers",
                expected=f"at least {len(self.sites) + 1}",
                do="give --sites, and fewer of them",
            )
        return fitted


@dataclass(frozen=True)
class Entry:
    """A method at a place.

    Attributes:
        name: In plans and on the command line.
        place: DECODER, ENCODER, PROJECTOR or RECIPE.
        target: Its class (of a recipe its function) as "module:name", loaded on demand.
        summary: What it does, in one line.
        leaves: RATIO (its option `keep_ratio`), NUMBER (`num_keep`; before the decoder `keep`), or
            ADAPTS: the image decides, within a budget.
        options: Of a plan's parameters, in the order of the help.
        papers: Name and address of where it comes from.
        example: Options of `patchsieve.plans.build` that fit LLaVA-1.5-7B.
        merges: Tokens become means of several, so at most every other goes at one place.
        is_grid: It needs every patch of the grid, and leaves a smaller grid.
        is_projected: It judges tokens as the projector made them, so all are projected first.
        draws: Chance decides, whatever the image shows.
        judges: Values of its options with which it judges by the pseudo-CLS, a row of its own;
            empty for always, None for never.
        tower: Where and how far it prunes inside the tower; of methods before the decoder.
        published: The sites of its paper, which plans without sites get; of decoder methods.
    """

    name: str
    place: str
    target: str
    summary: str
    leaves: str
    options: tuple[Option, ...]
    papers: tuple[tuple[str, str], ...] = ()
    example: Mapping[str, Any] = field(default_factory=dict)
    merges: bool = False
    is_grid: bool = False
    is_projected: bool = False
    draws: bool = False
    judges: Mapping[str, Any] | None = None
    tower: TowerRule = TowerRule()
    published: Published | None = None

    @property
    def prefix(self) -> str:
        """What comes before its options' words: "encoder-", "projector-" or nothing."""
        return f"{self.place}-" if self.place in (ENCODER, PROJECTOR) else ""

    @property
    def params(self) -> tuple[Option, ...]:
        """The options that a plan writes among the method's parameters."""
        return tuple(option for option in self.options if not option.is_of_plan)

    def option(self, name: str) -> Option:
        """An option by its name."""
        return next(option for option in self.options if option.name == name)

    def has(self, name: str) -> bool:
        """Whether the method has an option of this name."""
        return any(option.name == name for option in self.options)

    def keyword(self, option: Option) -> str:
        """The option's name in `patchsieve.plans.build` and among parsed arguments."""
        return (self.prefix + (option.word or option.name)).replace("-", "_")

    def flag(self, option: Option) -> str:
        """The option as it is typed; of one that only plans set, its name."""
        if option.word is None:
            return f"{option.name} in the plan"
        return "--" + self.keyword(option).replace("_", "-")

    def load(self) -> Any:
        """The class or the function itself, for which torch may be imported."""
        module, _, name = self.target.partition(":")
        return getattr(importlib.import_module(module), name)

    def value(self, name: str, params: Mapping[str, Any]) -> Any:
        """An option's value among a plan's parameters, or its default."""
        return params.get(name, self.option(name).default)

    def is_judged_by_cls(self, params: Mapping[str, Any]) -> bool:
        """Whether the method judges by the pseudo-CLS, with these parameters."""
        if self.judges is None:
            return False
        return all(self.value(name, params) == value for name, value in self.judges.items())

    def check(self, params: Mapping[str, Any], where: str = "") -> None:
        """Refuse parameters that the method does not have, or cannot use.

        Args:
            params: By name.
            where: Of the plan, such as " at layer 2".

        Raises:
            PatchsieveError: One is unknown, of another type or out of range.
        """
        known = {option.name: option for option in self.params}
        unknown = [name for name in params if name not in known]
        if unknown:
            raise PatchsieveError(
                f"the parameters of {self.name}{where} do not fit",
                found=f"no such: {', '.join(map(str, unknown))}"[:80],
                expected=", ".join(known) or "none",
                do="remove them from the plan",
            )
        for name, value in params.items():
            known[name].check(value, f"{self.name}{where}", self.flag(known[name]))
