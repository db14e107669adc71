"""What takes long to make is made once a run, whichever of pytest's workers asks first."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` filled; shared by all workers, so copy it before you change it.

    Args:
        factory: pytest's.
        name: What the folder is called; the same name is the same content.
        make: Fills the folder that it is given.
    """
    base = factory.getbasetemp()
    # With workers each has a folder of its own below that of the run.
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "once"
    shared.mkdir(exist_ok=True)
    folder, done = shared / name, shared / f"{name}.done"
    with open(shared / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker may be making it now
        if not done.exists():
            folder.mkdir()  # a make that failed before fails again, and says so
            make(folder)
            done.touch()
    return folder
