"""Writing to a disk that may be full or forbidden: all or nothing, errors in one line."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from patchsieve.contract.errors import PatchsieveError

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


def check_new_bundle(out: Path) -> None:
    """The same for a bundle, which may also be given another plan."""
    check_new(out, "remove it, choose another -o, or change its plan with --reuse")


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


def check_file(path: Path) -> None:
    """Refuse a file that cannot be written, before the work whose result it is to hold.

    Nothing changes on the disk.

    Raises:
        PatchsieveError: Its folder is absent or forbidden, or it is a folder itself.
    """
    if path.is_dir():
        raise PatchsieveError(
            f"cannot write {path}", found="a folder", do="choose the name of a file"
        )
    if not path.parent.is_dir():
        raise PatchsieveError(
            f"cannot write {path}",
            found=f"no folder {path.parent}",
            do="make the folder, or choose another place",
        )
    with one_line(path):
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, "it may not be written")
        if path.is_file() or not path.exists():  # a device has no neighbours
            with tempfile.TemporaryFile(dir=path.parent):
                pass


def check_folder(out: Path) -> None:
    """Refuse a folder that cannot be made, before the work whose result it is to hold.

    Raises:
        PatchsieveError: What it would lie in is no folder, or forbidden.
    """
    place = out.absolute()
    with one_line(out):
        parent = next(parent for parent in place.parents if parent.exists())
        if not parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{parent} is no folder")
        with tempfile.TemporaryFile(dir=parent):
            pass


def write_result(path: Path, content: bytes) -> None:
    """Write what took long to make; where its place fails now, it is kept in the temporary folder.

    Raises:
        PatchsieveError: Its place fails; the error names the file that holds the result.
    """
    is_device = path.exists() and not path.is_file()
    try:
        path.write_bytes(content) if is_device else write_whole(path.resolve(), content)
    except OSError as error:
        rescued = Path(tempfile.gettempdir()) / f"{path.stem}-{os.getpid()}{path.suffix}"
        with one_line(rescued):
            write_whole(rescued, content)
        raise PatchsieveError(
            f"cannot write {path}", found=error, do=f"move {rescued}, which holds the result"
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
