"""The key/value cache: each stage has its own rows, its own length and its own capacity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from patchsieve.contract.manifest import Manifest, Stage


@dataclass
class StageCache:
    """Cache of one stage.

    Attributes:
        stage: Which layers.
        slots: Capacity in rows.
        row_bytes: KV bytes of one row in all of the stage's layers.
        buffers: The backend's own; for each layer keys and values [1, G, S, D], zeroed when made.
        length: Rows present. Slots from here on hold finite numbers that no row sees.
        num_side: Side rows that the current prefill appended; the next rows overwrite them.
    """

    stage: Stage
    slots: int
    row_bytes: int
    buffers: Any
    length: int = 0
    num_side: int = 0

    @property
    def present(self) -> int:
        """Rows that decisions may read: those that count, and side rows."""
        return self.length + self.num_side

    def grow(self, rows: int, num_side: int = 0) -> None:
        """Count the rows that a stage wrote, and side rows after them."""
        self.length, self.num_side = self.length + rows, num_side

    def to_dict(self) -> dict[str, Any]:
        """Reservation and use, in slots and bytes."""
        return {
            "layers": [self.stage.first, self.stage.last - 1],
            "slots_reserved": self.slots,
            "slots_used": self.length,
            "reserved": self.slots * self.row_bytes,
            "used": self.length * self.row_bytes,
        }


@dataclass
class Cache:
    """Caches of all stages, and the one position counter that they share.

    Attributes:
        stages: One cache per stage.
        position: Rotary position of the next row, whatever was dropped before or since.
    """

    stages: list[StageCache] = field(default_factory=list)
    position: int = 0

    def mark(self) -> tuple[int, ...]:
        """How far the cache is filled, for `rewind`."""
        return (self.position, *(stage.length for stage in self.stages))

    def rewind(self, mark: tuple[int, ...]) -> None:
        """Forget the rows that came since a mark."""
        self.position = mark[0]
        for stage, length in zip(self.stages, mark[1:], strict=True):
            stage.length = length

    def empty(self) -> None:
        """Forget all rows."""
        self.rewind((0,) * len(self.mark()))

    def kv_bytes(self) -> dict[str, Any]:
        """Reserved and used bytes, in all and per stage."""
        per_stage = [stage.to_dict() for stage in self.stages]
        total = {key: sum(stage[key] for stage in per_stage) for key in ("reserved", "used")}
        return total | {"per_stage": per_stage}


def empty_cache(facts: Manifest, slots: Sequence[int], allocate: Any) -> Cache:
    """A cache of so many slots per stage; `allocate(index, slots)` makes a stage's buffers."""
    return Cache(
        [
            StageCache(stage, count, facts.row_bytes(stage), allocate(index, count))
            for index, (stage, count) in enumerate(zip(facts.stages, slots, strict=True))
        ]
    )
