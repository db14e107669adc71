"""A GPU that exists in memory: the CUDA runtime's functions over plain byte arrays.

It is as unkind as a real one may be. Memory comes full of NaN and of numbers that are no index;
memory that was given back is an illegal address; work runs at the last moment or at once, so that
a host that reads too early, or writes again too early, gets other numbers.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

POISON = bytes.fromhex("ffffff7f")  # NaN as float32, float16 and bfloat16; as int64 far outside
FIRST = 0x7F00_0000_0000
TOTAL = 8 << 30


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorECCUncorrectable = 214
    cudaErrorNotReady = 600
    cudaErrorIllegalAddress = 700
    cudaErrorLaunchFailure = 719
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class cudaStreamCaptureMode(enum.IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


class IllegalAddress(Exception):
    """Work touched memory that is not there."""


class Event:
    def __init__(self) -> None:
        self.ms: float | None = None


class Graph:
    def __init__(self, work: list[Callable[[], None]]) -> None:
        self.work = work


class FakeGpu:
    """What the machine does, apart from how it is asked.

    Args:
        runs_late: Work waits until the host does; otherwise it is done when it is enqueued.
        has_host_addresses: An address is where the bytes lie, so that a library of the CPU can use
            it; otherwise addresses have gaps between them that nothing may touch.

    Attributes:
        calls: How often each function was called.
        live: Things that were made and not given back, by kind.
        wrong: What a program must never do, found on the way.
    """

    def __init__(self, runs_late: bool = True, *, has_host_addresses: bool = False) -> None:
        self.runs_late, self.has_host_addresses = runs_late, has_host_addresses
        self.device: dict[int, np.ndarray] = {}
        self.pinned: dict[int, np.ndarray] = {}
        self.total, self.used = TOTAL, 0
        self.next_address = FIRST
        self.queue: list[Callable[[], None]] = []
        self.captured: list[Callable[[], None]] | None = None
        self.is_capture_broken = False
        self.calls: Counter[str] = Counter()
        self.live: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.lost: cudaError_t | None = None
        self.failures: dict[str, tuple[int, cudaError_t]] = {}
        self.clock_ms = 0.0

    def fail(self, name: str, error: cudaError_t, after: int = 0) -> None:
        """Let a function fail once, after some calls that succeed."""
        self.failures[name] = (after, error)

    def bytes_at(self, address: int, size: int) -> np.ndarray:
        """Device memory, to be read or written."""
        for base, memory in self.device.items():
            if base <= address and address + size <= base + len(memory):
                return memory[address - base : address - base + size]
        raise IllegalAddress(f"{size} bytes at {address:#x}")

    def holds(self, address: int) -> bool:
        """Whether an address lies in device memory that was not given back."""
        return any(base <= address < base + len(m) for base, m in self.device.items())

    def host_bytes(self, address: int, size: int) -> np.ndarray:
        for base, memory in self.pinned.items():
            if base <= address and address + size <= base + len(memory):
                return memory[address - base : address - base + size]
        raise IllegalAddress(f"{size} page-locked bytes at {address:#x}")

    def enqueue(self, work: Callable[[], None]) -> None:
        if self.captured is not None:
            self.captured.append(work)
        elif self.runs_late:
            self.queue.append(work)
        else:
            self.do(work)

    def do(self, work: Callable[[], None]) -> None:
        self.clock_ms += 1.0
        try:
            work()
        except IllegalAddress as error:
            self.wrong.append(str(error))
            self.lost = cudaError_t.cudaErrorIllegalAddress

    def wait(self) -> None:
        while self.queue:
            self.do(self.queue.pop(0))

    def module(self) -> FakeCudaRuntime:
        """What a program imports."""
        return FakeCudaRuntime(self)


def _poisoned(size: int) -> np.ndarray:
    memory = np.frombuffer(bytearray(POISON * (size // len(POISON) + 65)), np.uint8)
    start = -memory.ctypes.data % 256  # as CUDA aligns
    return memory[start : start + size]


def _function(method: Callable[..., Any]) -> Callable[..., Any]:
    """Count a call, let it fail where a test says so, and return what CUDA's bindings return."""
    name = method.__name__

    def call(self: FakeCudaRuntime, *arguments: Any) -> tuple[Any, ...]:
        gpu = self._gpu
        gpu.calls[name] += 1
        if name in gpu.failures:
            left, error = gpu.failures[name]
            gpu.failures[name] = (left - 1, error)
            if left == 0:
                del gpu.failures[name]
                if name == "cudaStreamEndCapture":  # it ends all the same
                    gpu.captured = None
                if error >= 214 and error < 800 and error != cudaError_t.cudaErrorNotReady:
                    gpu.lost = error
                return (error, None)
        if gpu.lost is not None and name != "cudaGetErrorString":
            return (gpu.lost, None)
        out = method(self, *arguments)
        if gpu.lost is not None:  # found in this very call
            return (gpu.lost, None)
        return out if isinstance(out, tuple) else (out,)

    return call


