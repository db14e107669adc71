"""Quantised matrices: what their published layouts have in common.

A number of a matrix [out, in] is `(value - zero) * scale`. Scale and zero hold for a group of input
channels of one output channel. Here values and zeros are centred: 0 is the middle of their range,
so that a matrix without zeros is symmetric.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from patchsieve.contract.errors import UnsupportedModelError
from patchsieve.export.quantise.hints import Grid

FLOATS = ("F32", "F16", "BF16", "F64")
INT32 = ("I32",)
ORIGIN = "give the checkpoint that it was quantised from"
_ROWS = 512  # output channels whose groups are looked up at once
_AGAIN = f"download the checkpoint again, or {ORIGIN}"
# Types as torch calls them, which a .bin file gives -> codes of safetensors.
_CODES = {
    f"torch.{name}": code
    for name, code in (
        ("float64", "F64"),
        ("float32", "F32"),
        ("float16", "F16"),
        ("bfloat16", "BF16"),
        ("float8_e4m3fn", "F8_E4M3"),
        ("int64", "I64"),
        ("int32", "I32"),
        ("int16", "I16"),
        ("int8", "I8"),
        ("uint8", "U8"),
    )
}


def code_of(dtype: str) -> str:
    """A stored type by the code of safetensors."""
    return _CODES.get(dtype, dtype)


@dataclass(frozen=True)
class Parts:
    """The stored tensors of one quantised matrix.

    Attributes:
        name: The matrix, without ".weight".
        tensors: Shape and type (a code of safetensors) by the end of each tensor's name.
        fetch: Reads one tensor by the end of its name.
    """

    name: str
    tensors: Mapping[str, tuple[tuple[int, ...], str]]
    fetch: Callable[[str], Tensor]

    def __contains__(self, end: str) -> bool:
        """Whether there is a tensor of this end."""
        return end in self.tensors

    def shape(self, end: str, types: tuple[str, ...], rank: int = 2) -> tuple[int, ...]:
        """The shape of a tensor.

        Raises:
            UnsupportedModelError: It is absent, or has another type or number of axes.
        """
        if end not in self.tensors:
            raise self.refused(f"the quantised matrix {self.name} lacks {end}", None, end)
        shape, code = self.tensors[end]
        if code not in types:
            raise self.refused(
                f"the tensor {self.name}.{end} has a type that its format does not have",
                code,
                " or ".join(types),
            )
        if len(shape) != rank or 0 in shape:
            raise self.refused(
                f"the tensor {self.name}.{end} has another shape than its format",
                list(shape),
                f"{rank} axes, none of them empty",
            )
        return shape

    def check(self, end: str, expected: tuple[int, ...], types: tuple[str, ...] = FLOATS) -> None:
        """Refuse a tensor of another shape or type.

        Raises:
            UnsupportedModelError: It is so, or is absent.
        """
        found = self.shape(end, types, len(expected))
        if found != expected:
            raise self.refused(
                f"the tensor {self.name}.{end} does not fit its matrix",
                list(found),
                list(expected),
            )

    def groups(self, channels: int, count: int, said: Collection[object] = ()) -> int:
        """How many input channels have one scale.

        Args:
            channels: Input channels of the matrix.
            count: Scales of each output channel.
            said: Group sizes that the settings name; what is no size is passed over.

        Raises:
            UnsupportedModelError: They do not divide, or the settings name other sizes.
        """
        size, rest = divmod(channels, count)
        if rest:
            raise self.refused(
                f"the groups of {self.name} do not divide its input channels",
                f"{count} scales for {channels} channels",
                "as many channels in each group",
            )
        sizes = [each for each in said if isinstance(each, int) and 0 < each < channels]
        if sizes and size not in sizes:
            raise self.refused(
                f"the scales of {self.name} do not fit the group size of the settings",
                f"{count} scales for {channels} channels, {size} in a group",
                f"{' or '.join(map(str, sizes))} in a group",
            )
        return size

    def refused(self, what: str, found: object, expected: object) -> UnsupportedModelError:
        """An error about these tensors."""
        return UnsupportedModelError(what, found=found, expected=expected, do=_AGAIN)


@dataclass(frozen=True)
class Scheme:
    """What the numbers of a matrix [out, in] mean.

    Attributes:
        bits: Of a whole number; None if the values are floats.
        scale: [out, G] for G groups of input channels.
        zero: Centred zeros, [out, G]; None if all are 0.
        group: Group of each input channel, [in]; None if groups are neighbours of equal size.
        factor: What each input channel is multiplied by before, [in]; None without.
    """

    bits: int | None
    scale: Tensor
    zero: Tensor | None = None
    group: Tensor | None = None
    factor: Tensor | None = None

    def weight(self, values: Tensor) -> Tensor:
        """The matrix in float32, [out, in], from its centred values [out, in].

        With scales of 16 bits each number is exact: the product has fewer bits than float32 holds.
        """
        made = values.to(torch.float32)
        scale, zero = self.scale.float(), None if self.zero is None else self.zero.float()
        if self.group is None:
            blocks = made.unflatten(1, (scale.shape[1], -1))  # [out, G, in/G], the same memory
            if zero is not None:
                blocks -= zero[..., None]
            blocks *= scale[..., None]
        else:
            for start in range(0, len(made), _ROWS):  # a scale for each number takes memory
                rows = slice(start, start + _ROWS)
                if zero is not None:
                    made[rows] -= zero[rows][:, self.group]
                made[rows] *= scale[rows][:, self.group]
        return made if self.factor is None else made.mul_(self.factor.float())

    def grid(self) -> Grid | None:
        """The symmetric grid of the matrix; None if its numbers lie on none, or are floats.

        One scale for each output channel is [out] at 8 bits, and one block [1, out] at 4 bits.
        """
        has_zero = self.zero is not None and bool(self.zero.any())
        if self.bits is None or has_zero or self.group is not None or self.factor is not None:
            return None
        scale = self.scale.float().t().contiguous()  # [G, out]
        return Grid(self.bits, scale[0] if self.bits == 8 and len(scale) == 1 else scale)


class Layout(ABC):
    """A published layout of quantised matrices.

    Args:
        settings: What the checkpoint says of its quantisation.

    Attributes:
        method: As settings name it.
        holders: Ends of the names of tensors that hold the values.
        ends: Ends of the names of all tensors of a matrix.
    """

    method: ClassVar[str]
    holders: ClassVar[tuple[str, ...]]
    ends: ClassVar[tuple[str, ...]]

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings

    @abstractmethod
    def shape(self, parts: Parts) -> tuple[int, int]:
        """Shape [out, in] of a matrix, by the headers of its tensors.

        Raises:
            UnsupportedModelError: The tensors do not fit each other or the settings.
        """

    @abstractmethod
    def scheme(self, parts: Parts, shape: tuple[int, int]) -> Scheme:
        """What the values of a matrix [out, in] mean.

        Raises:
            UnsupportedModelError: A group index lies outside the groups.
        """

    @abstractmethod
    def values(self, parts: Parts, shape: tuple[int, int]) -> Tensor:
        """The centred values of a matrix, [out, in]."""

    def refuse(self, found: object, expected: object) -> UnsupportedModelError:
        """An error about the settings."""
        return UnsupportedModelError(
            f"this kind of {self.method} is not supported",
            found=found,
            expected=expected,
            do=ORIGIN,
        )


@dataclass(frozen=True)
class Matrix:
    """A quantised matrix that lies in a file.

    Attributes:
        layout: How it is stored.
        parts: Its tensors.
        shape: [out, in].
    """

    layout: Layout
    parts: Parts
    shape: tuple[int, int]

    def read(self) -> Tensor:
        """Its numbers in float32, [out, in]."""
        scheme = self.layout.scheme(self.parts, self.shape)
        return scheme.weight(self.layout.values(self.parts, self.shape))

    def grid(self) -> Grid | None:
        """The symmetric grid on which all its numbers lie; None if there is none."""
        return self.layout.scheme(self.parts, self.shape).grid()


def unpack(words: Tensor, bits: int) -> Tensor:
    """The 4- or 8-bit fields of integers, centred, the lowest field first.

    Args:
        words: Integers, [rows, columns].
        bits: 4 or 8.

    Returns:
        int8, [rows, columns * fields].
    """
    fields = words.contiguous().view(torch.uint8)  # the lowest byte first; [rows, bytes]
    if bits == 4:
        fields = torch.stack((fields & 15, fields >> 4), dim=-1).flatten(1)
        return fields.to(torch.int8) - 8
    return (fields ^ 128).view(torch.int8)  # as a two's complement, 128 less


def mixed_groups(parts: Parts, end: str, channels: int, count: int) -> Tensor | None:
    """The group of each input channel, [in]; None if groups are neighbours of equal size.

    Args:
        parts: The matrix.
        end: End of the name of the tensor of group indices, int [in].
        channels: Input channels.
        count: Groups.

    Raises:
        UnsupportedModelError: An index lies outside the groups.
    """
    index = parts.fetch(end).to(torch.int64)
    if bool((index < 0).any() | (index >= count).any()):
        raise parts.refused(
            f"the group indices of {parts.name} lie outside its groups",
            f"{int(index.min())} to {int(index.max())} in {end}",
            f"0 to {count - 1}",
        )
    if channels % count == 0:
        usual = torch.arange(channels) // (channels // count)
        if torch.equal(index, usual):
            return None
    return index
