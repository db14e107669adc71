"""ATP's two-dimensional rotary positions in NumPy, row by row, after Qwen2-VL's M-RoPE.

Visual tokens get (t const, h, w), text gets equal ids on all axes, starting at max(visual id) + 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def number(
    image: np.ndarray, raster: np.ndarray, grid: tuple[int, int], start: int = 0
) -> tuple[np.ndarray, int]:
    """Ids of rows, [L, 3], and the id of the row behind them.

    Args:
        image: Image of each row, -1 for text, [L]. All tokens of each image are there.
        raster: Raster index of each row, -1 for text and a class token, [L].
        grid: Patch rows and columns.
        start: Id of the first row, if it is text.
    """
    ids: list[tuple[int, int, int]] = []
    following = start
    for row in range(len(image)):
        if raster[row] < 0:
            ids.append((following, following, following))
            following += 1
            continue
        h, w = raster[row] // grid[1], raster[row] % grid[1]
        ids.append((following, following + h, following + w))
        is_last = row + 1 == len(image) or image[row + 1] != image[row]
        if is_last:
            own = [ids[other] for other in range(row + 1) if image[other] == image[row]]
            following = max(max(one) for one in own) + 1
    return np.array(ids).reshape(-1, 3), following


def tables(
    ids: np.ndarray, inv_freq: np.ndarray, sections: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines, float32 [L, D] each.

    Args:
        ids: Time, row and column of each row, [L, 3]; two sections turn by row and column.
        inv_freq: Radians per position, [D / 2].
        sections: Frequencies of each axis.
    """
    axis_of = [axis for axis, count in enumerate(sections) for _ in range(count)]
    first = 3 - len(sections)
    angles = np.zeros((len(ids), len(inv_freq)), np.float32)
    for row in range(len(ids)):
        for k in range(len(inv_freq)):
            angles[row, k] = np.float32(ids[row, first + axis_of[k]]) * inv_freq[k]
    both = np.concatenate((angles, angles), axis=1)
    return np.cos(both), np.sin(both)
