"""The operations that each target spells its own way.

Run eagerly they compute; while a module is traced they leave one node of the domain `patchsieve`,
which a lowering (export/lowering) replaces by what its target accepts. Everything else in a graph
is plain ONNX.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

DOMAIN = "patchsieve"
BLOCK = "Block"

Part = Callable[..., tuple[Tensor, ...]]  # a method of a module

_met: ContextVar[list[Part] | None] = ContextVar("blocks that the traced module met", default=None)


def _node(
    op_type: str,
    inputs: tuple[Tensor, ...],
    like: list[Tensor],
    **attributes: int | float | str,
) -> tuple[Tensor, ...]:
    """Leave a node whose outputs have the types and shapes of `like`."""
    return tuple(
        torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{op_type}",
            inputs,
            attrs={**attributes},
            dtypes=[tensor.dtype for tensor in like],
            shapes=[tensor.shape for tensor in like],
            version=1,
        )
    )


@contextmanager
def blocks() -> Iterator[list[Part]]:
    """Inside, `block` leaves one node for each part, in the order of the list."""
    found: list[Part] = []
    token = _met.set(found)
    try:
        yield found
    finally:
        _met.reset(token)


def block(part: Part, like: list[Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """Run a method of a module that a graph holds many times over, such as a layer.

    While a graph is traced it leaves one node. `trace` puts the part's own nodes in its place,
    which it traces once for all modules of one description (`spec`).

    Args:
        part: The method. Its module has no inputs or choices but `spec` and its parameters.
        like: Tensors of the types and shapes of its outputs.
        inputs: What it takes.
    """
    found = _met.get()
    if found is None or not torch.compiler.is_exporting():
        return part(*inputs)
    found.append(part)
    return _node(BLOCK, inputs, like, number=len(found) - 1)


def module_of(part: Part) -> nn.Module:
    """The module whose method a part is."""
    module: nn.Module = part.__self__  # type: ignore[attr-defined]
    return module


def linear(rows: Tensor, weight: Tensor) -> Tensor:
    """Multiply rows [..., in] by a matrix [in, out], which may be stored in another format."""
    if torch.compiler.is_exporting():
        like = rows.new_empty((*rows.shape[:-1], weight.shape[1]))
        return _node("Linear", (rows, weight), [like])[0]
    return rows @ weight


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis, the sum in float32. hidden: [1, L, C]."""
    if torch.compiler.is_exporting():
        return _node("RMSNorm", (hidden, weight), [hidden], eps=eps)[0]
    wide = hidden.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(hidden.dtype)


def rotary(states: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    """Rotate each head by halves.

    Args:
        states: Queries or keys, heads side by side, [1, L, H * D].
        cos: Cosines of the rows' angles, [1, L, D / 2].
        sin: Sines, [1, L, D / 2].
        num_heads: H.

    Returns:
        Rotated states, [1, L, H * D].
    """
    if torch.compiler.is_exporting():
        return _node("Rotary", (states, cos, sin), [states], num_heads=num_heads)[0]
    heads = states.view(*states.shape[:2], num_heads, -1)  # [1, L, H, D]
    first, second = heads.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)  # [1, L, 1, D / 2]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.reshape(states.shape)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    scale: float,
    bias: Tensor | None = None,
) -> Tensor:
    """Full attention, as in a vision tower.

    Args:
        query: Heads side by side, [B, L, H * D].
        key: [B, N, H * D].
        value: [B, N, H * D].
        num_heads: H.
        scale: Factor on the products, 1 / sqrt(D).
        bias: Added to the scaled products, of four axes that broadcast to [B, H, L, N]; finite.

    Returns:
        The mixed values, [B, L, H * D].
    """
    if torch.compiler.is_exporting():
        inputs = (query, key, value) if bias is None else (query, key, value, bias)
        return _node("Attention", inputs, [query], num_heads=num_heads, scale=scale)[0]
    split = [t.view(*t.shape[:2], num_heads, -1).transpose(1, 2) for t in (query, key, value)]
    heads, keys, values = split
    mixed = torch.nn.functional.scaled_dot_product_attention(
        heads, keys, values, attn_mask=bias, scale=scale
    )
    return mixed.transpose(1, 2).reshape(query.shape)


def cached_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot: Tensor,
    last_key: Tensor,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Write new rows into a cache and attend over it.

    The row at slot t sees slot j iff `j <= last_key[row]` or `j == t`.

    Args:
        query: Rotated queries, [1, L, H * D].
        key: Rotated keys of the new rows, [1, L, G * D].
        value: Values of the new rows, [1, L, G * D].
        key_cache: Keys so far, [1, G, S, D].
        value_cache: Values so far, [1, G, S, D].
        slot: Slot of the first new row, [1].
        last_key: Last slot that each row sees apart from its own, [L].
        num_heads: H.
        num_kv_heads: G.
        scale: Factor on the products, 1 / sqrt(D).

    Returns:
        The mixed values, [1, L, H * D], and both caches with the new rows in place.
    """
    if torch.compiler.is_exporting():
        inputs = (query, key, value, key_cache, value_cache, slot, last_key)
        like = [query, key_cache, value_cache]
        heads = {"num_heads": num_heads, "num_kv_heads": num_kv_heads}
        mixed, keys, values = _node("CachedAttention", inputs, like, **heads, scale=scale)
        return mixed, keys, values
    rows = torch.arange(query.shape[1], device=query.device) + slot  # [L]
    keys, values = key_cache.clone(), value_cache.clone()
    keys[:, :, rows] = key.view(1, -1, num_kv_heads, keys.shape[-1]).transpose(1, 2)
    values[:, :, rows] = value.view(1, -1, num_kv_heads, keys.shape[-1]).transpose(1, 2)
    slots = torch.arange(keys.shape[2], device=query.device)
    seen = (slots <= last_key[:, None]) | (slots == rows[:, None])  # [L, S]
    heads_first = query.view(1, -1, num_heads, keys.shape[-1]).transpose(1, 2)
    mixed = torch.nn.functional.scaled_dot_product_attention(
        heads_first, keys, values, attn_mask=seen, scale=scale, enable_gqa=True
    )
    return mixed.transpose(1, 2).reshape(query.shape), keys, values


def mark(hidden: Tensor, name: str) -> Tensor:
    """Give an inner value a name that survives export, so that `verify` can ask for it."""
    if torch.compiler.is_exporting():
        return _node("Mark", (hidden,), [hidden], name=name)[0]
    return hidden
