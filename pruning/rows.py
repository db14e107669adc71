"""Attention of chosen rows: R rows over S key slots make [R, S] scores per head, O(R S D).

R is 1 for the last row and T for an instruction of T rows; no [L, L] map of all rows is made.
"""

from __future__ import annotations

import torch
from torch import Tensor

HIDDEN_LOGIT = -1e30  # softmax makes it exactly 0; -inf would give NaN in a row that sees nothing
_SMALLEST = 1e-12  # least length of a row, so that a row of zeros has cosine 0


def attention_rows(query_rows: Tensor, key: Tensor, row_slots: Tensor) -> Tensor:
    """Causal softmax attention of chosen rows over all keys (ATP-LLaVA eqs. 1 and 2).

    Args:
        query_rows: Queries of the chosen rows, rotated, [B, H, R, D].
        key: Keys of all rows, rotated, [B, G, S, D]; G divides H.
        row_slots: Key index of each chosen row, int64 [R]; a row sees keys up to its own.

    Returns:
        Probabilities, float32 [B, H, R, S]; they sum to 1 over S.
    """
    batch, heads, num_rows, head_dim = query_rows.shape
    kv_heads, num_slots = key.shape[1], key.shape[2]
    scaled = query_rows.float() * head_dim**-0.5
    # The heads that share a KV head become more rows of it, so that K is never repeated.
    grouped = scaled.reshape(batch, kv_heads, heads // kv_heads * num_rows, head_dim)
    logits = grouped @ key.float().transpose(-1, -2)  # [B, G, H/G*R, S]
    logits = logits.reshape(batch, heads, num_rows, num_slots)  # [B, H, R, S]
    slots = torch.arange(num_slots, device=key.device)
    visible = slots[None, :] <= row_slots[:, None]  # [R, S]
    return torch.softmax(torch.where(visible, logits, HIDDEN_LOGIT), dim=-1)


def mean_over(values: Tensor, dim: int) -> Tensor:
    """Mean over one dimension, which goes.

    Not Tensor.mean: exported unoptimised, its axes are a Reshape of a constant, which TensorRT-RTX
    1.7.1 refuses ("Axis input must resolve to a build-time constant"); a sum's axes are constant.
    """
    return values.sum(dim) / values.shape[dim]


def cosine(rows: Tensor, centre: Tensor) -> Tensor:
    """Cosine of each row [B, n, C] with [B, 1, C]; 0 where one has no length; [B, n]."""
    return (unit(rows) * unit(centre)).sum(-1)


def unit(rows: Tensor) -> Tensor:
    """Rows of length 1, float32 [..., C]; a row of zeros stays one."""
    rows = rows.float()
    return rows / rows.pow(2).sum(-1, keepdim=True).sqrt().clamp(min=_SMALLEST)
