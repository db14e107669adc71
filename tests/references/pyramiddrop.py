"""PyramidDrop over the whole map of the layer at the site."""

from types import SimpleNamespace

import torch

from tests.references import fastv
from tests.references.selection import fraction


def decide(method, site, budget):
    """Return keep, scores and the number wanted."""
    rows = torch.arange(site.query.shape[2])
    ahead = SimpleNamespace(
        query=site.next_layer.query(rows),
        key=site.next_layer.key(),
        visual_rows=site.visual_rows,
        last_row=getattr(site, "last_row", None),
    )
    s = fastv.scores(ahead, "last")
    keep, wanted = fraction(s, method.keep_ratio, site.num_visual, budget)
    return keep, s, wanted
