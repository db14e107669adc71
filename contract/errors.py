"""The errors that a user can cause. The command line prints each as one line and exits 2."""

from __future__ import annotations


class PatchsieveError(Exception):
    """What went wrong, what was found, what was expected and what to do, in one line."""

    def __init__(
        self,
        what: str,
        *,
        found: object = None,
        expected: object = None,
        do: str | None = None,
    ) -> None:
        parts = [what]
        if found is not None:
            parts.append(f"found: {found}")
        if expected is not None:
            parts.append(f"expected: {expected}")
        if do is not None:
            parts.append(f"what to do: {do}")
        super().__init__(" | ".join(" ".join(part.split()) for part in parts))


class ShapeError(PatchsieveError):
    """A tensor or a count does not have the shape that a graph or a method takes."""


class BundleError(PatchsieveError):
    """A bundle is damaged, of a newer schema, or built for something else."""


class UnsupportedModelError(PatchsieveError):
    """A checkpoint has an architecture or an option that export does not know."""


class BackendMissingError(PatchsieveError):
    """A library or a device that a target needs is absent."""


class RequestError(PatchsieveError):
    """An image, a prompt or an option of one request cannot be used."""


class CapacityError(RequestError):
    """A request does not fit the key/value slots that the bundle reserves."""
