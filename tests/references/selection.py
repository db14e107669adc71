"""Choosing tokens in plain Python: sort by score, then by index."""

import numpy as np


def top(scores, number):
    """Mark the `number` highest of [N], the lower index of ties first."""
    order = sorted(range(len(scores)), key=lambda n: (-scores[n], n))
    keep = np.zeros(len(scores), dtype=bool)
    keep[order[:number]] = True
    return keep


def within_budget(keep, priority, budget):
    """Keep the `budget` highest of what is kept, [N]."""
    order = [n for n in np.argsort(-priority, kind="stable") if keep[n]]
    cut = np.zeros_like(keep)
    cut[order[: max(1, budget)]] = True
    return cut


def fraction(scores, keep_ratio, num_visual, budget):
    """Keep round(keep_ratio * num_visual) of each row of [B, N]; and how many before the budget."""
    number = min(max(1, int(np.floor(keep_ratio * num_visual + 0.5))), scores.shape[1])
    keep = np.stack([top(row, min(number, max(1, budget))) for row in scores])
    return keep, np.full(len(scores), number)
