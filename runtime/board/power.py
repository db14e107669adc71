"""Power, temperatures and throttling of a Jetson, read from sysfs; silent anywhere else."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from patchsieve.runtime.board.jetson import OFFLINE_C, whole_rails

HWMON = "sys/class/hwmon"
THERMAL = "sys/class/thermal"
INTERVAL_S = 0.02  # the sensors of a board renew their values every few milliseconds


@dataclass(frozen=True)
class Rail:
    """One measured supply: millivolts times milliamperes, or microwatts from the chip itself."""

    name: str
    volts: Path | None = None
    amperes: Path | None = None
    watts: Path | None = None

    def read(self) -> float | None:
        """Watts now; None if the chip does not answer or the reader may not ask."""
        if self.watts is not None:
            microwatts = _integer(self.watts)
            return None if microwatts is None else microwatts / 1e6
        if self.volts is None or self.amperes is None:
            return None
        millivolts, milliamperes = _integer(self.volts), _integer(self.amperes)
        if millivolts is None or milliamperes is None:
            return None
        return millivolts * milliamperes / 1e6


def find_rails(root: Path = Path("/")) -> dict[str, Rail]:
    """Rails of the INA power monitors under /sys/class/hwmon.

    `in7`, the sum of shunt voltages, has a label and no current, so it is no rail.
    """
    rails = {}
    for chip in sorted((root / HWMON).glob("hwmon*")):
        if not _text(chip / "name").startswith("ina"):
            continue
        for label in sorted(chip.glob("in*_label")):
            number = re.sub(r"\D", "", label.name)
            name = _text(label)
            volts, amperes = chip / f"in{number}_input", chip / f"curr{number}_input"
            if name not in ("", "NC") and amperes.is_file():
                rails[name] = Rail(name, volts, amperes)
        name, watts = _text(chip / "label"), chip / "power1_input"
        if name and watts.is_file():  # INA238: one supply, its chip multiplies
            rails[name] = Rail(name, watts=watts)
    return rails


def temperatures(root: Path = Path("/")) -> dict[str, float]:
    """Degrees Celsius by thermal zone; zones whose part has no power are left out."""
    found = {}
    for zone in sorted((root / THERMAL).glob("thermal_zone*")):
        value = _integer(zone / "temp")
        if value is not None and value / 1e3 != OFFLINE_C:
            found[_text(zone / "type").removesuffix("-thermal")] = value / 1e3
    return found


def throttling(root: Path = Path("/")) -> dict[str, int]:
    """What slows the board down: alerts that are on, and counts of overcurrent events."""
    found = {}
    for device in sorted((root / THERMAL).glob("cooling_device*")):
        name, state = _text(device / "type"), _integer(device / "cur_state")
        if "throttle" in name and state is not None:
            found[name] = state
    for counter in sorted((root / HWMON).glob("hwmon*/oc*_event_cnt")):
        count = _integer(counter)
        if count is not None:
            found[counter.name.removesuffix("_cnt")] = count
    return found


def has_throttled(before: dict[str, int], after: dict[str, int]) -> bool | None:
    """Whether an alert is on or a count has risen; None if the board reports neither."""
    if not after:
        return None
    return any(
        value > (before.get(name, 0) if name.startswith("oc") else 0)
        for name, value in after.items()
    )


@dataclass
class PowerReader:
    """Samples the module's power in a thread of its own, between `start` and `stop`.

    Attributes:
        rails: Those whose sum is what the module draws.
        interval_s: Seconds between two samples.
        clock: Seconds that only grow.
    """

    rails: Sequence[Rail]
    interval_s: float = INTERVAL_S
    clock: Callable[[], float] = time.perf_counter
    samples: list[tuple[float, float]] = field(default_factory=list)  # seconds, watts
    _done: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    @classmethod
    def find(cls, root: Path = Path("/")) -> PowerReader | None:
        """The reader of this board; None if nothing is measured, as on every desktop."""
        rails = find_rails(root)
        names = whole_rails(set(rails))
        if names is None or any(rails[name].read() is None for name in names):
            return None
        return cls([rails[name] for name in names])

    def sample(self) -> None:
        """Take one sample; a rail that does not answer spoils it, and it is left out."""
        values = [rail.read() for rail in self.rails]
        if None not in values:
            self.samples.append((self.clock(), float(sum(value for value in values if value))))

    def start(self) -> None:
        """Begin to sample."""
        self._done.clear()
        self._thread = threading.Thread(target=self._run, name="power", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End it."""
        self._done.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while not self._done.is_set():
            self.sample()
            self._done.wait(self.interval_s)

    def between(self, start: float, end: float) -> dict[str, float] | None:
        """Mean and highest watts, and joules, of an interval of `clock`.

        Joules are the trapezoids under the samples; the first and last are held to the ends.
        None if no sample fell inside.
        """
        inside = sorted((at, watts) for at, watts in self.samples if start <= at <= end)
        if not inside:
            return None
        line = [(start, inside[0][1]), *inside, (end, inside[-1][1])]
        joules = sum((w + v) / 2 * (u - t) for (t, w), (u, v) in pairwise(line))
        seconds = end - start
        return {
            "mean_w": round(joules / seconds if seconds else line[0][1], 4),
            "peak_w": round(max(watts for _, watts in inside), 4),
            "joules": round(joules, 4),
        }

    def describe(self) -> dict[str, Any]:
        """Which rails, how often."""
        return {"rails": [rail.name for rail in self.rails], "interval_s": self.interval_s}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:  # absent, or a sensor whose part is switched off
        return ""


def _integer(path: Path) -> int | None:
    text = _text(path)
    return int(text) if re.fullmatch(r"-?\d+", text) else None
