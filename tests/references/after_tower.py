"""Methods between tower and decoder in NumPy float64, one image at a time, from their papers."""

import numpy as np

from tests.references import tower
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


METHODS = tower.METHODS | {"divprune": divprune, "visionzip": visionzip}
