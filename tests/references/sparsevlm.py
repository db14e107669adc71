"""SparseVLM without recycling, over whole maps and by loops, in float64."""

import numpy as np

from tests.references.attention import attention_map, softmax
from tests.references.selection import fraction, top


def raters(visual, text):
    """Places of the text tokens [T, C] whose mean share over visual ones [N, C] is above 1/T."""
    share = np.mean([softmax(row @ text.T) for row in visual], axis=0)
    above = [t for t in range(len(text)) if share[t] > share.mean()]
    return above or list(range(len(text)))


def scores(method, site):
    """Attention of the raters, [B, N]."""
    cached = site.key.shape[2] - site.query.shape[2]
    text, visual = site.text_rows.numpy(), site.visual_rows.numpy()
    out = []
    for maps, rows in zip(attention_map(site), site.embeddings.double().numpy(), strict=True):
        chosen = text[raters(rows[visual], rows[text])]
        heads = maps[:, chosen][:, :, visual + cached].mean(1)  # [H, N]
        if method.over_heads == "best":
            number = max(1, int(np.floor(len(heads) * 14 / 32 + 0.5)))
            heads = heads[top(heads.sum(-1), number)]
        out.append(heads.mean(0))
    return np.stack(out)


def decide(method, site, budget):
    """Return keep, scores and the number wanted."""
    s = scores(method, site)
    keep, wanted = fraction(s, method.keep_ratio, site.num_visual, budget)
    return keep, s, wanted
