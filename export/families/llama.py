"""Llama and its kin: Vicuna, Mistral, Qwen2. They differ in biases and in the rotary scaling."""

from __future__ import annotations

from typing import Any

from patchsieve.contract.errors import UnsupportedModelError
from patchsieve.export.families.specs import DecoderSpec

# Hugging Face's defaults for sizes that a config.json leaves out; None follows from the others.
_SIZES: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "head_dim": None,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    kind: {
        **_SIZES,
        "vocab_size": vocab,
        "intermediate_size": inner,
        "num_key_value_heads": kv_heads,
    }
    for kind, vocab, inner, kv_heads in (
        ("llama", 32000, 11008, None),
        ("mistral", 32000, 14336, 8),
        ("qwen2", 151936, 22016, 32),
    )
}
ROTARY_KINDS = ("default", "linear", "llama3", "yarn")  # those that do not depend on the length


def sizes(config: Any) -> dict[str, Any]:
    """The sizes of a text config, by the names of `DecoderSpec`."""
    heads = config.num_attention_heads
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": heads,
        "num_kv_heads": config.num_key_value_heads or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
    }


def biases(config: Any) -> dict[str, Any]:
    """Which of the layers' matrices have biases, by the names of `DecoderSpec`."""
    llama, qwen2 = config.model_type == "llama", config.model_type == "qwen2"
    attention = llama and bool(getattr(config, "attention_bias", False))
    return {
        "qkv_bias": qwen2 or attention,
        "output_bias": attention,
        "mlp_bias": llama and bool(getattr(config, "mlp_bias", False)),
    }


def spec(config: Any) -> DecoderSpec:
    """Read a text config. Raises UnsupportedModelError for a rotary kind that grows with length."""
    inv_freq, rotary_scale = _rotary(config)
    return DecoderSpec(
        **sizes(config),
        norm_eps=config.rms_norm_eps,
        activation=config.hidden_act,
        **biases(config),
        inv_freq=inv_freq,
        rotary_scale=rotary_scale,
        max_rows=min(config.max_position_embeddings, _window(config)),
    )


def _rotary(config: Any) -> tuple[tuple[float, ...], float]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    kind = config.rope_parameters["rope_type"]
    if kind not in ROTARY_KINDS:
        raise UnsupportedModelError(
            "this rotary scaling is not supported",
            found=f"rope_type {kind}",
            expected=", ".join(ROTARY_KINDS),
            do="give a checkpoint without this scaling",
        )
    if kind == "default":
        inv_freq, scale = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        inv_freq, scale = ROPE_INIT_FUNCTIONS[kind](config, None)
    return tuple(inv_freq.tolist()), float(scale)


def _window(config: Any) -> int:
    """Rows up to which a sliding window changes nothing."""
    if config.model_type == "qwen2" and not config.use_sliding_window:
        return config.max_position_embeddings
    return getattr(config, "sliding_window", None) or config.max_position_embeddings
