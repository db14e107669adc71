"""The class of every method in the catalogue, by place and name, and what a method is made of."""

from __future__ import annotations

from torch import nn

from patchsieve.pruning.catalogue import ENTRIES
from patchsieve.pruning.decoder.site import Method
from patchsieve.pruning.entry import DECODER, ENCODER, PROJECTOR


def _classes(place: str) -> dict[str, type]:
    return {entry.name: entry.load() for entry in ENTRIES if entry.place == place}


# Of a decoder site; inside the vision tower; between tower and decoder.
METHODS, ENCODERS, PROJECTORS = (_classes(place) for place in (DECODER, ENCODER, PROJECTOR))


def settings(method: Method) -> dict[str, object]:
    """Options of a method by name, without its modules: what a manifest records as JSON."""
    return {k: v for k, v in vars(method).items() if not isinstance(v, nn.Module)}


def modules(method: Method) -> dict[str, nn.Module]:
    """Modules of a method by field name: what a decision graph registers to carry their weights."""
    return {k: v for k, v in vars(method).items() if isinstance(v, nn.Module)}
