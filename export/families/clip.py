"""CLIP's vision tower: a class token, a norm before the layers, no bias on the patches."""

from __future__ import annotations

from typing import Any

from patchsieve.export.families.specs import TowerSpec


def spec(config: Any) -> TowerSpec:
    """Read a CLIP vision config."""
    return TowerSpec(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        norm_eps=config.layer_norm_eps,
        activation=config.hidden_act,
        has_cls=True,
        has_pre_norm=True,
        patch_bias=False,
    )
