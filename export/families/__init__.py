"""Model families: one file for each decoder or tower structure, found by its `model_type`."""

from __future__ import annotations

from patchsieve.contract.errors import UnsupportedModelError
from patchsieve.export.families import clip, llama, siglip
from patchsieve.export.families.specs import DecoderSpec, TowerSpec

DECODERS = {model_type: llama for model_type in llama.MODEL_TYPES}
TOWERS = {"clip_vision_model": clip, "siglip_vision_model": siglip}


def decoder_spec(text_config: object) -> DecoderSpec:
    """Describe the decoder of a Hugging Face text config, or refuse it."""
    model_type = text_config.model_type  # type: ignore[attr-defined]
    if model_type not in DECODERS:
        raise UnsupportedModelError(
            "this decoder is not supported",
            found=model_type,
            expected=", ".join(sorted(DECODERS)) + " (Vicuna is llama)",
        )
    return DECODERS[model_type].spec(text_config)


def tower_spec(vision_config: object) -> TowerSpec:
    """Describe the vision tower of a Hugging Face vision config, or refuse it."""
    model_type = vision_config.model_type  # type: ignore[attr-defined]
    if model_type not in TOWERS:
        raise UnsupportedModelError(
            "this vision tower is not supported",
            found=model_type,
            expected=", ".join(sorted(TOWERS)),
        )
    return TOWERS[model_type].spec(vision_config)
