"""ToMe in the decoder by loops, in float64."""

import numpy as np

from tests.references.selection import top


def choose(site, num_keep, budget):
    """Return keep [N], scores [N] and where each token goes [N], of the first batch row."""
    past = site.key.shape[2] - site.query.shape[2]
    key = site.key.double().numpy()[:, :, site.visual_rows.numpy() + past]
    out = []
    for metric in key.mean(1):  # [N, D]
        n = len(metric)
        lengths = np.maximum(np.linalg.norm(metric, axis=-1, keepdims=True), 1e-30)
        metric = metric / lengths
        scores, best = np.full(n, 2.0), list(range(n))
        for a in range(0, n, 2):
            similar = {b: float(metric[a] @ metric[b]) for b in range(1, n, 2)}
            if similar:
                best[a] = max(similar, key=lambda b: (similar[b], -b))
                scores[a] = -similar[best[a]]
        keep = top(scores, min(num_keep, n, max(1, budget)))
        goes = [i if keep[i] else best[i] for i in range(n)]
        out.append((keep, scores, goes))
    return [np.array(part) for part in zip(*out, strict=True)]


def decide(method, site, budget):
    """Return keep, scores and the number wanted."""
    keep, scores, _ = choose(site, method.num_keep, budget)
    return keep, scores, np.full(len(keep), min(method.num_keep, keep.shape[1]))


def merged(method, site, budget):
    """Return the image's tokens after merging [B, N, C] and where each went [B, N]."""
    _, _, goes = choose(site, method.num_keep, budget)
    rows = site.hidden.double().numpy()[:, site.visual_rows.numpy()]
    sizes = site.sizes.double().numpy()
    out = rows.copy()
    for image, moved in enumerate(goes):
        for target in range(len(moved)):
            group = [i for i in range(len(moved)) if i == target or moved[i] == target]
            total = sum(sizes[image, i] for i in group)
            out[image, target] = sum(rows[image, i] * sizes[image, i] for i in group) / total
    return out, goes
