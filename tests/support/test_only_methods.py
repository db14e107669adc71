"""Methods that only tests know, one for each source that no method of the product reads yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from patchsieve.contract import names, reads
from patchsieve.export.families.specs import DecoderSpec
from patchsieve.pruning.decoder.site import Decision, Site, received_at_next_layer
from patchsieve.pruning.select import keep_count


@dataclass(frozen=True)
class Ahead:
    """Keep the tokens that the last row attends to most in the layer that they would enter."""

    name: ClassVar[str] = "ahead"
    reads: ClassVar[tuple[str, ...]] = (names.LAST_ROW, reads.NEXT_LAYER)
    merges: ClassVar[bool] = False

    num_keep: int = 6

    def decide(self, site: Site, budget: Tensor) -> Decision:
        scores = received_at_next_layer(site, site.last_row)
        return Decision(scores=scores, **chosen(scores, self.num_keep, budget))


@dataclass(frozen=True)
class Longest:
    """Keep the longest hidden rows: it reads them and merges nothing."""

    name: ClassVar[str] = "longest"
    reads: ClassVar[tuple[str, ...]] = (names.HIDDEN,)
    merges: ClassVar[bool] = False

    num_keep: int = 6

    def decide(self, site: Site, budget: Tensor) -> Decision:
        rows = site.hidden.index_select(1, site.visual_rows).float()  # [B, N, C]
        scores = (rows * rows).sum(-1)
        return Decision(scores=scores, **chosen(scores, self.num_keep, budget))


def chosen(scores: Tensor, num_keep: int, budget: Tensor) -> dict[str, Tensor]:
    """The other parts of a decision by scores."""
    keep, num_wanted = keep_count(scores, num_keep, budget)
    return {"keep": keep, "num_wanted": num_wanted}


TEST_ONLY = {method.name: method for method in (Ahead, Longest)}


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
