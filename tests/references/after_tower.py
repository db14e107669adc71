"""Methods between tower and decoder in NumPy float64, one image at a time, from their papers."""

import numpy as np

from tests.references import tower
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


METHODS = tower.METHODS | {"divprune": divprune}
