"""An engine of TensorRT, and its contexts: one for each optimisation profile.

The names used here are the same in `tensorrt` 10.3 to 11.x and `tensorrt_rtx` 1.7.1. What only some
of them have is found by asking for it.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from patchsieve.contract.errors import BundleError, CapacityError, ShapeError
from patchsieve.runtime.gpu.driver import Driver
from patchsieve.runtime.gpu.memory import DeviceTensor
from patchsieve.runtime.trt.library import Messages, collect_messages

PREFILL, DECODE = 0, 1  # profiles of a stage, in the order in which they are built

Range = tuple[tuple[int, ...], tuple[int, ...]]  # smallest and largest shape

# NumPy has no bfloat16: the host carries its bits.
_DTYPES = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "BF16": np.uint16,
    "INT32": np.int32,
    "INT64": np.int64,
    "BOOL": np.bool_,
}


@dataclass(frozen=True)
class Port:
    """An input or output of an engine.

    Attributes:
        shape: -1 where it changes from call to call.
        is_on_host: TensorRT reads it with the CPU, because shapes follow from it.
        ranges: Smallest and largest shape in each profile; of inputs.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    is_input: bool
    is_on_host: bool
    ranges: tuple[Range, ...]


def as_port(array: np.ndarray, port: Port) -> np.ndarray:
    """An array of the host in the type that an engine takes; only whole numbers change theirs.

    Raises:
        ShapeError: The types differ.
    """
    is_whole = array.dtype.kind in "iu" and port.dtype.kind == "i"
    if array.dtype != port.dtype and not is_whole:
        raise _other_type(port, array.dtype)
    return np.ascontiguousarray(array, port.dtype)


def _other_type(port: Port, found: np.dtype[Any]) -> ShapeError:
    return ShapeError(
        f"{port.name} has another type than the engine takes",
        found=found,
        expected=port.dtype,
        do="export the bundle and build its engines again",
    )


def _remedy(messages: Messages) -> str:
    """What may help an engine that the library does not take, by what the library said of it."""
    if messages.shortage() is None:
        return "build the engines again with the TensorRT that is here"
    return "close other programs that use the GPU, or export with smaller --max-text-tokens"


class Engine:
    """A deserialised engine.

    Args:
        trt: The library.
        runtime: Its runtime.
        graph: Name of the graph.
        path: The engine's file.

    Raises:
        BundleError: The library does not take the file, or a tensor has a type unknown here.
    """

    def __init__(self, trt: ModuleType, runtime: Any, graph: str, path: Path) -> None:
        self.trt, self.graph = trt, graph
        with collect_messages(trt) as messages, path.open("rb") as file:
            # Mapped, not read: on a board the GPU's memory is the host's, where a second copy of
            # the weights may not fit. The map goes when the library lets go of it.
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self.engine = runtime.deserialize_cuda_engine(content)
            if self.engine is None:
                raise BundleError(
                    f"{trt.__name__} {trt.__version__} cannot load the engine {path.name}",
                    found=messages.reason(),
                    do=_remedy(messages),
                )
        self.ports = {port.name: port for port in self._ports()}
        self.num_profiles = int(self.engine.num_optimization_profiles)

    @property
    def activation_bytes(self) -> int:
        """Scratch memory that a context of any profile needs while it runs."""
        return int(self.engine.device_memory_size_v2)

    @property
    def streamed_bytes(self) -> int:
        """Weights that stay in host memory and are copied in at every call."""
        size = int(self.engine.streamable_weights_size)
        return max(0, size - int(self.engine.weight_streaming_budget_v2)) if size else 0

    def outputs(self) -> list[Port]:
        """What comes out."""
        return [port for port in self.ports.values() if not port.is_input]

    def close(self) -> None:
        """Give back the weights, whoever still holds this object: a traceback, for instance."""
        self.engine = None

    def updates_in_place(self, name: str, output: str) -> bool:
        """Whether an output is the buffer of an input; yes where the library cannot be asked."""
        ask = getattr(self.engine, "get_aliased_input_tensor", None)
        return ask is None or ask(output) == name

    def _ports(self) -> list[Port]:
        trt, engine = self.trt, self.engine
        found = []
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            kind = engine.get_tensor_dtype(name).name
            if kind not in _DTYPES:
                raise BundleError(
                    f"the engine {self.graph} has a tensor of a type that is not known here",
                    found=f"{name}: {kind}",
                    expected=", ".join(_DTYPES),
                    do="export the bundle again and build its engines with this version",
                )
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            shape = tuple(engine.get_tensor_shape(name))
            found.append(
                Port(
                    name=name,
                    dtype=np.dtype(_DTYPES[kind]),
                    shape=shape,
                    is_input=is_input,
                    is_on_host=engine.get_tensor_location(name) == trt.TensorLocation.HOST,
                    ranges=self._ranges(name, shape) if is_input else (),
                )
            )
        return found

    def _ranges(self, name: str, shape: tuple[int, ...]) -> tuple[Range, ...]:
        numbers = range(self.engine.num_optimization_profiles)
        if -1 not in shape:
            return tuple((shape, shape) for _ in numbers)
        shapes = [self.engine.get_tensor_profile_shape(name, number) for number in numbers]
        return tuple((tuple(low), tuple(high)) for low, _, high in shapes)


