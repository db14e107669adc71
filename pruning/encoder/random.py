"""Random in the vision tower or right after it: the baseline that every score has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from patchsieve.contract.errors import ShapeError
from patchsieve.pruning.encoder.walk import TowerMethod, TowerSite


@dataclass(frozen=True)
class RandomPatches(TowerMethod):
    """Keep patches drawn uniformly without replacement, inside the tower or right after it.

    Each patch has one number of noise; the lowest go first, whatever the schedule, so that the last
    survivors are the same draw.
    """

    name: ClassVar[str] = "random"
    reads: ClassVar[tuple[str, ...]] = ("noise",)

    def scores(self, site: TowerSite) -> Tensor:
        """The noise of each candidate, float32 [B, N].

        Raises:
            ShapeError: The site brings no noise.
        """
        if site.noise is None:
            raise ShapeError(
                "the random method got no noise",
                expected="TowerSite.noise [B, n], uniform in [0, 1)",
                do="draw it from the request's seed and feed it to the vision graph",
            )
        return site.candidates(site.noise.float())
