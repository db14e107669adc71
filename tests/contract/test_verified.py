"""What was found whole is not read again; whatever changed, and on demand everything, is."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import patchsieve
from patchsieve.contract import files, manifest, verified
from patchsieve.contract.errors import BundleError
from patchsieve.contract.verified import Verified
from tests.support import damage
from tests.support.bundles import command
from tests.support.damage import refused

NAME = "graphs/weights/layers.0.safetensors"


@pytest.fixture(autouse=True)
def later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute after all files were written, with an empty cache."""
    now = time.time_ns
    monkeypatch.setattr(verified.time, "time_ns", lambda: now() + 60_000_000_000)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return damage.copy(damage.bundle(), tmp_path / "bundle")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are hashed."""
    names: list[str] = []
    hash_file = files.hash_file

    def counted(path: Path) -> manifest.File:
        names.append(path.name)
        return hash_file(path)

    monkeypatch.setattr(files, "hash_file", counted)
    return names


def check(path: Path, **options: bool) -> None:
    files.check_files(path, files.read(path), **options)


def note(tmp_path: Path) -> Path:
    (found,) = (tmp_path / "cache" / "patchsieve" / "verified").glob("*.json")
    return found


def test_a_second_run_reads_nothing_and_a_changed_file_only(
    bundle: Path, read: list[str], tmp_path: Path
) -> None:
    before = damage.contents(bundle)
    patchsieve.load(bundle, threads=1).close()
    assert len(read) == len(set(read)) > 5
    read.clear()
    model = patchsieve.load(bundle, threads=1)
    assert model.generate(None, "Hello", max_new_tokens=1).token_ids and not read
    (bundle / NAME).write_bytes((bundle / NAME).read_bytes())
    patchsieve.load(bundle, threads=1).close()
    assert read == [Path(NAME).name]
    assert damage.contents(bundle) == before  # nothing is written into the bundle
    assert note(tmp_path).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("restores_time", [False, True])
def test_a_file_damaged_after_it_was_found_whole_is_refused(
    restores_time: bool, bundle: Path
) -> None:
    """The time of the content can be put back, the time of the inode cannot."""
    check(bundle)
    content, seen = bytearray((bundle / NAME).read_bytes()), (bundle / NAME).stat()
    content[-1] ^= 1
    with (bundle / NAME).open("r+b") as file:
        file.write(content)
    if restores_time:
        os.utime(bundle / NAME, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    refused(lambda: patchsieve.load(bundle), BundleError, "another sha256")


def test_a_file_put_in_place_of_another_is_read(bundle: Path, read: list[str]) -> None:
    check(bundle)
    read.clear()
    seen = (bundle / NAME).stat()
    other = bundle / "other"
    other.write_bytes(b"\0" * seen.st_size)
    os.utime(other, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    other.replace(bundle / NAME)
    refused(lambda: check(bundle), BundleError, "another sha256")
    assert read == [Path(NAME).name]


def test_all_is_read_again_on_demand(bundle: Path, read: list[str]) -> None:
    """By a note that says what is not so: the way to find what a disk did unseen."""
    check(bundle)
    whole = len(read)
    content = bytearray((bundle / NAME).read_bytes())
    content[-1] ^= 1
    (bundle / NAME).write_bytes(content)
    facts = files.read(bundle)
    liar = Verified(bundle.resolve())
    path = bundle.resolve() / NAME
    liar.learn(path, liar.look(path), facts.files[NAME].sha256)
    liar.save()
    read.clear()
    check(bundle)
    assert not read
    refused(lambda: patchsieve.load(bundle, check="full"), BundleError, "another sha256")
    code, _, line = command("inspect", bundle, "--check", "--quiet")
    assert code == 2 and NAME in line
    refused(lambda: check(bundle), BundleError, "another sha256")  # nor is the note believed now
    (bundle / NAME).write_bytes((damage.bundle() / NAME).read_bytes())
    read.clear()
    assert command("inspect", bundle, "--check", "--quiet")[0] == 0
    assert len(read) == whole


def test_a_note_of_another_hash_is_no_reason_to_refuse(bundle: Path, read: list[str]) -> None:
    check(bundle)
    damage.rewrite(bundle, NAME, (bundle / NAME).read_bytes() + b"\0")
    read.clear()
    check(bundle)
    assert read == [Path(NAME).name]


def test_a_file_that_has_just_changed_is_read_again(
    bundle: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may change once more within the grain of the clock."""
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(bundle.parent / "cache"))
    (bundle / NAME).write_bytes((bundle / NAME).read_bytes())
    check(bundle)
    assert not Verified(bundle.resolve()).knows(
        bundle.resolve() / NAME, files.read(bundle).files[NAME].sha256
    )


