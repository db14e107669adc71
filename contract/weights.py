"""Weights files: which part of the model each holds, and how its matrices are stored.

Three facts are kept apart. The *type* is what a part computes in, the *format* how the matrices of
a file are stored, and the type of the caches is the manifest's own. A file holds one part, so that
it can be written, hashed and read without the others.

To add a format: a row of `FORMATS`, a row of `PACKINGS` in export/weights.py that writes it, the
operation in export/graphs that reads it, and how export/lowering/base.py spells that operation.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from patchsieve.contract.precision import Precision

FOLDER = "graphs/weights/"
ENDING = ".safetensors"


@dataclass(frozen=True)
class Part:
    """A part of the model that has weights files of its own.

    Attributes:
        name: As the manifest calls it.
        file: Name of its file without folder and ending; `{}` is the number of a layer.
        precision: The part of `Precision` that says its type.
        label: For people.
    """

    name: str
    file: str
    precision: str
    label: str

    def path(self, layer: int | None = None) -> str:
        """Its file in a bundle."""
        return f"{FOLDER}{self.file.format(layer)}{ENDING}"

    def entry(self, precision: Precision, layer: int | None = None) -> WeightsFile:
        """What the manifest says of its file, in the format that every part may have."""
        return WeightsFile(self.name, layer, getattr(precision, self.precision), FLOAT)


TOWER = Part("tower", "vision", "tower", "vision tower")  # and projector
LAYER = Part("layer", "layers.{}", "decoder", "decoder layers")
EMBEDDINGS = Part("embeddings", "embed_tokens", "decoder", "embeddings")
HEAD = Part("head", "head", "head", "output head")  # and the last norm
SCORER = Part("scorer", "scorer", "tower", "CLIP scorer")  # CLIP's text tower
JOINT = Part("joint", "joint", "tower", "CLIP scorer")  # what carries an image into its space
PARTS = {part.name: part for part in (LAYER, TOWER, EMBEDDINGS, HEAD, SCORER, JOINT)}


@dataclass(frozen=True)
class Format:
    """A way to store the matrices of a file.

    Attributes:
        name: As the manifest calls it.
        error: Largest error that it makes of a row of the model, over the row's largest entry; 0 if
            it keeps each number. `verify` allows it.
    """

    name: str
    error: float = 0.0


FLOAT = "float"  # each number in the type of its part
FORMATS = {row.name: row for row in (Format(FLOAT),)}


@dataclass(frozen=True)
class WeightsFile:
    """What the manifest says of a weights file.

    Attributes:
        part: A name of `PARTS`.
        layer: Of the decoder, for the part that has a file for each.
        type: The floating-point type that its numbers are computed in.
        format: A key of `FORMATS`.
    """

    part: str
    layer: int | None
    type: str
    format: str


def of_path(path: str) -> tuple[Part, int | None] | None:
    """Part and layer of a file by its name, as schemas 1 to 3 knew them; None for any other."""
    for part in PARTS.values():
        pattern = re.escape(part.path()).replace("None", r"(\d{1,6})")
        if found := re.fullmatch(pattern, path, re.ASCII):
            return part, int(found[1]) if found.groups() else None
    return None
