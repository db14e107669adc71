"""Keep the best tokens, with ties in an order that every backend shares.

The top-k of torch, ONNX Runtime and TensorRT return tied indices in different orders, so nothing
here reads an index of a sort: the k-th largest *value* says who is above and who ties, and a
running count over the ties takes the lower raster index first. Counts run in float32, exact up to
2**24, because TensorRT 10.3 sums no integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchsieve.pruning.schedules import num_to_keep

LOWEST = torch.finfo(torch.float32).min


def keep_top(scores: Tensor, num_keep: Tensor | int) -> Tensor:
    """Mark the highest scores; ties go to the lower index.

    Args:
        scores: Finite scores, [B, N].
        num_keep: How many, int64 [B], [1] or 0-d, or an int; below 1 counts as 1, above N as N.

    Returns:
        Mask with that many true in each row, bool [B, N].
    """
    batch, num_tokens = scores.shape
    ordered = torch.sort(scores, dim=-1, descending=True).values  # [B, N]
    wanted: float | Tensor
    if isinstance(num_keep, int):
        num_keep = min(max(num_keep, 1), num_tokens)
        last_kept = ordered[:, num_keep - 1 : num_keep]  # [B, 1]
        wanted = torch.full_like(last_kept, num_keep, dtype=torch.float32)
    else:
        num_keep = num_keep.reshape(-1, 1).expand(batch, 1)
        num_keep = num_keep.clamp(min=1).clamp(max=num_tokens)  # [B, 1]
        last_kept, wanted = ordered.gather(1, num_keep - 1), num_keep.float()  # [B, 1]
    above = scores > last_kept  # [B, N]
    tied = scores == last_kept  # [B, N]
    places = wanted - above.float().sum(-1, keepdim=True)  # [B, 1]
    return above | (tied & (tied.float().cumsum(-1) <= places))


def first_best(scores: Tensor) -> Tensor:
    """Mark the highest score of each row, the lowest index of several; bool [B, N]."""
    best = scores == scores.amax(-1, keepdim=True)  # [B, N]
    return best & (best.float().cumsum(-1) <= 1)


def first_best_of_rows(scores: Tensor) -> Tensor:
    """Mark the highest of the last axis, the lower index of several, [B, a, b] -> bool."""
    batch, rows, columns = scores.shape
    return first_best(scores.reshape(batch * rows, columns)).reshape(batch, rows, columns)


def ascending(keep: Tensor, count: int) -> Tensor:
    """Indices of what is kept, ascending, from masks that all hold the same number.

    Args:
        keep: Masks with `count` true in each row, bool [B, N].
        count: How many.

    Returns:
        int64 [B, count].
    """
    num_tokens = keep.shape[1]
    places = torch.arange(num_tokens, device=keep.device).float()  # [N]
    # The values that are kept differ, so a sort of values has one order.
    placed = torch.where(keep, places, float(num_tokens))  # [B, N]
    return torch.sort(placed, dim=-1).values[:, :count].to(torch.int64)


def apply_budget(keep: Tensor, priority: Tensor, budget: Tensor) -> tuple[Tensor, Tensor]:
    """Cut a choice down to a budget.

    Args:
        keep: What the rule keeps, at least one token in each row, bool [B, N].
        priority: Who stays when the budget cuts, higher first, ties to the lower index, [B, N].
        budget: Most tokens that may stay, int64 0-d or [1]; below 1 counts as 1.

    Returns:
        What stays, bool [B, N]; and how many the rule kept, int64 [B].
    """
    num_wanted = keep.float().sum(-1).to(torch.int64)  # [B]
    of_kept = torch.where(keep, priority.float(), LOWEST)  # [B, N]
    allowed = torch.minimum(num_wanted, budget.reshape(1))  # [B]
    return keep & keep_top(of_kept, allowed), num_wanted


def keep_fraction(
    scores: Tensor, keep_ratio: float, num_visual: int, budget: Tensor
) -> tuple[Tensor, Tensor]:
    """Keep a fixed fraction, the highest scores, cut down to a budget.

    Args:
        scores: Higher is kept, ties to the lower index, [B, N].
        keep_ratio: Fraction kept of `num_visual`; all N where fewer are alive.
        num_visual: Tokens of the image that entered the decoder.
        budget: Most tokens that may stay, int64 0-d or [1]; below 1 counts as 1.

    Returns:
        What stays, bool [B, N]; and how many the rule kept, int64 [B].
    """
    return keep_count(scores, num_to_keep(keep_ratio, num_visual), budget)


def keep_count(scores: Tensor, num_keep: int, budget: Tensor) -> tuple[Tensor, Tensor]:
    """Keep a fixed number, the highest scores, cut down to a budget.

    Args:
        scores: Higher is kept, ties to the lower index, [B, N].
        num_keep: How many; all N where fewer are alive.
        budget: Most tokens that may stay, int64 0-d or [1]; below 1 counts as 1.

    Returns:
        What stays, bool [B, N]; and how many the rule kept, int64 [B].
    """
    batch, num_tokens = scores.shape
    num_wanted = torch.full((batch,), num_keep, dtype=torch.int64, device=scores.device)
    num_wanted = num_wanted.clamp(max=num_tokens)  # [B]
    return keep_top(scores, torch.minimum(num_wanted, budget.reshape(1))), num_wanted
