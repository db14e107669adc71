"""Random in the decoder: the baseline that every score has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from patchsieve.contract.errors import ShapeError
from patchsieve.pruning.decoder.rule import KeepRatio
from patchsieve.pruning.decoder.site import Site


@dataclass(frozen=True)
class Random(KeepRatio):
    """Keep tokens drawn uniformly without replacement, by noise that comes in with the site.

    The caller draws the noise, so a seed gives the same tokens on every backend.
    """

    name: ClassVar[str] = "random"
    reads: ClassVar[tuple[str, ...]] = ("noise",)

    def scores(self, site: Site) -> Tensor:
        """The noise of each visual token, float32 [B, N].

        Raises:
            ShapeError: The site brings no noise.
        """
        if site.noise is None:
            raise ShapeError(
                "the random method got no noise",
                expected="Site.noise [B, N], uniform in [0, 1)",
                do="draw it from the request's seed and feed it to the decision",
            )
        # A clone, because an output that is an input would lend that input its name in the graph.
        return site.noise.float().clone()
