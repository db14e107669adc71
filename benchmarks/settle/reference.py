"""The graphs of graphs.py in NumPy, computed in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.settle.graphs import StageSize

Array = np.ndarray


@dataclass
class Feed:
    """What one call of a stage is fed, its caches apart."""

    hidden: Array  # [1, L0, C]
    keep_indices: Array  # [L]
    cos: Array  # [1, L, D/2]
    sin: Array  # [1, L, D/2]
    slot: Array  # [1]
    last_key: Array  # [L]

    def inputs(self) -> dict[str, Array]:
        """Arrays by the name of the graph's input."""
        return dict(vars(self))


def make_feed(
    size: StageSize,
    *,
    rows: int,
    entering: int,
    slot: int,
    seed: int,
    last_key: Array | None = None,
) -> Feed:
    """Make random rows that survive from `entering` ones and go to slots `slot`, `slot`+1, ...

    Args:
        size: Sizes and dtype.
        rows: L, survivors.
        entering: L0, rows before the gather.
        slot: First slot written.
        seed: Seed of rows and survivors.
        last_key: Last slot that each row sees apart from its own, [L]; its own if not given.

    """
    rng = np.random.default_rng(seed)
    keep = np.sort(rng.choice(entering, rows, replace=False)).astype(np.int64)
    # Positions are those before pruning: cache slot and position differ on purpose.
    positions = keep + 2 * slot
    frequencies = 10000.0 ** (-np.arange(size.head_dim // 2) / (size.head_dim // 2))
    angles = positions[None, :, None] * frequencies  # [1, L, D/2]
    own = np.arange(slot, slot + rows, dtype=np.int64)
    return Feed(
        hidden=rng.standard_normal((1, entering, size.hidden)).astype(size.dtype),
        keep_indices=keep,
        cos=np.cos(angles).astype(size.dtype),
        sin=np.sin(angles).astype(size.dtype),
        slot=np.array([slot], dtype=np.int64),
        last_key=own if last_key is None else last_key,
    )


def empty_caches(size: StageSize, fill: float = 0.0) -> dict[str, Array]:
    """Make the caches of a stage, every slot holding `fill`."""
    return {name: np.full(size.cache_shape, fill, size.dtype) for name in size.cache_names()}


def attend(query: Array, key: Array, value: Array, seen: Array, scale: float = 1.0) -> Array:
    """Attend from [1, H, L, D] to [1, G, S, D] where `seen` [L, S]; other slots may hold NaN."""
    group = query.shape[1] // key.shape[1]
    used = seen.any(axis=0)  # [S]; an unseen slot is left out: 0 * NaN would be NaN
    key = np.repeat(key[:, :, used], group, axis=1).astype(np.float64)  # [1, H, used, D]
    value = np.repeat(value[:, :, used], group, axis=1).astype(np.float64)
    scores = query.astype(np.float64) @ key.swapaxes(-1, -2) * scale  # [1, H, L, used]
    scores = np.where(seen[:, used], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ value  # [1, H, L, D]


def stage(
    size: StageSize, weights: dict[str, Array], feed: Feed, caches: dict[str, Array]
) -> tuple[Array, dict[str, Array]]:
    """Compute `hidden_out` [1, L, C] and the caches after the call."""
    slots = np.arange(size.slots)
    rows = feed.keep_indices.size
    own = int(feed.slot[0]) + np.arange(rows)
    seen = (slots <= feed.last_key[:, None]) | (slots == own[:, None])  # [L, S]
    x = feed.hidden[:, feed.keep_indices].astype(np.float64)  # [1, L, C]
    after = {name: cache.copy() for name, cache in caches.items()}
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    for i in range(size.layers):
        n = _rms_norm(x, w[f"input_norm.{i}"], size.epsilon)
        query = _rotate(_split(n @ w[f"q.{i}"], size.heads), feed)
        key = _rotate(_split(n @ w[f"k.{i}"], size.kv_heads), feed)
        value = _split(n @ w[f"v.{i}"], size.kv_heads)
        after[f"cache_key.{i}"][:, :, own] = key
        after[f"cache_value.{i}"][:, :, own] = value
        cached = after[f"cache_key.{i}"], after[f"cache_value.{i}"]
        out = attend(query, *cached, seen, size.head_dim**-0.5)
        out = out.swapaxes(1, 2).reshape(1, rows, -1)  # [1, L, H*D]
        x = x + out @ w[f"o.{i}"]
        n = _rms_norm(x, w[f"mlp_norm.{i}"], size.epsilon)
        gate = n @ w[f"gate.{i}"]
        x = x + (gate / (1 + np.exp(-gate)) * (n @ w[f"up.{i}"])) @ w[f"down.{i}"]
    return x, after


def _rms_norm(x: Array, weight: Array, epsilon: float) -> Array:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + epsilon) * weight


def _split(x: Array, heads: int) -> Array:
    return x.reshape(1, x.shape[1], heads, -1).swapaxes(1, 2)  # [1, heads, L, D]


def _rotate(x: Array, feed: Feed) -> Array:
    half = x.shape[-1] // 2
    cos, sin = (a.astype(np.float64)[:, None] for a in (feed.cos, feed.sin))  # [1, 1, L, D/2]
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def relative_error(found: Array, expected: Array) -> float:
    """Largest difference over the largest expected magnitude; NaN where `found` holds one."""
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    return float(np.abs(found - expected).max() / np.abs(expected).max())
