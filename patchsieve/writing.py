"""Writing to a disk that may be full or forbidden: all or nothing, errors in one line."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from patchsieve.errors import PatchsieveError

_FULL = (errno.ENOSPC, errno.EDQUOT)


def check_new(out: Path, do: str = "remove it, or choose another name with -o") -> None:
    """Refuse to write where something is, be it a dangling link.

    Args:
        out: What is to be made.
        do: What to do about it.

    Raises:
        PatchsieveError: It is there.
    """
    if os.path.lexists(out):
        raise PatchsieveError(f"{out} exists already", expected="a name for a new one", do=do)


@contextmanager
def one_line(place: Path) -> Iterator[None]:
    """Turn an error of the file system into one of ours.

    Args:
        place: What is being written.
    """
    try:
        yield
    except BrokenPipeError:  # of who reads the progress, not of the disk
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise PatchsieveError(
                f"the disk of {place.parent} is full", found=error, do="make room"
            ) from error
        raise PatchsieveError(
            f"cannot write {place}", found=error, do="choose a place that can be written"
        ) from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, then rename it: it is whole or as before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_or_nothing(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name only when all is written.

    Args:
        out: The folder to be; parents that are missing are made, and go again after a failure.
    """
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    with one_line(out):
        made = [parent for parent in out.parents if not parent.exists()]
        done = False
        try:
            # Left by a killed export of the same number, as every one has in a container.
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            partial.rename(out)
            done = True
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            if not done:
                _remove_empty(made)


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:  # the innermost first
        try:
            folder.rmdir()
        except OSError:  # not empty, or never made
            return
