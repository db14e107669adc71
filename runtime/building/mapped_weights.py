"""Give back the pages of the weights' files while an engine is built.

TensorRT's parser maps the files that a graph points into, and the builder reads each weight once or
twice. The pages that it has read count as memory of the process until the parser is gone: for a
tower of 0.59 GB, 0.59 GB beside the builder's own 1.01 GB (TensorRT-RTX 1.7.1).
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_EVERY = 0.01  # seconds between two looks: what is read meanwhile stays, some ten MB
_MOST = 128 << 20  # bytes that may stay mapped: less, and more is read again from the disk
# "Reclaim these pages now" (Linux 5.4 and later). Unlike MADV_DONTNEED it changes no content,
# whatever has been mapped at an address since we looked: a page that is read again comes back.
_MADV_PAGEOUT = 21

Range = tuple[int, int]  # first address, bytes


@contextmanager
def giving_back(folder: Path) -> Iterator[None]:
    """Inside the `with`, pages mapped from files below a folder leave memory before they are many.

    Where the system cannot do it, nothing happens: the build takes more memory and is the same.
    """
    done = threading.Event()
    # What was there before is read here: the thread may first run when much is mapped already.
    thread = threading.Thread(target=_work, args=(folder, done, _resident()), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def mapped_ranges(folder: Path) -> list[Range]:
    """Where this process has mapped files below a folder, read-only; empty without /proc."""
    inside = os.path.realpath(folder) + os.sep
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        # first-last rights offset device inode path; the path may hold blanks
        place, rights, *_, path = [*line.split(maxsplit=5), "", ""][:6]
        if rights.startswith("r-") and path.startswith(inside):
            first, last = (int(part, 16) for part in place.split("-"))
            found.append((first, last - first))
    return found


def give_back(ranges: list[Range]) -> bool:
    """Ask the system to reclaim pages now; whether it knows how."""
    advise = getattr(ctypes.CDLL(None, use_errno=True), "madvise", None)
    if advise is None:
        return False
    advise.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
    return all(advise(first, size, _MADV_PAGEOUT) == 0 for first, size in ranges)


def _work(folder: Path, done: threading.Event, kept: int) -> None:
    while not done.wait(_EVERY):
        kept = min(kept, _resident())  # the system takes pages too, our libraries' among them
        if _resident() - kept > _MOST:
            if not give_back(mapped_ranges(folder)):
                return
            kept = _resident()


def _resident() -> int:
    """Bytes of files that this process has in memory, its libraries' too; 0 without /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[2])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
