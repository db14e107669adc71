"""A checkpoint on disk: its config, and its tensors one at a time under one spelling."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchsieve.contract.errors import UnsupportedModelError
from patchsieve.contract.formats import Format
from patchsieve.export.families import Family, check_structure
from patchsieve.export.quantise.hints import Grid
from patchsieve.export.quantise.rounding import given
from patchsieve.export.source.hub import ADAPTER
from patchsieve.export.source.hub import locate as locate
from patchsieve.export.source.original import CONVERT, refuse_original
from patchsieve.export.source.packed import FLOATS, ORIGIN, Matrix, Parts, code_of
from patchsieve.export.source.quantised import (
    Quantised,
    matrices,
    quantisation_of,
    without_quantisation,
)
from patchsieve.export.source.weight_files import WeightsFile, read_json, weight_files

_WEIGHT = ".weight"


def read_config(directory: Path) -> Any:
    """Read Hugging Face's config, or refuse the checkpoint at once with what is supported.

    What it says of a quantisation is left out: the stored tensors decide (`Checkpoint`).
    """
    refuse_adapter(directory)
    path = directory / "config.json"
    raw = read_json(path)
    refuse_original(raw, path)
    return check_structure(raw, path).config(without_quantisation(raw), path)


def refuse_adapter(directory: Path) -> None:
    """Refuse a directory whose adapter transformers would add to the weights.

    It does so if peft is installed, to a model in the same directory (or in its base's) and
    whether or not that model was merged with the adapter before.

    Raises:
        UnsupportedModelError: There is an adapter_config.json.
    """
    path = directory / ADAPTER
    if not path.is_file():
        return
    entry = read_json(path)
    kind, base = entry.get("peft_type") or "PEFT", entry.get("base_model_name_or_path")
    merge = (
        "merge the two with peft (PeftModel.from_pretrained(base, adapter).merge_and_unload()), "
        "save the result with its processor, and give that directory"
    )
    if (directory / "config.json").is_file():
        merge += f"; if the weights beside it are merged already, remove {ADAPTER}"
    raise UnsupportedModelError(
        f"{directory} holds an adapter, which is not a whole model",
        found=f"{ADAPTER}: a {kind} adapter of {base or 'a base that it does not name'}",
        expected="the merged model, without an adapter",
        do=merge,
    )


class Checkpoint:
    """The tensors of a checkpoint, read one at a time and never held.

    A quantised matrix is read under the name of its weight, in float32.

    Args:
        directory: Where the files lie.
        family: Whose spellings of the tensors' names are known; None reads names as stored.

    Raises:
        UnsupportedModelError: The tensors are quantised in a way that is not known, or damaged.
        PatchsieveError: There are no weights, a shard is absent, or a file cannot be read.
    """

    def __init__(self, directory: Path, family: Family | None = None) -> None:
        self.directory = directory
        self._model = "the model" if family is None else f"a {family.model_class}"
        self._stored: dict[str, tuple[str, WeightsFile]] = {}  # by canonical name: stored, file
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        for file in map(WeightsFile, weight_files(directory)):
            for stored, (shape, dtype) in file.tensors().items():
                name = stored if family is None else family.canonical(stored)
                self._stored[name] = (stored, file)
                self._shapes[name], self._dtypes[name] = shape, code_of(dtype)
        odd = {name: code for name, code in self._dtypes.items() if code not in FLOATS}
        found = quantisation_of(directory, set(self._stored), odd)
        self._method = None if found is None else found.method
        self._matrices: dict[str, Matrix] = {}  # by the name of the weight
        if found is not None and found.layout is not None:
            for matrix, names in matrices(self._dtypes, found.layout).items():
                tensors = {end: (self._shapes[n], self._dtypes[n]) for end, n in names.items()}
                parts = Parts(matrix, tensors, self._fetch(names))
                made = Matrix(found.layout, parts, found.layout.shape(parts))
                self._matrices[f"{matrix}{_WEIGHT}"] = made
        self._shapes |= {name: matrix.shape for name, matrix in self._matrices.items()}

    def __contains__(self, name: str) -> bool:
        """Whether a tensor is stored, under any spelling."""
        return name in self._stored or name in self._matrices

    @property
    def quantised_with(self) -> Quantised | None:
        """The quantised matrices and their method; None if all are floats."""
        if not self._matrices:
            return None
        names = (name.removesuffix(_WEIGHT) for name in self._matrices)
        return Quantised(str(self._method), tuple(names))

    def read(self, name: str) -> Tensor:
        """Read one tensor; that of a quantised matrix, [out, in], in float32.

        Raises:
            UnsupportedModelError: Its group indices lie outside the groups.
        """
        if name in self._matrices:
            return self._matrices[name].read()
        stored, file = self._stored[name]
        return file.read(stored)

    def grid(self, name: str) -> Grid | None:
        """The symmetric grid on which all numbers of a tensor [out, in] lie, as it was stored.

        Returns:
            None of a float tensor, and where zero points, act-order or a factor for each input
            channel leave no such grid.

        Raises:
            UnsupportedModelError: Its group indices lie outside the groups.
        """
        return self._matrices[name].grid() if name in self._matrices else None

    def report(self, stored: Iterable[tuple[str, Format, torch.dtype]]) -> str | None:
        """How the quantised matrices are stored in a bundle, for people; None if there are none.

        Args:
            stored: Name in the checkpoint, format and type of each tensor of the bundle. A matrix
                that is stored twice counts twice.
        """
        counts = Counter(
            self._is_exact(name, form, dtype)
            for name, form, dtype in stored
            if name in self._matrices
        )
        found = self.quantised_with
        return None if found is None else found.sentence(counts[True], counts[False], counts[None])

    def _is_exact(self, name: str, form: Format, dtype: torch.dtype) -> bool | None:
        """Whether a format holds a quantised matrix exactly; None if it stores floats."""
        if not form.bits:
            return None
        matrix = self._matrices[name]
        scale = given(matrix.grid(), form, matrix.shape[1])
        return scale is not None and torch.equal(scale.to(dtype).float(), scale)

    def dequantised(self) -> dict[str, Tensor] | None:
        """All tensors by the names that transformers reads; None if none is quantised.

        transformers would ask for the method's own library, or fill the matrices with noise.
        """
        if not self._matrices:
            return None
        made = {}
        for name, (stored, _) in self._stored.items():
            matrix, _, end = name.rpartition(".")
            weight = f"{matrix}{_WEIGHT}"
            if weight not in self._matrices or end == "bias":
                made[stored] = self.read(name)
            elif (place := f"{stored.rpartition('.')[0]}{_WEIGHT}") not in made:
                made[place] = self.read(weight).contiguous()
        return made

    def require(self, wanted: dict[str, tuple[int, ...]], model: str | None = None) -> None:
        """Refuse a checkpoint that lacks a tensor or holds one of another shape.

        `model` names in the error what the tensors belong to, the family's class by default.
        """
        missing = [name for name in wanted if name not in self._shapes]
        if missing:
            raise UnsupportedModelError(
                f"the checkpoint {self.directory} lacks {len(missing)} of {len(wanted)} tensors",
                found=f"no {missing[0]}",
                expected=f"all weights of {model or self._model}",
                do=self._remedy(),
            )
        for name, shape in wanted.items():
            if self._shapes[name] != shape:
                raise UnsupportedModelError(
                    f"the tensor {name} does not fit the checkpoint's own config",
                    found=list(self._shapes[name]),
                    expected=list(shape),
                    do="check config.json, or download the checkpoint again",
                )
            if name not in self._matrices and self._dtypes[name] not in FLOATS:
                raise UnsupportedModelError(
                    f"the tensor {name} is not stored in floating point",
                    found=self._dtypes[name],
                    expected="float32, float16 or bfloat16",
                    do=ORIGIN,
                )

    def _fetch(self, names: Mapping[str, str]) -> Callable[[str], Tensor]:
        """Reads the tensors of a matrix, by the ends of their names."""

        def fetch(end: str) -> Tensor:
            stored, file = self._stored[names[end]]
            return file.read(stored)

        return fetch

    def _remedy(self) -> str:
        """What to do about tensors that are missing."""
        names = {name for name, _ in self._stored.values()}
        if any("mm_projector" in name for name in names):
            return CONVERT
        if any("lora_A" in name for name in names):
            return "merge the adapter into its base with peft (merge_and_unload)"
        if self._method is not None:
            return f"{ORIGIN} (its settings say with {self._method})"
        return "check that every shard was downloaded"
