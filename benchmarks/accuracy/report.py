"""A table's marks as JSON and as text that Markdown renders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.accuracy.marks import GROUPS, Marks, verdict
from benchmarks.accuracy.places import Costs, acts_in
from benchmarks.accuracy.plans import Row
from benchmarks.accuracy.tables import Part, Table

_COLUMNS = ("", "acts in", "FLOPs", "tokens", "KV kB", "all", "to none", "kept", "fine", "coarse")


def to_dict(
    table: Table, marks: Mapping[Row, Marks], costs: Costs, date: str = ""
) -> dict[str, Any]:
    """A table as JSON holds it: accuracies with intervals, paired differences, who beats whom.

    Args:
        table: The table, its first row the unpruned model.
        marks: Of each row that was run.
        costs: What plans cost.
        date: When.
    """
    full = marks[table.rows[0]]
    return {
        "table": table.name,
        "title": table.title,
        "questions": len(full.hits),
        "has_kinds": table.kinds,
        "text_tokens": costs.text_tokens,
        "parts": [_part(part, marks, full, costs, date) for part in table.parts],
    }


def with_earlier(
    found: dict[str, Any], earlier: Mapping[str, Any], table: Table, costs: Costs
) -> dict[str, Any]:
    """A table whose rows that were not run now have what an earlier run of it found.

    Their numbers and their date are the earlier ones, and so is a comparison of which one side was
    not run now. Rows are the same that have the same label in the part of the same title.

    Args:
        found: From `to_dict`.
        earlier: The same table as it was written before, of as many questions.
        table: Whose rows they are.
        costs: What plans cost.
    """
    known = {part["title"]: part for part in earlier["parts"]}
    for part, rows in zip(found["parts"], table.parts, strict=True):
        before = known.get(part["title"], {"rows": [], "comparisons": []})
        old = {row["label"]: row for row in before["rows"] if "not_run" not in row}
        left = {row["label"] for row in part["rows"] if "not_run" in row}
        for place, row in enumerate(part["rows"]):
            if row["label"] in left & set(old):
                entry = {"date": earlier["date"]} | old[row["label"]]
                part["rows"][place] = entry | _place(rows.rows[place], costs, entry)
        shown = {row["label"] for row in part["rows"] if "not_run" not in row}
        told = {(one["of"], one["to"]): one for one in part["comparisons"]}
        kept = {(one["of"], one["to"]): one for one in before["comparisons"]} | told
        part["comparisons"] = [
            kept[of, to]
            for of in rows.champions
            for to in (row.label for row in rows.rows)
            if (of, to) in kept and {of, to} <= shown
        ]
    return found


def _place(row: Row, costs: Costs, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Where a row acts, and its FLOPs as a share of the unpruned model's."""
    share = costs.share(row.plan, entry["tokens"]["all"])
    return {"acts_in": acts_in(row.plan), "flops": share}


def _part(
    part: Part, marks: Mapping[Row, Marks], full: Marks, costs: Costs, date: str
) -> dict[str, Any]:
    rows = []
    for row in part.rows:
        if row.not_run:
            rows.append({"label": row.label, "not_run": row.not_run})
            continue
        own = marks[row]
        entry = {"label": row.label, "date": date, "plan": row.plan.to_dict()} | own.to_dict()
        entry |= _place(row, costs, entry)
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
    """A table for people."""
    blocks = [
        f"## {found['title']}",
        f"{found['questions']} held-out questions; 95 % intervals. FLOPs of tower, decoder and "
        f"text scorer up to the first token, with {found['text_tokens']} text tokens, are a share "
        "of the unpruned model's.",
    ]
    days = {row["date"][:10] for part in found["parts"] for row in part["rows"] if "date" in row}
    for part in found["parts"]:
        blocks.append(f"**{part['title']}**")
        blocks.append(_grid(_COLUMNS, [_line(row) for row in part["rows"]]))
        told = [_sentence(one) for one in part["comparisons"]]
        if told:
            blocks.append("\n".join(f"- {line}" for line in told))
        run = [row for row in part["rows"] if "not_run" not in row]
        if len(days) > 1 and run:
            blocks.append(_dates(run))
        if found["has_kinds"] and run:
            blocks.append(_kinds(run))
    return "\n\n".join(blocks) + "\n"


def _dates(rows: Sequence[Mapping[str, Any]]) -> str:
    """When which rows were asked."""
    days: dict[str, list[str]] = {}
    for row in rows:
        days.setdefault(row["date"][:10], []).append(row["label"])
    if len(days) == 1:
        return f"Asked on {next(iter(days))}."
    return "\n".join(f"Asked on {day}: {'; '.join(labels)}." for day, labels in days.items())


def _line(row: Mapping[str, Any]) -> list[str]:
    if "not_run" in row:
        return [f"{row['label']} ({row['not_run']})", *[""] * (len(_COLUMNS) - 1)]
    away = row.get("difference")
    return [
        row["label"],
        row["acts_in"],
        f"{100 * row['flops']:.0f} %",
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
