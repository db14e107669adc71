"""Where a report goes: one file a day and device, whole or not at all."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from patchsieve.writing import one_line, write_whole


def file_name(results: dict[str, Any]) -> str:
    """`2026-11-21-nvidia-h200.json`; a run on a CPU says so in its name."""
    device = re.sub(r"[^a-z0-9]+", "-", results["device"].lower()).strip("-")
    parts = [results["date"][:10], device[:60]]
    if results["kind"] == "cpu-run":
        parts.insert(1, "cpu-run")
    return "-".join(parts) + ".json"


def write_report(folder: Path, results: dict[str, Any]) -> Path:
    """Write a report; parts that an earlier call of that day measured stay beside the new ones.

    Raises:
        PatchsieveError: The folder cannot be written.
    """
    path = folder / file_name(results)
    with one_line(path):
        folder.mkdir(parents=True, exist_ok=True)
        earlier = _read(path)
        if earlier.get("target") == results["target"]:
            results = earlier | results
        write_whole(path, (json.dumps(results, indent=1) + "\n").encode())
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError):
        return {}
    return data if isinstance(data, dict) else {}
