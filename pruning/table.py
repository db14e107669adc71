"""Every method of a decoder site. "none" is the absence of a site, not a method."""

from __future__ import annotations

from torch import nn

from patchsieve.pruning.atp import ATP
from patchsieve.pruning.fastv import FastV
from patchsieve.pruning.ivtp import IVTP
from patchsieve.pruning.random import Random
from patchsieve.pruning.site import Method
from patchsieve.pruning.topk_decoder import DecoderTopK

METHODS: dict[str, type] = {m.name: m for m in (Random, FastV, ATP, IVTP, DecoderTopK)}


def settings(method: Method) -> dict[str, object]:
    """Options of a method by name, without its modules: what a manifest records as JSON."""
    return {k: v for k, v in vars(method).items() if not isinstance(v, nn.Module)}


def modules(method: Method) -> dict[str, nn.Module]:
    """Modules of a method by field name: what a decision graph registers to carry their weights."""
    return {k: v for k, v in vars(method).items() if isinstance(v, nn.Module)}
