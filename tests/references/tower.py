"""Methods inside the tower in NumPy float64, one image at a time, from their papers.

Every method gives a matrix [K, n] that makes the new rows out of the old ones, and for each old row
the new one that it went to (None: dropped). Maps are whole, sorts are Python's.
"""

import numpy as np

from tests.references import rollout
from tests.references.attention import softmax
from tests.references.selection import top


class Image:
    """One image between two prunings: rows [n, C] and the layers since, as whole maps.

    Attributes:
        maps: Head-mean attention [n, n] of each layer since the last pruning.
        query: Queries of the last layer, [H, n, D].
        key: Its keys, [H, n, D].
        value: Its values, [H, n, D].
        sizes: Patches of each row, [n].
        members: Patches that each row stands for.
        fused: Rows at the end that are no candidates.
    """

    def __init__(self, rows, has_cls, noise=None):
        patches = len(rows) - has_cls
        self.rows, self.has_cls, self.fused = rows, int(has_cls), 0
        self.members = [[] for _ in range(has_cls)] + [[p] for p in range(patches)]
        self.sizes, self.maps = np.ones(len(rows)), []
        self.noise = noise
        self.carried = []  # rows of earlier layers, pruned alike
        self.project = lambda rows: rows  # of the model

    def see(self, query, key, value, scale, bias=None):
        """Note a layer, [H, n, D] each, and return its attention, [H, n, n]."""
        logits = query @ key.swapaxes(-1, -2) * scale
        attention = softmax(logits if bias is None else logits + bias)
        self.maps.append(softmax(logits).mean(0))
        self.query, self.key, self.value = query, key, value
        return attention

    @property
    def candidates(self):
        """Rows that may be dropped."""
        return list(range(self.has_cls, len(self.rows) - self.fused))

    def row_of(self, attention):
        """Attention of the class token; without one, of all rows alike."""
        return attention[0] if self.has_cls else attention.mean(0)

    def prune(self, matrix, goes, fused=0):
        """Apply what a method chose."""
        members = [[] for _ in matrix]
        for old, new in enumerate(goes):
            if new is not None:
                members[new] += self.members[old]
        self.rows, self.members, self.fused = matrix @ self.rows, members, fused
        self.carried = [matrix @ rows for rows in self.carried]
        self.sizes = np.array([max(1, len(group)) for group in members], dtype=np.float64)
        self.maps = []

    def finish(self):
        """Rows in raster order, and their ids."""
        last = len(self.rows) - self.fused
        order = sorted(
            range(len(self.rows)),
            key=lambda row: (
                (1, row)
                if row >= last
                else (0, row >= self.has_cls, min(self.members[row], default=-1))
            ),
        )
        ids = [
            self.members[row][0] if len(self.members[row]) == 1 and row < last else -1
            for row in order
        ]
        return order, ids

    def sources(self, num_patches):
        """New place of each patch, -1 if it was dropped."""
        order, _ = self.finish()
        out = np.full(num_patches, -1)
        for place, row in enumerate(order):
            out[self.members[row]] = place
        return out


def keep_rows(image, kept):
    """Matrix and moves that keep some rows in order."""
    matrix = np.eye(len(image.rows))[kept]
    return matrix, [kept.index(row) if row in kept else None for row in range(len(image.rows))]


def select(image, scores, count):
    """Keep the `count` highest of the candidates' scores [N], and what is no candidate."""
    chosen = [row for row, k in zip(image.candidates, top(scores, count), strict=True) if k]
    others = [row for row in range(len(image.rows)) if row not in image.candidates]
    image.prune(*keep_rows(image, sorted(chosen + others)), image.fused)


