"""TensorRT without a GPU: an engine is an ONNX Runtime session over the very graph of the target.

It reads and writes the memory of a `FakeGpu` and refuses what TensorRT refuses: addresses that are
not aligned, shapes outside the profile, caches that are not updated where they lie, too little
scratch memory. The names are those of `tensorrt_rtx`.
"""

from __future__ import annotations

import enum
import functools
import json
import weakref
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime as ort

from patchsieve.contract import files, names
from patchsieve.contract.manifest import Manifest
from patchsieve.runtime.building.profiles import profiles
from patchsieve.runtime.trt import engines

SCRATCH = 4096
Port = tuple[np.dtype[Any], tuple[int, ...], int]  # type, shape, address


class DataType(enum.Enum):
    FLOAT = "tensor(float)"
    HALF = "tensor(float16)"
    BF16 = "tensor(bfloat16)"
    INT32 = "tensor(int32)"
    INT64 = "tensor(int64)"
    BOOL = "tensor(bool)"


_NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64, "BOOL": np.bool_}


class TensorIOMode(enum.Enum):
    INPUT = 1
    OUTPUT = 2


class TensorLocation(enum.Enum):
    DEVICE = 0
    HOST = 1


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC = 0
    USER_MANAGED = 2


class DynamicShapesKernelSpecializationStrategy(enum.Enum):
    LAZY = 0
    EAGER = 1


class CudaGraphStrategy(enum.Enum):
    DISABLED = 0


