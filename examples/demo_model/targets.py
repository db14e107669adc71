"""What each patch of a scene shows: dense targets of both trainings."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .scenes import (
    COLOURS,
    GRID,
    GROUNDS,
    PATCH,
    PATTERNS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    owner_map,
)

NAMES = {"shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(SIZES), "texture": TEXTURES}
GROUND_NAMES = {"ground": tuple(GROUNDS), "pattern": PATTERNS}


def patch_targets(scene: Scene) -> tuple[Tensor, Tensor]:
    """What each patch shows.

    Returns:
        Its classes in the order of the heads, [N, 6]; and where its object's centre is from its
        own, in patches, [N, 2], zero where there is no object.
    """
    owners = owner_map(scene).ravel()
    classes = np.zeros((GRID * GRID, len(NAMES) + 2), dtype=np.int64)
    centres = np.zeros((GRID * GRID, 2), dtype=np.float32)
    classes[:, len(NAMES)] = tuple(GROUNDS).index(scene.ground)
    classes[:, len(NAMES) + 1] = PATTERNS.index(scene.pattern)
    for patch in np.flatnonzero(owners >= 0):
        thing = scene.things[owners[patch]]
        for column, (name, values) in enumerate(NAMES.items()):
            classes[patch, column] = values.index(getattr(thing, name)) + 1
        middle = (np.array([patch % GRID, patch // GRID]) + 0.5) * PATCH
        centres[patch] = (np.array([thing.x, thing.y]) - middle) / PATCH
    return torch.from_numpy(classes), torch.from_numpy(centres)
