"""FastV (Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchsieve.contract.errors import PatchsieveError
from patchsieve.pruning.decoder.site import Decision, Site, received_attention
from patchsieve.pruning.select import check_keep_ratio, keep_fraction

ROWS = ("last", "mean")


@dataclass(frozen=True)
class FastV:
    """Keep a fixed fraction: the tokens that the text looks at most, in the layer before the site.

    The paper's K is the site (its default 2: layer 1 scores, layer 2 gets the survivors); its R is
    the fraction pruned, 1 - `keep_ratio`.

    Differs from the paper: its text averages over all rows, which needs the [L, L] map, and its
    code takes the last row only. "last" is the code. "mean" here averages over the instruction's
    rows behind the image. A half is rounded up, as in every method here: of 49 tokens 0.5 keeps 25,
    where the code's `round`, which goes to the even number, keeps 24. Of 576 both keep 288.

    Attributes:
        keep_ratio: Fraction kept of the image's tokens as they enter the decoder, in (0, 1].
        rows: "last" or "mean".

    Raises:
        PatchsieveError: `keep_ratio` is out of range or `rows` is unknown.
    """

    name: ClassVar[str] = "fastv"
    reads: ClassVar[tuple[str, ...]] = ("query", "key", "last_row")

    keep_ratio: float = 0.5
    rows: str = "last"

    def __post_init__(self) -> None:
        """Check the options."""
        check_keep_ratio(self.keep_ratio)
        if self.rows not in ROWS:
            raise PatchsieveError(
                "FastV does not know these rows",
                found=self.rows,
                expected=" or ".join(ROWS),
                do='use "last", which is what the authors\' code does',
            )

    def decide(self, site: Site, budget: Tensor) -> Decision:
        """Keep the tokens that receive most attention (see `Method.decide`)."""
        scores = last_row_score(site) if self.rows == "last" else mean_row_score(site)
        keep, num_wanted = keep_fraction(scores, self.keep_ratio, site.num_visual, budget)
        return Decision(keep, scores, num_wanted)


def last_row_score(site: Site) -> Tensor:
    """Attention that each visual token receives from the last row, head mean, float32 [B, N]."""
    last = site.last_row
    if last is None:
        num_rows = site.query.shape[2]
        last = torch.arange(num_rows - 1, num_rows, device=site.query.device)  # [1]
    return received_attention(site, last)


def mean_row_score(site: Site) -> Tensor:
    """Attention that each visual token receives, mean over instruction and heads, [B, N] float32.

    The T rows of the instruction, as the site's `text_rows` has them: T x S scores.
    """
    return received_attention(site, site.text_rows)
