"""ToMe in the decoder: the baseline that IVTP's table 7 calls ToMe+."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchsieve.contract.errors import ShapeError
from patchsieve.pruning.decoder.rule import DecoderMethod
from patchsieve.pruning.decoder.site import Decision, Site
from patchsieve.pruning.rows import mean_over, unit
from patchsieve.pruning.schedules import fewest_after_merging
from patchsieve.pruning.select import LOWEST, first_best_of_rows, keep_count

NEVER = 2.0  # score of a token that nothing can merge away: a negated cosine is at most 1


@dataclass(frozen=True)
class DecoderToMe(DecoderMethod):
    """Merge the tokens of an image that are most alike, until `num_keep` are left.

    Tokens are divided by place into A (even) and B (odd); each of A looks for the most similar of
    B, by the cosine of the keys of the layer before the site, averaged over the heads; the best
    pairs merge into their mean weighted by size, which takes the row of B: its position and its
    raster id. Between equal pairs the lower index stays unmerged.

    The paper leaves open: all but that ToMe is extended to the decoder. Here a whole site merges at
    once, at the input of its layer, as every site drops tokens; so at most half of the tokens that
    come in can merge, which export checks. Keys are taken as they are cached, rotated: tokens whose
    rotated keys are alike are attended to alike by every later row. Layers before the site
    keep the keys and values of both.

    Differs from ToMe: attention is not proportional to size. A merged token counts once.

    Attributes:
        num_keep: Tokens left of each image.
    """

    name: ClassVar[str] = "tome"
    reads: ClassVar[tuple[str, ...]] = ("key", "hidden", "sizes")

    num_keep: int = 64

    def fewest_left(self, num_tokens: int) -> int:
        """Fewest tokens that one site can leave of so many: those of B, and one."""
        return fewest_after_merging(num_tokens)

    def decide(self, site: Site, budget: Tensor) -> Decision:
        """Merge all but `num_keep` tokens (see `Method.decide`).

        Below `fewest_left` tokens of B go too, and are lost with what merged into them.

        Raises:
            ShapeError: The site lacks hidden rows or sizes.
        """
        if site.hidden is None or site.sizes is None:
            raise ShapeError(
                "tome does not find what it merges",
                expected="Site.hidden [B, L, C] and Site.sizes [B, N]",
                do="feed what `reads` names",
            )
        key = site.key.index_select(2, site.visual_rows + site.first_key)  # [B, G, N, D]
        metric = unit(mean_over(key.float(), 1))  # [B, N, D]
        place = torch.arange(metric.shape[1], device=metric.device)  # [N]
        half = place.float() / 2  # no remainder: export/operators lists none for CUDA
        is_target = half.floor() < half  # [N]
        similar = metric @ metric.transpose(1, 2)  # [B, N, N]
        similar = torch.where(is_target, similar, LOWEST)
        dissimilar = (-similar.amax(-1)).clamp(max=NEVER)  # of a lone token there is no pair
        scores = torch.where(is_target, NEVER, dissimilar)  # [B, N]
        keep, num_wanted = keep_count(scores, self.num_keep, budget)
        best = first_best_of_rows(similar).float()  # [B, N, N]
        target = (best * place).sum(-1).to(torch.int64)  # [B, N]
        moved = torch.where(keep | is_target, place, target)  # [B, N]
        rows = site.hidden.index_select(1, site.visual_rows)  # [B, N, C]
        return Decision(keep, scores, num_wanted, merge(rows, site.sizes, moved), moved)


def merge(rows: Tensor, sizes: Tensor, moved: Tensor) -> Tensor:
    """Means weighted by size of the rows that come together; others stay to the last bit.

    Args:
        rows: [B, N, C].
        sizes: Patches that each stands for, float32 [B, N].
        moved: Row that each goes to, its own where it stays, int64 [B, N].

    Returns:
        [B, N, C], of the rows' type; a row that goes keeps what it held.
    """
    place = torch.arange(rows.shape[1], device=rows.device)  # [N]
    goes = (moved[:, None] == place[:, None]) & (place[:, None] != place)  # [B, N to, N from]
    weights = torch.where(goes, sizes[:, None], 0.0)  # [B, N, N]
    added = weights.sum(-1, keepdim=True)  # [B, N, 1] sizes that come
    own = sizes[:, :, None]  # [B, N, 1]
    wide = rows.float()
    mean = (wide * own + weights @ wide) / (own + added)
    return torch.where(added > 0, mean.to(rows.dtype), rows)
