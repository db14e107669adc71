"""SigLIP's vision tower: no class token, a bias on the patches."""

from __future__ import annotations

from typing import Any

from patchsieve.export.families.specs import TowerSpec

# Hugging Face's defaults for entries that a config.json leaves out.
DEFAULTS: dict[str, dict[str, Any]] = {
    "siglip_vision_model": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu_pytorch_tanh",
    }
}


def spec(config: Any) -> TowerSpec:
    """Read a SigLIP vision config."""
    return TowerSpec.of(config, has_cls=False, has_pre_norm=False, patch_bias=True)
