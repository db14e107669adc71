"""TopK in the decoder over whole maps."""

import numpy as np

from tests.references import fastv, ivtp
from tests.references.selection import top


def decide(method, site, budget):
    """Return keep, scores and the number wanted."""
    if method.row == "last":
        s = fastv.scores(site, "last")
    else:
        maps, is_visual = ivtp.block_maps(site, "prefix")
        s = maps[-1][:, -1][:, is_visual]
    wanted = min(method.num_keep, s.shape[1])
    keep = np.stack([top(row, min(wanted, max(1, budget))) for row in s])
    return keep, s, np.full(len(s), wanted)
