"""TopK: the patches that resemble or interest the class token most (IVTP's baseline)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from patchsieve.contract.errors import PatchsieveError
from patchsieve.pruning.encoder.walk import Kept, TowerSite
from patchsieve.pruning.rollout import start_row
from patchsieve.pruning.rows import cosine
from patchsieve.pruning.schedules import TowerSchedule
from patchsieve.pruning.select import keep_top

SCORES = ("attention", "cosine")


@dataclass(frozen=True)
class TopK:
    """Keep the patches nearest to the class token, layer by layer or at once.

    IVTP's tables prune 22.26 patches behind each layer (the default schedule); one shot is a
    schedule of one layer.

    The paper leaves open: the "similarity with the CLS token", attention or cosine, and a tower
    without one: there the mean over all rows takes its place.

    Attributes:
        schedule: Where, and to how many.
        score: "attention" of the class token, mean of heads, in the layer before; or "cosine" of
            the rows behind it.

    Raises:
        PatchsieveError: `score` is unknown.
    """

    name: ClassVar[str] = "topk"
    reads: ClassVar[tuple[str, ...]] = ()
    is_inside: ClassVar[bool] = False
    is_merging: ClassVar[bool] = False
    is_proportional: ClassVar[bool] = False

    schedule: TowerSchedule = TowerSchedule()
    score: str = "attention"

    def __post_init__(self) -> None:
        """Check the option."""
        if self.score not in SCORES:
            raise PatchsieveError(
                "topk does not know this score",
                found=repr(self.score)[:80],
                expected=" or ".join(SCORES),
            )

    def places(self, num_patches: int, num_layers: int) -> dict[int, int]:
        """See `TowerMethod.places`."""
        return self.schedule.places(self.name, num_patches, num_layers)

    def scores(self, site: TowerSite) -> Tensor:
        """Score of each candidate, float32 [B, N]."""
        if self.score == "attention":
            return site.candidates(start_row(site.group[-1], site.cls))
        rows = site.rows.float()
        centre = rows[:, :1] if site.has_cls else rows.sum(1, keepdim=True) / rows.shape[1]
        return site.candidates(cosine(rows, centre))

    def reduce(self, site: TowerSite, count: int) -> Kept:
        """Keep the `count` patches that score highest."""
        return Kept.of(site, keep_top(self.scores(site), count), count)
