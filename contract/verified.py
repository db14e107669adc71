"""What was found whole is not read again: a note of each file's size, times and inode.

A bundle of 7 billion parameters is 13.5 GB, and hashing it takes longer than the answer. After a
file was compared with its sha256, the note says so; while size, time of change (content and inode)
and inode number are the same, its content is taken to be the same. Any write changes one of them.
What changes bytes without the system's knowledge, such as a failing disk, or root with a tool that
sets such times, stays unseen until all is read again: `patchsieve inspect BUNDLE --check`, or
`patchsieve.load(BUNDLE, check="full")`.

Notes lie in `$XDG_CACHE_HOME/patchsieve/verified` (`~/.cache` by default), a file for each bundle
or repository of the hub's cache, never in the bundle, which may be shared or read-only. A note only
saves work: one that is damaged, or that others could have written, counts as none, and where none
can be written, files are hashed each time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import stat
import tempfile
import time
from pathlib import Path

log = logging.getLogger(__name__)

_SCHEMA = 1
_LARGEST = 4 << 20  # bytes of a note
_MOST_NOTES = 200
# Times have the grain of the system's clock, or 2 s on FAT: a file that changed just now may change
# again without another time.
_SETTLED_NS = 3_000_000_000

Mark = list[int]  # size, mtime_ns, ctime_ns, inode


class Verified:
    """Which files of a folder were compared with their hashes, and what they looked like.

    Args:
        root: The folder, with no link in its path.
    """

    def __init__(self, root: Path) -> None:
        self._root = str(root)
        self._known: dict[str, tuple[Mark, str]] | None = None  # read when first asked
        self._learned: dict[str, tuple[Mark, str] | None] = {}  # None: forgotten

    def knows(self, path: Path, sha256: str) -> bool:
        """Whether a file was found to have this hash, and looks as it did then."""
        if self._known is None:
            self._known = _read(self._root)
        return self._known.get(str(path)) == (_mark(path), sha256)

    def look(self, path: Path) -> Mark | None:
        """What a file looks like before it is hashed; None if it has just changed."""
        mark = _mark(path)
        return mark if max(mark[1:3]) <= time.time_ns() - _SETTLED_NS else None

    def learn(self, path: Path, before: Mark | None, sha256: str) -> None:
        """Keep that a file has a hash, if it still looks as it did before it was hashed."""
        if before is not None and before == _mark(path):
            self._learned[str(path)] = (before, sha256)

    def forget(self, path: Path) -> None:
        """A file is not what it was: whatever was noted of it goes."""
        self._learned[str(path)] = None

    def save(self) -> None:
        """Write down what was learned. A place that cannot be written is no failure."""
        if not self._learned:
            return
        files = {  # read again: another process may have written meanwhile
            path: entry
            for path, entry in (_read(self._root) | self._learned).items()
            if entry is not None and os.path.lexists(path)
        }
        data = {"schema_version": _SCHEMA, "root": self._root, "files": files}
        note = _note(self._root)
        try:
            if note is not None:
                _write(note, json.dumps(data).encode("utf-8", "surrogateescape"))
                _forget_oldest(note.parent)
        except OSError as error:
            log.info("cannot keep which files are whole in %s: %s", note, error)
        self._learned.clear()


def _mark(path: Path) -> Mark:
    seen = os.lstat(path)
    return [seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, seen.st_ino]


def _note(root: str) -> Path | None:
    """The file of a folder's note; None for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # as its specification asks
        base = os.path.expanduser("~/.cache")
    if not os.path.isabs(base):
        return None
    own = hashlib.sha256(os.fsencode(root)).hexdigest()[:32]
    return Path(base, "patchsieve", "verified", f"{own}.json")


def _read(root: str) -> dict[str, tuple[Mark, str]]:
    """A folder's note; empty if there is none that this user alone could have written."""
    note = _note(root)
    if note is None:
        return {}
    try:
        # NONBLOCK: a pipe in the note's place must not block.
        handle = os.open(note, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            seen = os.fstat(handle)
            is_own = seen.st_uid == os.geteuid() and not seen.st_mode & (
                stat.S_IWGRP | stat.S_IWOTH
            )
            if not (is_own and stat.S_ISREG(seen.st_mode) and seen.st_size <= _LARGEST):
                log.info("%s is not taken: it may be written by others, or is no file", note)
                return {}
            data = json.loads(file.read(_LARGEST))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON
        log.info("%s cannot be read: %s", note, error)
        return {}
    is_ours = isinstance(data, dict) and data.get("schema_version") == _SCHEMA
    if not is_ours or data.get("root") != root or not isinstance(data.get("files"), dict):
        return {}
    return {path: (entry[0], entry[1]) for path, entry in data["files"].items() if _is_entry(entry)}


def _is_entry(entry: object) -> bool:
    return (
        isinstance(entry, list)
        and len(entry) == 2
        and isinstance(entry[0], list)
        and len(entry[0]) == 4
        and all(type(number) is int for number in entry[0])
        and isinstance(entry[1], str)
        and re.fullmatch(r"[0-9a-f]{64}", entry[1]) is not None
    )


def _write(note: Path, content: bytes) -> None:
    """Whole or as before, and for this user alone, whatever the umask is."""
    note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".", dir=note.parent)  # mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, note)
    except BaseException:
        os.unlink(temporary)
        raise


def _forget_oldest(folder: Path) -> None:
    """Bundles come and go: only the notes written last are kept."""
    notes = sorted(folder.glob("*.json"), key=lambda note: note.lstat().st_mtime_ns)
    for note in notes[:-_MOST_NOTES]:
        note.unlink(missing_ok=True)
