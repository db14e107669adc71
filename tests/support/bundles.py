"""A tiny checkpoint and its bundle, made once per session, for tests of the commands.

A test file takes the fixtures by `pytest_plugins = ["tests.support.bundles"]`, after it has
imported the functions: too late for pytest's rewriting of assertions, hence PYTEST_DONT_REWRITE.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from patchsieve import cli
from patchsieve.contract.manifest import Limits
from patchsieve.contract.plan import Plan, SitePlan
from patchsieve.export.exporter import ExportOptions, export
from tests.support.models import save_checkpoint
from tests.support.once import once

PHOTO = str(Path(__file__).resolve().parents[2] / "examples" / "photo.jpg")
PROMPT = "What is on the table?"
PLAN = "half"


def export_tiny(checkpoint: Path, out: Path, **options: Any) -> Path:
    """Export a tiny checkpoint of 5 layers, cut at 2 and 4, with FastV at both."""
    sites = (SitePlan(2, "fastv", {"keep_ratio": 0.5}), SitePlan(4, "fastv", {"keep_ratio": 0.25}))
    given = {"plan": Plan(sites), "plan_name": PLAN, "limits": Limits(64, 32, 1)} | options
    export(str(checkpoint), out, ExportOptions(**given))
    return out


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = once(
        tmp_path_factory,
        "checkpoint",
        lambda folder: save_checkpoint(folder / "tiny", layers=5, kv_heads=2),
    )
    return made / "tiny"


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by all tests: copy it before changing it."""
    made = once(
        tmp_path_factory, "bundle", lambda folder: export_tiny(tiny_checkpoint, folder / "tiny")
    )
    return made / "tiny"


@pytest.fixture
def own_bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "own"))


def command(*arguments: object) -> tuple[int, str, str]:
    """Run a command in this process: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as exit:  # argparse
            code = exit.code if isinstance(exit.code, int) else 1
    return code, out.getvalue(), err.getvalue()


def command_json(*arguments: object) -> tuple[int, dict[str, Any]]:
    """Run a command with --json: exit code and the one object."""
    code, out, _ = command(*arguments, "--json")
    lines = out.strip().splitlines()
    if len(lines) != 1:
        raise AssertionError(f"not one line on stdout: {out!r}")
    return code, json.loads(lines[0])
