"""A LLaVA checkpoint on disk: its config, and its tensors one at a time under one spelling."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchsieve.errors import PatchsieveError, UnsupportedModelError
from patchsieve.export.families import DECODERS, TOWERS

SAFETENSORS = "model.safetensors"
BINARY = "pytorch_model.bin"
_FLOATS = {"F64", "F32", "F16", "BF16"} | {
    f"torch.{name}" for name in ("float64", "float32", "float16", "bfloat16")
}
_HUB_FILES = ["*.json", "*.safetensors", "*.bin", "*.model", "*.jinja", "*.txt"]


def locate(checkpoint: str) -> Path:
    """Find a checkpoint: a local directory, or a hub id that is cached or can be downloaded."""
    path = Path(checkpoint)
    if checkpoint and os.path.isdir(path):
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", checkpoint) or os.path.exists(path):
        raise PatchsieveError(
            "there is no such checkpoint",
            found=repr(checkpoint),
            expected="a directory with config.json, or a hub id such as llava-hf/llava-1.5-7b-hf",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(checkpoint, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise PatchsieveError(
            f"cannot get the checkpoint {checkpoint} from the hub",
            found=str(error).splitlines()[0],
            do="check the name and the network (a gated model needs `hf auth login`), "
            "or pass a local directory",
        ) from error


def read_config(directory: Path) -> Any:
    """Read a LLaVA config, or refuse the checkpoint at once with what is supported."""
    path = directory / "config.json"
    raw = _read_json(path)
    supported = (
        "LlavaForConditionalGeneration (model_type llava) with a decoder of type "
        f"{', '.join(sorted(DECODERS))} and a tower of type {', '.join(sorted(TOWERS))}"
    )
    text, vision = (raw.get(part, {}) for part in ("text_config", "vision_config"))
    for part, value in (("text_config", text), ("vision_config", vision)):
        if not isinstance(value, dict):
            raise UnsupportedModelError(
                f"{path} is not well formed", found=f"{part} {value!r}"[:80], expected="an object"
            )
    for part, found, known in (
        ("model_type", raw.get("model_type"), {"llava"}),
        ("text_config", text.get("model_type", "llama"), set(DECODERS)),
        ("vision_config", vision.get("model_type", "clip_vision_model"), set(TOWERS)),
    ):
        if not isinstance(found, str) or found not in known:
            raise UnsupportedModelError(
                "this checkpoint is not supported",
                found=f"{part} {found!r}"[:80],
                expected=supported,
                do="give a checkpoint of one of these structures",
            )
    for part, value in (("config.json", raw), ("text_config", text), ("vision_config", vision)):
        kind = value.get("quantization_config")
        if kind:
            name = kind.get("quant_method", "unknown") if isinstance(kind, dict) else kind
            raise UnsupportedModelError(
                "this checkpoint is not supported: its weights are quantised",
                found=f"quantization_config {name!r} in {part}"[:120],
                expected=supported + ", in float32, float16 or bfloat16",
                do="give the checkpoint that it was quantised from",
            )
    from huggingface_hub.errors import StrictDataclassError
    from transformers import LlavaConfig

    try:
        return LlavaConfig.from_dict(raw)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UnsupportedModelError(
            f"transformers does not accept {path}", found=str(error)[:300], expected=supported
        ) from error


def canonical(name: str) -> str:
    """One spelling for the three in which LLaVA's tensors are stored.

    In memory (`model.language_model.layers...`), as `save_pretrained` of transformers 5 writes
    (`language_model.model.layers...`), and in older files (`vision_tower.vision_model...`).
    """
    name = re.sub(r"^model\.(?=language_model|vision_tower|multi_modal_projector)", "", name)
    name = re.sub(r"^language_model\.lm_head\.", "lm_head.", name)
    name = re.sub(r"^language_model\.(model\.)?", "", name)
    return re.sub(r"^vision_tower\.vision_model\.", "vision_tower.", name)


class Checkpoint:
    """The tensors of a checkpoint, read one at a time and never held.

    Files are mapped anew for each tensor: a mapping that stays would count every page it touched.

    Args:
        directory: Where the files lie.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._stored: dict[str, tuple[str, Path]] = {}  # canonical name -> (stored name, file)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        for file in _weight_files(directory):
            for stored, (shape, dtype) in _tensors(file).items():
                name = canonical(stored)
                self._stored[name] = (stored, file)
                self._shapes[name], self._dtypes[name] = shape, dtype

    def __contains__(self, name: str) -> bool:
        """Tell whether a tensor is stored, under any spelling."""
        return name in self._stored

    def read(self, name: str) -> Tensor:
        """Read one tensor."""
        stored, file = self._stored[name]
        if file.suffix == ".bin":
            return _load_binary(file)[stored]
        with _open(file) as opened:
            return opened.get_tensor(stored)

    def require(
        self, wanted: dict[str, tuple[int, ...]], of: str = "a LlavaForConditionalGeneration"
    ) -> None:
        """Refuse a checkpoint that lacks a tensor or holds one of another shape."""
        missing = [name for name in wanted if name not in self._shapes]
        if missing:
            raise UnsupportedModelError(
                f"the checkpoint {self.directory} lacks {len(missing)} of {len(wanted)} tensors",
                found=f"no {missing[0]}",
                expected=f"all weights of {of}",
                do="check that every shard was downloaded",
            )
        for name, shape in wanted.items():
            if self._shapes[name] != shape:
                raise UnsupportedModelError(
                    f"the tensor {name} does not fit the checkpoint's own config",
                    found=list(self._shapes[name]),
                    expected=list(shape),
                    do="check config.json, or download the checkpoint again",
                )
            if self._dtypes[name] not in _FLOATS:
                raise UnsupportedModelError(
                    f"the tensor {name} is not stored in floating point",
                    found=self._dtypes[name],
                    expected="float32, float16 or bfloat16",
                    do="give the checkpoint that it was quantised from",
                )


