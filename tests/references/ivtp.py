"""IVTP in NumPy float64, by whole maps and plain loops, as eqs. 2-8 are printed."""

import numpy as np

from tests.references import rollout
from tests.references.attention import softmax
from tests.references.selection import top


def block_maps(site, block):
    """Eq. 2 in each layer of the group, lowest first, over the block's rows, [B, n, n].

    The block is [visual; pseudo-CLS]; with "prefix", also all that stands before the image's end.
    Rows that were cached earlier have no queries: they look at the first row here, for nothing that
    they look at can come back to the image.
    """
    cached = site.key.shape[2] - site.query.shape[2]
    visual, side = site.visual_rows.numpy(), int(site.side_row)
    rows = np.arange(-cached, visual[-1] + 1) if block == "prefix" else visual
    rows = np.append(rows, side)
    maps = []
    for query, key in reversed([(site.query, site.key), *site.lower]):
        query, key = query.double().numpy(), key.double().numpy()
        key = np.repeat(key, query.shape[1] // key.shape[1], axis=1)[:, :, rows + cached]
        queries = query[:, :, np.maximum(rows, 0)]
        logits = queries @ key.swapaxes(-1, -2) / np.sqrt(query.shape[-1])
        seen = np.tril(np.ones((len(rows), len(rows)), bool))
        seen[rows < 0] = np.arange(len(rows)) == 0
        maps.append(softmax(np.where(seen, logits, -np.inf)).mean(1))
    return maps, np.isin(rows, visual)


def cls_row(maps, fusion, cls, identity_first=False):
    """Row `cls` of a group's maps [B, n, n], lowest first, joined by eq. 3 or as table 5 has it."""
    lines = np.stack([each[:, cls] for each in maps])
    return {
        "rollout": lambda: rollout.rollout(maps, identity_first)[:, cls],
        "single": lambda: lines[-1],
        "mean": lambda: lines.mean(0),
        "max": lambda: lines.max(0),
        "multiply": lambda: lines.prod(0),
    }[fusion]()


def scores(method, site):
    """Eq. 4 of the visual tokens, [B, N]."""
    maps, is_visual = block_maps(site, method.block)
    row = cls_row(maps[-method.group :], method.fusion, -1, method.identity_first)
    cached = site.key.shape[2] - site.query.shape[2]
    value = site.value.double().numpy()[:, :, site.visual_rows.numpy() + cached]
    return rollout.scores(row[:, is_visual], value)


def decide(method, site, budget):
    """Return keep, scores and the number wanted."""
    s = scores(method, site)
    wanted = min(method.num_keep, s.shape[1])
    keep = np.stack([top(row, min(wanted, max(1, budget))) for row in s])
    return keep, s, np.full(len(s), wanted)


def relevance(cls, text, spans, other):
    """Eqs. 6 and 7 by loops: relevance of each token of the other tokeniser, -inf for none."""
    c = [
        sum(a * b for a, b in zip(cls, row, strict=True))
        / (np.sqrt(sum(a * a for a in cls)) * np.sqrt(sum(b * b for b in row)))
        for row in np.asarray(text, np.float64).tolist()
    ]
    found = []
    for start, stop in other:
        inside = set(range(start, stop))
        own = [c[k] for k, (a, b) in enumerate(spans) if inside & set(range(a, b))]
        found.append(sum(own) / len(own) if own else -np.inf)
    return np.array(found)


def pseudo_cls(embeddings, relevance, tau, visual_cls):
    """Eq. 8: the row, and which tokens it is made of."""
    chosen = [i for i, c in enumerate(relevance) if c >= tau]
    if not chosen:
        return np.asarray(visual_cls, np.float64), chosen
    return sum(np.asarray(embeddings[i], np.float64) for i in chosen) / len(chosen), chosen
