"""CLIP's vision tower: a class token, a norm before the layers, no bias on the patches."""

from __future__ import annotations

from typing import Any

from patchsieve.export.families.specs import TowerSpec


def spec(config: Any) -> TowerSpec:
    """Read a CLIP vision config."""
    return TowerSpec.of(config, has_cls=True, has_pre_norm=True, patch_bias=False)