def _read_json(path: Path) -> dict[str, Any]:
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
            f"cannot use {path}", found=type(value).__name__, expected="a JSON object"
        )
    return value


def _weight_files(directory: Path) -> list[Path]:
    """The files that hold a checkpoint's tensors: one, or the shards that an index names."""
    for single in (SAFETENSORS, BINARY):
        index = directory / f"{single}.index.json"
        if index.is_file():
            weight_map = _read_json(index).get("weight_map")
            named = weight_map.values() if isinstance(weight_map, dict) else [None]
            # A shard is a file beside its index, never one elsewhere.
            if not all(
                isinstance(shard, str) and shard and Path(shard).name == shard for shard in named
            ):
                raise PatchsieveError(
                    f"cannot use {index}",
                    found="a weight_map that does not name files beside it",
                    do="download it again",
                )
            shards = sorted(set(named))
            absent = [shard for shard in shards if not (directory / shard).is_file()]
            if absent:
                raise PatchsieveError(
                    f"the checkpoint {directory} is incomplete",
                    found=f"{len(absent)} of {len(shards)} shards absent, first {absent[0]}",
                    do="download it again",
                )
            return [directory / shard for shard in shards]
        if (directory / single).is_file():
            return [directory / single]
    raise PatchsieveError(
        f"the checkpoint {directory} holds no weights",
        expected=f"{SAFETENSORS}, {BINARY}, or one of them in shards with its index",
    )


def _tensors(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of each tensor of a file."""
    if file.suffix == ".bin":
        loaded = _load_binary(file).items()
        return {name: (tuple(value.shape), str(value.dtype)) for name, value in loaded}
    with _open(file) as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        return {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}


def _open(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    return _readable(lambda: safe_open(file, framework="pt"), file, (SafetensorError, OSError))


def _load_binary(file: Path) -> dict[str, Tensor]:
    """Map a .bin file into memory; its pages are read when touched."""
    loaded = _readable(
        lambda: torch.load(file, map_location="cpu", mmap=True, weights_only=True),
        file,
        (RuntimeError, OSError, ValueError, EOFError, KeyError, pickle.UnpicklingError),
    )
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise PatchsieveError(f"the weights file {file} is not a table of tensors")
    return loaded


def _readable(read: Callable[[], Any], file: Path, errors: tuple[type[Exception], ...]) -> Any:
    try:
        return read()
    except errors as error:
        raise PatchsieveError(
            f"cannot read the weights file {file}",
            found=str(error).splitlines()[0] if str(error) else type(error).__name__,
            do="download it again",
        ) from error
