"""Causal attention in NumPy float64, by full L x L maps: what the paper's formulas say, slowly."""

import numpy as np


def as_float64(site):
    """Return queries [B, H, L, D] and keys with the KV heads repeated, [B, H, S, D]."""
    query = site.query.double().numpy()
    key = site.key.double().numpy()
    return query, np.repeat(key, query.shape[1] // key.shape[1], axis=1)


def logits_map(site):
    """Compute A_logits = Q K^T / sqrt(D) (ATP-LLaVA eq. 1), [B, H, L, S]."""
    query, key = as_float64(site)
    return query @ key.swapaxes(-1, -2) / np.sqrt(query.shape[-1])


def attention_map(site):
    """Compute A = softmax(A_logits + M) (ATP-LLaVA eq. 2), [B, H, L, S]."""
    logits = logits_map(site)
    rows, slots = logits.shape[-2:]
    cached = slots - rows
    out = np.zeros_like(logits)
    for m in range(rows):
        seen = logits[..., m, : cached + m + 1]
        e = np.exp(seen - seen.max(-1, keepdims=True))
        out[..., m, : cached + m + 1] = e / e.sum(-1, keepdims=True)
    return out


def softmax(logits):
    """Rows of probabilities over the last axis, all of it visible."""
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)
