"""Tables and numbers for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], indent: int = 0) -> str:
    """A plain table; the first column to the left, the rest to the right."""
    cells = [list(header), *([_text(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(" " * indent + line for line in lines)


def flops(count: float) -> str:
    """FLOPs for people: four digits, in the unit that leaves one to three before the point."""
    for unit in ("", " k", " M", " G"):
        if count < 999.95:
            return f"{count:#.4g}{unit}" if unit else f"{count:.0f}"
        count /= 1000
    return f"{count:#.4g} T" if count < 999.95 else f"{count:.0f} T"


def plural(count: int, what: str) -> str:
    """A number of things: "1 image", "2 images"."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def size(count: float) -> str:
    """Bytes for people: one or two decimals, in decimal units."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def _text(cell: Any) -> str:
    if cell is None:
        return "-"
    return f"{cell:.2f}" if isinstance(cell, float) else str(cell)
