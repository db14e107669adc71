"""SparseVLM (Zhang et al., 2024, arXiv 2410.04417), as the second version of its code has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchsieve.contract.errors import ShapeError
from patchsieve.pruning.decoder.rule import KeepRatio
from patchsieve.pruning.decoder.site import Site, key_slots
from patchsieve.pruning.rows import attention_rows, mean_over
from patchsieve.pruning.select import keep_top


@dataclass(frozen=True)
class SparseVLM(KeepRatio):
    """Keep a fixed fraction: what the instruction's raters attend to in the layer before the site.

    A rater is a text token that the visual tokens are like: its share of softmax_t(H_v H_t^T), mean
    over the visual tokens, is above the mean; H are the rows that entered the decoder. Scores are
    the raters' attention, mean over raters and heads. The sites are 3, 7 and 16 of 32 layers, and
    the counts those of version 2, which merges nothing (`SPARSEVLM_COUNTS` of
    pruning/entries/decoder.py).

    Differs from the paper: the text is the instruction, where its code takes all that follows the
    image. Raters are found again at each site, by the visual tokens that are left, where its code
    finds them once. The fraction is fixed, as in its code; the paper takes it from the rank of the
    attention. Version 1's recycled tokens are not here.

    The paper leaves open: a text of which no token is above the mean, such as a single one. Then
    all rate.

    Attributes:
        over_heads: Heads whose attention counts. "all": version 1. "best": the 14 of 32 whose
            raters look at the image most, as version 2 has it; as large a share of other numbers.
    """

    name: ClassVar[str] = "sparsevlm"
    reads: ClassVar[tuple[str, ...]] = ("query", "key", "embeddings")

    over_heads: str = "best"

    def scores(self, site: Site) -> Tensor:
        """Attention that each visual token receives from the raters, float32 [B, N].

        Raises:
            ShapeError: The site has no embeddings.
        """
        if site.embeddings is None:
            raise ShapeError(
                "sparsevlm got no embeddings",
                expected="Site.embeddings [B, L, C]",
                do='name "embeddings" in the `reads` of the method',
            )
        visual = site.embeddings.index_select(1, site.visual_rows)  # [B, N, C]
        text = site.embeddings.index_select(1, site.text_rows)  # [B, T, C]
        rates = raters(visual, text).float()  # [B, T]
        slots = key_slots(site, site.text_rows)
        attention = attention_rows(site.query.index_select(2, site.text_rows), site.key, slots)
        attention = attention.index_select(3, key_slots(site, site.visual_rows))  # [B, H, T, N]
        rated = (attention * rates[:, None, :, None]).sum(2)  # [B, H, N]
        rated = rated / rates.sum(-1)[:, None, None]
        if self.over_heads == "all":
            return mean_over(rated, 1)
        num_best = best_heads(rated.shape[1])
        is_best = keep_top(rated.sum(-1), num_best).float()  # [B, H]
        return (rated * is_best[:, :, None]).sum(1) / num_best


def raters(visual: Tensor, text: Tensor) -> Tensor:
    """Which text tokens judge.

    Args:
        visual: H_v, [B, N, C].
        text: H_t, [B, T, C].

    Returns:
        Mask with at least one true in each row, bool [B, T].
    """
    logits = visual.float() @ text.float().transpose(1, 2)  # [B, N, T]
    share = mean_over(torch.softmax(logits, dim=-1), 1)  # [B, T]
    above = share > mean_over(share, 1)[:, None]
    is_empty = above.float().sum(-1, keepdim=True) < 1  # [B, 1]
    return above | is_empty


def best_heads(num_heads: int) -> int:
    """Heads that count: 14 of 32, the same share of other numbers, rounded half up."""
    return max(1, (28 * num_heads + 32) // 64)
