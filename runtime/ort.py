"""ONNX Runtime on the CPU. Caches are bound as input and output at once, so each is one buffer."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from patchsieve import names
from patchsieve.errors import BundleError, CapacityError, RequestError
from patchsieve.runtime.backend import missing
from patchsieve.runtime.bundle import Bundle
from patchsieve.runtime.cache import StageCache

try:
    import onnxruntime as ort
except ImportError as error:
    raise missing("onnxruntime", "cpu") from error

_QUIET = 3  # errors only
# Where a graph that comes from memory finds its weights.
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


@dataclass
class Buffers:
    """Caches of one stage, bound once to their session for as long as they live."""

    arrays: dict[str, np.ndarray]
    values: dict[str, Any]  # the same memory as ONNX Runtime's tensors
    binding: Any
    outputs: list[str]


class OrtBackend:
    """Runs `cpu` and `reference` graphs.

    Args:
        bundle: The opened bundle.
        threads: Threads of one operator, at least 1; None takes all cores.
        models: Serialised graphs that stand in for the bundle's files of the same name, on the
            same weights; a stage's further outputs come back with the others.

    Raises:
        RequestError: `threads` is below 1 or no whole number.
    """

    has_fixed_slots = False

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        models: Mapping[str, bytes] | None = None,
    ) -> None:
        self.bundle, self.facts = bundle, bundle.manifest
        self._models = models or {}
        self.options = ort.SessionOptions()
        self.options.log_severity_level = _QUIET
        self.options.intra_op_num_threads = _num_threads(threads)
        self.options.enable_mem_pattern = False  # lengths differ from call to call
        for graph in list(self._models)[:1]:  # all graphs lie in one folder
            folder = bundle.graph_path(graph).parent
            self.options.add_session_config_entry(_WEIGHTS_FOLDER, str(folder))
        self._sessions: dict[str, Any] = {}
        for graph in (
            self.facts.vision_graph(self.facts.default_plan),
            names.COMPACT,
            *map(names.stage, range(len(self.facts.stages))),
        ):
            self._session(graph)

    def allocate(self, stage: int, slots: int) -> Buffers:
        """Caches of a stage: zeroed pages that take memory only when written."""
        text, facts = self.facts.text, self.facts.stages[stage]
        shape = (1, text.num_kv_heads, slots, text.head_dim)
        layers = range(facts.first, facts.last)
        wanted, memory = slots * self.facts.row_bytes(facts), _memory()
        if wanted > memory:
            raise CapacityError(
                f"the cache of layers {facts.first} to {facts.last - 1} does not fit this machine",
                found=f"{wanted / 1e9:.1f} GB reserved for {slots} rows",
                expected=f"at most {memory / 1e9:.1f} GB, all of its memory",
                do="export with smaller --max-text-tokens, --max-images or --budget",
            )
        arrays = {
            name: np.zeros(shape, self.facts.precision)
            for layer in layers
            for name in (names.key_cache(layer), names.value_cache(layer))
        }
        values = {name: ort.OrtValue.ortvalue_from_numpy(a) for name, a in arrays.items()}
        session = self._session(names.stage(stage))
        outputs = [out.name for out in session.get_outputs() if not out.name.endswith(names.OUT)]
        binding = session.io_binding()
        for name in outputs:
            binding.bind_output(name, "cpu")
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name + names.OUT, value)
        return Buffers(arrays, values, binding, outputs)

    def run(self, graph: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Run a vision graph, decide or compact."""
        session = self._session(graph)
        outputs = [out.name for out in session.get_outputs()]
        wanted = {value.name for value in session.get_inputs()}
        used = {name: value for name, value in inputs.items() if name in wanted}
        with _one_line(graph):
            return _run(session, session.io_binding(), used, outputs)

    def run_stage(self, stage: int, inputs: Mapping[str, Any], cache: StageCache) -> dict[str, Any]:
        """Run a stage in place on its caches."""
        buffers: Buffers = cache.buffers
        graph = names.stage(stage)
        with _one_line(graph):
            return _run(self._session(graph), buffers.binding, inputs, buffers.outputs)

    def key_cache(self, cache: StageCache, layer: int) -> Any:
        """The cache itself, not a copy."""
        return cache.buffers.values[names.key_cache(layer)]

    def value_cache(self, cache: StageCache, layer: int) -> Any:
        """The cache itself, not a copy."""
        return cache.buffers.values[names.value_cache(layer)]

    def to_numpy(self, tensor: Any) -> np.ndarray:
        """Copy a tensor out."""
        return tensor if isinstance(tensor, np.ndarray) else tensor.numpy()

    def clear(self, cache: StageCache) -> None:
        """Zero the slots behind the cache's length."""
        for array in cache.buffers.arrays.values():
            array[:, :, cache.length :] = 0

    def describe(self) -> dict[str, Any]:
        """Library and device."""
        threads = self.options.intra_op_num_threads
        return {"library": f"onnxruntime {ort.__version__}", "device": f"cpu, {threads} threads"}

    def close(self) -> None:
        """Drop the sessions."""
        self._sessions.clear()

    def _session(self, graph: str) -> Any:
        if graph not in self._sessions:
            model: str | bytes = self._models.get(graph) or str(self.bundle.graph_path(graph))
            with _one_line(graph):
                session = ort.InferenceSession(
                    model, self.options, providers=["CPUExecutionProvider"]
                )
            if graph not in self._models:
                self._check_tensors(graph, session)
            self._sessions[graph] = session
        return self._sessions[graph]

    def _check_tensors(self, graph: str, session: Any) -> None:
        """Refuse a graph that is not the one that the manifest describes."""
        listed = self.facts.tensors.get(graph, {})
        sides = {"inputs": session.get_inputs(), "outputs": session.get_outputs()}
        for side, values in sides.items():
            found = {v.name: (v.type, _lengths(v.shape)) for v in values}
            expected = {
                str(t.get("name")): (f"tensor({t.get('dtype')})", _lengths(t.get("shape") or ()))
                for t in listed.get(side, ())
            }
            if found != expected:
                odd = next(n for n in {**found, **expected} if found.get(n) != expected.get(n))
                raise BundleError(
                    f"the {side} of {graph} are not those that the manifest lists",
                    found=f"{odd}: {found.get(odd, 'absent')}",
                    expected=expected.get(odd, "no such tensor"),
                    do="export the bundle again",
                )


