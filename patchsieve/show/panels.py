"""Panels of a contact sheet as Pillow images: whole pixels a patch, hard edges."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from patchsieve.show import colours, shapes
from patchsieve.show.colours import Colour
from patchsieve.show.shown import Picture, Place

PANEL = 384  # pixels of the longer side, at most
PAPER: Colour = (253, 253, 252)
INK: Colour = (28, 32, 36)
_VEIL = 0.84  # share of the paper over a dropped patch
_TINT = 0.55  # share of a group's colour


def pixels(picture: Picture) -> Image.Image:
    """The picture, scaled to a panel."""
    rows, columns = picture.grid
    patch = max(PANEL // max(rows, columns), 1)
    image = Image.open(io.BytesIO(picture.png)).convert("RGB")
    return image.resize((columns * patch, rows * patch), Image.Resampling.LANCZOS)


def survivors(picture: Picture, place: Place) -> Image.Image:
    """The picture; dropped patches are pale."""
    kept = _kept(picture, place)
    paper = np.tile(np.array(PAPER), (picture.num_patches, 1))
    return _outlined(_blend(picture, paper, _VEIL * ~kept), picture, kept.tolist())


def heat(picture: Picture, place: Place) -> Image.Image | None:
    """The scores by rank, kept patches outlined; None if there are no scores."""
    if colours.quantiles(place.scores or ()) is None:
        return None
    colour = np.tile(np.array(PAPER), (picture.num_patches, 1))
    share = np.full(picture.num_patches, _VEIL)
    for one, patches in colours.levels(place.scores or ()).items():
        colour[patches], share[patches] = one, 1.0
    return _outlined(_blend(picture, colour, share), picture, _kept(picture, place).tolist())


def groups(picture: Picture, place: Place) -> Image.Image | None:
    """The picture, each merged group in a colour; None if nothing merges."""
    if place.groups is None:
        return None
    colour, share = np.zeros((picture.num_patches, 3)), np.zeros(picture.num_patches)
    for one, patches in colours.tints(place.groups, picture.grid[1]).items():
        colour[patches], share[patches] = one, _TINT
    return _outlined(_blend(picture, colour, share), picture, place.groups)


def depths(picture: Picture, places: Sequence[Place]) -> Image.Image:
    """Colours of how deep each patch comes."""
    colour = np.zeros((picture.num_patches, 3))
    for _, one, patches in colours.depths(places, picture.num_patches):
        colour[patches] = one
    return _blend(picture, colour, np.ones(picture.num_patches))


def ramp(width: int, height: int) -> Image.Image:
    """The scale of scores, least to largest."""
    row = np.array([colours.scale(x / max(width - 1, 1)) for x in range(width)], np.uint8)
    return Image.fromarray(np.tile(row, (height, 1, 1)))


def _kept(picture: Picture, place: Place) -> np.ndarray:
    kept = np.zeros(picture.num_patches, bool)
    kept[list(place.kept)] = True
    return kept


def _blend(picture: Picture, colour: np.ndarray, share: np.ndarray) -> Image.Image:
    """The picture under colours [R * C, 3], each as strong as its share [R * C]."""
    below = pixels(picture)
    over = Image.fromarray(colour.astype(np.uint8).reshape(*picture.grid, 3))
    mask = Image.fromarray((share * 255).round().astype(np.uint8).reshape(picture.grid))
    hard = Image.Resampling.NEAREST
    return Image.composite(over.resize(below.size, hard), below, mask.resize(below.size, hard))


def _outlined(image: Image.Image, picture: Picture, labels: Sequence[int]) -> Image.Image:
    pen, columns = ImageDraw.Draw(image), picture.grid[1]
    patch = image.width // columns
    for line in shapes.borders(labels, columns):
        pen.line([patch * end for end in line], INK, 1)
    return image