def test_two_revisions_of_a_snapshot_share_what_is_known_of_their_blobs(
    read: list[str], tmp_path: Path
) -> None:
    first = damage.as_snapshot(damage.bundle(), tmp_path / "models--me--bundle")
    second = first.with_name("4567def")
    damage.shutil.copytree(first, second, symlinks=True)
    check(first)
    read.clear()
    check(second)
    assert not read


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"[" * 100_000,
        b"\xff\xfe",
        b"1" * 5_000,
        b'{"schema_version": 2}',
        b'{"schema_version": 1, "root": 3, "files": {}}',
    ],
)
def test_a_damaged_note_counts_as_none(
    content: bytes, bundle: Path, read: list[str], tmp_path: Path
) -> None:
    check(bundle)
    whole = len(read)
    read.clear()
    note(tmp_path).write_bytes(content)
    check(bundle)
    assert len(read) == whole
    read.clear()
    check(bundle)
    assert not read  # and it was written again


@pytest.mark.parametrize(
    "entry", [None, [], [1, 2], [[1, 2, 3], "0" * 64], [[True] * 4, "0" * 64], [[1] * 4, 5], "x"]
)
def test_a_note_with_entries_that_are_none_counts_without_them(
    entry: object, bundle: Path, read: list[str], tmp_path: Path
) -> None:
    check(bundle)
    data = json.loads(note(tmp_path).read_text())
    key = next(path for path in data["files"] if path.endswith(NAME))
    data["files"][key] = entry
    note(tmp_path).write_text(json.dumps(data))
    read.clear()
    check(bundle)
    assert read == [Path(NAME).name]


def lend(place: Path) -> None:
    """Others may write it."""
    place.chmod(0o666)


def pipe(place: Path) -> None:
    """A pipe, which would block who opens it."""
    place.unlink()
    os.mkfifo(place)


def link(place: Path) -> None:
    """A link to a note that would do."""
    place.rename(place.with_suffix(".real"))
    place.symlink_to(place.with_suffix(".real").name)


def folder(place: Path) -> None:
    """A folder."""
    place.unlink()
    place.mkdir()


@pytest.mark.parametrize("harm", [lend, pipe, link, folder])
def test_a_note_that_others_could_have_written_is_not_taken(
    harm: Callable[[Path], None], bundle: Path, read: list[str], tmp_path: Path
) -> None:
    check(bundle)
    whole = len(read)
    read.clear()
    harm(note(tmp_path))
    check(bundle)
    assert len(read) == whole


def test_where_no_note_can_be_written_files_are_hashed_each_time(
    bundle: Path, read: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    for home in (str(tmp_path / "file"), "/proc/1/none", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", home)
        monkeypatch.setenv("HOME", str(tmp_path / "file"))
        for _ in range(2):
            read.clear()
            check(bundle)
            assert len(read) > 5
    assert not Path("relative").exists()


def test_many_at_once_lose_nothing_that_was_written_before(bundle: Path, tmp_path: Path) -> None:
    check(bundle)
    before = json.loads(note(tmp_path).read_text())["files"]
    threads = [
        threading.Thread(target=check, args=(bundle,), kwargs={"again": True}) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert json.loads(note(tmp_path).read_text())["files"] == before
    assert [path.suffix for path in note(tmp_path).parent.iterdir()] == [".json"]


def test_notes_of_bundles_long_gone_are_forgotten(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verified, "_MOST_NOTES", 3)
    place = tmp_path / "cache" / "patchsieve" / "verified"
    place.mkdir(parents=True)
    for number in range(5):
        (place / f"{number}.json").write_text("{}")
        os.utime(place / f"{number}.json", (number, number))
    check(bundle)
    assert len(list(place.iterdir())) == 3 and (place / "4.json").exists()
