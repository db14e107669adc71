"""A stage's key/value cache on the GPU, in the two forms of `patchsieve.contract.names`."""

from __future__ import annotations

from abc import ABC, abstractmethod

from patchsieve.contract import names
from patchsieve.contract.errors import BundleError
from patchsieve.runtime.gpu.engine import Context, Engine, Port
from patchsieve.runtime.gpu.memory import ALIGNMENT, Block, DeviceTensor, Memory, aligned


def is_cache(port: Port) -> bool:
    """Whether a stage's input is the cache of a layer."""
    return port.is_input and port.name.startswith(("key_cache.", "value_cache."))


class DeviceCache(ABC):
    """Keys and values of a stage's layers, one block of memory, zeroed when made.

    Args:
        memory: Where the block comes from. It is freed when nobody holds the cache any more.
        engine: The stage's engine, whose tensors give layers and types.
        slots: Rows that each layer has room for.
        heads: G key/value heads of width D.
    """

    def __init__(self, memory: Memory, engine: Engine, slots: int, heads: tuple[int, int]) -> None:
        self.memory, self.engine, self.slots = memory, engine, slots
        self.num_kv_heads, self.head_dim = heads
        self.names = [port.name for port in engine.ports.values() if is_cache(port)]
        self.dtype = engine.ports[self.names[0]].dtype
        self.row_bytes = self.num_kv_heads * self.head_dim * self.dtype.itemsize
        each = aligned(slots * self.row_bytes)
        self.block: Block = memory.device.take_own(each * len(self.names))
        self.addresses = {
            name: self.block.address + place * each for place, name in enumerate(self.names)
        }
        memory.driver.zero(self.block.address, self.block.size)

    @abstractmethod
    def bind(self, context: Context, length: int, count: int) -> list[tuple[int, DeviceTensor]]:
        """Connect the cache to a context that adds `count` rows after `length` present ones.

        Returns:
            Where rows must be copied to once the context has run, and what holds them.
        """

    @abstractmethod
    def view(self, name: str, length: int) -> DeviceTensor:
        """A layer's keys or values as decisions read them, with `length` rows present."""

    @abstractmethod
    def clear(self, length: int) -> None:
        """Zero the slots after `length`."""


class InPlaceCache(DeviceCache):
    """[1, G, S, D], input and output at one address: the engine writes only the new rows."""

    def __init__(self, memory: Memory, engine: Engine, slots: int, heads: tuple[int, int]) -> None:
        super().__init__(memory, engine, slots, heads)
        for name in self.names:
            if not engine.updates_in_place(name, name + names.OUT):
                raise BundleError(
                    f"the engine {engine.graph} copies its cache instead of writing into it",
                    found=f"{name + names.OUT} is a buffer of its own",
                    do="build it again with the TensorRT that the target names",
                )

    def bind(self, context: Context, length: int, count: int) -> list[tuple[int, DeviceTensor]]:
        """The same addresses at every call; `slot` says where the rows go."""
        for name in self.names:
            tensor = self.view(name, length)
            context.bind(name, tensor)
            context.bind(name + names.OUT, tensor)
        return []

    def view(self, name: str, length: int) -> DeviceTensor:
        """The whole cache."""
        shape = (1, self.num_kv_heads, self.slots, self.head_dim)
        return DeviceTensor(self.addresses[name], shape, self.dtype, self)

    def clear(self, length: int) -> None:
        """The end of each head's slots, for all heads of a layer at once."""
        row = self.head_dim * self.dtype.itemsize
        if length < self.slots:
            for address in self.addresses.values():
                self.memory.driver.zero_rows(
                    address + length * row,
                    pitch=self.slots * row,
                    width=(self.slots - length) * row,
                    count=self.num_kv_heads,
                )


class NewRowsCache(DeviceCache):
    """[1, S, G * D]: the first rows come in as a view, the new ones are written after them."""

    def bind(self, context: Context, length: int, count: int) -> list[tuple[int, DeviceTensor]]:
        """The outputs follow the past if their address is aligned, else they are moved."""
        moves = []
        shape = (1, count, self.num_kv_heads * self.head_dim)
        for name in self.names:
            context.bind(name, self.view(name, length))
            place = self.addresses[name] + length * self.row_bytes
            if place % ALIGNMENT:
                rows = self.memory.empty(shape, self.dtype)
                moves.append((place, rows))
            else:
                rows = DeviceTensor(place, shape, self.dtype, self)
            context.bind(name + names.NEW, rows)
        return moves

    def view(self, name: str, length: int) -> DeviceTensor:
        """The rows present."""
        shape = (1, length, self.num_kv_heads * self.head_dim)
        return DeviceTensor(self.addresses[name], shape, self.dtype, self)

    def clear(self, length: int) -> None:
        """The end of each layer's rows."""
        if length < self.slots:
            rest = (self.slots - length) * self.row_bytes
            for address in self.addresses.values():
                self.memory.driver.zero(address + length * self.row_bytes, rest)


FORMS: dict[str, type[DeviceCache]] = {
    names.IN_PLACE: InPlaceCache,
    names.NEW_ROWS: NewRowsCache,
}
