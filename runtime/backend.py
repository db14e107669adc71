"""The seam between the pipeline and what computes.

Tensors that stay inside a backend are opaque to the pipeline: it hands them from one graph to the
next and never looks in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from patchsieve.errors import BackendMissingError, PatchsieveError
from patchsieve.runtime.bundle import Bundle
from patchsieve.runtime.cache import StageCache


class Backend(Protocol):
    """Runs the graphs of one bundle on one target."""

    has_fixed_slots: bool  # caches are as long as the engines were built for

    def allocate(self, stage: int, slots: int) -> Any:
        """Zeroed buffers for a stage's caches."""

    def run(self, graph: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Run a graph without caches: vision, decide or compact."""

    def run_stage(self, stage: int, inputs: Mapping[str, Any], cache: StageCache) -> dict[str, Any]:
        """Run a stage; its caches are updated in place."""

    def key_cache(self, cache: StageCache, layer: int) -> Any:
        """The keys of a layer, to be read by a decision."""

    def value_cache(self, cache: StageCache, layer: int) -> Any:
        """The values of a layer, likewise."""

    def to_numpy(self, tensor: Any) -> np.ndarray:
        """Bring a tensor to the host. On a GPU this waits for it."""

    def clear(self, cache: StageCache) -> None:
        """Zero the slots behind the cache's length, after a request that failed."""

    def describe(self) -> dict[str, Any]:
        """Library, version and device, for reports."""

    def close(self) -> None:
        """Give back memory."""


def open_backend(bundle: Bundle, *, threads: int | None = None) -> Backend:
    """Make the backend of a bundle's target.

    Raises:
        BackendMissingError: The target's library is not installed.
        PatchsieveError: No backend runs this target yet.
    """
    if bundle.target in ("cpu", "reference"):
        from patchsieve.runtime.ort import OrtBackend

        return OrtBackend(bundle, threads=threads)
    raise PatchsieveError(
        f"this version builds engines for {bundle.target} but does not run them",
        expected="cpu or reference",
        do="run the bundle with --target cpu",
    )


def missing(library: str, extra: str) -> BackendMissingError:
    """The error for a library that is not installed."""
    return BackendMissingError(
        f"{library} is not installed",
        do=f'pip install "patchsieve[{extra}]" (or pip install {library})',
    )
