"""PyramidDrop (Xing et al., 2024, arXiv 2410.17247)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from patchsieve.pruning.decoder.fastv import last_row
from patchsieve.pruning.decoder.rule import KeepRatio
from patchsieve.pruning.decoder.site import Site, received_at_next_layer


@dataclass(frozen=True)
class PyramidDrop(KeepRatio):
    """Keep a fixed fraction: what the prompt's last row attends to in the layer to be entered.

    The layer at the site computes queries and keys of the rows that would enter it; the score is
    the attention of the last row, mean over the heads. The paper's stages end at layers 8, 16 and
    24 of 32, and keep 0.5, 0.25 and 0.125 of the original count (its lambda is 0.5).

    Differs from the paper: survivors keep their positions, where its code numbers the shorter
    sequence again at every stage, so that text moves towards the image. A half is rounded up, where
    its code rounds down; of 576 both keep 288, 144 and 72. In a later turn the row looks at the
    rows of its own prefill: the layer has not seen the earlier ones. Its training, which averages
    over the rows before each answer, is not here.
    """

    name: ClassVar[str] = "pyramiddrop"
    reads: ClassVar[tuple[str, ...]] = ("last_row", "next_layer")

    def scores(self, site: Site) -> Tensor:
        """Attention that each visual token receives from the last row, float32 [B, N]."""
        return received_at_next_layer(site, last_row(site))
