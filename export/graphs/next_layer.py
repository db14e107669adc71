"""The layer at a site inside its decision: queries and keys of rows that it has not been fed yet.

PyramidDrop and its kin judge by the attention of the layer that the survivors will enter. So a
decision holds that layer's norm and projections, bound to the tensors that the stage stores.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from patchsieve.export.families.specs import DecoderSpec
from patchsieve.export.graphs import ops
from patchsieve.export.graphs.layers import Linear, RMSNorm, rotary_tables


class Projections(nn.Module):
    """What makes a layer's queries and keys, its parameters named as in the layer itself."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        size, head_dim = spec.hidden_size, spec.head_dim
        self.input_layernorm = RMSNorm(size, spec.norm_eps)
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": Linear(size, spec.num_heads * head_dim, spec.qkv_bias),
                "k_proj": Linear(size, spec.num_kv_heads * head_dim, spec.qkv_bias),
            }
        )
        self.inv_freq = nn.Buffer(torch.tensor(spec.inv_freq, dtype=torch.float32))


class NextLayer:
    """Projections of given rows (see `patchsieve.pruning.decoder.site.NextLayer`).

    Args:
        spec: The decoder.
        layer: Norm and projections of the layer at the site.
        hidden: The rows that would enter it, [1, L, C].
        position_ids: Their rotary positions, [L]; with A rotary sections [L, A].
    """

    def __init__(
        self, spec: DecoderSpec, layer: Projections, hidden: Tensor, position_ids: Tensor
    ) -> None:
        self.spec, self.layer, self.hidden = spec, layer, hidden
        self.tables = rotary_tables(position_ids, layer.inv_freq, spec, hidden.dtype)

    def query(self, rows: Tensor) -> Tensor:
        """Rotated queries of chosen rows [R], [1, H, R, D]."""
        chosen = (each.index_select(1, rows) for each in (self.hidden, *self.tables))
        return self._states("q_proj", self.spec.num_heads, *chosen)

    def key(self) -> Tensor:
        """Rotated keys of all rows, [1, G, L, D]."""
        return self._states("k_proj", self.spec.num_kv_heads, self.hidden, *self.tables)

    def _states(
        self, projection: str, num_heads: int, hidden: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        states = self.layer.self_attn[projection](self.layer.input_layernorm(hidden))
        rows = ops.rotary(states, cos, sin, num_heads)
        return rows.view(1, -1, num_heads, self.spec.head_dim).transpose(1, 2)
