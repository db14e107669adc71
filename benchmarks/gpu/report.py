"""Where a report goes: one file a day and device, whole on disk after every part."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from patchsieve.contract.writing import one_line, write_whole


class Report:
    """The results of a run, written after every part: a run that is killed keeps its measurements.

    Args:
        folder: Where the file goes; it is tried before anything is measured.
        head: Device, versions and target.
        parts: What will be put in.

    Raises:
        PatchsieveError: The folder cannot be written.
    """

    def __init__(self, folder: Path, head: dict[str, Any], parts: Sequence[str]) -> None:
        self.folder = folder
        self.results = head | {"unfinished": list(parts)}
        self.path = write_report(folder, self.results)

    def keep(self, part: str, found: dict[str, Any]) -> None:
        """Write what a part has found so far."""
        self.results[part] = found
        self.path = write_report(self.folder, self.results)

    def finish(self, part: str, found: dict[str, Any]) -> None:
        """Write a part that has ended."""
        self.results["unfinished"].remove(part)
        self.keep(part, found)


def file_name(results: dict[str, Any]) -> str:
    """`2026-11-21-nvidia-h200.json`; a run on a CPU, or a dry one, says so in its name."""
    device = re.sub(r"[^a-z0-9]+", "-", results["device"].lower()).strip("-")
    parts = [results["date"][:10], device[:60]]
    if results["kind"] != "gpu":
        parts.insert(1, results["kind"])
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
        target = results["target"] or earlier.get("target")  # the smoke run needs none
        if earlier.get("target") in (None, target):
            results = earlier | results | {"target": target}
        write_whole(path, (json.dumps(results, indent=1) + "\n").encode())
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
