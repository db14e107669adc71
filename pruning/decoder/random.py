"""Random in the decoder: the baseline that every score has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from patchsieve.contract.errors import ShapeError
from patchsieve.pruning.decoder.site import Decision, Site
from patchsieve.pruning.select import check_keep_ratio, keep_fraction


@dataclass(frozen=True)
class Random:
    """Keep tokens drawn uniformly without replacement, by noise that comes in with the site.

    The caller draws the noise, so a seed gives the same tokens on every backend.

    Attributes:
        keep_ratio: Fraction kept of the image's tokens as they enter the decoder, in (0, 1].

    Raises:
        PatchsieveError: `keep_ratio` is out of range.
    """

    name: ClassVar[str] = "random"
    reads: ClassVar[tuple[str, ...]] = ("noise",)

    keep_ratio: float = 0.5

    def __post_init__(self) -> None:
        """Check the fraction."""
        check_keep_ratio(self.keep_ratio)

    def decide(self, site: Site, budget: Tensor) -> Decision:
        """Keep the tokens with the highest noise (see `Method.decide`).

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
        scores = site.noise.float().clone()  # [B, N]
        keep, num_wanted = keep_fraction(scores, self.keep_ratio, site.num_visual, budget)
        return Decision(keep, scores, num_wanted)
