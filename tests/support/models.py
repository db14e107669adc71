"""Tiny LLaVA models for tests: seeded, offline, made by the script that makes the demo's.

`TINY` holds one row for each structure that export supports; tests are parametrised over it. The
weights are scaled so that a wrong position, a wrong survivor or a lost bias changes the answer.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

_SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "make_checkpoint.py"
_SPEC = importlib.util.spec_from_file_location("patchsieve_make_checkpoint", _SCRIPT)
make_checkpoint = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = make_checkpoint
_SPEC.loader.exec_module(make_checkpoint)

# 32 px with patch 8: 4 x 4 = 16 visual tokens. Matrices of 64 columns need the larger deviation to
# make attention as peaked as 0.08 does on 256.
SMALL = {
    "layers": 4,
    "hidden": 64,
    "heads": 4,
    "kv_heads": 2,
    "vision_layers": 3,
    "vision_hidden": 32,
    "image_size": 32,
    "std": 0.16,
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}

TINY: dict[str, dict[str, Any]] = {
    "llama": {"kv_heads": 4},
    "llama-gqa-tied-linear-rope": {
        "text": {"tie_word_embeddings": True, "rope_parameters": LINEAR_ROPE}
    },
    "llama-llama3-rope": {"text": {"rope_parameters": LLAMA3_ROPE}},
    "llama-biases": {"text": {"attention_bias": True, "mlp_bias": True}},
    "llama-wide-heads": {"text": {"head_dim": 32}},
    "vicuna-6x6": {"kv_heads": 4, "image_size": 48, "text": {"rms_norm_eps": 1e-6}},
    "mistral": {"structure": "mistral"},
    "qwen2": {"structure": "qwen2"},
    "qwen2-tied": {"structure": "qwen2", "text": {"tie_word_embeddings": True}},
    "clip-full": {"strategy": "full"},
    "clip-two-layers": {"feature_layer": [-3, -1]},
    "siglip": {"tower": "siglip", "feature_layer": -1},
    "qwen2-siglip-two-layers": {
        "structure": "qwen2",
        "tower": "siglip",
        "feature_layer": [1, -2],
    },
}


def tiny_llava(
    structure: str = "llama", tower: str = "clip", *, seed: int = 0, **overrides: Any
) -> tuple[Any, Any]:
    """A tiny LLaVA model in float32 with eager attention, and its processor.

    Args:
        structure: A row of `TINY`, or a decoder: "llama", "mistral" or "qwen2".
        tower: "clip" or "siglip"; a row of `TINY` may say otherwise.
        seed: Seed of the weights.
        **overrides: What `make_llava` takes; they win over the row.
    """
    row = {"structure": structure, "tower": tower} if structure not in TINY else {"tower": tower}
    return make_checkpoint.make_llava(
        seed=seed, **{**SMALL, **row, **TINY.get(structure, {}), **overrides}
    )


def save_checkpoint(
    path: str | Path,
    structure: str = "llama",
    tower: str = "clip",
    *,
    seed: int = 0,
    shard_size: str | None = None,
    **overrides: Any,
) -> Path:
    """Save `tiny_llava(...)` as a checkpoint directory and return its path."""
    model, processor = tiny_llava(structure, tower, seed=seed, **overrides)
    return make_checkpoint.save_llava(path, model, processor, shard_size)
