"""A table's marks as JSON and as text that Markdown renders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.accuracy.marks import GROUPS, Marks, verdict
from benchmarks.accuracy.plans import Row
from benchmarks.accuracy.tables import Part, Table

_COLUMNS = ("", "tokens", "KV kB", "all", "to none", "kept", "fine", "coarse")


def to_dict(table: Table, marks: Mapping[Row, Marks]) -> dict[str, Any]:
    """A table as JSON holds it: accuracies with intervals, paired differences, who beats whom.

    Args:
        table: The table, its first row the unpruned model.
        marks: Of each row that was run.
    """
    full = marks[table.rows[0]]
    return {
        "table": table.name,
        "title": table.title,
        "questions": len(full.hits),
        "has_kinds": table.kinds,
        "parts": [_part(part, marks, full) for part in table.parts],
    }


def _part(part: Part, marks: Mapping[Row, Marks], full: Marks) -> dict[str, Any]:
    rows = []
    for row in part.rows:
        if row.not_run:
            rows.append({"label": row.label, "not_run": row.not_run})
            continue
        own = marks[row]
        entry = {"label": row.label, "plan": row.plan.to_dict()} | own.to_dict()
        if row.heads is not None:
            entry["heads"] = asdict(row.heads)
        if own is not full:
            entry["difference"] = {g: own.minus(full, g).to_dict() for g in GROUPS}
            entry["kept"] = own.share() / full.share() if full.share() else 0.0
        fine_more = own.tokens_between("fine", "coarse")
        entry["fine_keeps_more"] = fine_more.to_dict()
        rows.append(entry)
    return {"title": part.title, "rows": rows, "comparisons": _comparisons(part, marks)}


def _comparisons(part: Part, marks: Mapping[Row, Marks]) -> list[dict[str, Any]]:
    out = []
    for champion in part.champions:
        own = next(row for row in part.rows if row.label == champion)
        if own.not_run:
            continue
        for other in part.rows:
            if other is own or other.not_run:
                continue
            away = marks[own].minus(marks[other])
            words = {"of": champion, "to": other.label, "verdict": verdict(away)}
            out.append(words | {"difference": away.to_dict()})
    return out


def to_text(found: Mapping[str, Any]) -> str:
    """A table for the eye."""
    blocks = [f"## {found['title']}", f"{found['questions']} held-out questions; 95 % intervals."]
    for part in found["parts"]:
        blocks.append(f"**{part['title']}**")
        blocks.append(_grid(_COLUMNS, [_line(row) for row in part["rows"]]))
        told = [_sentence(one) for one in part["comparisons"]]
        if told:
            blocks.append("\n".join(f"- {line}" for line in told))
        run = [row for row in part["rows"] if "not_run" not in row]
        if found["has_kinds"] and run:
            blocks.append(_kinds(run))
    return "\n\n".join(blocks) + "\n"


def _line(row: Mapping[str, Any]) -> list[str]:
    if "not_run" in row:
        return [f"{row['label']} ({row['not_run']})", *[""] * (len(_COLUMNS) - 1)]
    away = row.get("difference")
    return [
        row["label"],
        f"{row['tokens']['all']:.1f}",
        f"{row['kv_bytes'] / 1000:.0f}",
        _percent(row["accuracy"]["all"]),
        _percent(away["all"], "+") if away else "",
        f"{100 * row['kept']:.1f} %" if away else "",
        _percent(row["accuracy"]["fine"]),
        _percent(row["accuracy"]["coarse"]),
    ]


def _kinds(rows: Sequence[Mapping[str, Any]]) -> str:
    """Tokens and accuracy by kind of question."""
    kinds = sorted(rows[0]["tokens_by_kind"])
    cells = [
        [row["label"]]
        + [f"{row['tokens_by_kind'][k]:.1f}: {100 * row['accuracy_by_kind'][k]:.1f}" for k in kinds]
        + [_number(row["fine_keeps_more"])]
        for row in rows
    ]
    header = ["tokens: accuracy", *kinds, "fine keep more by"]
    return _grid(header, cells)


def _sentence(one: Mapping[str, Any]) -> str:
    return f"{one['of']} {one['verdict']} {one['to']}: {_percent(one['difference'], '+')} points"


def _percent(found: Mapping[str, float], sign: str = "") -> str:
    numbers = (round(100 * found[key], 1) + 0.0 for key in ("mean", "low", "high"))  # no -0.0
    mean, low, high = (f"{number:{sign}.1f}" for number in numbers)
    return f"{mean} [{low}, {high}]"


def _number(found: Mapping[str, float]) -> str:
    rounded = {key: round(found[key], 1) + 0.0 for key in ("mean", "low", "high")}  # no -0.0
    return "{mean:+.1f} [{low:+.1f}, {high:+.1f}]".format(**rounded)


def _grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up."""
    every = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in every) for i in range(len(header))]
    lines = [
        "| "
        + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(pairs))
        + " |"
        for pairs in (list(zip(row, widths, strict=True)) for row in every)
    ]
    rule = [("-" * w if i == 0 else "-" * (w - 1) + ":") for i, w in enumerate(widths)]
    lines.insert(1, "| " + " | ".join(rule) + " |")
    return "\n".join(lines)
