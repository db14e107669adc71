"""Methods between tower and decoder in NumPy float64, one image at a time, from their papers."""

import numpy as np

from tests.references import tower
from tests.references.attention import softmax
from tests.references.selection import top
from tests.references.tower import keep_rows


def unit(rows):
    """Rows of length 1; a row of zeros stays one."""
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)


def divprune(image, count):
    """The max-min choice, a token at a time: sets and Python's min and max alone."""
    where = image.candidates
    rows = unit(image.project(image.rows[where]))
    distance = [[1 - float(a @ b) for b in rows] for a in rows]
    places, chosen = range(len(where)), []
    while len(chosen) < count:
        left = [i for i in places if i not in chosen]

        def nearest(i, others=chosen or places):
            return min(distance[i][j] for j in others if j != i)

        chosen.append(max(left, key=lambda i: (nearest(i), -i)))
    stays = list(range(image.has_cls)) + sorted(where[i] for i in chosen)
    image.prune(*keep_rows(image, stays))


def visionzip(image, count, class_token=True):
    """Dominant patches, the class token, and contextual tokens, one assignment at a time."""
    num_contextual = max(1, int(np.floor(count * 10 / 64 + 0.5)))
    copies = int(image.has_cls and class_token)
    where, attention = image.candidates, image.row_of(image.maps[-1])
    is_dominant = top(attention[where], count - num_contextual - copies)
    rest = [row for row, k in zip(where, is_dominant, strict=True) if not k]
    stays = [row for row in range(len(image.rows)) if row not in rest]
    targets = rest[:: len(rest) // num_contextual][:num_contextual]
    keys, taken = unit(image.key.mean(0)), {target: [] for target in targets}
    for row in rest:
        if row not in targets:
            best = max(targets, key=lambda t: (float(keys[row] @ keys[t]), -t))
            taken[best].append(row)
    matrix, goes = keep_rows(image, stays)
    lines = [np.eye(len(image.rows))[0]] * copies
    for target, group in taken.items():
        for row in (target, *group):
            goes[row] = len(stays) + len(lines)
        lines.append(np.eye(len(image.rows))[target])
        lines[-1][group] = 1 / max(1, len(group))
    image.prune(np.concatenate((matrix, lines)), goes, copies + num_contextual)


def prumerge(image, count, neighbours=32, is_plus=False):
    """IQR outliers, each with its neighbours, and a token of all others.

    How many tokens it wanted is noted in `image.wanted`.
    """
    query, key = (
        each.swapaxes(0, 1).reshape(len(image.rows), -1) for each in (image.query, image.key)
    )
    attention = image.row_of(softmax(query @ key.T / query.shape[1] ** 0.5))
    where = image.candidates
    scores = attention[where]
    low, high = np.percentile(scores, (25, 75))
    wanted = {i for i, score in enumerate(scores) if score > high + 1.5 * (high - low)}
    wanted = wanted or {int(np.argmax(scores))}
    if is_plus:
        step = int(len(scores) / len(wanted))
        wanted |= set(range(0, len(scores) - 1, max(1, int(step / 3))))
    image.wanted = len(wanted) + 1
    best = sorted(wanted, key=lambda i: (-scores[i], i))[: count - 1]
    stays = list(range(image.has_cls)) + sorted(where[i] for i in best)
    keys = unit(key)
    matrix, goes = keep_rows(image, stays)
    for place, row in enumerate(stays[image.has_cls :], image.has_cls):
        others = [each for each in range(image.has_cls, len(image.rows)) if each != row]
        others.sort(key=lambda each, row=row: (-float(keys[row] @ keys[each]), each))
        matrix[place, others[:neighbours]] += attention[others[:neighbours]]
    rest = attention.copy()
    rest[stays] = 0
    goes = [len(stays) if new is None else new for new in goes]
    image.prune(np.concatenate((matrix, rest[None])), goes, 1)


def prumerge_plus(image, count, neighbours=32):
    """PruMerge with tokens at even distances."""
    prumerge(image, count, neighbours, is_plus=True)


def dart(image, count, pivots=4):
    """Pivots by length, then what is least like each of them in turn."""
    where = image.candidates
    rows = image.project(image.rows[where])
    lengths, directions = np.abs(rows).sum(-1), unit(rows)
    kept = sorted(range(len(rows)), key=lambda i: (-lengths[i], i))[: min(pivots, count)]
    turns = list(kept)
    while turns and len(kept) < count:
        share = int(np.ceil((count - len(kept)) / len(turns)))
        pivot = directions[turns.pop(0)]
        left = [i for i in range(len(rows)) if i not in kept]
        left.sort(key=lambda i, pivot=pivot: (float(directions[i] @ pivot), i))
        kept += left[:share]
    stays = list(range(image.has_cls)) + sorted(where[i] for i in kept)
    image.prune(*keep_rows(image, stays))


METHODS = tower.METHODS | {
    "divprune": divprune,
    "visionzip": visionzip,
    "prumerge": prumerge,
    "prumerge-plus": prumerge_plus,
    "dart": dart,
}
