"""Every pruning method by its name. "none" is the absence of a method."""

from __future__ import annotations

from torch import nn

from patchsieve.pruning.atp import ATP
from patchsieve.pruning.evit import EViT
from patchsieve.pruning.fastv import FastV
from patchsieve.pruning.gtp import GTP
from patchsieve.pruning.ivtp import IVTP
from patchsieve.pruning.pooling import Pooling
from patchsieve.pruning.random import Random, RandomPatches
from patchsieve.pruning.site import Method
from patchsieve.pruning.tome import ToMe
from patchsieve.pruning.tome_decoder import DecoderToMe
from patchsieve.pruning.topk import TopK
from patchsieve.pruning.topk_decoder import DecoderTopK

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
