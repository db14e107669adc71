"""Pages of the weights' files leave memory while an engine is built, and nothing else does."""

from __future__ import annotations

import mmap
import re
import time
from pathlib import Path

import numpy as np
import pytest

from patchsieve.runtime.building import mapped_weights
from patchsieve.runtime.building.compile import build_engine
from patchsieve.runtime.building.mapped_weights import give_back, giving_back, mapped_ranges

pytestmark = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc")
SIZE = 8 << 20


def mapped(path: Path, *, access: int = mmap.ACCESS_READ) -> mmap.mmap:
    """A file of numbers, mapped and read whole."""
    np.arange(SIZE // 8).tofile(path)
    with path.open("r+b") as file:
        pages = mmap.mmap(file.fileno(), 0, access=access)
    assert total(pages) > 0
    return pages


def total(pages: mmap.mmap) -> int:
    return int(np.frombuffer(pages, np.int64).sum())


def resident(path: Path) -> int:
    """Bytes of a mapped file that are in this process's memory."""
    text = Path("/proc/self/smaps").read_text(encoding="utf-8")
    found = re.search(rf"{re.escape(str(path.resolve()))}\n.*?\nRss: +(\d+) kB", text, re.S)
    return 0 if found is None else int(found.group(1)) * 1024


def needs_pageout(path: Path) -> None:
    """Skip where pages of this file system stay in memory whatever is asked."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    around = [m for m in mounts if path.resolve().is_relative_to(m[1])]
    if max(around, key=lambda mount: len(mount[1]))[2] in ("tmpfs", "ramfs"):
        pytest.skip("files of tmpfs lie in memory")
    if not give_back([]):
        pytest.skip("no madvise")


def test_pages_that_were_read_leave_memory_and_come_back_the_same(tmp_path: Path) -> None:
    needs_pageout(tmp_path)
    path = tmp_path / "layers 0.safetensors"
    pages = mapped(path)
    before, expected = resident(path), total(pages)
    if not give_back(mapped_ranges(tmp_path)):
        pytest.skip("this kernel knows no MADV_PAGEOUT")
    assert before >= SIZE / 2
    assert resident(path) <= SIZE / 8
    assert total(pages) == expected


def test_only_what_is_mapped_read_only_from_the_folder_is_given_back(tmp_path: Path) -> None:
    own, other = tmp_path / "own", tmp_path / "own and more"
    for folder in (own, other):
        folder.mkdir()
    kept = mapped(own / "written.safetensors", access=mmap.ACCESS_COPY), mapped(other / "a")
    assert mapped_ranges(own) == []
    read = mapped(own / "read.safetensors")
    ((_, size),) = mapped_ranges(own)
    assert size == SIZE == len(read)
    assert len(kept) == 2


def test_what_was_written_since_is_not_lost(tmp_path: Path) -> None:
    # An address that we saw may belong to something else when we ask: that must stay as it is.
    pages = mapped(tmp_path / "a", access=mmap.ACCESS_COPY)
    numbers = np.frombuffer(pages, np.int64)
    numbers[:] = 7
    give_back([(numbers.ctypes.data, SIZE)])
    assert (numbers == 7).all()


def test_pages_are_given_back_while_the_work_goes_on(tmp_path: Path, monkeypatch) -> None:
    needs_pageout(tmp_path)
    monkeypatch.setattr(mapped_weights, "_MOST", SIZE // 4)
    path = tmp_path / "a"
    with giving_back(tmp_path):
        pages = mapped(path)
        for _ in range(500):
            if resident(path) <= SIZE / 8:
                break
            time.sleep(0.01)
        else:
            pytest.fail("the pages are still there")
        assert total(pages) == sum(range(SIZE // 8))


@pytest.mark.tensorrt
def test_the_parser_maps_the_weights_where_we_look(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    from benchmarks.settle.graphs import TINY, save_stage, stage_profiles

    path, _ = save_stage(TINY, tmp_path)
    seen = []
    monkeypatch.setattr(mapped_weights, "_MOST", -1)
    monkeypatch.setattr(mapped_weights, "give_back", lambda found: seen.append(found) or True)
    build_engine(path, tmp_path / "e.engine", stage_profiles(TINY), target="tensorrt-rtx")
    assert any(seen)
