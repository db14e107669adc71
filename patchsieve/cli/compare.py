"""`patchsieve compare A.json B.json`: two results of `patchsieve profile`, side by side."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from patchsieve.cli.output import print_json
from patchsieve.runtime import profiles
from patchsieve.runtime.profiles import Profile
from patchsieve.tables import size, table

_NAMES = {
    "ttft": "time to first token",
    "per_token": "time per token",
    "kv_used": "KV used",
    "kv_reserved": "KV reserved",
    "joules": "energy of an answer",
}
_NUMBERED = {"prefill": "prefill, stage", "decide": "decision before layer"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("a", type=Path, metavar="A.json", help="a file that `patchsieve profile --output` wrote")
    add("b", type=Path, metavar="B.json", help="another one; ratios are B over A")


def run(args: argparse.Namespace) -> int:
    """Print each number of both, and their ratio."""
    found = profiles.compare(profiles.read(args.a), profiles.read(args.b))
    if args.json:
        print_json(found.to_dict())
        return 0
    blocks = [f"A  {_line(found.a)}\nB  {_line(found.b)}"]
    if found.differences:
        rows = [(name, *map(_short, values)) for name, values in found.differences.items()]
        blocks.append("not the same in both:\n" + table(("", "A", "B"), rows))
    blocks += [_table(name, rows) for name, rows in found.plans.items()]
    print("\n\n".join(blocks))
    return 0


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
