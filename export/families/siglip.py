"""SigLIP's vision tower: no class token, a bias on the patches."""

from __future__ import annotations

from typing import Any

from patchsieve.export.families.specs import TowerSpec


def spec(config: Any) -> TowerSpec:
    """Read a SigLIP vision config."""
    return TowerSpec.of(config, has_cls=False, has_pre_norm=False, patch_bias=True)