class Context:
    """What runs an engine in one profile. Its scratch memory is the bundle's shared block.

    Args:
        engine: The engine.
        profile: Number of the profile, for ever.
        driver: On whose stream it runs.
        config: A runtime configuration, of libraries that have it; it asks for scratch memory
            from outside.
    """

    def __init__(self, engine: Engine, profile: int, driver: Driver, config: Any = None) -> None:
        self.engine, self.profile, self.driver = engine, profile, driver
        trt = engine.trt
        with collect_messages(trt) as messages:
            strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
            create = engine.engine.create_execution_context
            self.context = create(strategy) if config is None else create(config)
            if self.context is None:
                raise BundleError(
                    f"{trt.__name__} {trt.__version__} cannot prepare the engine {engine.graph}",
                    found=messages.reason(),
                    do=_remedy(messages),
                )
            if profile:
                self._choose_profile(messages)
        self.has_run = False
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def _choose_profile(self, messages: Messages) -> None:
        choose = self.context.set_optimization_profile_async
        try:
            is_chosen = choose(self.profile, int(self.driver.stream))
        except RuntimeError as error:  # how 10.x says no
            raise self._refused(f"profile {self.profile}", messages.reason()) from error
        if not is_chosen:
            raise self._refused(f"profile {self.profile}", messages.reason())

    def use_scratch(self, address: int, size: int) -> None:
        """Compute in this block, which other contexts use before and after."""
        self.context.set_device_memory(address, size)

    def bind(self, name: str, tensor: DeviceTensor) -> None:
        """Connect an input or output to memory; an input's shape is the tensor's.

        Raises:
            CapacityError: The shape lies outside the profile.
            ShapeError: The type is another one.
        """
        port = self.engine.ports[name]
        if tensor.dtype != port.dtype:
            raise _other_type(port, tensor.dtype)
        if port.is_input and self._shapes.get(name) != tensor.shape:
            self._check_shape(port, tensor.shape)
            if -1 in port.shape and not self.context.set_input_shape(name, tensor.shape):
                raise self._refused(f"{name} of shape {list(tensor.shape)}")
            self._shapes[name] = tensor.shape
        if self._addresses.get(name) != tensor.address:
            if not self.context.set_tensor_address(name, tensor.address):
                raise self._refused(f"the address of {name}")
            self._addresses[name] = tensor.address

    def shape_of(self, output: str) -> tuple[int, ...]:
        """Shape of an output, once all inputs are bound."""
        shape = tuple(self.context.get_tensor_shape(output))
        if any(length < 0 for length in shape):
            raise self._refused(f"{output}, whose shape {list(shape)} depends on values")
        return shape

    def enqueue(self) -> None:
        """Run after the work that is on the stream, without waiting.

        Raises:
            BundleError: TensorRT refuses.
        """
        with collect_messages(self.engine.trt) as messages:
            if not self.context.execute_async_v3(int(self.driver.stream)):
                self.driver.check()
                raise self._refused("its tensors", messages.reason())
        self.has_run = True

    def is_capturable(self) -> bool:
        """Whether the library says that a CUDA graph can hold it; yes where it cannot be asked.

        It knows only when all is bound, so it is asked after a first run.
        """
        ask = getattr(self.context, "is_stream_capturable", None)
        return ask is None or bool(ask(int(self.driver.stream)))

    def close(self) -> None:
        """Give back what the library holds."""
        self.context = None

    def _check_shape(self, port: Port, shape: Sequence[int]) -> None:
        low, high = port.ranges[self.profile]
        if len(shape) != len(low) or not all(
            a <= length <= b for a, length, b in zip(low, shape, high, strict=True)
        ):
            raise CapacityError(
                f"the request does not fit the engine of {self.engine.graph}",
                found=f"{port.name} {list(shape)}",
                expected=f"{list(low)} to {list(high)}",
                do="ask for less, or export with larger limits and build again",
            )

    def _refused(self, what: str, reason: str = "") -> BundleError:
        trt = self.engine.trt
        return BundleError(
            f"{trt.__name__} {trt.__version__} fails at the engine {self.engine.graph}",
            found=f"{what}: {reason}" if reason else what,
            do="build the engines again",
        )
