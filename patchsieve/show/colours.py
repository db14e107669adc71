"""Colours of scores and of groups, told apart by every kind of eye."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from patchsieve.show.shown import Place

# Ten points of viridis (van der Walt and Smith, CC0): its lightness rises evenly, for eyes that do
# not distinguish red from green either, and in grey.
_SCALE = (
    *((68, 1, 84), (72, 40, 120), (62, 74, 137), (49, 104, 142), (38, 130, 142)),
    *((31, 158, 137), (53, 183, 121), (110, 206, 88), (181, 222, 43), (253, 231, 37)),
)
# Okabe and Ito's palette without black and white.
_GROUPS = (
    *((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66)),
    *((0, 114, 178), (213, 94, 0), (204, 121, 167)),
)
NUM_LEVELS = 32  # more than the eye tells apart
_FEWEST = 2  # patches of a group that is worth a colour

Colour = tuple[int, int, int]


def scale(fraction: float) -> Colour:
    """Colour of a fraction, 0 the least and 1 the most."""
    points = np.linspace(0, 1, len(_SCALE))
    red, green, blue = (
        int(round(np.interp(fraction, points, part))) for part in zip(*_SCALE, strict=True)
    )
    return red, green, blue


def css(colour: Colour) -> str:
    """A colour as CSS and Pillow read it."""
    return "#{:02x}{:02x}{:02x}".format(*colour)


def ranks(scores: Sequence[float | None]) -> list[float | None]:
    """Share of the other scores that lie below each, ties in the middle, 0 to 1.

    By rank, because attention has a few very large scores beside which all others look alike.
    """
    found = np.sort([s for s in scores if s is not None and np.isfinite(s)])
    if not len(found):
        return [None] * len(scores)
    most = max(len(found) - 1, 1)

    def rank(score: float | None) -> float | None:
        if score is None or not np.isfinite(score):
            return None
        if len(found) == 1:
            return 0.5
        below, upto = np.searchsorted(found, score), np.searchsorted(found, score, "right")
        return float((below + upto - 1) / 2 / most)

    return [rank(score) for score in scores]


def levels(scores: Sequence[float | None]) -> dict[Colour, list[int]]:
    """Patches by the colour of their score, in `NUM_LEVELS` steps from the least."""
    steps: dict[int, list[int]] = {}
    for patch, share in enumerate(ranks(scores)):
        if share is not None:
            steps.setdefault(round(share * (NUM_LEVELS - 1)), []).append(patch)
    return {scale(step / (NUM_LEVELS - 1)): steps[step] for step in sorted(steps)}


def quantiles(scores: Sequence[float | None]) -> tuple[float, float, float] | None:
    """Least, middle and largest score; None if there is no score."""
    found = [score for score in scores if score is not None and np.isfinite(score)]
    if not found:
        return None
    low, middle, high = (float(value) for value in np.quantile(found, (0, 0.5, 1)))
    return low, middle, high


def depths(places: Sequence[Place], num_patches: int) -> list[tuple[str, Colour, list[int]]]:
    """How far patches come: words, a colour and the patches, for each place and for the end."""
    left = set(range(num_patches))
    out = []
    for number, place in enumerate(places):
        gone = sorted(left - set(place.kept))
        left &= set(place.kept)
        out.append((f"dropped {place.name}", scale(number / len(places)), gone))
    return [*out, ("in every layer", scale(1.0), sorted(left))]


def tints(groups: Sequence[int], columns: int) -> dict[Colour, list[int]]:
    """Merged patches by colour: neighbours of different groups differ where seven colours allow.

    A group of one patch has no colour.
    """
    members: dict[int, list[int]] = {}
    for patch, group in enumerate(groups):
        if group >= 0:
            members.setdefault(group, []).append(patch)
    merged = {g: patches for g, patches in members.items() if len(patches) >= _FEWEST}
    chosen: dict[int, int] = {}
    for number, (group, patches) in enumerate(merged.items()):
        beside = {groups[near] for patch in patches for near in _beside(patch, columns, groups)}
        taken = {chosen[other] for other in beside if other in chosen}
        order = [(number + step) % len(_GROUPS) for step in range(len(_GROUPS))]
        chosen[group] = next((colour for colour in order if colour not in taken), order[0])
    out: dict[Colour, list[int]] = {}
    for group, colour in chosen.items():
        out.setdefault(_GROUPS[colour], []).extend(merged[group])
    return {colour: sorted(patches) for colour, patches in out.items()}


def _beside(patch: int, columns: int, groups: Sequence[int]) -> list[int]:
    """Patches above, below, left and right."""
    row, column = divmod(patch, columns)
    near = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
    rows = len(groups) // columns
    return [r * columns + c for r, c in near if 0 <= r < rows and 0 <= c < columns]
