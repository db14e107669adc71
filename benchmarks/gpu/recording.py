"""The logits of each token of an answer, which a result does not carry."""

from __future__ import annotations

from typing import Any

import numpy as np

from patchsieve.runtime.model import Model


def recorded_logits(model: Model) -> list[np.ndarray]:
    """A list to which a model adds the logits [V] of each later token, prefill and decode."""
    seen: list[np.ndarray] = []
    pipeline = model.pipeline
    prefill, decode = type(pipeline).prefill, type(pipeline).decode

    def recorded_prefill(*args: Any) -> Any:
        done = prefill(pipeline, *args)
        seen.append(done.logits.copy())
        return done

    def recorded_decode(*args: Any) -> Any:
        seen.append(decode(pipeline, *args).copy())
        return seen[-1]

    pipeline.prefill = recorded_prefill  # type: ignore[method-assign]
    pipeline.decode = recorded_decode  # type: ignore[method-assign]
    return seen
