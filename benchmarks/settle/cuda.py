"""The CUDA runtime by cuda-python, and an engine that runs on NumPy arrays.

torch is not needed. Work is ordered on one stream and every check waits for it: nothing is fast.
"""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from patchsieve.contract.errors import BackendMissingError, PatchsieveError
from patchsieve.runtime.trt.library import collect_messages, load_tensorrt, shared_logger

TO_DEVICE, TO_HOST = 1, 2  # cudaMemcpyKind
CAPTURE_THREAD = 1  # cudaStreamCaptureModeThreadLocal
SM_MAJOR, SM_MINOR = 75, 76  # cudaDeviceAttr

# Where a call takes an enumeration: the argument, and its name.
_ENUMS = {
    "cudaMemcpy": (3, "cudaMemcpyKind"),
    "cudaMemcpyAsync": (3, "cudaMemcpyKind"),
    "cudaStreamBeginCapture": (1, "cudaStreamCaptureMode"),
    "cudaDeviceGetAttribute": (0, "cudaDeviceAttr"),
}


class CudaError(PatchsieveError):
    """A CUDA call failed."""


class Cuda:
    """The CUDA runtime: `call(name, *arguments)` gives the call's results or raises CudaError."""

    def __init__(self) -> None:
        """Import the binding.

        Raises:
            BackendMissingError: There is none.

        """
        module = _first_module("cuda.bindings.runtime", "cuda.cudart")
        if module is None:
            raise BackendMissingError(
                "no CUDA binding is installed",
                found="neither cuda.bindings.runtime nor cuda.cudart",
                do="pip install cuda-python",
            )
        self._python: Any = module
        self.source = module.__name__

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the runtime.

        Raises:
            CudaError: It does not return cudaSuccess.

        """
        values = list(arguments)
        if name in _ENUMS:
            place, kind = _ENUMS[name]
            values[place] = getattr(self._python, kind)(values[place])
        try:
            status, *results = getattr(self._python, name)(*values)
        except RuntimeError as error:  # cuda-python up to 12.8, where libcuda is absent
            raise CudaError(f"{name} failed", found=str(error)) from error
        if int(status):
            found = f"CUDA error {int(status)}: {self._text(status)}"
            raise CudaError(f"{name} failed", found=found)
        return results[0] if len(results) == 1 else tuple(results)

    def _text(self, status: Any) -> str:
        _, text = self._python.cudaGetErrorString(status)
        return text.decode() if isinstance(text, bytes) else str(text)

    def compute_capability(self) -> str:
        """Compute capability of device 0, such as `9.0`.

        Raises:
            BackendMissingError: There is no device.

        """
        try:
            count = self.call("cudaGetDeviceCount")
        except CudaError as error:
            raise BackendMissingError(
                "no CUDA device answers", found=str(error), do="run where an NVIDIA driver is"
            ) from error
        if not count:
            raise BackendMissingError("no CUDA device answers", do="run where an NVIDIA GPU is")
        major, minor = (self.call("cudaDeviceGetAttribute", a, 0) for a in (SM_MAJOR, SM_MINOR))
        return f"{major}.{minor}"

    def versions(self) -> dict[str, str]:
        """CUDA of the driver and of the runtime, and where the runtime comes from."""
        driver, runtime = (self.call(f"cuda{n}GetVersion") for n in ("Driver", "Runtime"))
        text = [f"{v // 1000}.{v % 1000 // 10}" for v in (driver, runtime)]
        return {"driver_cuda": text[0], "runtime_cuda": text[1], "cuda_from": self.source}

    def used_bytes(self) -> int:
        """Device memory in use, by everyone."""
        free, total = self.call("cudaMemGetInfo")
        return total - free


def _first_module(*names: str) -> ModuleType | None:
    for name in names:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None


class Engine:
    """A deserialised engine, the buffers of its inputs and outputs, and its contexts."""

    def __init__(self, cuda: Cuda, path: Path, target: str) -> None:
        """Load an engine.

        Raises:
            PatchsieveError: TensorRT refuses it; the message holds everything that it said.

        """
        self.cuda, self.trt = cuda, load_tensorrt(target)
        self.stream = cuda.call("cudaStreamCreate")
        with collect_messages(self.trt) as messages:
            runtime = self.trt.Runtime(shared_logger(self.trt))
            self.runtime = runtime
            self.engine = runtime.deserialize_cuda_engine(path.read_bytes()) if runtime else None
        if self.engine is None:
            raise PatchsieveError("the engine does not load", found=" / ".join(messages.errors))
        self.contexts: list[Any] = []
        self.buffers: dict[str, tuple[int, int]] = {}  # tensor -> address, bytes
        self.pairs: dict[str, str] = {}  # output -> the input whose memory it shares

    @property
    def tensors(self) -> list[str]:
        """Names of inputs and outputs."""
        return [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]

    def is_input(self, name: str) -> bool:
        """Whether a tensor is an input."""
        return self.engine.get_tensor_mode(name) == self.trt.TensorIOMode.INPUT

    def add_context(self, profile: int = 0, shared: tuple[int, int] | None = None) -> int:
        """Create a context on a profile; `shared` is (address, bytes) for its activations."""
        if shared is None:
            size = max(int(self.engine.device_memory_size_v2), 256)
            shared = (int(self.cuda.call("cudaMalloc", size)), size)
        with collect_messages(self.trt) as messages:
            # An engine that was built with REQUIRE_USER_ALLOCATION takes no other strategy.
            strategy = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
            context = self.engine.create_execution_context(strategy)
            done = context is not None and context.set_optimization_profile_async(
                profile, int(self.stream)
            )
        if not done:
            raise PatchsieveError(
                f"no context on profile {profile}", found=" / ".join(messages.errors)
            )
        context.set_device_memory(*shared)
        self.synchronize()
        self.contexts.append(context)
        return len(self.contexts) - 1

    def write(self, name: str, value: np.ndarray) -> None:
        """Copy an array to a tensor's buffer, on the stream."""
        value = np.ascontiguousarray(value)
        address = self.reserve(name, value.nbytes)
        self.cuda.call(
            "cudaMemcpyAsync", address, value.ctypes.data, value.nbytes, TO_DEVICE, self.stream
        )
        self.synchronize()  # the array may be temporary

    def reserve(self, name: str, nbytes: int) -> int:
        """Address of a tensor's buffer of at least `nbytes`."""
        name = self.pairs.get(name, name)
        address, room = self.buffers.get(name, (0, 0))
        if room < nbytes:
            address = int(self.cuda.call("cudaMalloc", max(nbytes, 256)))
            self.buffers[name] = (address, nbytes)
        return address

    def prepare(self, inputs: dict[str, np.ndarray], context: int = 0) -> None:
        """Write inputs, set shapes, and give every tensor its address."""
        ctx = self.contexts[context]
        for name, value in inputs.items():
            self.write(name, value)
            if not ctx.set_input_shape(name, value.shape):
                raise PatchsieveError(f"input {name} refuses the shape {value.shape}")
        for name in self.tensors:
            if self.is_input(name):
                address = self.buffers[name][0]
            else:
                shape = tuple(ctx.get_tensor_shape(name))
                dtype = np.dtype(self.trt.nptype(self.engine.get_tensor_dtype(name)))
                address = self.reserve(name, int(np.prod(shape)) * dtype.itemsize)
            ctx.set_tensor_address(name, address)

    def enqueue(self, context: int = 0) -> None:
        """Put one call on the stream.

        Raises:
            PatchsieveError: TensorRT refuses; the message holds everything that it said.

        """
        with collect_messages(self.trt) as messages:
            done = self.contexts[context].execute_async_v3(int(self.stream))
        if not done:
            raise PatchsieveError("the engine does not run", found=" / ".join(messages.errors))

    def run(self, inputs: dict[str, np.ndarray], context: int = 0) -> dict[str, np.ndarray]:
        """Run once and read every output."""
        self.prepare(inputs, context)
        self.enqueue(context)
        self.synchronize()
        return {n: self.read(n, context) for n in self.tensors if not self.is_input(n)}

    def read(self, name: str, context: int = 0) -> np.ndarray:
        """Copy a tensor to the host."""
        ctx = self.contexts[context]
        dtype = np.dtype(self.trt.nptype(self.engine.get_tensor_dtype(name)))
        value = np.empty(tuple(ctx.get_tensor_shape(name)), dtype)
        address, _ = self.buffers[self.pairs.get(name, name)]
        self.cuda.call("cudaMemcpy", value.ctypes.data, address, value.nbytes, TO_HOST)
        return value

    def synchronize(self) -> None:
        """Wait for the stream."""
        self.cuda.call("cudaStreamSynchronize", self.stream)

    def capture(self, context: int = 0) -> Any:
        """Capture one call as a CUDA graph, ready to launch."""
        self.cuda.call("cudaStreamBeginCapture", self.stream, CAPTURE_THREAD)
        try:
            self.enqueue(context)
        except PatchsieveError:
            with contextlib.suppress(CudaError):  # the first error says why
                self.cuda.call("cudaStreamEndCapture", self.stream)
            raise
        graph = self.cuda.call("cudaStreamEndCapture", self.stream)
        return self.cuda.call("cudaGraphInstantiate", graph, 0)

    def launch(self, graph: Any) -> None:
        """Launch a captured call and wait for it."""
        self.cuda.call("cudaGraphLaunch", graph, self.stream)
        self.synchronize()
