"""Outlines of patches as SVG paths, one unit a patch: crisp at any zoom."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

Line = tuple[int, int, int, int]  # x and y of both ends


def squares(patches: Iterable[int], columns: int) -> str:
    """A path that covers patches, neighbours of a row in one piece."""
    return "".join(
        f"M{column} {row}h{count}v1h-{count}z" for row, column, count in runs(patches, columns)
    )


def runs(patches: Iterable[int], columns: int) -> list[tuple[int, int, int]]:
    """Row, first column and length of each run of neighbouring patches."""
    out: list[tuple[int, int, int]] = []
    for patch in sorted(patches):
        row, column = divmod(patch, columns)
        if out and out[-1][0] == row and out[-1][1] + out[-1][2] == column:
            out[-1] = (row, out[-1][1], out[-1][2] + 1)
        else:
            out.append((row, column, 1))
    return out


def borders(labels: Sequence[int], columns: int) -> list[Line]:
    """Lines between neighbouring patches of different labels, [R * C] labels, in long pieces."""
    grid = np.asarray(labels).reshape(-1, columns)  # [R, C]
    lines: list[Line] = []
    for y, differs in enumerate(grid[1:] != grid[:-1], 1):
        lines += [(start, y, stop, y) for start, stop in _stretches(differs)]
    for x, differs in enumerate((grid[:, 1:] != grid[:, :-1]).T, 1):
        lines += [(x, start, x, stop) for start, stop in _stretches(differs)]
    return lines


def path(lines: Iterable[Line]) -> str:
    """Lines as an SVG path."""
    return "".join(f"M{x0} {y0}L{x1} {y1}" for x0, y0, x1, y1 in lines)


def _stretches(flags: np.ndarray) -> list[tuple[int, int]]:
    """First index, and the one after the last, of each stretch of true flags."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], flags.astype(np.int8), [0]))))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]