def _num_threads(threads: int | None) -> int:
    if threads is None:
        return len(os.sched_getaffinity(0))
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise RequestError(
            "bad threads",
            found=repr(threads),
            expected="a whole number >= 1",
            do="leave it out for all cores",
        )
    return threads


def _lengths(shape: Sequence[Any]) -> list[int | None]:
    """Lengths of the fixed axes."""
    return [size if isinstance(size, int) else None for size in shape]


def _memory() -> int:
    """Memory of the machine, bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def _one_line(graph: str) -> Iterator[None]:
    """Turn an error of ONNX Runtime into one of ours."""
    try:
        yield
    except Exception as error:  # its exceptions have no common base but this
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        raise BundleError(
            f"ONNX Runtime {ort.__version__} fails at the graph {graph}",
            found=" ".join(str(error).split())[:300],
            do="upgrade onnxruntime, or export the bundle again",
        ) from error


def _run(
    session: Any, binding: Any, inputs: Mapping[str, Any], outputs: list[str]
) -> dict[str, Any]:
    """Run with `outputs` bound first, each in a new buffer of the length that comes out."""
    for name, value in inputs.items():
        if isinstance(value, np.ndarray):
            value = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value))
        binding.bind_ortvalue_input(name, value)
    for name in outputs:
        binding.bind_output(name, "cpu")
    session.run_with_iobinding(binding)
    return dict(zip(outputs, binding.get_outputs(), strict=False))
