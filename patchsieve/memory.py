"""Bytes by part and format, and whether boards hold them, as commands print them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from patchsieve.contract import boards, sizes
from patchsieve.contract.boards import Demand
from patchsieve.contract.sizes import Share
from patchsieve.tables import size, table

_FITS, _SHORT = "{} left", "LACKS {}"


def weights(rows: Sequence[Share]) -> dict[str, Any]:
    """Bytes by part and format, for JSON."""
    return {"weights": [asdict(row) for row in rows], "weight_bytes": sizes.total(rows)}


def places(demand: Demand, free: Mapping[str, int] | None = None) -> dict[str, Any]:
    """What a model takes, and which boards hold it, for JSON.

    Args:
        demand: What it takes.
        free: Bytes that programs may have, by the name of a place; every board by default.
    """
    found = boards.fits(demand, free)
    return {"memory": demand.to_dict(), "boards": [fit.to_dict() for fit in found]}


def weights_table(found: Sequence[Mapping[str, Any]], more: Mapping[str, int] | None = None) -> str:
    """The rows of `weights`, other files below them, for people."""
    rows = [(row["part"], row["type"], row["format"], size(row["bytes"])) for row in found]
    rows += [(name, "", "", size(count)) for name, count in (more or {}).items()]
    total = sum(row["bytes"] for row in found) + sum((more or {}).values())
    return table(("part", "type", "format", "bytes"), [*rows, ("all", "", "", size(total))])


def places_table(found: Mapping[str, Any]) -> str:
    """What `places` gave, for people."""
    needs = found["memory"]
    builds = bool(needs["building"])
    rows = []
    for fit in found["boards"]:
        cells = [fit["memory"], size(fit["free"]), size(needs["running"]), _left(fit["run"])]
        rows.append([*cells, size(needs["building"]), _left(fit["build"])] if builds else cells)
    header = ["memory", "free", "running", ""] + (["building", ""] if builds else [])
    parts = [
        f"weights {size(needs['weights'])}",
        f"KV caches {size(needs['kv'])}",
        f"activations about {size(needs['activations'])}",
        f"libraries about {size(needs['libraries'])}",
    ]
    lines = [table(header, rows), f"running {needs['target']}: {', '.join(parts)}"]
    if builds:
        lines.append(f"building: the largest engine, {size(needs['largest'])} of weights")
    lines += advice(found)
    return "\n".join(lines)


def places_line(found: Mapping[str, Any]) -> str:
    """The same in one line, such as "boards of 8 GB are too small; of 16 GB hold it"."""
    words = {
        (True, True): "hold it",
        (True, False): "run it and cannot build its engines",
        (False, True): "build its engines and cannot run it",
        (False, False): "are too small",
    }
    boards_of: dict[str, list[str]] = {}
    for fit in found["boards"]:
        word = words[fit["run"] >= 0, (fit["build"] or 0) >= 0]
        boards_of.setdefault(word, []).append(fit["memory"])
    return "boards " + "; ".join(f"of {', '.join(n)} {word}" for word, n in boards_of.items())


def advice(found: Mapping[str, Any]) -> list[str]:
    """What to do where a model runs on a board but its engines cannot be built there."""
    tight = [fit for fit in found["boards"] if fit["run"] >= 0 and (fit["build"] or 0) < 0]
    return [
        f"{fit['memory']}: export with --build-memory {fit['free'] // 10**8 / 10:g} to build there"
        for fit in tight
    ]


def _left(count: int) -> str:
    return _FITS.format(size(count)) if count >= 0 else _SHORT.format(size(-count))
