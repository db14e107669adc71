"""FastV from its paper and its authors' description, over full maps."""

import numpy as np

from tests.references.attention import attention_map
from tests.references.selection import fraction


def scores(site, rows):
    """Attention of the last row, or mean of the instruction's or of all rows; head mean; [B, N]."""
    attention = attention_map(site).mean(1)  # [B, L, S]
    cached = site.key.shape[2] - site.query.shape[2]
    columns = cached + site.visual_rows.numpy()
    if rows == "last":
        return attention[:, last_row(site)][:, columns]
    if rows == "all":  # rows that were cached earlier came before the image
        blind = [np.zeros_like(attention[:, 0][:, columns])] * cached
        seeing = [attention[:, m][:, columns] for m in range(last_row(site) + 1)]
        return np.mean([*blind, *seeing], axis=0)
    return np.mean([attention[:, t][:, columns] for t in site.text_rows.tolist()], axis=0)


def last_row(site):
    """The last row that is no side row."""
    given = getattr(site, "last_row", None)
    return site.query.shape[2] - 1 if given is None else int(given)


def decide(method, site, budget):
    """Return keep, scores and the number wanted."""
    s = scores(site, method.rows)
    keep, wanted = fraction(s, method.keep_ratio, site.num_visual, budget)
    return keep, s, wanted
