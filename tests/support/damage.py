"""One tiny checkpoint and one tiny bundle for tests that break things, and ways to break them."""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import patchsieve
from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.manifest import Limits
from patchsieve.contract.plan import Plan, SitePlan
from patchsieve.export import card
from patchsieve.export.exporter import ExportOptions, export
from tests.support.models import save_checkpoint

LIMITS = Limits(max_text_tokens=64, max_new_tokens=16, max_images=2)
FASTV = Plan((SitePlan(2, "fastv", {"keep_ratio": 0.5}),))
RANDOM = Plan((SitePlan(2, "random", {"keep_ratio": 0.25}),))
PHOTO = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
QUESTION = "What is on the table?"


@functools.cache
def folder() -> Path:
    """A folder that goes when the tests end."""
    path = Path(tempfile.mkdtemp(prefix="patchsieve-tests-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@functools.cache
def checkpoint() -> Path:
    """A tiny LLaVA checkpoint; copy it before you break it."""
    return save_checkpoint(folder() / "checkpoint")


@functools.cache
def bundle() -> Path:
    """Its bundle for `cpu` and `reference`, FastV at layer 2; copy it before you break it."""
    path = folder() / "bundle"
    export(str(checkpoint()), path, options(targets=("cpu", "reference")))
    return path


def options(**changes: Any) -> ExportOptions:
    """Export options of the tiny bundle."""
    return ExportOptions(**{"plan": FASTV, "plan_name": "fastv", "limits": LIMITS, **changes})


def copy(source: Path, to: Path) -> Path:
    """A copy that may be broken."""
    shutil.copytree(source, to)
    return to


def as_snapshot(source: Path, repository: Path, *, absolute: bool = False) -> Path:
    """A bundle as `snapshot_download` lays it down: links from a snapshot to the blobs beside it.

    Args:
        source: The bundle as files.
        repository: models--OWNER--NAME, to be made.
        absolute: As the hub's cache does where it cannot make relative links.
    """
    snapshot, blobs = repository / "snapshots" / "0123abc", repository / "blobs"
    blobs.mkdir(parents=True)
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        link = snapshot / file.relative_to(source)
        blob = blobs / hashlib.sha256(str(link).encode()).hexdigest()
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        link.symlink_to(blob if absolute else os.path.relpath(blob, link.parent))
    return snapshot


def answer(path: Path, **load: Any) -> list[int]:
    """Load a bundle and ask it something."""
    model = patchsieve.load(path, threads=1, **load)
    try:
        return model.generate(PHOTO, QUESTION, max_new_tokens=4).token_ids
    finally:
        model.close()


def refused(
    call: Callable[[], Any], kind: type[PatchsieveError] = PatchsieveError, match: str | None = None
) -> str:
    """The one line with which a call is refused."""
    with pytest.raises(kind, match=match) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 1200, line
    return line


def edit_manifest(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a bundle's manifest as JSON, in place."""
    file = path / "manifest.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    change(data)
    file.write_text(json.dumps(data), encoding="utf-8")


def rewrite(path: Path, name: str, content: bytes) -> None:
    """Replace a file of a bundle and bring the manifest's hash up to date, as an attacker would."""
    (path / name).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    edit_manifest(
        path, lambda data: data["files"].update({name: {"size": len(content), "sha256": digest}})
    )


def leaves(data: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each value inside a JSON object, containers included."""
    if way:
        yield way
    if isinstance(data, dict):
        for key, value in data.items():
            yield from leaves(value, (*way, key))
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from leaves(value, (*way, index))


def put(data: Any, way: tuple[Any, ...], value: Any) -> None:
    """Set the value at the end of a way."""
    for step in way[:-1]:
        data = data[step]
    data[way[-1]] = value


def contents(path: Path) -> dict[str, str]:
    """sha256 of every file below a folder; README.md apart, which anybody may change."""
    return {
        file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != card.FILE_NAME
    }
