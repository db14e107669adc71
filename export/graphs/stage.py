"""The `stage_i` graphs: the decoder's layers between two cuts, with their part of the KV cache."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from patchsieve.contract import names
from patchsieve.export.families.specs import DecoderSpec
from patchsieve.export.graphs import ops
from patchsieve.export.graphs.layers import Linear, RMSNorm, activation, rotary_tables
from patchsieve.export.graphs.trace import Input


class Attention(nn.Module):
    """Projections around the cached attention of one decoder layer."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.q_proj = Linear(spec.hidden_size, queries, spec.qkv_bias)
        self.k_proj = Linear(spec.hidden_size, keys, spec.qkv_bias)
        self.v_proj = Linear(spec.hidden_size, keys, spec.qkv_bias)
        self.o_proj = Linear(queries, spec.hidden_size, spec.output_bias)


class DecoderLayer(nn.Module):
    """One Llama layer that writes its keys and values into a cache."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.norm_eps)
        self.self_attn = Attention(spec)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.norm_eps)
        size, inner = spec.hidden_size, spec.intermediate_size
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": Linear(size, inner, spec.mlp_bias),
                "up_proj": Linear(size, inner, spec.mlp_bias),
                "down_proj": Linear(inner, size, spec.mlp_bias),
            }
        )
        self.activation = activation(spec.activation)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        slot: Tensor,
        last_key: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[1, L, C] -> the same, the rotated queries [1, L, H * D], and the caches updated."""
        spec, attn = self.spec, self.self_attn
        rows = self.input_layernorm(x)
        query = ops.rotary(attn.q_proj(rows), cos, sin, spec.num_heads)
        key = ops.rotary(attn.k_proj(rows), cos, sin, spec.num_kv_heads)
        mixed, keys, values = ops.cached_attention(
            query,
            key,
            attn.v_proj(rows),
            key_cache,
            value_cache,
            slot,
            last_key,
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim**-0.5,
        )
        x = x + attn.o_proj(mixed)
        rows = self.post_attention_layernorm(x)
        gated = self.activation(self.mlp["gate_proj"](rows)) * self.mlp["up_proj"](rows)
        return x + self.mlp["down_proj"](gated), query, keys, values


class Head(nn.Module):
    """From hidden rows to logits. [V, C] as the embedding table, which may be the same tensor."""

    def __init__(self, spec: DecoderSpec, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(spec.vocab_size, spec.hidden_size, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[1, 1, C] -> [1, 1, V]."""
        return nn.functional.linear(x[0], self.weight).unsqueeze(0)


class Stage(nn.Module):
    """Decoder layers `first` to `last - 1`; the last stage also ends in the logits of one row.

    Args:
        spec: The decoder.
        first: Its first layer.
        last: The layer after its last.
        head_dtype: Of the last norm and the output matrix; by default that of the layers.
        queries: Layers, of any stage, whose queries decisions read. Those of the layer before a cut
            are always given.
        has_packed_head: The output matrix is stored in another format than float, [C, V].
    """

    def __init__(
        self,
        spec: DecoderSpec,
        first: int,
        last: int,
        head_dtype: torch.dtype | None = None,
        queries: Collection[int] = (),
        *,
        has_packed_head: bool = False,
    ) -> None:
        super().__init__()
        self.has_packed_head = has_packed_head
        self.spec, self.first, self.last = spec, first, last
        self.is_last = last == spec.num_layers
        cut = () if self.is_last else (last - 1,)
        self.queries = sorted({*cut, *(k for k in queries if first <= k < last)})
        # Keyed by the layer's number in the whole decoder, which weights and tensors go by.
        self.layers = nn.ModuleDict({str(i): DecoderLayer(spec) for i in range(first, last)})
        if self.is_last:
            self.norm = RMSNorm(spec.hidden_size, spec.norm_eps, head_dtype)
            sizes = spec.hidden_size, spec.vocab_size
            self.lm_head = (
                Linear(*sizes, bias=False, dtype=head_dtype)
                if has_packed_head
                else Head(spec, head_dtype)
            )
        self.inv_freq = nn.Buffer(torch.tensor(spec.inv_freq, dtype=torch.float32))

    def forward(
        self,
        hidden: Tensor,
        keep_indices: Tensor,
        position_ids: Tensor,
        slot: Tensor,
        last_key: Tensor,
        caches: list[tuple[Tensor, Tensor]],
        logits_row: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Feed the kept rows through the layers.

        Args:
            hidden: Rows of the stage before, [1, L0, C].
            keep_indices: Those of them that this stage keeps, ascending, [L].
            position_ids: Rotary positions of the kept rows, [L]; with A rotary sections [L, A].
            slot: Cache slot of the first kept row, [1].
            last_key: Last slot that each row sees apart from its own, [L].
            caches: Keys and values of each layer, [1, G, S, D] twice.
            logits_row: The kept row whose logits are wanted, [1]; last stage only.

        Returns:
            `logits` [1, 1, V] in the last stage, else `hidden_out` [1, L, C]; the queries that
            decisions may read, [1, L, H * D] each; then the caches.
        """
        x = hidden.index_select(1, keep_indices)  # [1, L, C]
        cos, sin = rotary_tables(position_ids, self.inv_freq, self.spec, x.dtype)
        queries: list[Tensor] = []
        updated: list[Tensor] = []
        for (number, layer), cache in zip(self.layers.items(), caches, strict=True):
            query = x.new_empty(1, x.shape[1], self.spec.num_heads * self.spec.head_dim)
            like = [x, query, *cache]
            given = (x, cos, sin, slot, last_key, *cache)
            x, query, *grown = ops.block(layer.forward, like, *given)
            x = ops.mark(x, names.layer_output(int(number)))
            queries += [query] if int(number) in self.queries else []
            updated += grown
        if not self.is_last:
            return (x, *queries, *updated)
        assert logits_row is not None  # the last stage has it
        row = x.index_select(1, logits_row).to(self.lm_head.weight.dtype)  # [1, 1, C]
        row = self.norm(row)
        return (self.lm_head(row).float(), *queries, *updated)

    def inputs(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """Dtypes and shapes of the arguments of `forward`."""
        spec, rows = self.spec, names.AXIS_ROWS
        position = (rows, axes) if (axes := len(spec.rotary_sections)) else (rows,)
        integers = [Input(torch.int64, shape) for shape in ((rows,), position, (1,), (rows,))]
        cache = Input(dtype, (1, spec.num_kv_heads, names.AXIS_SLOTS, spec.head_dim))
        hidden = Input(dtype, (1, names.AXIS_ROWS_IN, spec.hidden_size))
        caches = [(cache, cache)] * (self.last - self.first)
        row = (Input(torch.int64, (1,)),) if self.is_last else ()
        return (hidden, *integers, caches, *row)

    def input_names(self) -> list[str]:
        """Names of the graph's inputs, in the order of `forward`."""
        fixed = [names.HIDDEN, names.KEEP_INDICES, names.POSITION_IDS, names.SLOT, names.LAST_KEY]
        return fixed + self.cache_names() + ([names.LOGITS_ROW] if self.is_last else [])

    def output_names(self) -> list[str]:
        """Names of the graph's outputs."""
        out = [names.LOGITS if self.is_last else names.HIDDEN_OUT, *map(names.query, self.queries)]
        return out + [name + names.OUT for name in self.cache_names()]

    def cache_names(self) -> list[str]:
        """Keys and values of each layer in turn."""
        layers = range(self.first, self.last)
        return [name for i in layers for name in (names.key_cache(i), names.value_cache(i))]
