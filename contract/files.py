"""A bundle's manifest and files on disk: read, written, and compared with their hashes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from patchsieve.contract.consistency import check
from patchsieve.contract.errors import BundleError, PatchsieveError
from patchsieve.contract.links import locate
from patchsieve.contract.manifest import SCHEMA_VERSION, File, Manifest
from patchsieve.contract.older import modernise
from patchsieve.contract.plan import Plan
from patchsieve.contract.precision import Precision
from patchsieve.contract.reading import read_as
from patchsieve.contract.verified import Verified
from patchsieve.contract.weights import FOLDER

FILE_NAME = "manifest.json"
_LARGEST_MANIFEST = 16 << 20
_CHUNK = 4 << 20


def parse(text: str) -> Manifest:
    """Read a manifest of this schema or an older one, refusing what is not one."""
    data = _as_json(text)
    version = data["schema_version"]
    if version > SCHEMA_VERSION:
        raise BundleError(
            "the bundle is newer than this patchsieve",
            found=f"schema {version}" if version < 1 << 53 else "a huge schema number",
            expected=f"at most {SCHEMA_VERSION}",
            do="upgrade patchsieve, or export the bundle again with this version",
        )
    data.pop("cuts", None)
    plans, precision = data.pop("plans", None), data.get("precision")
    if not isinstance(plans, dict):
        raise BundleError("the manifest's plans are not an object", found=repr(plans)[:60])
    if not isinstance(precision, str):
        raise BundleError("the manifest's precision is no text", found=repr(precision)[:60])
    try:
        kinds = Precision.parse(precision)
        read = {name: Plan.from_dict(plan) for name, plan in plans.items()}
        if version < SCHEMA_VERSION:
            data = modernise(data, kinds, read)
        data["precision"] = asdict(kinds)
        content = read_as(Manifest, data | {"plans": {}}, "the manifest's content")
        manifest = replace(content, plans=read)
        check(manifest)
    except BundleError:
        raise
    except PatchsieveError as error:  # a plan's or a precision's own complaints
        raise BundleError(f"the manifest's content cannot be used: {error}") from error
    return manifest


def _as_json(text: str) -> dict[str, Any]:
    """The object that a manifest is, with a schema version."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of 5000 digits
        raise BundleError("the manifest is not JSON", found=str(error)[:120]) from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if type(version) is not int or version < 1:
        raise BundleError(
            "the manifest has no schema_version", expected=f"a bundle of schema {SCHEMA_VERSION}"
        )
    return data


def hash_file(path: Path) -> File:
    """Size and sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return File(path.stat().st_size, digest.hexdigest())


def read(bundle: Path) -> Manifest:
    """Read a bundle's manifest without touching its other files."""
    path = locate(bundle).file(FILE_NAME)
    if not is_there(path):
        raise BundleError(
            "this is not a bundle",
            found=bundle,
            expected=f"a directory with {FILE_NAME}",
            do="make one with: patchsieve export CHECKPOINT -o BUNDLE",
        )
    if path.stat().st_size > _LARGEST_MANIFEST:
        raise BundleError("the manifest is too large to be one", found=path.stat().st_size)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"cannot read {path}", found=error) from error
    return parse(text)


def check_files(
    bundle: Path,
    manifest: Manifest,
    *,
    paths: list[str] | None = None,
    hashes: bool = True,
    again: bool = False,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Refuse a bundle with a missing, truncated or altered file.

    Args:
        bundle: The directory.
        manifest: Its manifest.
        paths: Which files; all by default.
        hashes: Compare contents too, not only sizes. A file that was found whole before, and that
            nobody has written to since, is not read again (`patchsieve.contract.verified`).
        again: Read those too.
        progress: Told each file's path before it is read.
    """
    _check_unlisted(bundle, manifest)
    place = locate(bundle)
    verified = Verified(place.root)
    try:
        for name in manifest.files if paths is None else paths:
            expected = manifest.files[name]
            path = place.file(name)
            size = path.stat().st_size if is_there(path) else None
            if size != expected.size:
                found = "no such file" if size is None else f"{size} bytes"
                raise _damaged(name, found, f"{expected.size} bytes")
            try:
                if not hashes or (not again and verified.knows(path, expected.sha256)):
                    continue
                if progress is not None:
                    progress(name)
                is_same = has_hash(path, expected, verified)
            except OSError as error:
                raise BundleError(
                    f"cannot read the bundle's file {name}",
                    found=error,
                    do="copy the bundle again, to a disk that can be read",
                ) from error
            if not is_same:
                raise _damaged(name, "another sha256", expected.sha256)
    finally:
        verified.save()  # what was read before an interrupt, too


def _damaged(name: str, found: str, expected: str) -> BundleError:
    return BundleError(
        f"the bundle's file {name} is damaged",
        found=found,
        expected=expected,
        do="copy or export the bundle again",
    )


def has_hash(path: Path, expected: File, verified: Verified) -> bool:
    """Read a file and compare it; `verified` learns that it is whole."""
    before = verified.look(path)
    is_same = hash_file(path) == expected
    if is_same:
        verified.learn(path, before, expected.sha256)
    else:
        verified.forget(path)
    return is_same


def _check_unlisted(bundle: Path, manifest: Manifest) -> None:
    """Refuse weights without a hash: graphs point to files that the manifest must answer for."""
    folder = bundle / FOLDER
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if f"{FOLDER}{path.name}" not in manifest.files:
            raise BundleError(
                "the bundle holds a weights file that its manifest does not list",
                found=path.name,
                do="do not use this bundle unless you know who made it; else export it again",
            )


def write(bundle: Path, manifest: Manifest) -> None:
    """Write the manifest under a temporary name, then rename it: it is whole or as before."""
    temporary = bundle / f".{FILE_NAME}.{os.getpid()}"
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(manifest.to_json())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(bundle / FILE_NAME)
    finally:
        temporary.unlink(missing_ok=True)


def is_there(path: Path) -> bool:
    """Whether a file is there; a path that the system refuses is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, a directory that may not be entered
        return False
