"""Weights files: which part of the model each holds, and how its matrices are stored.

A file holds one part, so that it can be written, hashed and read without the others. How matrices
are stored is in `patchsieve.contract.formats`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from patchsieve.contract import formats
from patchsieve.contract.formats import FLOAT
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
        key: What `--precision` calls it, if its matrices may have a format; None otherwise.
    """

    name: str
    file: str
    precision: str
    label: str
    key: str | None = None

    def path(self, layer: int | None = None) -> str:
        """Its file in a bundle."""
        return f"{FOLDER}{self.file.format(layer)}{ENDING}"

    def entry(
        self, precision: Precision, layer: int | None = None, format: str = FLOAT
    ) -> WeightsFile:
        """What the manifest says of its file."""
        return WeightsFile(self.name, layer, getattr(precision, self.precision), format)


TOWER = Part("tower", "vision", "tower", "vision tower", formats.TOWER)  # and projector
LAYER = Part("layer", "layers.{}", "decoder", "decoder layers", formats.DECODER)
# The decoder layers once more, in the format that feeds single rows.
STEP = Part("step", "steps.{}", "decoder", "decoder layers for single rows", formats.STEP)
EMBEDDINGS = Part("embeddings", "embed_tokens", "decoder", "embeddings")
HEAD = Part("head", "head", "head", "output head", formats.HEAD)  # and the last norm
SCORER = Part("scorer", "scorer", "tower", "CLIP scorer", formats.SCORER)  # CLIP's text tower
JOINT = Part("joint", "joint", "tower", "CLIP scorer")  # what carries an image into its space
PARTS = {part.name: part for part in (LAYER, STEP, TOWER, EMBEDDINGS, HEAD, SCORER, JOINT)}


# What people call the parts that may have a format of their own, in the order of a sentence.
_CALLED = {"tower": "tower", "layer": "decoder", "step": "single rows", "head": "head"}
_CALLED |= {"scorer": "scorer"}


@dataclass(frozen=True)
class WeightsFile:
    """What the manifest says of a weights file.

    Attributes:
        part: A name of `PARTS`.
        layer: Of the decoder, for the part that has a file for each.
        type: The floating-point type that its numbers are computed in.
        format: A key of `formats.FORMATS`: that of most of its numbers. Single matrices may have
            another, which their tensors' names say.
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


def in_words(files: Iterable[WeightsFile]) -> str:
    """The formats of parts that are not floats: "tower and decoder int8, head int8-weights"."""
    held: dict[str, list[str]] = {}
    for file in files:
        formats_of = held.setdefault(file.part, [])
        formats_of += [file.format] if file.format not in formats_of else []
    called: dict[str, list[str]] = {}
    for part, name in _CALLED.items():
        kinds = held.get(part, [FLOAT])
        if kinds != [FLOAT]:
            called.setdefault(" and ".join(kinds), []).append(name)
    return ", ".join(f"{' and '.join(names)} {kinds}" for kinds, names in called.items())
