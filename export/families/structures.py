"""The decoders and towers that families are built of, found by their `model_type`."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

from patchsieve.contract.errors import UnsupportedModelError
from patchsieve.export.families import clip, llama, siglip
from patchsieve.export.families.specs import DecoderSpec, TowerSpec

DECODERS: dict[str, ModuleType] = {model_type: llama for model_type in llama.DEFAULTS}
TOWERS: dict[str, ModuleType] = {
    model_type: module for module in (clip, siglip) for model_type in module.DEFAULTS
}
# Type of a default -> types of a value in its place; None is a number that follows from others.
_TYPES: dict[type, tuple[type, ...]] = {
    int: (int,),
    type(None): (int,),
    float: (int, float),
    str: (str,),
}


def decoder_spec(text_config: Any) -> DecoderSpec:
    """Describe the decoder of a Hugging Face text config, or refuse it."""
    return _module(text_config, DECODERS, "decoder").spec(text_config)


def decoder_sizes(text_config: Any) -> dict[str, int]:
    """The sizes among the entries of `decoder_spec`, without torch."""
    return _module(text_config, DECODERS, "decoder").sizes(text_config)


def decoder_biases(text_config: Any) -> dict[str, bool]:
    """The biases among the entries of `decoder_spec`, without torch."""
    return _module(text_config, DECODERS, "decoder").biases(text_config)


def tower_spec(vision_config: Any) -> TowerSpec:
    """Describe the vision tower of a vision config, or refuse it."""
    return _module(vision_config, TOWERS, "vision tower").spec(vision_config)


def with_defaults(part: Mapping[str, Any], model_type: str) -> SimpleNamespace:
    """A config's part as an object: absent or null entries have Hugging Face's defaults.

    Raises:
        UnsupportedModelError: An entry is of another type than its default, or no positive number.
    """
    given = {"model_type": model_type} | {k: v for k, v in part.items() if v is not None}
    kind = given["model_type"]
    defaults = (DECODERS | TOWERS)[kind].DEFAULTS[kind]
    for name, default in defaults.items():
        value = given.setdefault(name, default)
        kinds = _TYPES[type(default)]
        if value is not default and not (type(value) in kinds and (kinds == (str,) or value > 0)):
            raise UnsupportedModelError(
                f"a model cannot have this {name}",
                found=repr(value)[:80],
                expected=f"a value such as {default or 8}",
                do="correct config.json",
            )
    return SimpleNamespace(**given)


def _module(config: Any, known: Mapping[str, ModuleType], what: str) -> ModuleType:
    if config.model_type not in known:
        raise UnsupportedModelError(
            f"this {what} is not supported",
            found=config.model_type,
            expected=", ".join(sorted(known)) + (" (Vicuna is llama)" if known is DECODERS else ""),
            do="give a checkpoint of one of these structures",
        )
    return known[config.model_type]
