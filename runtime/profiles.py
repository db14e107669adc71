"""Results of `profile`, read from their files and compared."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchsieve.contract.errors import PatchsieveError

SCHEMA_VERSION = 1
# What a profile was taken of, and how: a ratio says most where all of these are equal.
FACTS = ("checkpoint", "precision", "target", "stages", "warmup", "runs")
COUNTS = ("prompt_tokens", "visual_tokens", "new_tokens")
# What differs on one machine from minute to minute.
PASSING = ("memory_bytes.available",)
_WRITE = "write one: patchsieve profile BUNDLE --output FILE"


@dataclass(frozen=True)
class Measured:
    """One plan of one profile.

    Attributes:
        counts: Tokens of the request and of the answer.
        times_ms: Percentiles of each part.
        kv_bytes: Used and reserved.
        joules: Of an answer, the median; None if nothing measured power.
    """

    counts: dict[str, int]
    times_ms: dict[str, dict[str, float]]
    kv_bytes: dict[str, int]
    joules: float | None


@dataclass(frozen=True)
class Profile:
    """What `profile --json` or `profile --output` wrote, as far as it is compared.

    Attributes:
        path: Its file.
        bundle: The bundle's directory.
        date: When it was taken.
        plan: The main plan among `plans`.
        facts: The values of `FACTS`.
        machine: What describes the machine, by dotted names.
        plans: What was measured of each plan.
        peak_rss_bytes: The most memory that the process had.
    """

    path: Path
    bundle: str
    date: str
    plan: str
    facts: dict[str, Any]
    machine: dict[str, Any]
    plans: dict[str, Measured]
    peak_rss_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """What the profile was taken of, as `compare --json` prints it."""
        taken = {"file": str(self.path), "bundle": self.bundle, "date": self.date}
        memory = {"peak_rss_bytes": self.peak_rss_bytes}
        return taken | {"plan": self.plan} | self.facts | memory


@dataclass(frozen=True)
class Comparison:
    """Two profiles side by side.

    Attributes:
        a: The first.
        b: The second, whose numbers are divided by the first's.
        plans: By plan ("A / B" where two plans of different names meet), then by part: "a", "b"
            and their "ratio", None if A has 0.
        differences: What is not the same in both, by name, as [A, B].
    """

    a: Profile
    b: Profile
    plans: dict[str, dict[str, dict[str, float | None]]]
    differences: dict[str, list[Any]]

    def to_dict(self) -> dict[str, Any]:
        """The comparison as `compare --json` prints it."""
        sides = {"a": self.a.to_dict(), "b": self.b.to_dict()}
        return sides | {"plans": self.plans, "differences": self.differences}


def read(path: str | Path) -> Profile:
    """Read a profile.

    Raises:
        PatchsieveError: It is no JSON object, of a newer schema, or no profile.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PatchsieveError(
            f"cannot read the profile {path}", found=error, expected="a JSON object", do=_WRITE
        ) from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise PatchsieveError(
            f"{path} is not a profile that this version reads",
            found="no schema_version" if version is None else f"schema_version {version!r}",
            expected=f"schema_version {SCHEMA_VERSION}, as `patchsieve profile --output` writes it",
            do=_WRITE,
        )
    try:
        found = Profile(
            path=path,
            bundle=str(data["bundle"]),
            date=str(data["date"]),
            plan=str(data["plan"]),
            facts={name: data[name] for name in FACTS},
            machine=dict(_leaves(data["machine"])),
            plans={str(name): _measured(one) for name, one in data["plans"].items()},
            peak_rss_bytes=int(data["peak_rss_bytes"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PatchsieveError(
            f"{path} is not a profile",
            found=f"{type(error).__name__}: {error}",
            expected="what `patchsieve profile --output FILE` writes",
            do=_WRITE,
        ) from error
    if found.plan not in found.plans:
        raise PatchsieveError(
            f"the profile {path} lacks its own plan",
            found=", ".join(found.plans) or "no plans",
            expected=found.plan,
            do=_WRITE,
        )
    return found


def compare(a: Profile, b: Profile) -> Comparison:
    """Compare the main plans of two profiles, then plans of the same name."""
    shared = [(name, name) for name in a.plans if name in b.plans]
    pairs = dict.fromkeys([(a.plan, b.plan), *shared])
    return Comparison(
        a,
        b,
        {f"{x} / {y}" if x != y else x: ratios(a.plans[x], b.plans[y]) for x, y in pairs},
        differ(a, b),
    )


def ratios(a: Measured, b: Measured) -> dict[str, dict[str, float | None]]:
    """Medians of what both measured, KV bytes, and B over A; below 1, B is less."""
    times = [name for name in a.times_ms if name in b.times_ms]
    numbers = {name: (a.times_ms[name]["p50"], b.times_ms[name]["p50"]) for name in times}
    numbers |= {f"kv_{kind}": (a.kv_bytes[kind], b.kv_bytes[kind]) for kind in a.kv_bytes}
    if a.joules is not None and b.joules is not None:
        numbers["joules"] = (a.joules, b.joules)
    return {
        name: {"a": x, "b": y, "ratio": round(y / x, 4) if x else None}
        for name, (x, y) in numbers.items()
    }


def differ(a: Profile, b: Profile) -> dict[str, list[Any]]:
    """What is not the same in both, by name: model, settings, request and machine."""
    both = [one.facts | one.plans[one.plan].counts | one.machine for one in (a, b)]
    names = dict.fromkeys([*both[0], *both[1]])
    found = {name: [one.get(name) for one in both] for name in names if name not in PASSING}
    return {name: values for name, values in found.items() if values[0] != values[1]}


def _measured(data: Any) -> Measured:
    times = {
        str(name): {str(key): float(value) for key, value in values.items()}
        for name, values in data["times_ms"].items()
    }
    if not all("p50" in values for values in times.values()):
        raise ValueError("a time without its median")
    power = data.get("power")  # profiles of earlier versions have none
    return Measured(
        counts={name: int(data[name]) for name in COUNTS},
        times_ms=times,
        kv_bytes={kind: int(data["kv_bytes"][kind]) for kind in ("used", "reserved")},
        joules=power and float(power["joules_per_answer"]["p50"]),
    )


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of nested objects."""
    if not isinstance(value, dict):
        yield name, value
        return
    for key, part in value.items():
        yield from _leaves(part, f"{name}.{key}" if name else key)