def gtp(image, count, fusion="rollout", identity_first=False, value_heads="concatenated"):
    """IVTP eqs. 3 and 4."""
    rows = [image.row_of(attention) for attention in image.maps]
    if fusion == "rollout":
        row = image.row_of(rollout.rollout([m[None] for m in image.maps], identity_first)[0])
    else:
        row = {
            "single": lambda: rows[-1],
            "mean": lambda: np.mean(rows, 0),
            "max": lambda: np.max(rows, 0),
            "multiply": lambda: np.prod(rows, 0),
        }[fusion]()
    where = image.candidates
    scores = rollout.scores(row[None, where], image.value[None][:, :, where], value_heads)[0]
    select(image, scores, count)
    return scores


def topk(image, count, score="attention"):
    """Attention of the class token, or cosine to it."""
    if score == "attention":
        scores = image.row_of(image.maps[-1])[image.candidates]
    else:
        centre = image.rows[0] if image.has_cls else image.rows.mean(0)
        lengths = np.linalg.norm(image.rows, axis=-1) * np.linalg.norm(centre)
        dots = image.rows @ centre
        scores = np.divide(dots, lengths, out=np.zeros_like(dots), where=lengths > 0)
        scores = scores[image.candidates]
    select(image, scores, count)
    return scores


def random(image, count):
    """The highest noise, which belongs to patches."""
    scores = np.array([image.noise[image.members[row][0]] for row in image.candidates])
    select(image, scores, count)
    return scores


def evit(image, count):
    """Keep count - 1, fuse the rest and the old fused row by attention, not renormalised."""
    attention = image.row_of(image.maps[-1])
    kept = top(attention[image.candidates], count - 1)
    stays = [row for row, k in zip(image.candidates, kept, strict=True) if k]
    stays = list(range(image.has_cls)) + stays
    matrix, goes = keep_rows(image, stays)
    fused = attention.copy()
    fused[stays] = 0
    goes = [len(stays) if new is None else new for new in goes]
    image.prune(np.concatenate((matrix, fused[None])), goes, 1)
    return attention


def tome(image, count):
    """Bipartite soft matching, a pair at a time."""
    n = len(image.rows)
    merged = n - image.has_cls - count
    metric = image.key.mean(0)
    lengths = np.linalg.norm(metric, axis=-1, keepdims=True)
    metric = np.divide(metric, lengths, out=np.zeros_like(metric), where=lengths > 0)
    evens, odds = list(range(0, n, 2)), list(range(1, n, 2))
    best, score = {}, []
    for a in evens:
        similar = [float(metric[a] @ metric[b]) for b in odds]
        best[a] = odds[max(range(len(odds)), key=lambda i: (similar[i], -i))]
        score.append(-np.inf if image.has_cls and a == 0 else max(similar))
    goes_to = [a for a, k in zip(evens, top(score, merged), strict=True) if k]
    order = [a for a in evens if a not in goes_to] + odds
    goes = [order.index(best[row] if row in goes_to else row) for row in range(n)]
    matrix = np.zeros((len(order), n))
    for row, new in enumerate(goes):
        matrix[new, row] = image.sizes[row]
    image.prune(matrix / matrix.sum(-1, keepdims=True), goes)
    return np.array(score)


def above(image, count, factor=1.0, fuse=False):
    """The tests' own: what gets `factor` times the mean attention, at most `count` tokens.

    How many it wanted is noted in `image.wanted`.
    """
    attention = image.row_of(image.maps[-1])
    scores = attention[image.candidates]
    wanted = [row for row in image.candidates if attention[row] >= factor * scores.mean()]
    wanted = wanted or [image.candidates[int(np.argmax(scores))]]
    best = sorted(wanted, key=lambda row: (-attention[row], row))[: count - fuse]
    image.wanted = len(wanted) + fuse
    stays = list(range(image.has_cls)) + sorted(best)
    matrix, goes = keep_rows(image, stays)
    if fuse:
        fused = attention.copy()
        fused[stays] = 0
        matrix = np.concatenate((matrix, fused[None]))
        goes = [len(stays) if new is None else new for new in goes]
    image.prune(matrix, goes, int(fuse))
    return attention


METHODS = {
    "gtp": gtp,
    "topk": topk,
    "random": random,
    "evit": evit,
    "tome": tome,
    "above": above,
}
