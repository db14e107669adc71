"""The seam between the pipeline and what computes.

Tensors that stay inside a backend are opaque to the pipeline: it hands them from one graph to the
next and never looks in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from patchsieve.contract import names
from patchsieve.contract.errors import BackendMissingError
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

    def decode(
        self, hidden: np.ndarray, steps: Sequence[Mapping[str, Any]], caches: Sequence[StageCache]
    ) -> np.ndarray:
        """Feed one row through all stages.

        Args:
            hidden: Its embedding, [1, 1, C].
            steps: The other inputs of each stage, all known before the first one runs.
            caches: Each stage's cache, updated in place.

        Returns:
            Logits, with V elements.
        """

    def key_cache(self, cache: StageCache, layer: int) -> Any:
        """The keys of a layer, to be read by a decision."""

    def fetch(self, reason: str, *tensors: Any) -> list[np.ndarray]:
        """Bring tensors to the host together. A GPU is waited for once, under this reason."""

    def value_cache(self, cache: StageCache, layer: int) -> Any:
        """The values of a layer, likewise."""

    def to_numpy(self, tensor: Any) -> np.ndarray:
        """Bring one tensor to the host, for tools and tests."""

    def clear(self, cache: StageCache) -> None:
        """Zero the slots after the cache's length, after a request that failed."""

    def device_ms(self) -> dict[str, float]:
        """Time that a GPU took for each graph since the last call; nothing on a CPU.

        Called when the host has just waited.
        """

    def describe(self) -> dict[str, Any]:
        """Library, version and device, for reports."""

    def close(self) -> None:
        """Give back memory."""


def decode_by_stages(
    backend: Backend,
    hidden: np.ndarray,
    steps: Sequence[Mapping[str, Any]],
    caches: Sequence[StageCache],
) -> np.ndarray:
    """`Backend.decode` for a backend that has nothing better than one stage after the other."""
    rows: Any = hidden
    for index, (inputs, cache) in enumerate(zip(steps, caches, strict=True)):
        out = backend.run_stage(index, {names.HIDDEN: rows, **inputs}, cache)
        rows = out.get(names.HIDDEN_OUT)
    return backend.fetch("logits of a new token", out[names.LOGITS])[0]


def missing(library: str) -> BackendMissingError:
    """The error for a library that is not installed."""
    return BackendMissingError(f"{library} is not installed", do=f"pip install {library}")
