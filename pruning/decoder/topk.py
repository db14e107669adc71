"""TopK in the decoder: the baseline that IVTP's table 7 calls TopK+."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from patchsieve.contract.errors import PatchsieveError, ShapeError
from patchsieve.pruning.decoder.fastv import last_row_score
from patchsieve.pruning.decoder.ivtp import block_layer, cls_row
from patchsieve.pruning.decoder.site import Decision, Site
from patchsieve.pruning.select import check_num_keep, keep_count

ROWS = ("cls", "last")


@dataclass(frozen=True)
class DecoderTopK:
    """Keep the tokens that one row attends to most, in the layer before the site.

    The paper leaves open: which row takes the class token's part in a decoder. "cls" is the
    pseudo-CLS of the plan (its text "none" is the visual CLS, which makes this purely visual);
    "last" is the last row of the prompt, as FastV has it.

    Attributes:
        num_keep: Tokens kept of each image.
        row: "cls" or "last".

    Raises:
        PatchsieveError: An option cannot be used.
    """

    name: ClassVar[str] = "topk"
    merges: ClassVar[bool] = False

    num_keep: int = 64
    row: str = "cls"

    def __post_init__(self) -> None:
        """Check the options."""
        check_num_keep(self.num_keep)
        if self.row not in ROWS:
            raise PatchsieveError(
                "topk does not know this row",
                found=self.row,
                expected=" or ".join(ROWS),
                do='use "cls", the pseudo-CLS',
            )

    @property
    def reads(self) -> tuple[str, ...]:
        """What its decision takes (see `Method.reads`)."""
        return ("query", "key", "side_row" if self.row == "cls" else "last_row")

    def decide(self, site: Site, budget: Tensor) -> Decision:
        """Keep the `num_keep` tokens that receive most attention (see `Method.decide`).

        Raises:
            ShapeError: The site has no side row, and the row is "cls".
        """
        if self.row == "last":
            scores = last_row_score(site)  # [B, N]
        elif site.side_row is None:
            raise ShapeError(
                "topk got no pseudo-CLS",
                expected="Site.side_row [1]",
                do='give the plan a pseudo_cls, or choose row "last"',
            )
        else:
            scores = cls_row(site, block_layer(site, site.query, site.key))[:, :-1]  # [B, N]
        keep, num_wanted = keep_count(scores, self.num_keep, budget)
        return Decision(keep, scores, num_wanted)
