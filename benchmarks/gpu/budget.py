"""The time that one call may take: a machine may be lent for ten minutes at a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from patchsieve.contract.errors import PatchsieveError


class OutOfTimeError(PatchsieveError):
    """What comes next would not end in time."""


@dataclass
class Budget:
    """Seconds that are left of a number of minutes."""

    minutes: float
    clock: Callable[[], float] = time.monotonic
    _start: float = field(init=False)

    def __post_init__(self) -> None:
        self._start = self.clock()

    @property
    def left_s(self) -> float:
        """Seconds until the end; none is left after it."""
        return max(0.0, self._start + 60 * self.minutes - self.clock())

    def needs(self, seconds: float, what: str) -> None:
        """Refuse to begin what will not end.

        Raises:
            OutOfTimeError: Fewer seconds are left.
        """
        if self.left_s < seconds:
            raise OutOfTimeError(
                f"no time is left for {what}",
                found=f"{self.left_s:.0f} s of {self.minutes:g} minutes",
                expected=f"about {seconds:.0f} s",
                do="call again with the same --workdir: what is made stays",
            )
