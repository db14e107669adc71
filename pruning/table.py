"""Every pruning method by its name. "none" is the absence of a method."""

from __future__ import annotations

from torch import nn

from patchsieve.pruning.decoder.atp import ATP
from patchsieve.pruning.decoder.fastv import FastV
from patchsieve.pruning.decoder.ivtp import IVTP
from patchsieve.pruning.decoder.random import Random
from patchsieve.pruning.decoder.site import Method
from patchsieve.pruning.decoder.tome import DecoderToMe
from patchsieve.pruning.decoder.topk import DecoderTopK
from patchsieve.pruning.encoder.evit import EViT
from patchsieve.pruning.encoder.gtp import GTP
from patchsieve.pruning.encoder.random import RandomPatches
from patchsieve.pruning.encoder.tome import ToMe
from patchsieve.pruning.encoder.topk import TopK
from patchsieve.pruning.projector.pooling import Pooling

# Of a decoder site; inside the vision tower; between tower and decoder.
METHODS: dict[str, type] = {
    method.name: method for method in (Random, FastV, ATP, IVTP, DecoderTopK, DecoderToMe)
}
ENCODERS: dict[str, type] = {
    method.name: method for method in (GTP, TopK, RandomPatches, EViT, ToMe)
}
PROJECTORS: dict[str, type] = {method.name: method for method in (Pooling, TopK, RandomPatches)}


def settings(method: Method) -> dict[str, object]:
    """Options of a method by name, without its modules: what a manifest records as JSON."""
    return {k: v for k, v in vars(method).items() if not isinstance(v, nn.Module)}


def modules(method: Method) -> dict[str, nn.Module]:
    """Modules of a method by field name: what a decision graph registers to carry their weights."""
    return {k: v for k, v in vars(method).items() if isinstance(v, nn.Module)}
