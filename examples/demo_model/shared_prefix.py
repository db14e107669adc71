"""Llama over one picture and many questions at once, exactly as if each were asked alone.

The rows of the picture (the *prefix*) run once. Every question sees the prefix and itself, never
another question, and counts its positions on from the prefix. The weights are those of a
`LlavaForConditionalGeneration`; the attention is written out because it compiles to a faster
backward pass on CPUs than SDPA's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu


def run_questions(
    model: Any,
    prefix: Tensor,
    ids: Tensor,
    layer: Any = None,
    prefix_bias: Tensor | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """Last hidden states of all questions.

    Args:
        model: The LLaVA model.
        prefix: Embedded rows up to the picture's end and the line break after it, [B, P, C].
        ids: Token ids of the questions and their answers, padded at the end, [B, Q, T].
        layer: `run_layer`, or that compiled.
        prefix_bias: Added to the logits of every key of the prefix, [layers, B, P]: minus infinity
            where a pruned row is gone.
        places: Rotary positions of the prefix, [B, P], where some of its rows were left out.

    Returns:
        Normalised hidden states, [B, Q, T, C]; the head makes logits of them.
    """
    language = model.model.language_model
    rows, length = prefix.shape[1], ids.shape[2]
    asked = language.embed_tokens(ids).flatten(1, 2)  # [B, Q*T, C]
    hidden = torch.cat([prefix, asked.to(prefix.dtype)], 1)  # [B, P + Q*T, C]
    if places is None:
        places = torch.arange(rows)[None]
    after = places[:, -1:] + 1 + torch.arange(length)  # [B or 1, T]
    places = torch.cat([places, after.repeat(1, ids.shape[1])], 1)
    cos, sin = language.rotary_emb(hidden, places)  # [B or 1, P + Q*T, D]
    if prefix_bias is None:
        prefix_bias = torch.zeros(len(language.layers), len(ids), rows)
    for index, block in enumerate(language.layers):
        weights = layer_weights(block)
        hidden = (layer or run_layer)(hidden, weights, cos, sin, prefix_bias[index], rows, length)
    last = language.norm(hidden[:, rows:])
    return last.view(*ids.shape, -1)


def layer_weights(block: Any) -> tuple[Tensor, ...]:
    """A decoder layer's weights in the order that `run_layer` takes them."""
    attention, mlp = block.self_attn, block.mlp
    return (
        block.input_layernorm.weight,
        torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]),
        attention.o_proj.weight,
        block.post_attention_layernorm.weight,
        torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
        mlp.down_proj.weight,
    )


def run_layer(
    hidden: Tensor,
    weights: tuple[Tensor, ...],
    cos: Tensor,
    sin: Tensor,
    prefix_bias: Tensor,
    rows: int,
    length: int,
) -> Tensor:
    """One decoder layer over prefix and questions, [B, P + Q*T, C]; as many KV heads as heads."""
    before, qkv, out, after, gate_up, down = weights
    batch, total, width = hidden.shape
    dim = cos.shape[-1]
    heads = width // dim
    q, k, v = (_norm(hidden, before) @ qkv.T).view(batch, total, 3, heads, dim).unbind(2)
    cos, sin = cos[:, :, None].to(q.dtype), sin[:, :, None].to(q.dtype)
    q, k = _rotate(q, cos, sin) * dim**-0.5, _rotate(k, cos, sin)  # [B, L, H, D]

    is_later = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu(1)
    bias = prefix_bias[:, None, None].to(q.dtype)  # [B, 1, 1, P]
    keys, values = k[:, :rows].transpose(1, 2), v[:, :rows].transpose(1, 2)  # [B, H, P, D]
    scores = q[:, :rows].transpose(1, 2) @ keys.transpose(2, 3) + bias  # [B, H, P, P]
    seen = scores.masked_fill(is_later, -1e4).softmax(-1) @ values
    seen = seen.transpose(1, 2).flatten(2)  # [B, P, C]

    asked = q[:, rows:].transpose(1, 2)  # [B, H, Q*T, D]
    own_q, own_k, own_v = (
        t[:, rows:].view(batch, -1, length, heads, dim).permute(0, 3, 1, 2, 4) for t in (q, k, v)
    )  # [B, H, Q, T, D]
    is_later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    own = (own_q @ own_k.transpose(3, 4)).masked_fill(is_later, -1e4)  # [B, H, Q, T, T]
    shared = asked @ keys.transpose(2, 3) + bias  # [B, H, Q*T, P]
    share = torch.cat([shared, own.flatten(2, 3)], -1).softmax(-1)
    told = share[..., :rows] @ values  # [B, H, Q*T, D]
    told = told + (share[..., rows:].unflatten(2, (-1, length)) @ own_v).flatten(2, 3)
    told = told.transpose(1, 2).flatten(2)  # [B, Q*T, C]

    hidden = hidden + torch.cat([seen, told], 1) @ out.T
    gate, up = (_norm(hidden, after) @ gate_up.T).chunk(2, -1)
    return hidden + (silu(gate) * up) @ down.T


def run_rows(
    hidden: Tensor, weights: tuple[Tensor, ...], cos: Tensor, sin: Tensor, sees: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One decoder layer over rows alone, and what it attends by.

    Args:
        hidden: [B, L, C].
        weights: As `layer_weights` gives them.
        cos: Cosines of the rows' positions, [B, L, D].
        sin: Their sines.
        sees: Which row (axis 1) a row (axis 0) sees, bool [L, L].

    Returns:
        The rows after it; rotated queries, rotated keys and values, [B, H, L, D] each.
    """
    before, qkv, out, after, gate_up, down = weights
    dim = cos.shape[-1]
    heads = (_norm(hidden, before) @ qkv.T).unflatten(-1, (3, -1, dim)).unbind(2)
    query, key, value = (part.transpose(1, 2) for part in heads)
    query, key = (_rotate(part, cos[:, None], sin[:, None]) for part in (query, key))
    scores = (query * dim**-0.5 @ key.transpose(2, 3)).masked_fill(~sees, -1e4)
    seen = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    hidden = hidden + seen @ out.T
    gate, up = (_norm(hidden, after) @ gate_up.T).chunk(2, -1)
    return hidden + (silu(gate) * up) @ down.T, query, key, value


def _norm(hidden: Tensor, weight: Tensor) -> Tensor:
    full = hidden.float()
    full = full * torch.rsqrt(full.pow(2).mean(-1, keepdim=True) + 1e-5)
    return full.to(hidden.dtype) * weight.to(hidden.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
