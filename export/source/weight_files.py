"""Which files hold a checkpoint's tensors, chosen as transformers chooses; and reading them."""

from __future__ import annotations

import json
import logging
import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchsieve.contract.errors import PatchsieveError

_LOG = logging.getLogger(__name__)
# In this order (transformers 5.24, `_get_resolved_checkpoint_files`): a single file goes before
# the index of shards, and safetensors go before .bin.
INDEX = ".index.json"
ORDER = (
    "model.safetensors",
    "model.safetensors" + INDEX,
    "pytorch_model.bin",
    "pytorch_model.bin" + INDEX,
)
_WEIGHTS = ("*.safetensors", "*.safetensors" + INDEX, "pytorch_model*.bin", "*.bin" + INDEX)
_OTHERS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "checkpoint-*")
# Names that transformers reads only if a `variant` is asked for, which export does not do.
_VARIANTS = (
    (re.compile(r"(model|pytorch_model)\.(?!.*-of-)[^.]+\.(safetensors|bin)"), r"\1.\2"),
    (re.compile(r"(model\.safetensors|pytorch_model\.bin)\.index\.[^.]+\.json"), r"\1.index.json"),
)
_LFS = b"version https://git-lfs"


def read_json(path: Path) -> dict[str, Any]:
    """Read a checkpoint's JSON file.

    Raises:
        PatchsieveError: It is not there, or no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON
        raise PatchsieveError(
            f"cannot read {path}",
            found=error,
            expected="a Hugging Face checkpoint's JSON file",
            do="download it again",
        ) from error
    if not isinstance(value, dict):
        raise PatchsieveError(
            f"cannot use {path}",
            found=type(value).__name__,
            expected="a JSON object",
            do="download it again",
        )
    return value


def choose(names: set[str], explicit: object = None) -> str | None:
    """The file that transformers reads among these: weights, or the index of their shards.

    Args:
        names: Files of a checkpoint's top folder.
        explicit: `transformers_weights` of its config.json, which goes before the order.

    Raises:
        PatchsieveError: `explicit` is not the name of a safetensors file or of an index.
    """
    if explicit is None:
        return next((name for name in ORDER if name in names), None)
    is_name = isinstance(explicit, str) and Path(explicit).name == explicit
    if not is_name or not str(explicit).removesuffix(INDEX).endswith(".safetensors"):
        raise PatchsieveError(
            "config.json names a weights file that cannot be used",
            found=f"transformers_weights {explicit!r}"[:120],
            expected="the name of a .safetensors file, or of an index of such files",
            do="correct transformers_weights in config.json, or remove it",
        )
    return str(explicit) if explicit in names else None


def shards(index: Path) -> list[str]:
    """Files that an index names, each once.

    Raises:
        PatchsieveError: It names none, or one that does not lie beside it.
    """
    weight_map = read_json(index).get("weight_map")
    named = weight_map.values() if isinstance(weight_map, dict) else [None]
    if not all(isinstance(shard, str) and shard and Path(shard).name == shard for shard in named):
        raise PatchsieveError(
            f"cannot use {index}",
            found="a weight_map that does not name files beside it",
            do="download it again",
        )
    return sorted(set(named))


def weight_files(directory: Path) -> list[Path]:
    """The files that hold a checkpoint's tensors: one, or the shards that an index names.

    What lies beside them and is not read is named in a warning.

    Raises:
        PatchsieveError: There is none that transformers would read, or a shard is absent.
    """
    names = {path.name for path in directory.iterdir() if path.is_file()}
    config = directory / "config.json"
    explicit = read_json(config).get("transformers_weights") if config.is_file() else None
    chosen = choose(names, explicit)
    if chosen is None:
        raise no_weights(directory, {path.name for path in directory.iterdir()}, explicit)
    read = [chosen]
    if chosen.endswith(INDEX):
        read = shards(directory / chosen)
        absent = [shard for shard in read if shard not in names]
        if absent:
            raise _incomplete(directory, chosen, absent, len(read))
    if ignored := _matching(names - {chosen, *read}, _WEIGHTS):
        _LOG.warning(
            "%s: %s is read, as transformers does, and not %s",
            directory,
            chosen,
            _listed(ignored),
        )
    return [directory / name for name in read]


def _matching(names: set[str], patterns: tuple[str, ...]) -> list[str]:
    return sorted(name for name in names if any(fnmatch(name, each) for each in patterns))


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _incomplete(directory: Path, index: str, absent: list[str], total: int) -> PatchsieveError:
    do = "download it again"
    if absent[0].endswith(".safetensors") and (directory / ORDER[2]).is_file():
        do += f", or remove {index} if {ORDER[2]} is to be read"
    return PatchsieveError(
        f"the checkpoint {directory} is incomplete",
        found=f"{len(absent)} of {total} shards absent that {index} names, first {absent[0]}",
        do=do,
    )


def no_weights(where: object, names: set[str], explicit: object = None) -> PatchsieveError:
    """An error that says what is there instead, and how to come from it to a checkpoint.

    Args:
        where: The checkpoint.
        names: Files and folders at its top.
        explicit: `transformers_weights` of its config.json.
    """
    found = _matching(names, (*_WEIGHTS, *_OTHERS))
    variants = {
        pattern.sub(plain, name): name
        for name in sorted(names, reverse=True)
        for pattern, plain in _VARIANTS
        if pattern.fullmatch(name)
    }
    do = "give a directory that save_pretrained of transformers wrote"
    if explicit is not None:
        do = "correct transformers_weights in config.json, or remove it"
    elif variants:
        plain = next(name for name in ORDER if name in variants)
        do = f"rename the variant {variants[plain]} to {plain}"
    elif any(name.startswith(("model-0", "pytorch_model-0")) for name in found):
        do = f"download the index of the shards too, {ORDER[1]} or {ORDER[3]}"
    elif any(name.startswith("adapter_model") for name in found):
        do = "merge the adapter into its base with peft (merge_and_unload), and give the result"
    elif saves := [name for name in found if name.startswith("checkpoint-")]:
        do = f"give the folder of one save of the training, such as {max(saves, key=_number)}"
    usual = f"{ORDER[0]}, {ORDER[2]}, or one of them in shards with its index"
    return PatchsieveError(
        f"the checkpoint {where} holds no weights that transformers reads",
        found=_listed(found) if found else "no file of weights",
        expected=usual if explicit is None else explicit,
        do=do,
    )


def _number(name: str) -> int:
    digits = name.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else -1


@dataclass
class WeightsFile:
    """One safetensors or .bin file.

    It is mapped again for each tensor: a mapping that stays would count every page it touched.

    Attributes:
        path: Where it lies.
    """

    path: Path

    def tensors(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of each tensor."""
        if self._is_binary:
            loaded = self._load().items()
            return {name: (tuple(value.shape), str(value.dtype)) for name, value in loaded}
        with self._open() as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}

    def read(self, name: str) -> Tensor:
        """Read one tensor."""
        if self._is_binary:
            return self._load()[name]
        with self._open() as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor

    @property
    def _is_binary(self) -> bool:
        return self.path.suffix == ".bin"

    def _load(self) -> dict[str, Tensor]:
        return self._mapped() if zipfile.is_zipfile(self.path) else self._held

    @cached_property
    def _held(self) -> dict[str, Tensor]:
        """A file that torch before 1.6 wrote: no archive, so it cannot be mapped."""
        return self._mapped(mmap=False)

    def _mapped(self, mmap: bool = True) -> dict[str, Tensor]:
        loaded = self._readable(
            lambda: torch.load(self.path, map_location="cpu", mmap=mmap, weights_only=True),
            (RuntimeError, OSError, ValueError, EOFError, KeyError, pickle.UnpicklingError),
        )
        if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
            raise PatchsieveError(
                f"the weights file {self.path} is not a table of tensors",
                do="download it again, or save the model as safetensors",
            )
        return loaded

    def _open(self) -> Any:
        from safetensors import SafetensorError, safe_open

        return self._readable(
            lambda: safe_open(self.path, framework="pt"), (SafetensorError, OSError)
        )

    def _readable(self, read: Callable[[], Any], errors: tuple[type[Exception], ...]) -> Any:
        try:
            return read()
        except errors as error:
            found, do = str(error).splitlines()[:1], "download it again"
            if self._is_pointer():
                found, do = ["a pointer of Git LFS, not the file"], "run `git lfs pull` there"
            raise PatchsieveError(
                f"cannot read the weights file {self.path}",
                found=found[0] if found else type(error).__name__,
                do=do,
            ) from error

    def _is_pointer(self) -> bool:
        with self.path.open("rb") as file:
            return file.read(len(_LFS)) == _LFS
