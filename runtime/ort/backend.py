"""ONNX Runtime on a CPU or an NVIDIA GPU. What one graph gives stays where the next one runs."""

from __future__ import annotations

import functools
import io
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import numpy as np

from patchsieve.contract import names
from patchsieve.contract.errors import BackendMissingError, BundleError, CapacityError, RequestError
from patchsieve.contract.external_data import read_relocated, relocated
from patchsieve.contract.targets import CUDA_LIBRARIES, TARGETS, on_device
from patchsieve.runtime.backend import decode_by_stages, missing
from patchsieve.runtime.bundle import Bundle
from patchsieve.runtime.cache import StageCache

try:
    import onnxruntime as ort
except ImportError as error:
    raise missing("onnxruntime") from error

from patchsieve.runtime.ort.caches import Buffers, InPlace, NewRows, View

log = logging.getLogger(__name__)

_QUIET = 3  # errors only
# What ONNX Runtime's arena and CUDA itself say where memory is full.
_FULL = ("Failed to allocate memory", "out of memory", "bad_alloc")
# Every session has threads of its own; those that keep spinning after their run take a core from
# the next graph's threads.
_STOP_SPINNING = "session.force_spinning_stop"
# Int4 and weight-only int8: rows are rounded to int8 in blocks, seven times faster than in float32.
_ACCURACY = ("session.qdq_matmulnbits_accuracy_level", "4")
# Where a graph that comes from memory finds its weights.
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


