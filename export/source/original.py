"""LLaVA's original checkpoints, whose config.json has the decoder's sizes at its top level.

transformers reads such a config.json without an error, as a LLaVA-1.5 of 7 B whatever it says.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from patchsieve.contract.errors import UnsupportedModelError

# Hidden size of LLaVA-1.5's decoder -> the checkpoint that its authors' one became.
_CONVERTED = {4096: "llava-hf/llava-1.5-7b-hf", 5120: "llava-hf/llava-1.5-13b-hf"}
CONVERT = (
    "convert it with convert_llava_weights_to_hf.py (src/transformers/models/llava in the "
    "repository of transformers)"
)
_MODEL_TYPE = re.compile(r"llava_(llama|mistral|mixtral|mpt|qwen|phi|gemma)\w*")
_ARCHITECTURE = re.compile(r"Llava\w*ForCausalLM")


def refuse_original(config: dict[str, Any], path: Path | None = None) -> None:
    """Refuse the config of a checkpoint in LLaVA's original format, and say how to convert it.

    Args:
        config: What config.json holds.
        path: That file, to be named in the error.

    Raises:
        UnsupportedModelError: It is in the original format.
    """
    if not _is_original(config):
        return
    example = _CONVERTED.get(_number(config.get("hidden_size")), _CONVERTED[4096])
    do = f"{CONVERT}, or give a converted one such as {example}"
    if config.get("image_aspect_ratio") == "anyres" or config.get("image_grid_pinpoints"):
        do = f"give a LLaVA-1.5 such as {example}: LLaVA-NeXT (1.6) is not supported"
    raise UnsupportedModelError(
        f"{path or 'this config.json'} is that of a checkpoint in LLaVA's original format",
        found=f"{_name(config)} with no text_config and no vision_config",
        expected="LlavaForConditionalGeneration, the format of Hugging Face",
        do=do,
    )


def _is_original(config: dict[str, Any]) -> bool:
    if isinstance(config.get("text_config"), dict):
        return False
    return (
        _MODEL_TYPE.fullmatch(str(config.get("model_type"))) is not None
        or any(key.startswith("mm_") for key in config)
        or (config.get("model_type") == "llava" and "hidden_size" in config)
        or any(_ARCHITECTURE.fullmatch(name) for name in _architectures(config))
    )


def _architectures(config: dict[str, Any]) -> list[str]:
    names = config.get("architectures")
    return [str(name) for name in names] if isinstance(names, list) else []


def _name(config: dict[str, Any]) -> str:
    names = [*_architectures(config), f"model_type {config.get('model_type')!r}"]
    return names[0][:60]


def _number(value: Any) -> int:
    return value if type(value) is int else 0
