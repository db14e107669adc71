"""The catalogue of pruning methods: what `patchsieve.pruning.entries` lists, by place and name."""

from __future__ import annotations

from typing import Any, ClassVar

from patchsieve.contract.errors import PatchsieveError
from patchsieve.pruning.entries import ENTRIES
from patchsieve.pruning.entry import ADAPTS, DECODER, ENCODER, PROJECTOR, RECIPE, Entry

_BY_PLACE = {(entry.place, entry.name): entry for entry in ENTRIES}
_WHERE = {DECODER: "in the decoder", ENCODER: "inside the vision tower"}
_WHERE |= {PROJECTOR: "between tower and decoder", RECIPE: "as a whole"}


def names(place: str) -> list[str]:
    """The methods of a place."""
    return [entry.name for entry in ENTRIES if entry.place == place]


def find(place: str, name: str) -> Entry | None:
    """A method at a place, None if there is none."""
    return _BY_PLACE.get((place, name))


def entry(place: str, name: str, where: str = "") -> Entry:
    """A method at a place.

    Args:
        place: One of `patchsieve.pruning.entry.PLACES`.
        name: The method.
        where: Of a plan, such as " at layer 2".

    Raises:
        PatchsieveError: There is no such method.
    """
    found = find(place, name)
    if found is None:
        raise PatchsieveError(
            f"unknown method {_WHERE[place]}{where}",
            found=str(name)[:80],
            expected=", ".join(names(place)),
            do="correct the method's name",
        )
    return found


def in_tower(name: str) -> Entry:
    """A method that prunes inside the tower, or once after it.

    Raises:
        PatchsieveError: There is no such method.
    """
    return find(ENCODER, name) or entry(PROJECTOR, name)


def draws(name: str) -> bool:
    """Whether chance decides what a method keeps, at any place."""
    return any(each.draws for each in ENTRIES if each.name == name)


class Catalogued:
    """The base of every method's class: its options are checked against the catalogue.

    A class is a frozen dataclass. Fields that are no options of its entry, such as modules, it
    checks itself.

    Attributes:
        name: The method's.
        acts_at: Where the class acts, one of `patchsieve.pruning.entry.PLACES`.
    """

    name: ClassVar[str]
    acts_at: ClassVar[str]

    @property
    def entry(self) -> Entry:
        """What the catalogue says of the method."""
        return entry(self.acts_at, self.name)

    @property
    def merges(self) -> bool:
        """Whether tokens become means of several."""
        return self.entry.merges

    @property
    def adapts(self) -> bool:
        """Whether the image decides how many tokens stay, up to a bound."""
        return self.entry.leaves == ADAPTS

    def __post_init__(self) -> None:
        """Check the options."""
        own: dict[str, Any] = {k: v for k, v in vars(self).items() if self.entry.has(k)}
        self.entry.check(own)
