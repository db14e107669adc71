"""Activation statistics of a checkpoint: what is known of the rows that each matrix multiplies.

A safetensors file. The matrix NAME, as `Weight.source` has it without ".weight", has three tensors,
float32 [in] each, over all rows x that it multiplied in the float32 model:

    NAME.mean      mean of |x|
    NAME.square    mean of x**2
    NAME.largest   largest |x|

The entry `patchsieve` of the file's metadata is a JSON object: format, version, checkpoint,
records, rows, seed. It is one entry because safetensors writes several in no order, and equal runs
are to write equal files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.writing import write_result

FORMAT = "patchsieve-statistics"
VERSION = 1
_KEY = "patchsieve"  # of the metadata
_AGAIN = "collect them again with patchsieve calibrate --statistics"


@dataclass(frozen=True)
class InputStatistics:
    """What is known of the rows x that one matrix multiplies, float32 [in] each.

    Attributes:
        mean: Mean of |x|.
        square: Mean of x**2.
        largest: Largest |x|.
    """

    mean: Tensor
    square: Tensor
    largest: Tensor


_KINDS = tuple(field.name for field in fields(InputStatistics))


@dataclass(frozen=True)
class Statistics:
    """The statistics of a checkpoint.

    Attributes:
        checkpoint: Directory or hub id, as it was named.
        records: Conversations that were fed.
        rows: Rows that entered the decoder, of text and images together.
        seed: Seed by which the conversations were drawn.
        inputs: By the name of the matrix, such as `layers.0.self_attn.q_proj`.
    """

    checkpoint: str
    records: int
    rows: int
    seed: int
    inputs: Mapping[str, InputStatistics]

    def __post_init__(self) -> None:
        """Refuse numbers that nothing can be made of."""
        for name, found in self.inputs.items():
            _check(name, found)

    def of(self, name: str, size_in: int | None = None) -> InputStatistics | None:
        """The statistics of one matrix; None if there are none.

        Args:
            name: Of the matrix.
            size_in: Rows of the matrix as stored, [in, out]; None leaves them unchecked.

        Raises:
            PatchsieveError: They are those of a matrix of another size.
        """
        found = self.inputs.get(name)
        if found is not None and size_in not in (None, len(found.mean)):
            raise PatchsieveError(
                f"the statistics of {name} do not fit this checkpoint",
                found=f"{len(found.mean)} channels, of {self.checkpoint}",
                expected=f"{size_in} channels",
                do="give --statistics the file that was made from this checkpoint",
            )
        return found

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all.

        Raises:
            PatchsieveError: The place cannot be written; the error says where the result is kept.
        """
        write_result(path, self.to_bytes())

    def to_bytes(self) -> bytes:
        """The content of the file."""
        tensors = {
            f"{name}.{kind}": getattr(found, kind).contiguous()
            for name, found in self.inputs.items()
            for kind in _KINDS
        }
        about = {"format": FORMAT, "version": VERSION, **self._about()}
        content: bytes = save(tensors, metadata={_KEY: json.dumps(about)})
        return content

    @classmethod
    def read(cls, path: Path) -> Statistics:
        """Read a file that `write` made.

        Raises:
            PatchsieveError: It is absent, truncated, of another kind or version, or damaged.
        """
        about, tensors = _read(path)
        inputs: dict[str, dict[str, Tensor]] = {}
        for full, tensor in tensors.items():
            name, _, kind = full.rpartition(".")
            inputs.setdefault(name, {})[kind] = tensor
        try:
            found = {name: InputStatistics(**kinds) for name, kinds in inputs.items()}
            return cls(inputs=found, **about)
        except TypeError as error:  # a kind too many or too few
            raise PatchsieveError(
                f"the statistics {path} are not complete", found=error, do=_AGAIN
            ) from error
        except PatchsieveError as error:
            raise error.at(str(path)) from error

    def _about(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _ABOUT}


_ABOUT = tuple(field.name for field in fields(Statistics) if field.name != "inputs")


def _check(name: str, found: InputStatistics) -> None:
    """Refuse statistics of a matrix whose types, shapes or numbers are not possible."""
    for kind in _KINDS:
        tensor = getattr(found, kind)
        shape = list(tensor.shape)
        if tensor.dtype != torch.float32 or tensor.dim() != 1 or shape != list(found.mean.shape):
            raise PatchsieveError(
                f"the statistic {name}.{kind} cannot be used",
                found=f"{tensor.dtype} {shape}",
                expected=f"torch.float32 [{found.mean.numel()}]",
                do=_AGAIN,
            )
        wrong = ~(tensor.isfinite() & (tensor >= 0))
        if wrong.any():
            channel = int(wrong.int().argmax())
            raise PatchsieveError(
                f"the statistic {name}.{kind} cannot be used",
                found=f"{tensor[channel]:g} in channel {channel}",
                expected="finite numbers of at least 0",
                do=f"{_AGAIN}; if they are the same, the checkpoint's weights are damaged",
            )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The facts of the metadata, and the tensors."""
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise PatchsieveError(
            f"cannot read the statistics {path}",
            found=error,
            expected="the file of patchsieve calibrate --statistics",
            do="give --statistics the whole file, or collect them again",
        ) from error
    try:
        about = dict(json.loads(metadata.get(_KEY, "{}")))
    except (ValueError, TypeError, RecursionError):  # no JSON, no object
        about = {}
    found = about.pop("format", None), about.pop("version", None)
    if found != (FORMAT, VERSION) or set(about) != set(_ABOUT):
        raise PatchsieveError(
            f"{path} does not hold statistics of this version",
            found=f"{found[0]} {found[1]}" if found[0] else "a safetensors file of another kind",
            expected=f"{FORMAT} {VERSION}",
            do=f"correct --statistics, or {_AGAIN}",
        )
    return about, tensors
