"""`patchsieve compare A.json B.json`: two results of `patchsieve profile`, side by side."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchsieve.cli.output import print_json, size, table
from patchsieve.contract.errors import PatchsieveError

SCHEMA_VERSION = 1
# What a profile was taken of, and how; all else being equal, a ratio tells of what differs.
FACTS = ("checkpoint", "precision", "target", "stages", "warmup", "runs")
COUNTS = ("prompt_tokens", "visual_tokens", "new_tokens")
# Of a machine what differs from minute to minute and says nothing of it.
PASSING = ("memory_bytes.available",)
_NAMES = {
    "ttft": "time to first token",
    "per_token": "time per token",
    "kv_used": "KV used",
    "kv_reserved": "KV reserved",
    "joules": "energy of an answer",
}
_NUMBERED = {"prefill": "prefill, stage", "decide": "decision before layer"}


@dataclass(frozen=True)
class Measured:
    """One plan of one profile.

    Attributes:
        counts: Tokens of the request and of the answer.
        times_ms: Percentiles of each part.
        kv_bytes: Used and reserved.
        joules: Of an answer, the median; None where nothing measured power.
    """

    counts: dict[str, int]
    times_ms: dict[str, dict[str, float]]
    kv_bytes: dict[str, int]
    joules: float | None


@dataclass(frozen=True)
class Profile:
    """What `profile --json` or `profile --output` wrote, as far as it is compared."""

    path: Path
    bundle: str
    date: str
    plan: str
    facts: dict[str, Any]
    machine: dict[str, Any]
    plans: dict[str, Measured]
    peak_rss_bytes: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("a", type=Path, metavar="A.json", help="what `profile --output` wrote")
    add("b", type=Path, metavar="B.json", help="another; ratios are B over A")


def run(args: argparse.Namespace) -> int:
    """Print each number of both, and their ratio."""
    a, b = read(args.a), read(args.b)
    pairs = {f"{x} / {y}" if x != y else x: compare(a.plans[x], b.plans[y]) for x, y in plans(a, b)}
    differences = differ(a, b)
    if args.json:
        print_json({"a": _told(a), "b": _told(b), "plans": pairs, "differences": differences})
        return 0
    blocks = [f"A  {_line(a)}\nB  {_line(b)}"]
    if differences:
        rows = [(name, *map(_short, values)) for name, values in differences.items()]
        blocks.append("not the same in both:\n" + table(("", "A", "B"), rows))
    blocks += [_table(name, rows) for name, rows in pairs.items()]
    print("\n\n".join(blocks))
    return 0


def read(path: Path) -> Profile:
    """Read a profile.

    Raises:
        PatchsieveError: It is no JSON object, of a newer schema, or no profile.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PatchsieveError(
            f"cannot read the profile {path}", found=error, expected="a JSON object"
        ) from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise PatchsieveError(
            f"{path} is not a profile that this version reads",
            found="no schema_version" if version is None else f"schema_version {version!r}",
            expected=f"schema_version {SCHEMA_VERSION}, as `patchsieve profile --output` writes it",
        )
    try:
        return Profile(
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
        ) from error


def plans(a: Profile, b: Profile) -> list[tuple[str, str]]:
    """Plans that stand beside each other: the main ones, then those of the same name."""
    shared = [name for name in a.plans if name in b.plans]
    if a.plan not in a.plans or b.plan not in b.plans:
        raise PatchsieveError(
            "a profile lacks its own plan", found=f"{a.plan} in {a.path}, {b.plan} in {b.path}"
        )
    pairs = [(a.plan, b.plan), *((name, name) for name in shared)]
    return list(dict.fromkeys(pairs))


def compare(a: Measured, b: Measured) -> dict[str, dict[str, float | None]]:
    """Medians of what both measured, KV bytes, and B over A; below 1, B is less."""
    numbers = {name: (a.times_ms[name]["p50"], b.times_ms[name]["p50"]) for name in a.times_ms
               if name in b.times_ms}  # fmt: skip
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


def _told(one: Profile) -> dict[str, Any]:
    told = {"file": str(one.path), "bundle": one.bundle, "date": one.date, "plan": one.plan}
    return told | one.facts | {"peak_rss_bytes": one.peak_rss_bytes}


def _line(one: Profile) -> str:
    memory = f"peak memory {size(one.peak_rss_bytes)}"
    return f"{one.path}: {one.bundle}, plan {one.plan}, {one.date}, {memory}"


def _table(name: str, rows: dict[str, dict[str, float | None]]) -> str:
    """One pair of plans."""
    cells = []
    for part, values in rows.items():
        ratio = values["ratio"]
        numbers = [_number(part, values[side] or 0.0) for side in ("a", "b")]
        cells.append((_label(part), *numbers, "-" if ratio is None else f"{ratio:.3f}"))
    return table((f"plan {name}", "A p50", "B p50", "B / A"), cells)


def _label(part: str) -> str:
    kind, _, number = part.partition(".")
    return f"{_NUMBERED.get(kind, kind)} {number}" if number else _NAMES.get(part, part)


def _number(part: str, value: float) -> str:
    if part.startswith("kv_"):
        return size(value)
    return f"{value:.3f} J" if part == "joules" else f"{value:.2f} ms"


def _short(value: Any) -> str:
    text = "-" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 48 else text[:45] + "..."
