"""A bias on keys inside Hugging Face's attention, whatever kernel computes it.

Training masks a visual token by adding log(mask) to the logits of every row that looks at it
(ATP-LLaVA section 3.4, after DynamicViT). Kernels such as Flash take no bias, so it travels as one
more column of the head: q' = [q, 1] and k' = [k, bias / scale] give q k scale + bias.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from patchsieve.contract.errors import UnsupportedModelError

PASS = "pruning_pass"  # the keyword by which a forward pass hands its pruning to the attention
_PREFIX = "patchsieve_"
_ALIGNMENT = 8  # Flash kernels take head widths that are multiples of it


def install(language_model: nn.Module) -> None:
    """Let a decoder's attention look for a pruning pass among its keywords.

    Without one it computes what it always did, by the kernel that it had.

    Raises:
        UnsupportedModelError: The decoder's attention cannot be exchanged.
    """
    config: Any = language_model.config
    base = config._attn_implementation
    if base.startswith(_PREFIX):
        return
    kernel = AttentionInterface().get(base) if base != "eager" else _eager_of(language_model)
    mask = AttentionMaskInterface().get(base)
    if kernel is None or mask is None:
        raise UnsupportedModelError(
            "the decoder's attention cannot be exchanged",
            found=base,
            expected="eager, sdpa or flash_attention_2",
            do="correct attn_implementation in the checkpoint's config.json",
        )
    AttentionInterface.register(_PREFIX + base, _with_pass(kernel))
    # Under the same name, or transformers gives the kernel no causal mask.
    AttentionMaskInterface.register(_PREFIX + base, mask)
    config._attn_implementation = _PREFIX + base


def biased(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> list[Tensor]:
    """Queries, keys and values that carry a bias on the keys.

    Args:
        query: [B, H, L, D].
        key: [B, G, S, D].
        value: [B, G, S, D].
        bias: What is added to the logits of each key, [B, S].
        scale: What the kernel multiplies the products by.

    Returns:
        The three with D + 8 columns; the last 8 of the result are zero.
    """
    # Shared between both factors, so that neither leaves the range of float16.
    share = scale**-0.5
    column = (bias * share).to(key.dtype)[:, None, :, None]  # [B, 1, S, 1]
    ones = query.new_full((*query.shape[:3], 1), share)
    key = torch.cat((key, column.expand(-1, key.shape[1], -1, -1)), dim=-1)  # [B, G, S, D + 1]
    query = torch.cat((query, ones), dim=-1)  # [B, H, L, D + 1]
    rest = (0, _ALIGNMENT - 1)
    return [
        nn.functional.pad(query, rest),
        nn.functional.pad(key, rest),
        nn.functional.pad(value, (0, _ALIGNMENT)),
    ]


def _with_pass(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel that obeys the pruning pass among its keywords and shows it the queries and keys."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        pruning = kwargs.pop(PASS, None)
        if (positions := kwargs.get("position_ids")) is not None and positions.ndim > 2:
            del kwargs["position_ids"]  # Flash looks there for the ends of packed sequences
        layer: int = module.layer_idx  # type: ignore[assignment]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        bias = None if pruning is None else pruning.bias(layer)  # [B, S]
        if bias is None:
            out, weights = kernel(
                module, query, key, value, attention_mask, scaling=scale, **kwargs
            )
        else:
            width = value.shape[-1]
            wide = biased(query, key, value, bias, scale)
            out, weights = kernel(module, *wide, attention_mask, scaling=scale, **kwargs)
            out = out[..., :width]  # [B, L, H, D]
        if pruning is not None:
            with torch.autocast(query.device.type, enabled=False):  # decisions are float32
                pruning.see(layer, query, key)
        return out, weights

    return attention


def _eager_of(language_model: nn.Module) -> Callable[..., Any] | None:
    """The eager attention of a decoder's own module: transformers keeps no table of them."""
    import sys

    module = sys.modules[type(language_model).__module__]
    return getattr(module, "eager_attention_forward", None)
