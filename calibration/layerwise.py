"""A model fed layer by layer: one layer's weights in memory, the rows between layers on disk.

The modules are those that export makes graphs of, run eagerly in float32. A step feeds every block
of rows (an image in the tower, a conversation in the decoder) through one module and writes what
comes out. Meanwhile hooks add up what the module's matrices read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from patchsieve.contract.writing import one_line
from patchsieve.export.graphs.layers import Linear
from patchsieve.export.quantise.statistics import InputStatistics
from patchsieve.export.weights import Source, Weight, weights_of

Write = Callable[[Tensor], object]
_BYTES = 4  # of a float32 number


@dataclass(frozen=True)
class Rows:
    """Rows on disk, float32, in blocks [n, C].

    They are read and written, not mapped: pages of a mapping would count as memory.

    Attributes:
        path: The file.
        lengths: Rows of each block, n.
        width: C.
    """

    path: Path
    lengths: tuple[int, ...]
    width: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole file."""
        return sum(self.lengths) * self.width * _BYTES

    def read(self, block: int) -> Tensor:
        """One block, [1, n, C]."""
        start = sum(self.lengths[:block]) * self.width
        count = self.lengths[block] * self.width
        numbers = np.fromfile(self.path, np.float32, count, offset=start * _BYTES)
        return torch.from_numpy(numbers).view(1, -1, self.width)

    @contextmanager
    def writing(self) -> Iterator[Write]:
        """Write the file, block [1, n, C] by block in their order."""
        with one_line(self.path), self.path.open("wb") as file:
            yield lambda block: file.write(block.contiguous().numpy().data)


@dataclass(frozen=True)
class Step:
    """One module that all blocks are fed through.

    Attributes:
        label: What is done, for people.
        make: Makes the module.
        prefix: Its tensors and matrices begin so in the checkpoint.
        source: The checkpoint.
        blocks: What comes out of the module, block by block, [1, n, C] each.
        reads: What it is fed from.
        out: Where the blocks go; None if no step reads them.
    """

    label: str
    make: Callable[[], nn.Module]
    prefix: str
    source: Source
    blocks: Callable[[Any], Iterator[Tensor]]
    reads: tuple[Rows, ...]
    out: Rows | None

    @cached_property
    def weights(self) -> tuple[Weight, ...]:
        """The module's tensors."""
        return tuple(weights_of(self._empty(), "", self.prefix))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Rows of each block."""
        return (self.out or self.reads[0]).lengths

    def run(self, progress: Callable[[float], None]) -> dict[str, InputStatistics]:
        """Feed all blocks; gives the statistics of what each matrix read, by its name.

        Args:
            progress: Called with the share of the blocks that is done, 0 to 1.
        """
        module, sums = self._load(), {}
        for path, part in module.named_modules():
            if isinstance(part, Linear | Reader):
                sums[self.prefix + path] = total = _Sums()
                part.register_forward_pre_hook(total.add)
        place: AbstractContextManager[Write] = nullcontext(lambda _: None)
        if self.out is not None:
            place = self.out.writing()
        with torch.inference_mode(), place as write:
            for number, block in enumerate(self.blocks(module), 1):
                write(block)
                progress(number / len(self.lengths))
        return {name: total.statistics() for name, total in sums.items()}

    def _empty(self) -> nn.Module:
        """The module without numbers."""
        with torch.device("meta"):
            return self.make()

    def _load(self) -> nn.Module:
        """The module with the checkpoint's numbers in float32."""
        module, tensors = self._empty(), {}
        for weight in self.weights:
            tensor = self.source.read(weight.source).float()
            tensors[weight.name] = tensor.t() if weight.transposed else tensor
        module.load_state_dict(tensors, assign=True)
        return module


class Reader(nn.Identity):
    """In the place of a matrix whose products nobody needs: it only reads its rows."""


class _Sums:
    """Sums over the rows x that a matrix reads, in float64."""

    def __init__(self) -> None:
        self.rows = 0
        self.sizes = self.squares = self.largest = torch.zeros(())

    def add(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Add rows [..., in]; a hook before the matrix."""
        sizes = inputs[0].flatten(0, -2).abs()  # [n, in]
        self.rows += len(sizes)
        self.sizes = self.sizes + sizes.sum(0, dtype=torch.float64)
        self.squares = self.squares + sizes.square().sum(0, dtype=torch.float64)
        self.largest = torch.maximum(self.largest, sizes.amax(0))

    def statistics(self) -> InputStatistics:
        """The means and the largest, float32 [in]."""
        return InputStatistics(
            (self.sizes / self.rows).float(), (self.squares / self.rows).float(), self.largest
        )
