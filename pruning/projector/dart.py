"""DART (Wen et al., "Stop Looking for Important Tokens", EMNLP 2025), on the decoder's input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from patchsieve.pruning.encoder.walk import Kept, TowerMethod, TowerSite, gather_rows
from patchsieve.pruning.rows import cosine
from patchsieve.pruning.select import LOWEST, ascending, first_best, keep_top


@dataclass(frozen=True)
class DART(TowerMethod):
    """Keep a few long tokens, the pivots, and for each of them the tokens that are least like it.

    The form of TensorRT Edge-LLM, which judges by the decoder's input. Pivots are the tokens of the
    largest L1 norm. They take turns, the longest first: each keeps its share of the tokens that are
    still wanted, rounded up, namely those of the lowest cosine with it. Nothing is merged.

    Differs from the paper: it acts on keys after the decoder's second layer. Here as there in
    TensorRT Edge-LLM, the projected tokens take their place. Both also have pivots among the words;
    no word is known before the decoder, so all pivots are tokens of the image.

    Attributes:
        pivots: How many, at most as many as tokens stay.
    """

    name: ClassVar[str] = "dart"

    pivots: int = 4

    def reduce(self, site: TowerSite, count: int) -> Kept:
        """Choose `count` tokens."""
        count = site.choices(count)
        rows = site.candidates(site.rows).float()  # [B, N, C]
        left = torch.maximum(rows, -rows).sum(-1)  # [B, N], the L1 norm
        pivots = []
        for _ in range(min(self.pivots, count)):
            pivots.append(first_best(left))
            left = torch.where(pivots[-1], LOWEST, left)
        keep, wanted = left == LOWEST, count - len(pivots)
        for number, pivot in enumerate(pivots):
            share = -(-wanted // (len(pivots) - number))
            if not share:
                break
            similar = cosine(rows, gather_rows(rows, ascending(pivot, 1)))  # [B, N]
            keep = keep | keep_top(torch.where(keep, LOWEST, -similar), share)
            wanted -= share
        return Kept.of(site, keep, count)
