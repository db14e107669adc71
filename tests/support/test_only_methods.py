"""Methods that only tests know: small ones, each of which reads one source by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar
from unittest.mock import patch

from torch import Tensor

from patchsieve.contract import names, reads
from patchsieve.export.families.specs import DecoderSpec
from patchsieve.pruning import catalogue
from patchsieve.pruning.decoder.rule import KeepNumber
from patchsieve.pruning.decoder.site import Site, received_at_next_layer
from patchsieve.pruning.entry import DECODER, NUMBER, Entry, Option


@dataclass(frozen=True)
class Ahead(KeepNumber):
    """Keep the tokens that the last row attends to most in the layer that they would enter."""

    name: ClassVar[str] = "ahead"
    reads: ClassVar[tuple[str, ...]] = (names.LAST_ROW, reads.NEXT_LAYER)

    def scores(self, site: Site) -> Tensor:
        return received_at_next_layer(site, site.last_row)


@dataclass(frozen=True)
class Longest(KeepNumber):
    """Keep the longest hidden rows: it reads them and merges nothing."""

    name: ClassVar[str] = "longest"
    reads: ClassVar[tuple[str, ...]] = (names.HIDDEN,)

    def scores(self, site: Site) -> Tensor:
        rows = site.hidden.index_select(1, site.visual_rows).float()  # [B, N, C]
        return (rows * rows).sum(-1)


TEST_ONLY = {method.name: method for method in (Ahead, Longest)}


@contextmanager
def known() -> Iterator[None]:
    """Let plans name the methods."""
    options = (Option("num_keep", "count", "tokens left", 64),)
    rows = {
        (DECODER, name): Entry(
            name, DECODER, f"{kind.__module__}:{kind.__name__}", "a test's", NUMBER, options
        )
        for name, kind in TEST_ONLY.items()
    }
    with patch.dict(catalogue._BY_PLACE, rows):
        yield


def tiny_spec(num_heads: int = 4, num_kv_heads: int = 2, head_dim: int = 16) -> DecoderSpec:
    """A decoder of 4 layers, 64 wide, with biases."""
    return DecoderSpec(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=128,
        num_layers=4,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=1e-5,
        activation="silu",
        qkv_bias=True,
        output_bias=False,
        mlp_bias=False,
        inv_freq=tuple(10000 ** (-i / (head_dim // 2)) for i in range(head_dim // 2)),
        rotary_scale=1.0,
        max_rows=1024,
    )
