"""Blocks of GPU memory that go back when nobody holds them, and the way in and out of them.

All work runs in the order of one stream. So device memory that the host lets go may be given to
the next graph at once, although earlier work still reads it: that work comes first.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from patchsieve.contract.errors import CapacityError
from patchsieve.runtime.gpu.driver import ContextLostError, Driver

ALIGNMENT = 256  # bytes; what TensorRT asks of every address
_LARGEST_WASTE = 4  # an idle block serves requests of at least a quarter of it


class Block:
    """A piece of memory.

    Args:
        address: Where it begins.
        size: Bytes.
        release: Told the block's address and size when nobody holds it any more.
    """

    def __init__(self, address: int, size: int, release: Callable[[int, int], None]) -> None:
        self.address, self.size, self._release = address, size, release

    def __del__(self) -> None:
        self._release(self.address, self.size)


@dataclass(frozen=True)
class DeviceTensor:
    """A tensor on the GPU.

    Attributes:
        address: Of its first element.
        shape: In elements.
        dtype: Of the host's copy; bfloat16, which NumPy lacks, is its bits in uint16.
        owner: What must live as long as the tensor.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    owner: Any = None

    @property
    def size(self) -> int:
        """Bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class Pool:
    """Memory of one kind, kept between uses so that a request allocates nothing in the long run.

    Args:
        allocate: Address of new memory of a size.
        free: Gives an address back.
    """

    def __init__(self, allocate: Callable[[int], int], free: Callable[[int], None]) -> None:
        self._allocate, self._free = allocate, free
        self._idle: list[tuple[int, int]] = []  # (size, address)
        self._sizes: dict[int, int] = {}  # of every address that is not yet given back
        self._is_closed = False

    def take(self, size: int) -> Block:
        """A block of at least `size` bytes, not initialised.

        Raises:
            CapacityError: Memory is full.
        """
        size = rounded(max(size, 1))
        fitting = [idle for idle in self._idle if size <= idle[0] <= size * _LARGEST_WASTE]
        if fitting:
            best = min(fitting)
            self._idle.remove(best)
            return Block(best[1], best[0], self._put_back)
        return Block(self._new(size), size, self._put_back)

    def take_own(self, size: int) -> Block:
        """A block that goes back to the system, not to the pool: for what lives long."""
        size = max(size, 1)
        return Block(self._new(size), size, self._give_back)

    def bytes(self) -> int:
        """Bytes that are allocated, idle ones included."""
        return sum(self._sizes.values())

    def close(self) -> None:
        """Give everything back, also what somebody still holds: it must not be used any more."""
        self._is_closed = True
        self._idle.clear()
        while self._sizes:
            self._free(self._sizes.popitem()[0])

    def _new(self, size: int) -> int:
        try:
            address = self._allocate(size)
        except CapacityError:
            if not self._idle:
                raise
            while self._idle:  # sizes that nobody asks for now
                self._give_back(self._idle.pop()[1], 0)
            address = self._allocate(size)
        self._sizes[address] = size
        return address

    def _put_back(self, address: int, size: int) -> None:
        if not self._is_closed:
            self._idle.append((size, address))

    def _give_back(self, address: int, _: int) -> None:
        if not self._is_closed:
            del self._sizes[address]
            self._free(address)


def rounded(size: int) -> int:
    """A size class: at most a quarter more, so that sizes near each other share blocks."""
    step = max(ALIGNMENT, 1 << max(0, size.bit_length() - 3))
    return -(-size // step) * step


def aligned(size: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def host_bytes(block: Block) -> np.ndarray:
    """Page-locked memory as bytes, not a copy."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * block.size).from_address(block.address))


def part(
    content: np.ndarray, place: int, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> np.ndarray:
    """An array that begins at a byte of others, not a copy."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return content[place : place + size].view(dtype).reshape(shape)


class Memory:
    """Device memory and page-locked host memory of one bundle."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.device = Pool(driver.allocate, self._quietly(driver.free))
        self.pinned = Pool(driver.allocate_pinned, self._quietly(driver.free_pinned))

    def upload(self, arrays: Mapping[str, np.ndarray]) -> dict[str, DeviceTensor]:
        """Bring arrays to the GPU in one copy, without waiting for it."""
        places, size = {}, 0
        for name, array in arrays.items():
            places[name] = size
            size += aligned(max(array.nbytes, 1))
        pinned, device = self.pinned.take(size), self.device.take(size)
        content = host_bytes(pinned)
        for name, array in arrays.items():
            part(content, places[name], array.shape, array.dtype)[...] = array
        self.driver.keep(pinned)  # first: an error may come from elsewhere, the copy under way
        self.driver.upload(device.address, pinned.address, size)
        return {
            name: DeviceTensor(device.address + places[name], array.shape, array.dtype, device)
            for name, array in arrays.items()
        }

    def on_host(self, array: np.ndarray) -> DeviceTensor:
        """A copy in page-locked memory, for what a library reads with the CPU while it enqueues."""
        pinned = self.pinned.take(array.nbytes)
        part(host_bytes(pinned), 0, array.shape, array.dtype)[...] = array
        self.driver.keep(pinned)
        return DeviceTensor(pinned.address, array.shape, array.dtype, pinned)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceTensor:
        """A tensor whose contents mean nothing yet."""
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        block = self.device.take(size)
        return DeviceTensor(block.address, shape, dtype, block)

    def fetch(self, reason: str, tensors: Sequence[DeviceTensor]) -> list[np.ndarray]:
        """Bring tensors to the host together, in one wait."""
        places, size = [], 0
        for tensor in tensors:
            places.append(size)
            size += aligned(max(tensor.size, 1))
        pinned = self.pinned.take(size)
        self.driver.keep(pinned)  # first: if something below fails, copies may be under way
        for tensor, place in zip(tensors, places, strict=True):
            if tensor.size:
                self.driver.download(pinned.address + place, tensor.address, tensor.size)
        self.driver.synchronise(reason)
        content = host_bytes(pinned)
        return [
            part(content, place, tensor.shape, tensor.dtype).copy()
            for tensor, place in zip(tensors, places, strict=True)
        ]

    def close(self) -> None:
        """Give all of it back."""
        self.device.close()
        self.pinned.close()

    def _quietly(self, free: Callable[[int], None]) -> Callable[[int], None]:
        """A lost context has freed everything by itself."""

        def give_back(address: int) -> None:
            if not self.driver.lost:
                with contextlib.suppress(ContextLostError):
                    free(address)

        return give_back