class ILogger:
    class Severity(enum.Enum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2
        INFO = 3


@functools.cache
def session(path: str) -> ort.InferenceSession:
    """One session per graph for all tests: it holds weights, and no state."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class Runtime:
    def __init__(self, trt: FakeTensorRT, logger: Any) -> None:
        self._trt, self._logger = trt, logger
        trt.count(self, "runtime")

    def deserialize_cuda_engine(self, content: Any) -> Any:
        text = bytes(content)
        if self._trt.refuses == "engine":
            self._trt.complain(self._logger, "the plan file is damaged")
            return None
        kind = RtxEngine if self._trt.is_rtx else ICudaEngine
        return kind(self._trt, self._logger, json.loads(text))


class ICudaEngine:
    def __init__(self, trt: FakeTensorRT, logger: Any, facts: dict[str, Any]) -> None:
        self._trt, self._logger, self._facts = trt, logger, facts
        self._session = session(facts["onnx"])
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self._outputs = {value.name: value for value in self._session.get_outputs()}
        self._budget = trt.streamable.get(facts["graph"], 0)
        trt.count(self, "engine")

    @property
    def num_io_tensors(self) -> int:
        return len(self._inputs) + len(self._outputs)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._facts["profiles"])

    @property
    def device_memory_size_v2(self) -> int:
        return SCRATCH + len(self._inputs)

    @property
    def streamable_weights_size(self) -> int:
        return self._trt.streamable.get(self._facts["graph"], 0)

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget: int) -> None:
        self._budget = budget

    def get_tensor_name(self, index: int) -> str:
        return [*self._inputs, *self._outputs][index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType((self._inputs | self._outputs)[name].type)

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.HOST if name in self._trt.on_host else TensorLocation.DEVICE

    def get_tensor_shape(self, name: str) -> list[int]:
        shape = (self._inputs | self._outputs)[name].shape
        return [length if isinstance(length, int) else -1 for length in shape]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[list[int]]:
        return self._facts["profiles"][profile][name]

    def create_execution_context(self, how: Any) -> Any:
        if self._trt.refuses == "context":
            self._trt.complain(self._logger, "out of memory")
            return None
        strategy = how._strategy if isinstance(how, IRuntimeConfig) else how
        if strategy != ExecutionContextAllocationStrategy.USER_MANAGED:
            self._trt.gpu.wrong.append("a context brings scratch memory of its own")
        return (RtxContext if self._trt.is_rtx else IExecutionContext)(self, how)


class RtxEngine(ICudaEngine):
    """What `tensorrt` 10.3 has not."""

    def get_aliased_input_tensor(self, name: str) -> str | None:
        is_in_place = name.endswith(names.OUT) and not self._trt.copies_caches
        return name.removesuffix(names.OUT) if is_in_place else None

    def create_runtime_config(self) -> Any:
        return IRuntimeConfig(self._trt)


class IRuntimeConfig:
    def __init__(self, trt: FakeTensorRT) -> None:
        self._trt = trt
        self._strategy, self._cache = ExecutionContextAllocationStrategy.STATIC, None
        self.dynamic_shapes_kernel_specialization_strategy: Any = None
        self.cuda_graph_strategy: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self._strategy = strategy

    def create_runtime_cache(self) -> Any:
        return IRuntimeCache(self._trt)

    def set_runtime_cache(self, cache: Any) -> bool:
        self._cache = cache
        return True


class IRuntimeCache:
    """Kernels are the names of the graphs that ran; another version's are refused."""

    def __init__(self, trt: FakeTensorRT) -> None:
        self._version, self._kernels = trt.__version__, set[str]()

    def serialize(self) -> bytes:
        return "\n".join([self._version, *sorted(self._kernels)]).encode()

    def deserialize(self, content: bytes) -> bool:
        version, *kernels = content.decode().split("\n")
        if version != self._version:
            return False
        self._kernels.update(kernels)
        return True


class IExecutionContext:
    def __init__(self, engine: ICudaEngine, how: Any) -> None:
        self._engine, self._trt, self._gpu = engine, engine._trt, engine._trt.gpu
        self._cache = how._cache if isinstance(how, IRuntimeConfig) else None
        self._profile = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._scratch = (0, 0)
        self._trt.contexts.append((engine._facts["graph"], how))
        self._trt.count(self, "context")

    def set_device_memory(self, memory: int, size: int) -> None:
        self._scratch = (memory, size)

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self._profile = profile
        self._shapes.clear()
        return profile < self._engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self._engine.get_tensor_profile_shape(name, self._profile)
        if len(shape) != len(low) or not all(
            a <= n <= b for a, n, b in zip(low, shape, high, strict=True)
        ):
            return False
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return memory % 256 == 0 and memory != 0

    def get_tensor_shape(self, name: str) -> list[int]:
        lengths = {}
        for value in self._engine._inputs.values():
            shape = self._shapes.get(value.name, value.shape)
            lengths |= dict(zip(value.shape, shape, strict=True))
        value = (self._engine._inputs | self._engine._outputs)[name]
        shape = [lengths.get(axis, axis) for axis in value.shape]
        return [length if isinstance(length, int) else -1 for length in shape]

    def execute_async_v3(self, stream: int) -> bool:
        engine, gpu, graph = self._engine, self._gpu, self._engine._facts["graph"]
        if self._trt.refuses == graph or (self._trt.refuses == "capture" and gpu.captured):
            self._trt.complain(engine._logger, "no kernel fits")
            return False
        if engine.streamable_weights_size > engine.weight_streaming_budget_v2:
            if gpu.captured is not None:
                gpu.is_capture_broken = True
                return False
            gpu.wait()
        for name in engine._outputs:
            on_input = self._addresses.get(name.removesuffix(names.OUT))
            if name.endswith(names.OUT) and self._addresses[name] != on_input:
                self._trt.complain(engine._logger, f"{name} does not lie on its input")
                return False
        if self._scratch[1] < engine.device_memory_size_v2 or self._scratch[0] % 256:
            gpu.wrong.append(f"{graph} has too little scratch memory, or it is not aligned")
        self._trt.execute(self, stream)
        if self._cache is not None:
            self._cache._kernels.add(graph)
        return True

    def _compute(self) -> None:
        """Enqueue the graph, on a copy of its inputs as they lie in memory when it runs."""
        engine, gpu, scratch = self._engine, self._gpu, self._scratch
        reads = {name: self._read_at_run(name) for name in engine._inputs}
        writes = {name: self._addresses[name] for name in engine._outputs}

        def work() -> None:
            gpu.bytes_at(*scratch)[:] = 0xFF
            outputs = engine._session.run(
                list(writes), {name: read() for name, read in reads.items()}
            )
            for address, array in zip(writes.values(), outputs, strict=True):
                data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                gpu.bytes_at(address, data.size)[:] = data

        gpu.enqueue(work)

    def _ports(self, sides: Iterable[str]) -> dict[str, Port]:
        """Type, shape and address of inputs or outputs as they are bound now."""
        types = self._engine.get_tensor_dtype
        return {
            name: (
                np.dtype(_NUMPY[types(name).name]),
                tuple(self.get_tensor_shape(name)),
                self._addresses[name],
            )
            for name in sides
        }

    def _read_at_run(self, name: str) -> Any:
        """The input as it lies in memory when the work runs, not when it is enqueued."""
        address, shape = self._addresses[name], tuple(self.get_tensor_shape(name))
        dtype = np.dtype(_NUMPY[self._engine.get_tensor_dtype(name).name])
        size = int(np.prod(shape)) * dtype.itemsize
        if name in self._trt.on_host:
            now = self._gpu.host_bytes(address, size).copy()
            return lambda: now.view(dtype).reshape(shape)
        return lambda: self._gpu.bytes_at(address, size).copy().view(dtype).reshape(shape)

    def __del__(self) -> None:
        address, size = self._scratch
        if size and not self._gpu.holds(address):
            self._gpu.wrong.append("scratch memory went before a context that uses it")


class RtxContext(IExecutionContext):
    """What `tensorrt` 10.3 has not."""

    def is_stream_capturable(self, stream: int) -> bool:
        return self._trt.is_capturable


class FakeTensorRT(ModuleType):
    """The module.

    Args:
        gpu: On which engines run: a `FakeGpu`, or what answers in its place.
        is_rtx: As `tensorrt_rtx`, or as `tensorrt` 10.3, which cannot be asked for some things.

    Attributes:
        refuses: "engine", "context", "capture", or the graph whose launch fails.
        contexts: Graph and configuration of each context made.
        on_host: Inputs that are read with the CPU.
        streamable: Weight bytes by graph that can be streamed.
    """

    def __init__(self, gpu: Any, *, is_rtx: bool = True) -> None:
        super().__init__("tensorrt_rtx" if is_rtx else "tensorrt")
        self.__version__ = "1.7.1" if is_rtx else "10.3.0"
        self.gpu, self.is_rtx = gpu, is_rtx
        self.refuses = ""
        self.contexts: list[tuple[str, Any]] = []
        self.on_host: set[str] = set()
        self.streamable: dict[str, int] = {}
        self.copies_caches = False
        self.is_capturable = True
        self.ILogger, self.TensorIOMode, self.TensorLocation = ILogger, TensorIOMode, TensorLocation
        self.ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy
        if is_rtx:
            self.DynamicShapesKernelSpecializationStrategy = (
                DynamicShapesKernelSpecializationStrategy
            )
            self.CudaGraphStrategy = CudaGraphStrategy
        self.Runtime = lambda logger: Runtime(self, logger)

    def execute(self, context: IExecutionContext, stream: int) -> None:
        """Enqueue a context whose tensors are bound; another stand-in may compute elsewhere."""
        context._compute()

    def count(self, thing: Any, kind: str) -> None:
        """Note that a thing lives, until it does not."""
        self.gpu.live[kind] += 1
        weakref.finalize(thing, self.gpu.live.subtract, {kind: 1})

    def complain(self, logger: Any, message: str) -> None:
        logger.log(ILogger.Severity.ERROR, message)


def build_fakes(
    bundle: Path, target: str, trt: FakeTensorRT, gpu: engines.Gpu | None = None
) -> None:
    """Write the engines of a bundle, and their record, as `patchsieve build` would.

    Args:
        bundle: The bundle.
        target: For which target.
        trt: The library.
        gpu: The GPU that they are tied to, if any.
    """
    facts = files.read(bundle)
    folder = engines.folder_of(bundle, target)
    folder.mkdir(parents=True, exist_ok=True)
    graphs = [graph for graph in facts.targets[target] if not engines.misfit(facts, graph)]
    record = {graph: _engine(bundle, facts, target, graph, trt, gpu) for graph in graphs}
    engines.write_record(engines.Record(bundle, target, record))


def _engine(
    bundle: Path,
    facts: Manifest,
    target: str,
    graph: str,
    trt: FakeTensorRT,
    gpu: engines.Gpu | None,
) -> engines.Engine:
    file, ranges = facts.targets[target][graph], profiles(facts, graph, target)
    path = engines.engine_path(bundle, target, graph)
    content = {"graph": graph, "onnx": str(bundle / file), "profiles": _plain(ranges)}
    path.write_text(json.dumps(content))
    options = engines.Options()
    return engines.Engine(
        graph_sha256=facts.files[file].sha256,
        weights_sha256=engines.weights_hash(facts),
        library=engines.Library.of(trt),
        gpu=gpu,
        asked=options,
        options=options,
        rung="as asked",
        profiles=tuple(ranges),
        seconds=0.0,
        peak_bytes=None,
        base_bytes=None,
        **asdict(files.hash_file(path)),
    )


def _plain(ranges: Iterable[Any]) -> Any:
    return [{name: [list(shape) for shape in three] for name, three in r.items()} for r in ranges]