class OrtBackend:
    """Runs a bundle's graphs in ONNX Runtime, whose caches may have either form.

    Targets that another library runs are taken too, as far as ONNX Runtime knows their operators:
    so they are checked where that library is not.

    Args:
        bundle: The opened bundle.
        threads: Threads of one operator, at least 1; None takes all cores.
        models: Serialised graphs that stand in for the bundle's files of the same name, on the
            same weights; a stage's further outputs come back with the others.
        device: "cpu" or "cuda"; the target's own by default.

    Raises:
        RequestError: `threads` is below 1 or no whole number.
        BackendMissingError: This ONNX Runtime cannot use the device.
    """

    has_fixed_slots = False

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        models: Mapping[str, bytes] | None = None,
        device: str | None = None,
    ) -> None:
        self.bundle, self.facts = bundle, bundle.manifest
        self.device = device or TARGETS[bundle.target].device or "cpu"
        self.provider = _provider(self.device)
        self._models = models or {}
        self.options = ort.SessionOptions()
        self.options.log_severity_level = _QUIET
        self.options.intra_op_num_threads = _num_threads(threads)
        self.options.enable_mem_pattern = False  # lengths differ from call to call
        self.options.add_session_config_entry(_STOP_SPINNING, "1")
        self.options.add_session_config_entry(*_ACCURACY)
        folder = bundle.place.root if bundle.has_links else None
        for graph in list(self._models)[:1]:  # all graphs lie in one folder
            folder = folder or bundle.graph_path(graph).parent
        if folder is not None:
            self.options.add_session_config_entry(_WEIGHTS_FOLDER, str(folder))
        self._sessions: dict[str, Any] = {}
        for graph in (
            self.facts.vision_graph(self.facts.default_plan),
            names.COMPACT,
            *(name for index in range(len(self.facts.stages)) for name in self._stage(index)),
        ):
            self._session(graph)

    def allocate(self, stage: int, slots: int) -> Buffers:
        """Caches of a stage, in the form that the target's graphs take."""
        facts = self.facts.stages[stage]
        wanted, memory = slots * self.facts.row_bytes(facts), _memory()
        if self.device == "cpu" and wanted > memory:
            raise CapacityError(
                f"the cache of layers {facts.first} to {facts.last - 1} does not fit this machine",
                found=f"{wanted / 1e9:.1f} GB reserved for {slots} rows",
                expected=f"at most {memory / 1e9:.1f} GB, all of its memory",
                do="export with smaller --max-text-tokens, --max-images or --budget",
            )
        is_rows = self.facts.cache_forms[self.bundle.target] == names.NEW_ROWS
        with graph_errors(f"the graph {names.stage(stage)}"):
            return (NewRows if is_rows else InPlace)(
                slots,
                [self._session(graph) for graph in self._stage(stage)],
                facts,
                self.facts.text,
                self.facts.cache_type,
                self.device,
            )

    def run(self, graph: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Run a vision graph, decide or compact."""
        session = self._session(graph)
        outputs = [out.name for out in session.get_outputs()]
        wanted = {value.name for value in session.get_inputs()}
        used = {name: value for name, value in inputs.items() if name in wanted}
        with graph_errors(f"the graph {graph}"):
            return self._run(session, session.io_binding(), used, outputs)

    def run_stage(self, stage: int, inputs: Mapping[str, Any], cache: StageCache) -> dict[str, Any]:
        """Run a stage; its caches grow where they lie."""
        buffers: Buffers = cache.buffers
        count, graphs = len(inputs[names.KEEP_INDICES]), self._stage(stage)
        chosen = len(graphs) - 1 if count == 1 else 0
        graph, binding = graphs[chosen], buffers.bindings[chosen]
        buffers.bind(binding, cache.length, count)
        with graph_errors(f"the graph {graph}"):
            return self._run(self._session(graph), binding, inputs, buffers.outputs)

    def decode(
        self, hidden: np.ndarray, steps: Sequence[Mapping[str, Any]], caches: Sequence[StageCache]
    ) -> np.ndarray:
        """Feed one row through the stages, one after the other."""
        return decode_by_stages(self, hidden, steps, caches)

    def key_cache(self, cache: StageCache, layer: int) -> Any:
        """The cache itself, not a copy."""
        return cache.buffers.read(names.key_cache(layer), cache.present)

    def value_cache(self, cache: StageCache, layer: int) -> Any:
        """The cache itself, not a copy."""
        return cache.buffers.read(names.value_cache(layer), cache.present)

    def fetch(self, reason: str, *tensors: Any) -> list[np.ndarray]:
        """Copy tensors out; there is nothing to wait for."""
        with graph_errors(reason):  # on a GPU an error of earlier work comes out here
            return [self.to_numpy(tensor) for tensor in tensors]

    def to_numpy(self, tensor: Any) -> np.ndarray:
        """Copy a tensor out."""
        return tensor if isinstance(tensor, np.ndarray) else tensor.numpy()

    def clear(self, cache: StageCache) -> None:
        """Make the slots after the cache's length harmless."""
        cache.buffers.clear(cache.length)

    def device_ms(self) -> dict[str, float]:
        """Nothing: the host's clock measures all."""
        return {}

    def describe(self) -> dict[str, Any]:
        """Library and device."""
        threads = self.options.intra_op_num_threads
        device = f"cpu, {threads} threads" if self.device == "cpu" else f"{self.device}:0"
        return {"library": f"onnxruntime {ort.__version__}", "device": device}

    def close(self) -> None:
        """Drop the sessions."""
        self._sessions.clear()

    def _run(
        self, session: Any, binding: Any, inputs: Mapping[str, Any], outputs: list[str]
    ) -> dict[str, Any]:
        """Run with `outputs` bound first, each in a new buffer of the length that comes out."""
        for name, value in inputs.items():
            if isinstance(value, View):
                value.bind_input(binding, name)
                continue
            if isinstance(value, np.ndarray):
                array = np.ascontiguousarray(value)
                value = ort.OrtValue.ortvalue_from_numpy(array, self.device, 0)
            binding.bind_ortvalue_input(name, value)
        for name in outputs:
            binding.bind_output(name, self.device)
        session.run_with_iobinding(binding)
        return dict(zip(outputs, binding.get_outputs(), strict=False))

    def _stage(self, index: int) -> list[str]:
        """The graphs of a stage: for rows in any number, then for a single row if it has one."""
        graphs = [names.stage(index), names.step(index)]
        return [graph for graph in graphs if graph in self.facts.graphs]

    def _session(self, graph: str) -> Any:
        if graph not in self._sessions:
            model = self._model(graph)
            with graph_errors(f"the graph {graph}"):
                session = ort.InferenceSession(model, self.options, providers=[self.provider])
            _check_provider(session, self.provider)
            if graph not in self._models:
                self._check_tensors(graph, session)
            self._sessions[graph] = session
        return self._sessions[graph]

    def _model(self, graph: str) -> str | bytes:
        """A graph's file, or its content with the weights named by where they lie."""
        bundle, given = self.bundle, self._models.get(graph)
        if not bundle.has_links:
            return given or str(bundle.graph_path(graph))
        if given is None:
            return read_relocated(bundle.place, bundle.graphs[graph])
        return relocated(given, bundle.graphs[graph], bundle.place)

    def _check_tensors(self, graph: str, session: Any) -> None:
        """Refuse a graph that is not the one that the manifest describes."""
        listed = self.facts.signature(self.bundle.target, graph)
        sides = {
            "inputs": (session.get_inputs(), listed.inputs),
            "outputs": (session.get_outputs(), listed.outputs),
        }
        for side, (values, tensors) in sides.items():
            found = {v.name: (v.type, _lengths(v.shape)) for v in values}
            expected = {t.name: (f"tensor({t.dtype})", _lengths(t.shape)) for t in tensors}
            if found != expected:
                odd = next(n for n in {**found, **expected} if found.get(n) != expected.get(n))
                raise BundleError(
                    f"the {side} of {graph} are not those that the manifest lists",
                    found=f"{odd}: {found.get(odd, 'absent')}",
                    expected=expected.get(odd, "no such tensor"),
                    do="export the bundle again",
                )


def _provider(device: str) -> str:
    """The execution provider of a device, refused where this ONNX Runtime was built without it."""
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
    if provider not in ort.get_available_providers():
        raise BackendMissingError(
            f"onnxruntime {ort.__version__} cannot run on a GPU",
            found=", ".join(ort.get_available_providers()),
            expected=provider,
            do=on_device(device).install,
        )
    if device == "cuda":
        preload()
    return provider


@functools.cache
def preload() -> str:
    """Load CUDA's libraries from pip's packages, where the loader would not look for them.

    Without this a session on a GPU starts only beside a CUDA toolkit or torch. Once in a process.

    Returns:
        The libraries that are absent, in a few words; empty where none is. ONNX Runtime itself
        would print them on stdout.
    """
    load = getattr(ort, "preload_dlls", None)  # 1.21 and later
    if load is None:
        return ""
    said = io.StringIO()
    with redirect_stdout(said):
        load()
    absent = re.findall(r"Failed to load (\S+?):", said.getvalue())
    if said.getvalue():
        log.info("onnxruntime: %s", " ".join(said.getvalue().split()))
    return f"no {', '.join(dict.fromkeys(absent))}" if absent else ""


def _check_provider(session: Any, provider: str) -> None:
    """Refuse a session that ONNX Runtime moved to the CPU, as it does with no more than a log line.

    Nodes that only compute shapes run on the CPU in any case, as ONNX Runtime sees fit.
    """
    session.disable_fallback()
    found = session.get_providers()
    if found[0] != provider:
        raise BackendMissingError(
            "ONNX Runtime could not start on the GPU",
            found=preload() or f"{', '.join(found)}; ONNX Runtime logged why",
            expected=provider,
            do=f"{CUDA_LIBRARIES}, of the CUDA that it was built for",
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
def graph_errors(what: str) -> Iterator[None]:
    """Turn an error of ONNX Runtime into one of ours; its exceptions have no common base.

    The CUDA provider's own is a plain RuntimeError ("Error in execution: ...").
    """
    try:
        yield
    except Exception as error:
        if not (isinstance(error, RuntimeError) or _is_of_onnxruntime(error)):
            raise
        text = " ".join(str(error).split())
        if any(words in text for words in _FULL):
            raise CapacityError(
                f"memory is full at {what}",
                found=text[:300],
                do="close other programs, ask for less, or export with smaller --max-text-tokens, "
                "--max-images or --budget",
            ) from error
        is_cuda = "CUDA" in text or "CUBLAS" in text or "CUDNN" in text
        raise BundleError(
            f"ONNX Runtime {ort.__version__} fails at {what}",
            found=text[:300],
            do="start the program again; if the error returns, upgrade onnxruntime-gpu"
            if is_cuda
            else "upgrade onnxruntime, or export the bundle again",
        ) from error


def _is_of_onnxruntime(error: Exception) -> bool:
    return type(error).__module__.startswith("onnxruntime")
