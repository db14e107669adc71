"""Caches of one stage under ONNX Runtime, in the two forms of `patchsieve.contract.names`.

Both are bound to their session once and live as long as the binding. Neither is ever copied.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort

from patchsieve.contract import names
from patchsieve.contract.manifest import Stage
from patchsieve.contract.model import TextModel


@dataclass(frozen=True)
class View:
    """Part of a buffer as a tensor, for as long as the buffer lives."""

    device: str
    dtype: np.dtype
    shape: tuple[int, ...]
    address: int

    def bind_input(self, binding: Any, name: str) -> None:
        """Feed it to a graph."""
        binding.bind_input(name, self.device, 0, self.dtype, self.shape, self.address)

    def bind_output(self, binding: Any, name: str) -> None:
        """Have a graph write it."""
        binding.bind_output(name, self.device, 0, self.dtype, self.shape, self.address)


class Buffers(ABC):
    """Caches of a stage and their bindings.

    Args:
        sessions: The stage's, and that of its copy for single rows if it has one.
        stage: Its layers.
        text: The decoder's measures.
        dtype: Of the caches.
        device: "cpu" or "cuda".

    Attributes:
        outputs: The stage's outputs other than its caches, bound first.
        bindings: One for each session.
    """

    def __init__(
        self, sessions: Sequence[Any], stage: Stage, text: TextModel, dtype: str, device: str
    ) -> None:
        self.text, self.dtype, self.device = text, np.dtype(dtype), device
        self.names = [
            name
            for layer in range(stage.first, stage.last)
            for name in (names.key_cache(layer), names.value_cache(layer))
        ]
        caches = {name + suffix for name in self.names for suffix in (names.OUT, names.NEW)}
        self.outputs = [out.name for out in sessions[0].get_outputs() if out.name not in caches]
        self.bindings = [session.io_binding() for session in sessions]
        for binding in self.bindings:
            for name in self.outputs:
                binding.bind_output(name, device)

    @abstractmethod
    def bind(self, binding: Any, slot: int, count: int) -> None:
        """Prepare a binding for `count` rows after the `slot` rows present."""

    @abstractmethod
    def read(self, name: str, length: int) -> Any:
        """The cache as a decision takes it; the first `length` rows count."""

    @abstractmethod
    def rows(self, name: str, length: int) -> np.ndarray:
        """A copy of the first rows on the host, [1, G, length, D]."""

    @abstractmethod
    def clear(self, length: int) -> None:
        """Make the slots from `length` on harmless."""


class InPlace(Buffers):
    """Caches [1, G, S, D] in host memory, bound as input and output at once."""

    def __init__(self, slots: int, *of: Any) -> None:
        super().__init__(*of)
        shape = (1, self.text.num_kv_heads, slots, self.text.head_dim)
        # Zeroed pages take memory only when they are written.
        self.arrays = {name: np.zeros(shape, self.dtype) for name in self.names}
        self.values = {n: ort.OrtValue.ortvalue_from_numpy(a) for n, a in self.arrays.items()}
        for binding in self.bindings:
            for name, value in self.values.items():
                binding.bind_ortvalue_input(name, value)
                binding.bind_ortvalue_output(name + names.OUT, value)

    def bind(self, binding: Any, slot: int, count: int) -> None:
        """Nothing: the graph itself writes at `slot`."""

    def read(self, name: str, length: int) -> Any:
        """All slots, [1, G, S, D]."""
        return self.values[name]

    def rows(self, name: str, length: int) -> np.ndarray:
        """See `Buffers.rows`."""
        return self.arrays[name][:, :, :length].copy()

    def clear(self, length: int) -> None:
        """Zeros: a mask does not stop a NaN in an unused slot."""
        for array in self.arrays.values():
            array[:, :, length:] = 0


class NewRows(Buffers):
    """Buffers [1, S, G * D]: a graph sees the rows present and writes those after them."""

    def __init__(self, slots: int, *of: Any) -> None:
        super().__init__(*of)
        shape = (1, slots, self.text.num_kv_heads * self.text.head_dim)
        self.values = {name: self._allocate(shape) for name in self.names}

    def bind(self, binding: Any, slot: int, count: int) -> None:
        """The past as input, the rows after it as output."""
        for name in self.names:
            self._view(name, 0, slot).bind_input(binding, name)
            self._view(name, slot, count).bind_output(binding, name + names.NEW)

    def read(self, name: str, length: int) -> Any:
        """The rows present, [1, length, G * D]."""
        return self._view(name, 0, length)

    def rows(self, name: str, length: int) -> np.ndarray:
        """See `Buffers.rows`."""
        present = self.values[name].numpy()[:, :length]
        heads = present.reshape(1, length, self.text.num_kv_heads, self.text.head_dim)
        return heads.transpose(0, 2, 1, 3).copy()

    def clear(self, length: int) -> None:
        """Nothing: no graph sees a slot that holds no row."""

    def _allocate(self, shape: tuple[int, ...]) -> Any:
        if self.device != "cpu":
            return ort.OrtValue.ortvalue_from_shape_and_type(shape, self.dtype, self.device, 0)
        return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, self.dtype))

    def _view(self, name: str, start: int, count: int) -> View:
        value = self.values[name]
        width = value.shape()[2]
        address = value.data_ptr() + start * width * self.dtype.itemsize
        return View(self.device, self.dtype, (1, count, width), address)