_OK = cudaError_t.cudaSuccess


class FakeCudaRuntime:
    """Functions of `cuda.bindings.runtime`, by their own names."""

    cudaError_t = cudaError_t
    cudaMemcpyKind = cudaMemcpyKind
    cudaStreamCaptureMode = cudaStreamCaptureMode
    cudaStreamNonBlocking = 1

    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu = gpu

    def _not_while_capturing(self) -> cudaError_t | None:
        if self._gpu.captured is None:
            return None
        self._gpu.is_capture_broken = True
        return cudaError_t.cudaErrorStreamCaptureUnsupported

    @_function
    def cudaGetDeviceCount(self) -> Any:
        return _OK, 1

    @_function
    def cudaSetDevice(self, device: int) -> Any:
        return _OK

    @_function
    def cudaGetDeviceProperties(self, device: int) -> Any:
        return _OK, SimpleNamespace(name=b"Fake GPU", major=8, minor=6)

    @_function
    def cudaDriverGetVersion(self) -> Any:
        return _OK, 13000

    @_function
    def cudaGetErrorString(self, error: cudaError_t) -> Any:
        return _OK, b"meaning of " + error.name.encode()

    @_function
    def cudaGetLastError(self) -> Any:
        return _OK

    @_function
    def cudaPeekAtLastError(self) -> Any:
        return _OK

    @_function
    def cudaMemGetInfo(self) -> Any:
        return _OK, self._gpu.total - self._gpu.used, self._gpu.total

    @_function
    def cudaMalloc(self, size: int) -> Any:
        if error := self._not_while_capturing():
            return error, None
        gpu = self._gpu
        if gpu.used + size > gpu.total:
            return cudaError_t.cudaErrorMemoryAllocation, None
        memory = _poisoned(size)
        address = memory.ctypes.data if gpu.has_host_addresses else gpu.next_address
        gpu.next_address += -(-size // 512) * 512 + 512  # a gap, in which nothing may be touched
        gpu.device[address] = memory
        gpu.used += size
        gpu.live["device memory"] += 1
        return _OK, address

    @_function
    def cudaFree(self, address: int) -> Any:
        if error := self._not_while_capturing():
            return error
        gpu = self._gpu
        gpu.wait()
        if address not in gpu.device:
            gpu.wrong.append(f"freed twice: {address:#x}")
            return cudaError_t.cudaErrorInvalidValue
        gpu.used -= len(gpu.device.pop(address))
        gpu.live["device memory"] -= 1
        return _OK

    @_function
    def cudaMallocHost(self, size: int) -> Any:
        if error := self._not_while_capturing():
            return error, None
        memory = _poisoned(size)
        self._gpu.pinned[memory.ctypes.data] = memory
        self._gpu.live["pinned memory"] += 1
        return _OK, memory.ctypes.data

    @_function
    def cudaFreeHost(self, address: int) -> Any:
        if error := self._not_while_capturing():
            return error
        self._gpu.wait()
        del self._gpu.pinned[address]
        self._gpu.live["pinned memory"] -= 1
        return _OK

    @_function
    def cudaMemsetAsync(self, address: int, value: int, size: int, stream: int) -> Any:
        gpu = self._gpu

        def work() -> None:
            gpu.bytes_at(address, size)[:] = value

        gpu.enqueue(work)
        return _OK

    @_function
    def cudaMemset2DAsync(
        self, address: int, pitch: int, value: int, width: int, height: int, stream: int
    ) -> Any:
        gpu = self._gpu
        if width > pitch:
            return cudaError_t.cudaErrorInvalidValue

        def work() -> None:
            for row in range(height):
                gpu.bytes_at(address + row * pitch, width)[:] = value

        gpu.enqueue(work)
        return _OK

    @_function
    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: Any, stream: int) -> Any:
        gpu, kinds = self._gpu, cudaMemcpyKind

        def work() -> None:
            reads_host = kind == kinds.cudaMemcpyHostToDevice
            writes_host = kind == kinds.cudaMemcpyDeviceToHost
            data = (gpu.host_bytes if reads_host else gpu.bytes_at)(source, size)
            (gpu.host_bytes if writes_host else gpu.bytes_at)(to, size)[:] = data

        gpu.enqueue(work)
        return _OK

    @_function
    def cudaStreamCreateWithFlags(self, flags: int) -> Any:
        self._gpu.live["stream"] += 1
        return _OK, 77

    @_function
    def cudaStreamDestroy(self, stream: int) -> Any:
        self._gpu.live["stream"] -= 1
        return _OK

    @_function
    def cudaStreamSynchronize(self, stream: int) -> Any:
        if error := self._not_while_capturing():
            return error
        self._gpu.wait()
        return _OK

    @_function
    def cudaEventCreate(self) -> Any:
        self._gpu.live["event"] += 1
        return _OK, Event()

    @_function
    def cudaEventRecord(self, event: Event, stream: int) -> Any:
        gpu = self._gpu
        event.ms = None

        def work() -> None:
            event.ms = gpu.clock_ms

        gpu.enqueue(work)
        return _OK

    @_function
    def cudaEventElapsedTime(self, start: Event, end: Event) -> Any:
        if start.ms is None or end.ms is None:
            return cudaError_t.cudaErrorNotReady, None
        return _OK, end.ms - start.ms

    @_function
    def cudaEventDestroy(self, event: Event) -> Any:
        self._gpu.live["event"] -= 1
        return _OK

    @_function
    def cudaStreamBeginCapture(self, stream: int, mode: Any) -> Any:
        self._gpu.captured, self._gpu.is_capture_broken = [], False
        return _OK

    @_function
    def cudaStreamEndCapture(self, stream: int) -> Any:
        gpu = self._gpu
        work, gpu.captured = gpu.captured, None
        if gpu.is_capture_broken or work is None:
            return cudaError_t.cudaErrorStreamCaptureInvalidated, None
        gpu.live["graph"] += 1
        return _OK, Graph(work)

    @_function
    def cudaGraphInstantiate(self, graph: Graph, flags: int) -> Any:
        self._gpu.live["launchable graph"] += 1
        return _OK, Graph(list(graph.work))

    @_function
    def cudaGraphLaunch(self, graph: Graph, stream: int) -> Any:
        for work in graph.work:
            self._gpu.enqueue(work)
        return _OK

    @_function
    def cudaGraphDestroy(self, graph: Graph) -> Any:
        self._gpu.live["graph"] -= 1
        return _OK

    @_function
    def cudaGraphExecDestroy(self, graph: Graph) -> Any:
        self._gpu.live["launchable graph"] -= 1
        return _OK
