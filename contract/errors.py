"""The errors that a user can cause. The command line prints each as one line and exits 2."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

Kind = TypeVar("Kind", bound="PatchsieveError")


class PatchsieveError(Exception):
    """An error that a user can mend: four fields, printed as one line.

    Attributes:
        what: The fault.
        found: The value that caused it, or None.
        expected: The values that are accepted, or None.
        do: How to mend it: begins with a verb, and names an option where one helps.
    """

    def __init__(
        self,
        what: str,
        *,
        found: object = None,
        expected: object = None,
        do: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = _one_line(what)
        self.found = None if found is None else _one_line(found)
        self.expected = None if expected is None else _one_line(expected)
        self.do = None if do is None else _one_line(do)

    def __str__(self) -> str:
        parts = (
            self.what,
            None if self.found is None else f"found: {self.found}",
            None if self.expected is None else f"expected: {self.expected}",
            None if self.do is None else f"what to do: {self.do}",
        )
        return " | ".join(part for part in parts if part is not None)

    def __reduce__(self) -> tuple[Any, ...]:
        # As Exception does it, an error whose __init__ takes other arguments could not be copied.
        return _rebuild, (type(self), self.args, self.__dict__)

    def fields(self) -> dict[str, Any]:
        """The four fields by name: the arguments of the same error, or a JSON object."""
        return {
            "what": self.what,
            "found": self.found,
            "expected": self.expected,
            "do": self.do,
        }

    def at(self: Kind, where: str) -> Kind:
        """A copy of this error that names a place before the fault."""
        error = copy.copy(self)
        error.what = _one_line(f"{where}: {self.what}")
        return error


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def _rebuild(kind: type[Kind], args: tuple[Any, ...], state: dict[str, Any]) -> Kind:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class ShapeError(PatchsieveError):
    """A tensor or a count does not have the shape that a graph or a method takes."""


class BundleError(PatchsieveError):
    """A bundle is damaged, of a newer schema, or built for something else.

    A damaged one cannot be mended by hand, so that is what `do` says unless it says better.
    """

    def __init__(
        self,
        what: str,
        *,
        found: object = None,
        expected: object = None,
        do: str | None = "copy the bundle again, or export it again",
    ) -> None:
        super().__init__(what, found=found, expected=expected, do=do)


class UnsupportedModelError(PatchsieveError):
    """A checkpoint has an architecture or an option that export does not know."""


class BackendMissingError(PatchsieveError):
    """A library or a device that a target needs is absent."""


class RequestError(PatchsieveError):
    """An image, a prompt or an option of one request cannot be used."""


class CapacityError(RequestError):
    """A request does not fit the key/value slots that the bundle reserves."""
