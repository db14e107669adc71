"""Attention rollout by vectors (Abnar & Zuidema 2020; IVTP eqs. 2-4): no N x N product is made.

A rollout row is `start . (A^l2 + I) ... (A^l1+1 + I) . A^l1`. Read from the left it is a chain of
vectors: each step needs `v . A`, a weighted column sum of one layer's softmax, which is made from
that layer's queries and keys and then forgotten. A head mean passes through the chain, because
the column sums of the heads' mean are the mean of the heads' column sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from patchsieve.pruning.rows import HIDDEN_LOGIT

HEADS = ("concatenated", "summed")
_SMALLEST = 1e-30  # in the place of a sum of 0, so that nothing is divided by it


class Layer(NamedTuple):
    """What one layer brings to a rollout; n rows, H query heads, G KV heads, D head dim.

    Attributes:
        query: Queries, rotated where the model rotates, [B, H, n, D].
        key: Keys of the same rows, [B, G, n, D]; G divides H.
        scale: Factor on the products, 1 / sqrt(D).
        mask: Which key (axis 1) a row (axis 0) sees, bool [n, n]; None: all. Rows that are left
            out are simply not among the n: then a softmax over the rest renormalises each row.
        value: Values of the same rows, [B, G, n, D], where scores weigh by their length.
        columns: Where `key` holds more than the n rows (and `mask` as many columns), which of its
            keys they are, int64 [n]; the others keep their share of a row's attention.
    """

    query: Tensor
    key: Tensor
    scale: float
    mask: Tensor | None = None
    value: Tensor | None = None
    columns: Tensor | None = None


def column_sums(
    weights: Tensor, query: Tensor, key: Tensor, scale: float, mask: Tensor | None = None
) -> Tensor:
    """`v . A`: columns of the head-mean attention, summed with a weight for each row.

    Args:
        weights: v, float32 [B, R]; the sum of the result is theirs.
        query: Queries of R rows, [B, H, R, D].
        key: Keys of n rows, [B, G, n, D].
        scale: Factor on the products.
        mask: Which key a row sees, bool [R, n]; None: all.

    Returns:
        float32 [B, n].
    """
    batch, heads, rows, head_dim = query.shape
    kv_heads, num_keys = key.shape[1], key.shape[2]
    share = heads // kv_heads
    # Heads that share a KV head become more rows of it, so that K is never repeated.
    scaled = (query.float() * scale).reshape(batch, kv_heads, share * rows, head_dim)
    logits = scaled @ key.float().transpose(-1, -2)  # [B, G, H/G*R, n]
    if mask is not None:
        logits = logits.reshape(batch, kv_heads, share, rows, num_keys)
        logits = torch.where(mask, logits, HIDDEN_LOGIT)
        logits = logits.reshape(batch, kv_heads, share * rows, num_keys)
    attention = torch.softmax(logits, dim=-1)
    spread = weights[:, None, None].expand(batch, kv_heads, share, rows)
    spread = spread.reshape(batch, kv_heads, 1, share * rows) / heads
    return (spread @ attention).sum(1).squeeze(1)  # [B, n]


def start_row(layer: Layer, row: int | Tensor | None) -> Tensor:
    """The first step `start . A` of a chain.

    Args:
        layer: The top layer of the group.
        row: The row whose attention counts, a number or an int64 [1]; None if no row stands
            for the image (a tower without a class token): then every row counts alike.

    Returns:
        float32 [B, n].
    """
    batch, _, rows, _ = layer.query.shape
    device = layer.query.device
    if row is None:
        weights = torch.full((batch, rows), 1.0 / rows, device=device)
        return _step(weights, layer)
    place = torch.tensor([row], device=device) if isinstance(row, int) else row
    mask = None if layer.mask is None else layer.mask.index_select(0, place)
    one = torch.ones((batch, 1), device=device)
    query = layer.query.index_select(2, place)  # [B, H, 1, D]
    return _step(one, layer._replace(query=query, mask=mask))


def rollout_row(
    layers: Sequence[Layer], row: int | Tensor | None = 0, *, identity_first: bool = False
) -> Tensor:
    """One row of the rollout over a group of layers (eq. 3).

    `R = A^l1`, then `R = (A^l + I) / 2 . R`: the half renormalises the rows, which the paper omits
    "to simplify"; over whole rows it only scales, within a part of the rows it counts.

    Differs from Abnar & Zuidema: they add I in the lowest layer too; eq. 3 does not.

    Args:
        layers: The group, lowest first; all of the same n rows.
        row: Which row of the rollout (see `start_row`).
        identity_first: Add I in the lowest layer too.

    Returns:
        The row, float32 [B, n]; it sums to 1.
    """
    top = layers[-1]
    rolled = start_row(top, row)  # [B, n]
    if len(layers) > 1 or identity_first:
        rolled = (rolled + _start(top, row)) / 2
    for index in range(len(layers) - 2, -1, -1):
        layer = layers[index]
        stepped = _step(rolled, layer)
        rolled = (stepped + rolled) / 2 if index > 0 or identity_first else stepped
    return rolled


def _step(weights: Tensor, layer: Layer) -> Tensor:
    """`v . A` over the n rows, [B, n]."""
    stepped = column_sums(weights, layer.query, layer.key, layer.scale, layer.mask)
    return stepped if layer.columns is None else stepped.index_select(1, layer.columns)


def _start(layer: Layer, row: int | Tensor | None) -> Tensor:
    """The start vector itself, [B, n]: 1 at the row, or 1 / n everywhere."""
    batch, _, rows, _ = layer.query.shape
    device = layer.query.device
    if row is None:
        return torch.full((batch, rows), 1.0 / rows, device=device)
    hot = (torch.arange(rows, device=device) == row).float()  # [n]
    return hot.expand(batch, rows)


def value_norms(value: Tensor, heads: str = "concatenated") -> Tensor:
    """Length of each row's value.

    The paper leaves open: the heads. "concatenated" takes the norm over all of them side by side,
    "summed" adds the heads' norms (ATS, which the paper follows, has this form).

    Args:
        value: [B, G, n, D].
        heads: One of HEADS.

    Returns:
        float32 [B, n].
    """
    squares = value.float().pow(2).sum(-1)  # [B, G, n]
    return squares.sum(1).sqrt() if heads == "concatenated" else squares.sqrt().sum(1)


def importance(row: Tensor, norms: Tensor) -> Tensor:
    """Score of each token, its share of attention times value (eq. 4).

    Args:
        row: Rollout row at the tokens that are judged, [B, N].
        norms: Lengths of their values, [B, N].

    Returns:
        float32 [B, N], summing to 1, or all 0 where every product is.
    """
    product = row * norms
    return product / product.sum(-1, keepdim=True).clamp(min=_SMALLEST)
