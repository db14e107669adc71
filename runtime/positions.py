"""Rotary positions of the rows that enter the decoder, by a plan's position rule."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from patchsieve.contract.model import VisionModel
from patchsieve.contract.plan import GRID2D


def number_tokens(ids: np.ndarray, vision: VisionModel, rule: str) -> tuple[np.ndarray, int]:
    """Positions of an image's tokens, counted from its first, and how many the image takes.

    Args:
        ids: Raster ids of its tokens as the vision graph gives them, int64 [N].
        vision: The tower.
        rule: The plan's position rule: "original" leaves the gaps of what was dropped, and numbers
            tokens that are no patches as if the image had that many, or that many more;
            "contiguous" leaves no gaps. "grid2d" leaves the gaps too (see `number_grid`).

    Returns:
        int64 [N], by "grid2d" [N, 3]; and the number.
    """
    if rule == GRID2D:
        return number_grid(ids, vision)
    is_patch = ids >= 0
    if rule == "contiguous" or not is_patch.any():
        return np.arange(len(ids)), len(ids)
    shift = vision.num_visual - vision.num_patches  # 1 if the class token comes first
    is_further = ~is_patch
    is_further[0] &= shift != 1
    num_further = int(is_further.sum())
    positions = ids + shift
    positions[is_further] = vision.num_visual + np.arange(num_further)
    return positions, vision.num_visual + num_further


def number_grid(ids: np.ndarray, vision: VisionModel) -> tuple[np.ndarray, int]:
    """Positions of an image's tokens in time, row and column, and how many the image takes.

    Patches have one time and their place on the grid, as in Qwen2-VL; an image takes as many
    positions as the longer side of the whole grid, whatever of it was dropped. The same on all axes
    are the positions of a class token in front, which takes one more, and of tokens that are no
    patches, which follow the grid one by one.

    Args:
        ids: Raster ids of its tokens, int64 [N].
        vision: The tower.
    """
    is_patch = ids >= 0
    if not is_patch.any():
        return np.repeat(np.arange(len(ids))[:, None], 3, axis=1), len(ids)
    height, width = vision.grid
    front = int(vision.num_visual > vision.num_patches)
    row, column = np.divmod(np.maximum(ids, 0), width)
    positions = front + np.stack((np.zeros_like(ids), row, column), axis=1)
    others = np.flatnonzero(~is_patch)
    if front and others[:1] == 0:  # the class token, which a method may have dropped
        positions[0], others = 0, others[1:]
    taken = front + max(height, width)
    positions[others] = taken + np.arange(len(others))[:, None]
    return positions, taken + len(others)


def number_rows(
    count: int,
    images: Iterable[tuple[slice, np.ndarray]],
    vision: VisionModel,
    rule: str,
    num_axes: int = 0,
) -> np.ndarray:
    """Positions of `count` rows and of the row after them, counted from the first.

    Args:
        count: Rows of text and images.
        images: Rows of each image, in order, and the raster ids of its tokens.
        vision: The tower.
        rule: The plan's position rule.
        num_axes: Rotary sections of the model, A: 3 for time, row and column, 2 for row and column.

    Returns:
        int64 [count + 1]; with rotary sections [count + 1, A], of text the same on every axis.
    """
    positions = np.repeat(np.arange(count + 1)[:, None], max(1, num_axes), axis=1)
    for rows, ids in images:
        offsets, taken = number_tokens(ids, vision, rule)
        by_axis = offsets[:, -num_axes:] if offsets.ndim == 2 else offsets[:, None]
        positions[rows] = positions[rows.start] + by_axis
        positions[rows.stop :] += taken - len(ids)
    return positions if num_axes else positions[:, 0]
