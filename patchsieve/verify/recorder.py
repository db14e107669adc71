"""A backend that keeps what its graphs were fed and returned, for `verify`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from patchsieve.contract import names, reads
from patchsieve.runtime.cache import StageCache
from patchsieve.runtime.ort.backend import OrtBackend

MOST_STEPS = 8  # rows decoded that are kept: each asks the whole of the checkpoint's decoder


class Run(NamedTuple):
    """What one run of a graph was fed, its caches left out, and what it returned."""

    inputs: dict[str, np.ndarray]
    values: dict[str, np.ndarray]


class Recorder:
    """A backend that keeps the first result of each graph, in float32 and off the device.

    Args:
        inner: The backend.
        keeps_steps: The first rows decoded are kept too.
    """

    has_fixed_slots = False

    def __init__(self, inner: OrtBackend, *, keeps_steps: bool = False) -> None:
        self.inner, self.most_steps = inner, MOST_STEPS if keeps_steps else 0
        self.forget()

    def forget(self) -> None:
        """Forget everything, for another request."""
        self.inputs: dict[str, dict[str, np.ndarray]] = {}
        self.values: dict[str, np.ndarray] = {}  # by tensor name; decisions by graph, then tensor
        self.runs: dict[str, list[Run]] = {}  # of a decision one for each image
        self.steps: list[dict[str, np.ndarray]] = []  # by tensor name, of each row decoded
        self.before: list[int] = []  # rows in the cache of each stage before the first of them
        self._caches: Sequence[StageCache] = ()

    def allocate(self, stage: int, slots: int) -> Any:
        """As the backend does."""
        return self.inner.allocate(stage, slots)

    def run(self, graph: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Run a graph and keep what it was fed and what it returned."""
        out = self.inner.run(graph, inputs)
        if graph in self.inputs and names.decided(graph) is None:
            return out
        run = Run(
            {name: self._copy(value) for name, value in inputs.items() if not _is_cache(name)},
            {name: self._copy(value) for name, value in out.items()},
        )
        self.runs.setdefault(graph, []).append(run)
        if graph not in self.inputs:
            self.inputs[graph] = run.inputs
            self.values |= {f"{graph}/{name}": value for name, value in run.values.items()}
        return out

    def run_stage(self, stage: int, inputs: Mapping[str, Any], cache: StageCache) -> dict[str, Any]:
        """Run a stage and keep its outputs and the rows of its caches."""
        out = self.inner.run_stage(stage, inputs, cache)
        graph = names.stage(stage)
        if graph not in self.inputs:
            self.inputs[graph] = {k: self._copy(v) for k, v in inputs.items()}
            first, last = cache.stage.first, cache.stage.last
            self.values |= self._named(out, cache)
            rows = cache.length + len(inputs[names.KEEP_INDICES])
            for layer in range(first, last):
                for name in (names.key_cache(layer), names.value_cache(layer)):
                    self.values[name] = self._copy(cache.buffers.rows(name, rows))
        return out

    def decode(
        self, hidden: np.ndarray, steps: Sequence[Mapping[str, Any]], caches: Sequence[StageCache]
    ) -> np.ndarray:
        """As the backend does; what the first rows leave is kept."""
        if len(self.steps) == self.most_steps:
            return self.inner.decode(hidden, steps, caches)
        self.before = self.before or [cache.length for cache in caches]
        self._caches, found = caches, {names.HIDDEN: self._copy(hidden)}
        rows: Any = hidden
        for index, (inputs, cache) in enumerate(zip(steps, caches, strict=True)):
            out = self.inner.run_stage(index, {names.HIDDEN: rows, **inputs}, cache)
            rows = out.get(names.HIDDEN_OUT)
            found |= self._named(out, cache)
        self.steps.append(found)
        return self.inner.fetch("logits of a new token", out[names.LOGITS])[0]

    def cached(self) -> dict[str, np.ndarray]:
        """Keys and values [1, G, P + T, D] of each layer up to the last row of `steps`."""
        found = {}
        for cache, before in zip(self._caches, self.before, strict=True):
            for layer in range(cache.stage.first, cache.stage.last):
                for name in (names.key_cache(layer), names.value_cache(layer)):
                    found[name] = cache.buffers.rows(name, before + len(self.steps))
        return found

    def _named(self, out: Mapping[str, Any], cache: StageCache) -> dict[str, np.ndarray]:
        """Outputs of a stage by their names in the whole decoder."""
        hidden = {names.HIDDEN_OUT: names.layer_output(cache.stage.last - 1)}
        return {hidden.get(name, name): self._copy(value) for name, value in out.items()}

    def key_cache(self, cache: StageCache, layer: int) -> Any:
        """As the backend does."""
        return self.inner.key_cache(cache, layer)

    def fetch(self, reason: str, *tensors: Any) -> list[np.ndarray]:
        """As the backend does."""
        return self.inner.fetch(reason, *tensors)

    def value_cache(self, cache: StageCache, layer: int) -> Any:
        """As the backend does."""
        return self.inner.value_cache(cache, layer)

    def to_numpy(self, tensor: Any) -> np.ndarray:
        """As the backend does."""
        return self.inner.to_numpy(tensor)

    def clear(self, cache: StageCache) -> None:
        """As the backend does."""
        self.inner.clear(cache)

    def device_ms(self) -> dict[str, float]:
        """As the backend does."""
        return self.inner.device_ms()

    def describe(self) -> dict[str, Any]:
        """As the backend does."""
        return self.inner.describe()

    def close(self) -> None:
        """As the backend does."""
        self.inner.close()

    def _copy(self, tensor: Any) -> np.ndarray:
        array = np.array(self.inner.to_numpy(tensor))
        return array.astype(np.float32) if array.dtype == np.float16 else array


def _is_cache(name: str) -> bool:
    """Whether a graph's input is a cache of a decoder layer."""
    what = reads.named(name)
    return what is not None and what.read.source == reads.CACHE
