"""One stage of a bundle, run on rows of a test's own."""

from __future__ import annotations

from typing import Any

import numpy as np

from patchsieve.contract import names
from patchsieve.runtime.cache import StageCache
from patchsieve.runtime.model import Model


def run_stage(
    model: Model,
    index: int,
    hidden: np.ndarray,
    keep_indices: np.ndarray,
    position_ids: np.ndarray,
    cache: StageCache,
) -> dict[str, Any]:
    """Feed rows [1, L0, C] to a stage, as a prefill does, and count them in its cache."""
    last_seen = np.arange(len(keep_indices))
    inputs = model.pipeline._inputs(index, cache, keep_indices, position_ids, last_seen)
    out = model.backend.run_stage(index, {names.HIDDEN: hidden, **inputs}, cache)
    cache.grow(len(keep_indices))
    return out
