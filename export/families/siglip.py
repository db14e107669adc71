"""SigLIP's vision tower: no class token, a bias on the patches."""

from __future__ import annotations

from typing import Any

from patchsieve.export.families.specs import TowerSpec


def spec(config: Any) -> TowerSpec:
    """Read a SigLIP vision config."""
    return TowerSpec(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        norm_eps=config.layer_norm_eps,
        activation=config.hidden_act,
        has_cls=False,
        has_pre_norm=False,
        patch_bias=True,
    )
