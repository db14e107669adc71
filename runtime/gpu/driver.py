"""The GPU's driver in few verbs: memory, one stream, waits with a name, captured graphs.

All work of a bundle goes through one stream, in order. The host waits for it in `synchronise`
alone, which counts each wait under its reason, so that none can hide. What is called here are the
functions of cuda-python's `cuda.bindings.runtime` (12.8 and later) or `cuda.cudart` (before), which
carry the same names and return `(error, value...)`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from typing import Any

from patchsieve.contract.errors import BackendMissingError, CapacityError, PatchsieveError
from patchsieve.runtime.board import machine
from patchsieve.runtime.board.abilities import cuda_python_line
from patchsieve.runtime.trt.engines import Gpu

log = logging.getLogger(__name__)

# After these the process's context answers every call with the same error.
_STICKY = {
    "cudaErrorAssert",
    "cudaErrorContained",
    "cudaErrorContextIsDestroyed",
    "cudaErrorECCUncorrectable",
    "cudaErrorHardwareStackError",
    "cudaErrorIllegalAddress",
    "cudaErrorIllegalInstruction",
    "cudaErrorInvalidAddressSpace",
    "cudaErrorInvalidPc",
    "cudaErrorLaunchFailure",
    "cudaErrorLaunchTimeout",
    "cudaErrorMisalignedAddress",
    "cudaErrorNvlinkUncorrectable",
    "cudaErrorTensorMemoryLeak",
    "cudaErrorUnknown",
}
_OUT_OF_MEMORY = "cudaErrorMemoryAllocation"
_OLD_DRIVER = ("cudaErrorInsufficientDriver", "cudaErrorCallRequiresNewerDriver")


class CudaError(PatchsieveError):
    """A call of the driver failed, and nothing else did: later calls may succeed.

    Attributes:
        name: The error's name, such as cudaErrorInvalidValue.
    """

    def __init__(self, call: str, name: str, meaning: str) -> None:
        super().__init__(
            f"the GPU's driver refuses {call}",
            found=f"{name}: {meaning}",
            do="see patchsieve doctor: the driver may be too old; else build the engines again",
        )
        self.name = name


class ContextLostError(PatchsieveError):
    """The GPU's context is gone, with all that this process holds on the GPU."""


def load_cudart(target: str) -> Any:
    """Import cuda-python's binding of the CUDA runtime.

    Raises:
        BackendMissingError: It is not installed.
    """
    failures = []
    for name in ("cuda.bindings.runtime", "cuda.cudart"):
        try:
            return import_module(name)
        except (ImportError, OSError) as error:  # OSError: a shared library that does not load
            failures.append(error)
    raise BackendMissingError(
        f"target {target} needs the Python package cuda-python",
        found=failures[0],
        do=cuda_python_line(machine.jetson(machine.Probes())),
    ) from failures[0]


def _no_driver(found: object) -> BackendMissingError:
    line = cuda_python_line(machine.jetson(machine.Probes()), is_too_new=True)
    return BackendMissingError(
        "the NVIDIA driver is absent or older than cuda-python",
        found=found,
        do=f"install or update the driver, or {line}",
    )


