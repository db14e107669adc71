"""Patchsieve as pip installs it, from a copy: a build/ left in the tree ships deleted modules."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("contract", "pruning", "export", "runtime", "calibration")


def environment() -> dict[str, str]:
    """The environment without what would let a child find this checkout."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def copy_sources(place: Path) -> Path:
    """What git would carry, copied."""
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if tracked.returncode == 0:
        files = [name for name in tracked.stdout.split("\0") if name and (ROOT / name).is_file()]
    else:  # an unpacked archive
        folders = ("patchsieve", *FOLDERS)
        files = ["setup.py", "pyproject.toml", "README.md", "LICENSE"]
        files += [str(p.relative_to(ROOT)) for f in folders for p in (ROOT / f).rglob("*.py")]
        files += [f"patchsieve/show/{p.name}" for p in (ROOT / "patchsieve/show").glob("page.*")]
    for name in files:
        target = place / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    return place / "source"


def build_wheel(place: Path) -> Path:
    """The wheel."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", str(place), str(copy_sources(place))]
    subprocess.run(command, check=True, env=environment(), cwd=place)
    return next(place.glob("*.whl"))


def build_editable(place: Path) -> Path:
    """The wheel of an editable install: a finder that points at the copy."""
    script = "import sys, setuptools.build_meta as b; b.build_editable(sys.argv[1])"
    command = [sys.executable, "-c", script, str(place)]
    subprocess.run(
        command, check=True, env=environment(), cwd=copy_sources(place), stdout=subprocess.DEVNULL
    )
    return next(place.glob("*.whl"))


def unpack(wheel: Path, place: Path) -> Path:
    """What lies in site-packages after the wheel is installed."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
    return place
