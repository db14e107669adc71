"""A common scale for the two scores of ATP-LLaVA, on which the paper is silent.

As printed, S_self is an unbounded signed logit and S_cross at most 1/576 on average: their mean
would ignore S_cross, and thresholds in (0, 1) would fit neither. So both are brought to [0, 1]
first, each on its own, per sample and per site.
"""

from __future__ import annotations

import torch
from torch import Tensor

# rank() sorts keys up to N^2 as float32 (TensorRT 10.3 sorts no integers): exact up to 2**24.
MOST_RANKED = 4096


def normalise(s_self: Tensor, s_cross: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Bring S_self and S_cross to one scale.

    Args:
        s_self: Self-modality scores (eq. 3), [B, N].
        s_cross: Cross-modality scores (eq. 4), not negative, [B, N].
        kind: "minmax": 0 to 1, all 0.5 where all are equal. "rank": evenly spread, see `rank`.
            "softmax": softmax of S_self, S_cross over its sum, each then over its maximum. "none":
            as printed, for ablations.

    Returns:
        Both scores, float32 [B, N].
    """
    s_self, s_cross = s_self.float(), s_cross.float()
    if kind == "minmax":
        return minmax(s_self), minmax(s_cross)
    if kind == "rank":
        return rank(s_self), rank(s_cross)
    if kind == "softmax":
        # softmax(S) / max softmax(S) = exp(S - max S); S / sum S over its maximum = S / max S.
        highest = s_cross.detach().amax(-1, keepdim=True)  # [B, 1]
        is_seen = highest > 0
        share = s_cross / torch.where(is_seen, highest, 1.0)  # [B, N]
        return (
            torch.exp(s_self - s_self.detach().amax(-1, keepdim=True)),
            torch.where(is_seen, share, 1.0),
        )
    return s_self, s_cross


def redundancy(s_self: Tensor, s_cross: Tensor, kind: str) -> Tensor:
    """Mean of the two normalised scores: S_redundant (section 3.3.1, before eq. 5).

    Ranks are multiples of 1 / N, so their means tie often; these are put back on their grid of
    1 / 2N, lest rounding breaks the ties.

    Args:
        s_self: Normalised self-modality scores, [B, N].
        s_cross: Normalised cross-modality scores, [B, N].
        kind: Their normalisation.

    Returns:
        S_red, float32 [B, N].
    """
    if kind == "rank":
        num_tokens = s_self.shape[-1]
        return torch.round((s_self + s_cross) * num_tokens) / (2 * num_tokens)
    return (s_self + s_cross) / 2


def minmax(scores: Tensor) -> Tensor:
    """Scores from 0 to 1, all 0.5 where all are equal, [B, N]; no gradient through the extremes."""
    low = scores.detach().amin(-1, keepdim=True)  # [B, 1]
    span = scores.detach().amax(-1, keepdim=True) - low  # [B, 1]
    is_spread = span > 0
    return torch.where(is_spread, (scores - low) / torch.where(is_spread, span, 1.0), 0.5)


def rank(scores: Tensor) -> Tensor:
    """Scores spread evenly: (rank + 0.5) / N, rank 0 for the lowest; of ties the lower index wins.

    A threshold theta then prunes round(theta N) tokens. Two sorts, because backends order ties
    differently: the first numbers the distinct values (tied tokens share a number, whatever their
    order), the second sorts (number, index) pairs, of which no two are equal.

    Args:
        scores: Finite scores, [B, N], N at most `MOST_RANKED`.

    Returns:
        Evenly spread scores without gradient, float32 [B, N].
    """
    scores = scores.detach().float()
    num_tokens = scores.shape[-1]
    ordered, order = torch.sort(scores, dim=-1, descending=True)  # [B, N]
    previous = torch.cat((ordered[:, :1], ordered[:, :-1]), dim=-1)  # [B, N]
    number = (ordered != previous).float().cumsum(-1)  # [B, N], 0 for the highest value
    number = torch.zeros_like(scores).scatter(-1, order, number)  # [B, N], by token
    index = torch.arange(num_tokens, device=scores.device).float()  # [N]
    # Descending sort of a negated key: lowest number first, then lowest index.
    key = -(number * num_tokens + index)  # [B, N]
    order = torch.sort(key, dim=-1, descending=True).indices  # [B, N]
    value = (num_tokens - 0.5 - index) / num_tokens  # [N]
    return torch.zeros_like(scores).scatter(-1, order, value.expand(scores.shape))
