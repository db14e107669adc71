"""A LLaVA checkpoint on disk: its config, and its tensors one at a time under one spelling."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from patchsieve.contract.errors import UnsupportedModelError
from patchsieve.export.families import DECODERS, TOWERS
from patchsieve.export.source.hub import ADAPTER
from patchsieve.export.source.hub import locate as locate
from patchsieve.export.source.original import CONVERT, refuse_original
from patchsieve.export.source.quantised import ORIGIN, check_quantisation, without_quantisation
from patchsieve.export.source.weight_files import WeightsFile, read_json, weight_files

_FLOATS = {"F64", "F32", "F16", "BF16"} | {
    f"torch.{name}" for name in ("float64", "float32", "float16", "bfloat16")
}


def read_config(directory: Path) -> Any:
    """Read a LLaVA config, or refuse the checkpoint at once with what is supported.

    What it says of a quantisation is left out: the stored tensors decide (`Checkpoint`).
    """
    refuse_adapter(directory)
    path = directory / "config.json"
    raw = read_json(path)
    refuse_original(raw, path)
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
    from huggingface_hub.errors import StrictDataclassError
    from transformers import LlavaConfig

    try:
        return LlavaConfig.from_dict(without_quantisation(raw))
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UnsupportedModelError(
            f"transformers does not accept {path}", found=str(error)[:300], expected=supported
        ) from error


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

    Args:
        directory: Where the files lie.

    Raises:
        UnsupportedModelError: The tensors are quantised.
        PatchsieveError: There are no weights, a shard is absent, or a file cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._stored: dict[str, tuple[str, WeightsFile]] = {}  # by canonical name: stored, file
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        for file in map(WeightsFile, weight_files(directory)):
            for stored, (shape, dtype) in file.tensors().items():
                name = canonical(stored)
                self._stored[name] = (stored, file)
                self._shapes[name], self._dtypes[name] = shape, dtype
        odd = {name: dtype for name, dtype in self._dtypes.items() if dtype not in _FLOATS}
        self._method = check_quantisation(directory, set(self._stored), odd)

    def __contains__(self, name: str) -> bool:
        """Tell whether a tensor is stored, under any spelling."""
        return name in self._stored

    def read(self, name: str) -> Tensor:
        """Read one tensor."""
        stored, file = self._stored[name]
        return file.read(stored)

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
            if self._dtypes[name] not in _FLOATS:
                raise UnsupportedModelError(
                    f"the tensor {name} is not stored in floating point",
                    found=self._dtypes[name],
                    expected="float32, float16 or bfloat16",
                    do=ORIGIN,
                )

    def _remedy(self) -> str:
        """What to do about tensors that are missing."""
        names = {name for name, _ in self._stored.values()}
        if any("mm_projector" in name for name in names):
            return CONVERT
        if any("lora_A" in name for name in names):
            return "merge the adapter into its base with peft (merge_and_unload)"
        if self._method is not None:
            return f"{ORIGIN} (config.json says with {self._method})"
        return "check that every shard was downloaded"
