"""Attention rollout in NumPy float64 by whole N x N maps, as IVTP's eqs. 2-4 are printed."""

import numpy as np

from tests.references.attention import softmax


def head_mean(query, key, scale, mask=None):
    """A of eq. 2, mean over the heads, [B, n, n]; KV heads are repeated."""
    key = np.repeat(key, query.shape[1] // key.shape[1], axis=1)
    logits = query @ key.swapaxes(-1, -2) * scale
    if mask is not None:
        logits = np.where(mask, logits, -np.inf)
    return softmax(logits).mean(1)


def rollout(maps, identity_first=False):
    """Eq. 3 over maps [B, n, n], lowest first, rows renormalised to 1."""
    eye = np.eye(maps[0].shape[-1])
    rolled = maps[0] + eye if identity_first else maps[0]
    for attention in maps[1:]:
        rolled = (attention + eye) @ rolled
    return rolled / rolled.sum(-1, keepdims=True)


def scores(row, value, heads="concatenated"):
    """Eq. 4 from a row [B, N] and values [B, G, N, D]."""
    norms = np.linalg.norm(value, axis=-1)  # [B, G, N]
    norms = norms.sum(1) if heads == "summed" else np.sqrt((norms**2).sum(1))
    product = row * norms
    total = product.sum(-1, keepdims=True)
    return np.divide(product, total, out=np.zeros_like(product), where=total > 0)
