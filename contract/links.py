"""Where a bundle's files really lie: a snapshot of the hub's cache is made of links.

`huggingface_hub.snapshot_download` lays a repository down as

    models--OWNER--NAME/blobs/HASH                      the files
    models--OWNER--NAME/snapshots/REVISION/graphs/...   links to them: ../../../blobs/HASH

A link is followed one step, and only to a plain file of the bundle itself or of the `blobs` beside
its own snapshot. Links to links, to folders, to nothing and to anywhere else are refused: a bundle
comes from others, and must not make a runtime read what they choose.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from patchsieve.contract.errors import BundleError

_KINDS = ("models--", "datasets--", "spaces--")  # what the hub's cache calls its repositories
_AS_FILES = (
    "download the bundle as files with snapshot_download(..., local_dir=BUNDLE), or copy it with "
    "cp -L -r SNAPSHOT BUNDLE"
)


@dataclass(frozen=True)
class Place:
    """Where a bundle lies.

    Attributes:
        folder: The bundle's directory, with no link in its path.
        repository: The folder of the hub's cache whose snapshot the bundle is; None elsewhere.
    """

    folder: Path
    repository: Path | None

    @property
    def root(self) -> Path:
        """The folder that holds all of the bundle's files, its blobs included."""
        return self.repository or self.folder

    def file(self, name: str) -> Path:
        """The plain file that a name of the bundle means; it may be absent, but is no link.

        Raises:
            BundleError: The name is, or leads through, a link that is not followed.
        """
        path = self.folder
        *parents, last = PurePosixPath(name).parts
        for part in parents:
            path = path / part
            if os.path.islink(path):
                is_inside = Path(os.path.realpath(path)).is_relative_to(self.folder)
                raise _refused(name, "is reached through a linked folder" if is_inside else _LEAVES)
        path = path / last
        if not os.path.islink(path):
            return path
        target = path.parent / os.readlink(path)
        real = Path(os.path.realpath(target.parent), target.name)
        is_inside = real.is_relative_to(self.folder) or (
            self.repository is not None and real.parent == self.repository / "blobs"
        )
        if target.name in ("", "..") or not is_inside:
            raise _refused(name, _LEAVES)
        try:
            kind = os.lstat(real).st_mode
        except OSError as error:
            raise _refused(name, "is a link to nothing") from error
        if stat.S_ISLNK(kind):
            raise _refused(name, "is a link to another link")
        if not stat.S_ISREG(kind):
            raise _refused(name, "is a link to something that is no file")
        return real

    def has_links(self, names: Iterable[str]) -> bool:
        """Whether one of the bundle's files is a link."""
        return any(self.file(name) != self.folder / name for name in names)


_LEAVES = "is a link that leaves it"


def locate(bundle: Path) -> Place:
    """Find out where a bundle lies, and whether it is a snapshot of the hub's cache."""
    try:
        folder = Path(os.path.realpath(bundle))
    except ValueError:  # a name that no file system takes
        return Place(bundle, None)
    for snapshots in folder.parents:
        if snapshots.name == "snapshots" and snapshots.parent.name.startswith(_KINDS):
            return Place(folder, snapshots.parent)
    return Place(folder, None)


def _refused(name: str, what: str) -> BundleError:
    return BundleError(f"a file of the bundle {what}", found=name, do=_AS_FILES)
