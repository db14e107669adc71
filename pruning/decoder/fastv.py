"""FastV (Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchsieve.pruning.decoder.rule import KeepRatio
from patchsieve.pruning.decoder.site import Site, received_attention


@dataclass(frozen=True)
class FastV(KeepRatio):
    """Keep a fixed fraction: the tokens that the text looks at most, in the layer before the site.

    The paper's K is the site (its default 2: layer 1 scores, layer 2 gets the survivors); its R is
    the fraction pruned, 1 - `keep_ratio`.

    Differs from the paper: its text averages over all rows, which needs the [L, L] map, and its
    code takes the last row only. "last" is the code. "mean" here averages over the instruction's
    rows after the image. A half is rounded up, as in every method here: of 49 tokens 0.5 keeps 25,
    where the code's `round`, which goes to the even number, keeps 24. Of 576 both keep 288.

    Attributes:
        rows: "last" or "mean".
    """

    name: ClassVar[str] = "fastv"
    reads: ClassVar[tuple[str, ...]] = ("query", "key", "last_row")

    rows: str = "last"

    def scores(self, site: Site) -> Tensor:
        """Attention that each visual token receives, float32 [B, N]."""
        return last_row_score(site) if self.rows == "last" else mean_row_score(site)


def last_row_score(site: Site) -> Tensor:
    """Attention that each visual token receives from the last row, head mean, float32 [B, N]."""
    return received_attention(site, last_row(site))


def last_row(site: Site) -> Tensor:
    """The last ordinary row, int64 [1]."""
    if site.last_row is not None:
        return site.last_row
    num_rows = site.query.shape[2]
    return torch.arange(num_rows - 1, num_rows, device=site.query.device)


def mean_row_score(site: Site) -> Tensor:
    """Attention that each visual token receives, mean over instruction and heads, [B, N] float32.

    The T rows of the instruction, as the site's `text_rows` has them: T x S scores.
    """
    return received_attention(site, site.text_rows)
