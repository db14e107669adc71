"""CLIP's vision tower: a class token, a norm before the layers, no bias on the patches."""

from __future__ import annotations

from typing import Any

from patchsieve.export.families.specs import TowerSpec

# Hugging Face's defaults for entries that a config.json leaves out.
DEFAULTS: dict[str, dict[str, Any]] = {
    "clip_vision_model": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 32,
        "layer_norm_eps": 1e-5,
        "hidden_act": "quick_gelu",
    }
}


def spec(config: Any) -> TowerSpec:
    """Read a CLIP vision config."""
    return TowerSpec.of(config, has_cls=True, has_pre_norm=True, patch_bias=False)