class Driver:
    """One GPU, one stream.

    Args:
        cuda: The module with the runtime's functions.

    Attributes:
        gpu: Its name and abilities.
        waits: How often the host waited for the GPU, by reason.
        stream: Handle of the stream.

    Raises:
        BackendMissingError: There is no GPU, or its driver is absent or too old.
    """

    def __init__(self, cuda: Any) -> None:
        self.cuda = cuda
        self.waits: Counter[str] = Counter()
        self.lost: str | None = None
        self.stream: Any = None
        self._kept: list[Any] = []
        self._is_capturing = False
        self._to_free: list[tuple[str, int]] = []
        self._first_contact()
        self.gpu = self._gpu()
        self.stream = self.call("cudaStreamCreateWithFlags", cuda.cudaStreamNonBlocking)

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the runtime and return its value.

        Raises:
            ContextLostError: The context is lost, now or since an earlier call.
            CapacityError: The GPU's memory is full.
            CudaError: Any other error.
        """
        if self.lost:
            raise self._lost_error()
        try:
            error, *values = getattr(self.cuda, name)(*arguments)
        except RuntimeError as problem:  # a function that an older driver does not have
            raise CudaError(name, "RuntimeError", str(problem)) from problem
        if int(error) != 0:
            raise self._error(name, error)
        return values[0] if values else None

    # Memory. A caller outside runtime/gpu/memory.py holds blocks, never addresses of its own.

    def allocate(self, size: int) -> int:
        """Address of new device memory, not initialised."""
        return int(self.call("cudaMalloc", size))

    def allocate_pinned(self, size: int) -> int:
        """Address of new page-locked host memory, which the GPU reads and writes by itself."""
        return int(self.call("cudaMallocHost", size))

    def free(self, address: int) -> None:
        """Give device memory back. CUDA waits for the whole device in this call."""
        self._free("cudaFree", address)

    def free_pinned(self, address: int) -> None:
        """Give page-locked memory back, which waits too."""
        self._free("cudaFreeHost", address)

    def memory(self) -> tuple[int, int]:
        """Free and total bytes of the GPU."""
        error, free, total = self.cuda.cudaMemGetInfo()
        return (int(free), int(total)) if int(error) == 0 else (0, 0)

    # Work, in the order of the stream. The host continues at once.

    def upload(self, address: int, pinned: int, size: int) -> None:
        """Copy page-locked memory to the device."""
        self._copy(address, pinned, size, "cudaMemcpyHostToDevice")

    def download(self, pinned: int, address: int, size: int) -> None:
        """Copy device memory to page-locked memory."""
        self._copy(pinned, address, size, "cudaMemcpyDeviceToHost")

    def move(self, address: int, source: int, size: int) -> None:
        """Copy device memory to device memory."""
        self._copy(address, source, size, "cudaMemcpyDeviceToDevice")

    def zero(self, address: int, size: int) -> None:
        """Fill with zeros."""
        self.call("cudaMemsetAsync", address, 0, size, self.stream)

    def zero_rows(self, address: int, pitch: int, width: int, count: int) -> None:
        """Fill `width` bytes with zeros, `count` times, `pitch` bytes apart."""
        self.call("cudaMemset2DAsync", address, pitch, 0, width, count, self.stream)

    def keep(self, thing: Any) -> None:
        """Hold something that enqueued work still reads, until the host has waited for it."""
        self._kept.append(thing)

    def synchronise(self, reason: str) -> None:
        """Wait until all enqueued work is done. The only place where the host waits for results.

        Args:
            reason: What is waited for; counted in `waits`.
        """
        self.waits[reason] += 1
        self.call("cudaStreamSynchronize", self.stream)
        self._kept.clear()

    # Events.

    def event(self) -> Any:
        """A new event that takes the time."""
        return self.call("cudaEventCreate")

    def record(self, event: Any) -> None:
        """Note the time when the work so far is done."""
        self.call("cudaEventRecord", event, self.stream)

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Milliseconds between two events that have passed."""
        return float(self.call("cudaEventElapsedTime", start, end))

    def destroy_event(self, event: Any) -> None:
        """Give an event back."""
        self.call("cudaEventDestroy", event)

    # Captured graphs.

    def capture(self, work: Callable[[], None]) -> Any:
        """Record what `work` enqueues, without running it, and make it launchable.

        Raises:
            CudaError: Something in `work` cannot be captured. The stream is as before.
        """
        mode = self.cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.call("cudaStreamBeginCapture", self.stream, mode)
        self._is_capturing = True
        try:
            work()
        except BaseException:
            if not self.lost:
                self._abandon_capture()
            raise
        else:
            graph = self.call("cudaStreamEndCapture", self.stream)
        finally:
            self._is_capturing = False
            self._free_the_rest()
        try:
            return self.call("cudaGraphInstantiate", graph, 0)
        finally:
            self.call("cudaGraphDestroy", graph)

    def launch(self, graph: Any) -> None:
        """Run a captured graph after the work so far."""
        self.call("cudaGraphLaunch", graph, self.stream)

    def destroy_graph(self, graph: Any) -> None:
        """Give a launchable graph back."""
        self.call("cudaGraphExecDestroy", graph)

    def _gpu(self) -> Gpu:
        facts = self.call("cudaGetDeviceProperties", 0)
        name = facts.name.decode() if isinstance(facts.name, bytes) else str(facts.name)
        version = int(self.call("cudaDriverGetVersion"))
        return Gpu(
            name=name.rstrip("\0"),
            compute_capability=f"{facts.major}.{facts.minor}",
            driver=f"{version // 1000}.{version % 1000 // 10}",
        )

    def check(self) -> None:
        """Report an error that an earlier call left, without waiting for what is under way."""
        self.call("cudaPeekAtLastError")

    def close(self) -> None:
        """Give the stream back."""
        stream, self.stream = self.stream, None
        self._kept.clear()
        if stream is not None and not self.lost:
            self.call("cudaStreamDestroy", stream)

    def _free(self, call: str, address: int) -> None:
        if self._is_capturing:  # Python may let a block go at any time, and CUDA forbids it then
            self._to_free.append((call, address))
            return
        self.waits["memory is given back"] += 1
        self.call(call, address)

    def _free_the_rest(self) -> None:
        while self._to_free and not self.lost:
            self._free(*self._to_free.pop())

    def _copy(self, to: int, source: int, size: int, kind: str) -> None:
        self.call(
            "cudaMemcpyAsync",
            to,
            source,
            size,
            getattr(self.cuda.cudaMemcpyKind, kind),
            self.stream,
        )

    def _first_contact(self) -> None:
        """Find the GPU and make its context current."""
        try:
            error, *counted = self.cuda.cudaGetDeviceCount()
        except RuntimeError as problem:  # how cuda-python up to 12.8 says that there is no libcuda
            raise _no_driver(problem) from problem
        name = error.name
        if name in _OLD_DRIVER:
            raise _no_driver(self._meaning(error))
        if int(error) != 0 or int(counted[0]) == 0:
            raise BackendMissingError(
                "this machine has no NVIDIA GPU that can be used",
                found=name if int(error) else "0 devices",
                do="run with --target cpu, or let this process see the GPU (CUDA_VISIBLE_DEVICES, "
                "docker --gpus all)",
            )
        self.call("cudaSetDevice", 0)

    def _abandon_capture(self) -> None:
        """Take the stream out of a capture that failed; what it returns no longer matters."""
        error, *graph = self.cuda.cudaStreamEndCapture(self.stream)
        if int(error) == 0 and graph and graph[0] is not None:
            self.cuda.cudaGraphDestroy(graph[0])
        self.cuda.cudaGetLastError()

    def _error(self, call: str, error: Any) -> PatchsieveError:
        name = error.name
        if name in _STICKY:
            self.lost = f"{name}: {self._meaning(error)}"
            return self._lost_error()
        self.cuda.cudaGetLastError()  # else the next library that asks takes it for its own
        if name == _OUT_OF_MEMORY:
            free, total = self.memory()
            return CapacityError(
                "the GPU's memory is full",
                found=f"{free / 1e9:.2f} of {total / 1e9:.2f} GB free",
                do="close other programs or bundles, or export with smaller --max-text-tokens, "
                "--max-images or --budget",
            )
        return CudaError(call, name, self._meaning(error))

    def _lost_error(self) -> ContextLostError:
        return ContextLostError(
            "the GPU context is lost, and with it all that this process holds on the GPU",
            found=self.lost,
            do="start the program again and load the bundle again; if it comes back, build the "
            "engines again",
        )

    def _meaning(self, error: Any) -> str:
        _, text = self.cuda.cudaGetErrorString(error)
        return text.decode() if isinstance(text, bytes) else str(text)
