"""`optimum-cli export patchsieve` is `patchsieve export`, installed from a wheel or editable."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from patchsieve.contract.files import read
from tests.support.bundles import command
from tests.support.installs import build_editable, build_wheel, environment, unpack

pytest.importorskip("optimum.commands.optimum_cli", reason="optimum is not installed")
pytest_plugins = ["tests.support.bundles"]

# What a pip install would start; -S, so that no other install of patchsieve is found.
SCRIPT = """
import site, sys
place, sys.argv = sys.argv[1], sys.argv[2:]
paths = sys.argv.pop(0).split(":")
sys.path[:] = [place, *(path for path in sys.path if path), *paths]
site.addsitedir(place)
import patchsieve
assert patchsieve.__file__.startswith(place.rpartition("/")[0]), patchsieve.__file__
from optimum.commands.optimum_cli import main
main()
"""
DOOR = "optimum/commands/register/register_patchsieve.py"
Optimum = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module", params=["wheel", "editable"])
def optimum(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Optimum:
    """Runs `optimum-cli` beside patchsieve in one of its installed forms."""
    place = tmp_path_factory.mktemp(request.param)
    build = build_wheel if request.param == "wheel" else build_editable
    installed = unpack(build(place), place / "installed")
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    if any((Path(path) / DOOR).exists() for path in others):
        pytest.skip("patchsieve is installed here, not editable: its door would be there twice")

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-S", "-c", SCRIPT, str(installed), ":".join(others), "optimum-cli"]
        return subprocess.run(
            [*line, *map(str, words)], cwd=place, env=environment(), capture_output=True, text=True
        )

    return run


def test_the_door_is_listed_and_its_help_is_ours(optimum: Optimum) -> None:
    listed = optimum("export", "--help")
    assert listed.returncode == 0 and "patchsieve" in listed.stdout, listed.stderr
    told = optimum("export", "patchsieve", "--help")
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith("usage: optimum-cli export patchsieve [-h]")
    ours = command("export", "--help")[1]
    assert told.stdout.partition("options:")[2] == ours.partition("options:")[2] != ""


@pytest.mark.parametrize(
    "words", [["checkpoint", "--sites", "x"], ["--reuse"], ["--bogus"], ["a", "-o", "b", "--", "c"]]
)
def test_arguments_and_errors_are_ours(optimum: Optimum, words: list[str]) -> None:
    told = optimum("export", "patchsieve", *words)
    code, out, err = command("export", *words)
    err = err.replace("patchsieve export", "optimum-cli export patchsieve")
    assert (told.returncode, told.stdout, told.stderr) == (code, out, err)
    assert told.returncode == 2 and told.stderr.count("\n") == 1


@pytest.mark.slow_rows("wheel")
@pytest.mark.parametrize("optimum", ["wheel"], indirect=True)
def test_a_checkpoint_becomes_a_bundle(
    optimum: Optimum, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    words = [tiny_checkpoint, "-o", tmp_path / "bundle", "--method", "fastv", "--sites", 2]
    told = optimum("export", "patchsieve", *words, "--keep-ratio", 0.5, "--quiet")
    assert told.returncode == 0, told.stderr
    assert read(tmp_path / "bundle").default_plan == "fastv-2-50"
