"""FastV (Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchsieve.pruning.decoder.rule import KeepRatio
from patchsieve.pruning.decoder.site import Site, key_slots, received_attention
from patchsieve.pruning.rows import attention_rows, mean_over


@dataclass(frozen=True)
class FastV(KeepRatio):
    """Keep a fixed fraction: the tokens that the text looks at most, in the layer before the site.

    The paper's K is the site (its default 2: layer 1 scores, layer 2 gets the survivors); its R is
    the fraction pruned, 1 - `keep_ratio`.

    The paper and its code differ. The paper's criterion is the average attention that a token
    receives from all others, "all" here: H x L x S scores of a decision, 52 MB for 640 rows of 32
    heads. Its code takes the last row alone, "last".

    Differs from both: "mean" averages over the instruction's rows after the image. A half is
    rounded up, as in every method here: of 49 tokens 0.5 keeps 25, where the code's `round`, which
    goes to the even number, keeps 24. Of 576 both keep 288. Its code also has a form that masks
    tokens and drops none, and one that drops them from the cache after a full prefill; neither
    makes the first token faster, and neither is here.

    Attributes:
        rows: "last", "mean" or "all".
    """

    name: ClassVar[str] = "fastv"
    reads: ClassVar[tuple[str, ...]] = ("query", "key", "last_row")

    rows: str = "last"

    def scores(self, site: Site) -> Tensor:
        """Attention that each visual token receives, float32 [B, N]."""
        return _SCORES[self.rows](site)


def last_row_score(site: Site) -> Tensor:
    """Attention that each visual token receives from the last row, head mean, float32 [B, N]."""
    return received_attention(site, last_row(site))


def all_rows_score(site: Site) -> Tensor:
    """Attention that each visual token receives from all rows, head mean, float32 [B, N].

    The token looks at itself too. A row before it does not see it and counts as 0, as do rows that
    were cached before this prefill.
    """
    last = last_row(site)  # [1]; side rows come after it
    rows = torch.arange(site.query.shape[2], device=site.query.device)  # [L]
    attention = attention_rows(site.query, site.key, key_slots(site, rows))  # [B, H, L, S]
    attention = mean_over(attention, 1).index_select(2, key_slots(site, site.visual_rows))
    ordinary = (rows <= last).float()[:, None]  # [L, 1]
    return (attention * ordinary).sum(1) / (key_slots(site, last) + 1).float()


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


_SCORES = {"last": last_row_score, "mean": mean_row_score, "all": all_rows_score}
