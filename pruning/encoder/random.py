"""Random in the vision tower or right after it: the baseline that every score has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from patchsieve.contract.errors import ShapeError
from patchsieve.pruning.encoder.walk import Kept, TowerSite
from patchsieve.pruning.schedules import TowerSchedule
from patchsieve.pruning.select import keep_top


@dataclass(frozen=True)
class RandomPatches:
    """Keep patches drawn uniformly without replacement, inside the tower or right behind it.

    Each patch has one number of noise; the lowest go first, whatever the schedule, so that the last
    survivors are the same draw.

    Attributes:
        schedule: Where, and to how many.
    """

    name: ClassVar[str] = "random"
    reads: ClassVar[tuple[str, ...]] = ("noise",)
    is_inside: ClassVar[bool] = False
    is_merging: ClassVar[bool] = False
    is_proportional: ClassVar[bool] = False

    schedule: TowerSchedule = TowerSchedule()

    def places(self, num_patches: int, num_layers: int) -> dict[int, int]:
        """See `TowerMethod.places`."""
        return self.schedule.places(self.name, num_patches, num_layers)

    def reduce(self, site: TowerSite, count: int) -> Kept:
        """Keep the `count` patches with the highest noise.

        Raises:
            ShapeError: The site brings no noise.
        """
        if site.noise is None:
            raise ShapeError(
                "the random method got no noise",
                expected="TowerSite.noise [B, n], uniform in [0, 1)",
                do="draw it from the request's seed and feed it to the vision graph",
            )
        return Kept.of(site, keep_top(site.candidates(site.noise.float()), count), count)
