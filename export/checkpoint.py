"""A LLaVA checkpoint on disk: its config, and its tensors one at a time under one spelling."""

from __future__ import annotations

import json
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
_HUB_FILES = ["*.json", "*.safetensors", "*.bin", "*.model", "*.jinja", "*.txt"]


def locate(checkpoint: str) -> Path:
    """Find a checkpoint: a local directory, or a hub id that is cached or can be downloaded."""
    path = Path(checkpoint)
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", checkpoint) or path.exists():
        raise PatchsieveError(
            "there is no such checkpoint",
            found=checkpoint,
            expected="a directory with config.json, or a hub id such as llava-hf/llava-1.5-7b-hf",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(checkpoint, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise PatchsieveError(
            f"cannot get the checkpoint {checkpoint} from the hub",
            found=str(error).splitlines()[0],
            do="check the name and the network (a gated model needs `hf auth login`), "
            "or pass a local directory",
        ) from error


def read_config(directory: Path) -> Any:
    """Read a LLaVA config, or refuse the checkpoint at once with what is supported."""
    try:
        raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PatchsieveError(f"cannot read {directory / 'config.json'}", found=error) from error
    supported = (
        "LlavaForConditionalGeneration (model_type llava) with a decoder of type "
        f"{', '.join(sorted(DECODERS))} and a tower of type {', '.join(sorted(TOWERS))}"
    )
    parts = {
        "model_type": (raw.get("model_type"), {"llava"}),
        "text_config": (raw.get("text_config", {}).get("model_type", "llama"), set(DECODERS)),
        "vision_config": (
            raw.get("vision_config", {}).get("model_type", "clip_vision_model"),
            set(TOWERS),
        ),
    }
    if raw.get("quantization_config"):
        parts["quantization_config"] = (
            raw["quantization_config"].get("quant_method", "unknown"),
            {"none, give the unquantised checkpoint"},
        )
    for part, (found, known) in parts.items():
        if found not in known:
            raise UnsupportedModelError(
                "this checkpoint is not supported", found=f"{part} {found}", expected=supported
            )
    from transformers import LlavaConfig

    return LlavaConfig.from_dict(raw)


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
        for file in _weight_files(directory):
            for stored, shape in _shapes(file).items():
                self._stored[canonical(stored)] = (stored, file)
                self._shapes[canonical(stored)] = shape

    def read(self, name: str) -> Tensor:
        """Read one tensor."""
        stored, file = self._stored[name]
        if file.suffix == ".bin":
            return _load_binary(file)[stored]
        with _open(file) as opened:
            return opened.get_tensor(stored)

    def require(self, wanted: dict[str, tuple[int, ...]]) -> None:
        """Refuse a checkpoint that lacks a tensor or holds one of another shape."""
        missing = [name for name in wanted if name not in self._shapes]
        if missing:
            raise UnsupportedModelError(
                f"the checkpoint {self.directory} lacks {len(missing)} of {len(wanted)} tensors",
                found=f"no {missing[0]}",
                expected="all weights of a LlavaForConditionalGeneration",
                do="check that every shard was downloaded",
            )
        for name, shape in wanted.items():
            if self._shapes[name] != shape:
                raise UnsupportedModelError(
                    f"the tensor {name} does not fit the checkpoint's own config",
                    found=list(self._shapes[name]),
                    expected=list(shape),
                )


def _weight_files(directory: Path) -> list[Path]:
    """The files that hold a checkpoint's tensors: one, or the shards that an index names."""
    for single in (SAFETENSORS, BINARY):
        index = directory / f"{single}.index.json"
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (OSError, KeyError, UnicodeDecodeError, json.JSONDecodeError) as error:
                raise PatchsieveError(f"cannot read {index}", found=repr(error)) from error
            shards = sorted(set(weight_map.values()))
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


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    if file.suffix == ".bin":
        return {name: tuple(tensor.shape) for name, tensor in _load_binary(file).items()}
    with _open(file) as opened:
        return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118


def _open(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    return _readable(lambda: safe_open(file, framework="pt"), file, (SafetensorError, OSError))


def _load_binary(file: Path) -> dict[str, Tensor]:
    """Map a .bin file into memory; its pages are read when touched."""
    return _readable(
        lambda: torch.load(file, map_location="cpu", mmap=True, weights_only=True),
        file,
        (RuntimeError, OSError, ValueError, EOFError, KeyError, pickle.UnpicklingError),
    )


def _readable(read: Callable[[], Any], file: Path, errors: tuple[type[Exception], ...]) -> Any:
    try:
        return read()
    except errors as error:
        raise PatchsieveError(
            f"cannot read the weights file {file}",
            found=str(error).splitlines()[0] if str(error) else type(error).__name__,
            do="download it again",
        ) from error
