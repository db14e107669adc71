"""TopK in the decoder: the baseline that IVTP's table 7 calls TopK+."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from patchsieve.contract.errors import ShapeError
from patchsieve.pruning.decoder.fastv import last_row_score
from patchsieve.pruning.decoder.ivtp import block_layer, cls_row
from patchsieve.pruning.decoder.rule import KeepNumber
from patchsieve.pruning.decoder.site import Site


@dataclass(frozen=True)
class DecoderTopK(KeepNumber):
    """Keep the tokens that one row attends to most, in the layer before the site.

    The paper leaves open: which row takes the class token's part in a decoder. "cls" is the
    pseudo-CLS of the plan (its text "none" is the visual CLS, which makes this purely visual);
    "last" is the last row of the prompt, as FastV has it.

    Attributes:
        row: "cls" or "last".
    """

    name: ClassVar[str] = "topk"

    row: str = "cls"

    @property
    def reads(self) -> tuple[str, ...]:
        """What its decision takes (see `Method.reads`)."""
        return ("query", "key", "side_row" if self.row == "cls" else "last_row")

    def scores(self, site: Site) -> Tensor:
        """Attention that each visual token receives from the row, float32 [B, N].

        Raises:
            ShapeError: The site has no side row, and the row is "cls".
        """
        if self.row == "last":
            return last_row_score(site)
        if site.side_row is None:
            raise ShapeError(
                "topk got no pseudo-CLS",
                expected="Site.side_row [1]",
                do='give the plan a pseudo_cls, or choose row "last"',
            )
        return cls_row(site, block_layer(site, site.query, site.key))[:, :-1]
