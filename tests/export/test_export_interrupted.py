"""Export and reuse are all or nothing: killed, interrupted, on a full disk or a forbidden one."""

from __future__ import annotations

import errno
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import patchsieve
from patchsieve.contract import files
from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.plan import Plan, SitePlan
from patchsieve.export import exporter, plan_graphs
from patchsieve.export.exporter import export
from patchsieve.export.reuse import reuse
from tests.support import damage
from tests.support.damage import FASTV, RANDOM, answer, refused

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "patchsieve"]


class Stop(Exception):
    """What a test throws into an export."""


@pytest.fixture(scope="module", autouse=True)
def traced_once() -> Iterator[None]:
    """Trace each graph once for all exports of this file: only the writing is under test."""
    traced: dict[str, Any] = {}

    def once(function: Callable[..., Any]) -> Callable[..., Any]:
        def cached(*args: Any) -> Any:
            key = f"{function.__name__} {[a for a in args if isinstance(a, list)]} {args[:1]}"
            if key not in traced:
                traced[key] = function(*args)
            return traced[key]

        return cached

    with pytest.MonkeyPatch.context() as patch:
        for module, name in (
            (exporter, "trace"),
            (exporter, "compact_graph"),
            (plan_graphs, "decide_graph"),
        ):
            patch.setattr(module, name, once(getattr(module, name)))
        yield


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A copy of the tiny bundle, alone in its folder."""
    return damage.copy(damage.bundle(), tmp_path / "place" / "bundle")


def make(out: Path, progress: Callable[[str, float], None] = lambda *_: None) -> None:
    """Export the tiny checkpoint."""
    export(str(damage.checkpoint()), out, damage.options(), progress)


def steps(run: Callable[[Callable[[str, float], None]], object]) -> list[int]:
    """Numbers of the progress steps of a run: each new message, and a few of those that repeat."""
    messages: list[str] = []
    run(lambda what, _: messages.append(what))
    return [i for i, what in enumerate(messages) if what not in messages[:i] or i % 29 == 0]


def at(step: int, act: Callable[[], Any]) -> Callable[[str, float], None]:
    """A progress callback that does something at one step."""
    count = iter(range(1 << 30))

    def progress(what: str, fraction: float) -> None:
        assert 0 <= fraction <= 1
        if next(count) == step:
            act()

    return progress


def throw(error: BaseException) -> Callable[[], None]:
    """A function that raises."""

    def act() -> None:
        raise error

    return act


def full_disk_after(patch: pytest.MonkeyPatch, room: int) -> None:
    """Let files opened by pathlib take `room` bytes, then be on a full disk."""
    real = pathlib.Path.open
    left = [room]

    def open_(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = real(path, mode, *args, **kwargs)
        if "w" in mode:
            write = file.write

            def limited(data: Any) -> int:
                size = data.nbytes if isinstance(data, memoryview) else len(data)
                left[0] -= size
                if left[0] < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
                return write(data)

            return _Writer(file, limited)
        return file

    patch.setattr(pathlib.Path, "open", open_)


class _Writer:
    """A file whose `write` is another."""

    def __init__(self, file: Any, write: Callable[[Any], int]) -> None:
        self._file, self.write = file, write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def in_child(act: Callable[[], object], seconds: float = 60) -> int:
    """Run in a forked process and return its wait status."""
    child = os.fork()
    if child == 0:
        try:
            act()
        finally:
            os._exit(3)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError("the child hangs")


# Export.


@pytest.mark.slow
def test_export_interrupted_at_any_step_leaves_nothing(tmp_path: Path) -> None:
    numbers = steps(lambda progress: make(tmp_path / "whole", progress))
    shutil.rmtree(tmp_path / "whole")
    assert len(numbers) > 12
    for turn, number in enumerate(numbers):
        error = (KeyboardInterrupt(), Stop())[turn % 2]
        with pytest.raises(type(error)):
            make(tmp_path / "a" / "b" / "bundle", at(number, throw(error)))
        assert list(tmp_path.iterdir()) == [], number


@pytest.mark.slow
def test_export_killed_at_any_moment_leaves_nothing_under_the_name_and_can_be_repeated(
    tmp_path: Path,
) -> None:
    out = tmp_path / "bundle"
    make(out)
    shutil.rmtree(out)
    numbers = steps(lambda progress: make(tmp_path / "whole", progress))
    for number in numbers[:: max(1, len(numbers) // 7)]:
        kill = at(number, lambda: os.kill(os.getpid(), signal.SIGKILL))
        status = in_child(lambda progress=kill: make(out, progress))
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert not out.exists()
    make(out)
    assert answer(out) == answer(tmp_path / "whole")


def test_what_an_export_of_the_same_process_number_left_is_no_hindrance(tmp_path: Path) -> None:
    left = tmp_path / f".bundle.partial-{os.getpid()}"
    left.mkdir()
    (left / "half").write_text("x")
    make(tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert not (tmp_path / "bundle" / "half").exists()


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGINT, "writing"),
        (signal.SIGINT, "writing stage_0"),
        (signal.SIGTERM, "writing stage_0"),
    ],
)
def test_the_command_line_interrupted_says_so_and_leaves_nothing(
    number: int, moment: str, tmp_path: Path
) -> None:
    checkpoint = str(damage.checkpoint())
    process = subprocess.Popen(
        [*COMMAND, "export", checkpoint, "-o", str(tmp_path / "bundle")],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if moment in line:
            break
    process.send_signal(number)
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in rest
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("room", [0, 5_000, 200_000, 1_500_000, 1_620_000])
def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk_after(monkeypatch, room)
    line = refused(lambda: make(tmp_path / "new" / "bundle"), match="disk of .* is full")
    assert "make room" in line
    assert list(tmp_path.iterdir()) == []


def test_the_disk_may_fill_at_the_tokenizer_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_text

    def full(path: Path, *args: Any, **kwargs: Any) -> int:
        if path.name == "tokenizer.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    refused(lambda: make(tmp_path / "bundle"), match="is full")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kilobytes", [100, 1680])
def test_a_real_disk_that_is_full_is_one_line(kilobytes: int, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a disk of its own")
    try:
        refused(lambda: make(disk / "bundle"), match="disk of .* is (full|too small)")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_breaks_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path, data: bytes) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(pathlib.Path, "write_bytes", broken)
    refused(lambda: make(tmp_path / "bundle"), match="cannot write")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "file", "empty folder", "dangling link"])
def test_a_target_that_exists_is_refused_and_untouched(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    if kind == "file":
        out.write_text("mine")
    elif kind == "dangling link":
        out.symlink_to("nowhere")
    else:
        out.mkdir()
        if kind == "folder":
            (out / "mine").write_text("mine")
    before = damage.contents(tmp_path)
    line = refused(lambda: make(out), match="exists already")
    assert "--reuse" in line and damage.contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_target_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "bundle"

    def appear() -> None:
        out.mkdir()
        (out / "mine").write_text("mine")

    refused(lambda: make(out, at(3, appear)), match="cannot write")
    assert (out / "mine").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_parent_that_is_missing_is_made(tmp_path: Path) -> None:
    make(tmp_path / "a" / "b" / "bundle")
    assert answer(tmp_path / "a" / "b" / "bundle") == answer(damage.bundle())


@pytest.mark.parametrize("out", ["a file/bundle", "a file/x/bundle", "n" * 300])
def test_a_parent_that_cannot_hold_it_is_one_line(out: str, tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("mine")
    refused(lambda: make(tmp_path / out), match="cannot write")
    assert (tmp_path / "a file").read_text() == "mine"


def test_a_parent_that_may_not_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() == 0:  # root may write everywhere: let the system say no

        def denied(path: Path, *_: object, **__: object) -> None:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

        monkeypatch.setattr(pathlib.Path, "mkdir", denied)
    tmp_path.chmod(0o500)
    try:
        refused(lambda: make(tmp_path / "bundle"), match="cannot write")
        assert list(tmp_path.iterdir()) == []
    finally:
        tmp_path.chmod(0o700)


# Reuse.


def whole(path: Path, before: dict[str, str], tokens: list[int]) -> None:
    """A bundle stands as it was, and answers as it did."""
    assert damage.contents(path) == before
    assert answer(path) == tokens


def test_reuse_changes_decisions_only_and_keeps_the_old_plan(bundle: Path) -> None:
    before = damage.contents(bundle)
    start = time.perf_counter()
    facts = reuse(bundle, RANDOM, "random")
    assert time.perf_counter() - start < 30  # "seconds": generous, this is no benchmark
    after = damage.contents(bundle)
    new = set(after) - set(before)
    assert new == {f"graphs/{target}.decide.random.2.onnx" for target in ("cpu", "reference")}
    assert {name for name in before if after.get(name) != before[name]} == {files.FILE_NAME}
    assert facts.default_plan == "random" and set(facts.plans) == {"none", "fastv", "random"}
    model = patchsieve.load(bundle, threads=1)
    for plan, count in (("none", None), ("fastv", 8), ("random", 4), (None, 4)):
        result = model.generate(damage.PHOTO, damage.QUESTION, plan=plan, max_new_tokens=2)
        assert [len(site.kept) for site in result.sites] == ([] if count is None else [count])
    first = model.generate(damage.PHOTO, damage.QUESTION, plan="fastv", max_new_tokens=4)
    assert first.token_ids == answer(damage.bundle())


def test_reuse_under_a_name_that_is_there_replaces_its_graphs_without_a_trace(bundle: Path) -> None:
    for ratio, count in ((0.25, 4), (0.75, 12), (0.5, 8), (0.25, 4)):
        reuse(bundle, Plan((SitePlan(2, "fastv", {"keep_ratio": ratio}),)), "fastv")
        facts = files.read(bundle)
        on_disk = set(damage.contents(bundle)) - {files.FILE_NAME}
        assert on_disk == set(facts.files)
        model = patchsieve.load(bundle, threads=1)
        result = model.generate(damage.PHOTO, damage.QUESTION, max_new_tokens=1)
        assert len(result.sites[0].kept) == count
        assert set(facts.plans) == {"none", "fastv"}


def test_reuse_interrupted_at_any_step_leaves_the_old_bundle_whole(bundle: Path) -> None:
    before, tokens = damage.contents(bundle), answer(bundle)
    spare = damage.copy(bundle, bundle.parent / "spare")
    numbers = steps(lambda progress: reuse(spare, RANDOM, "random", progress))
    shutil.rmtree(spare)
    assert len(numbers) >= 3
    for number in numbers:
        for error in (KeyboardInterrupt(), Stop()):
            for name in ("random", "fastv"):  # a new plan, and one in place of another
                with pytest.raises(type(error)):
                    reuse(bundle, RANDOM, name, at(number, throw(error)))
                whole(bundle, before, tokens)


def test_an_interrupt_behind_the_new_manifest_leaves_the_new_bundle_whole(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = files.write

    def interrupted(*args: Any) -> None:
        write(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reuse(bundle, RANDOM, "fastv")
    facts = files.read(bundle)
    assert set(damage.contents(bundle)) - {files.FILE_NAME} == set(facts.files)
    assert facts.plans["fastv"].sites[0].method == "random"
    answer(bundle)


def test_reuse_killed_at_any_step_leaves_a_bundle_that_answers(bundle: Path) -> None:
    tokens = answer(bundle)
    before = damage.contents(bundle)
    spare = damage.copy(bundle, bundle.parent / "spare")
    numbers = steps(lambda progress: reuse(spare, RANDOM, "fastv", progress))
    for number in numbers:
        kill = at(number, lambda: os.kill(os.getpid(), signal.SIGKILL))
        status = in_child(lambda progress=kill: reuse(bundle, RANDOM, "fastv", progress))
        assert os.WIFSIGNALED(status)
        after = damage.contents(bundle)
        assert {name: after[name] for name in before} == before
        assert answer(bundle) == tokens
    reuse(bundle, RANDOM, "fastv")
    answer(bundle)


@pytest.mark.parametrize("room", [0, 5_000, 11_000, 14_000])
def test_reuse_on_a_full_disk_leaves_the_old_bundle_whole(
    room: int, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, tokens = damage.contents(bundle), answer(bundle)
    with monkeypatch.context() as patch:
        full_disk_after(patch, room)
        refused(lambda: reuse(bundle, RANDOM, "random"), match="is full")
        refused(lambda: reuse(bundle, RANDOM, "fastv"), match="is full")
    whole(bundle, before, tokens)


@pytest.mark.parametrize(
    ("plan", "name", "match"),
    [
        (Plan((SitePlan(1, "fastv"),)), "x", "not divided where the plan prunes.*--cuts"),
        (Plan((SitePlan(2, "fastv"), SitePlan(3, "fastv"))), "x", "not divided"),
        (Plan((SitePlan(99, "fastv"),)), "x", "not divided"),
        (FASTV, "none", "prunes nothing"),
        (FASTV, "../x", "part of file names"),
        (FASTV, "", "part of file names"),
        (FASTV, "a.b", "part of file names"),
        (Plan((SitePlan(2, "gone"),)), "x", "unknown method"),
        (Plan((SitePlan(2, "fastv", {"ratio": 1}),)), "x", "do not fit"),
        (Plan((SitePlan(2, "fastv", {"keep_ratio": 0.5}, 17),)), "x", "larger than what enters"),
        (Plan((SitePlan(2, "atp"),)), "x", "thresholds"),
    ],
)
def test_a_plan_that_does_not_fit_the_bundle_is_refused(
    plan: Plan, name: str, match: str, bundle: Path
) -> None:
    before = damage.contents(bundle)
    refused(lambda: reuse(bundle, plan, name), match=match)
    assert damage.contents(bundle) == before


def test_a_damaged_bundle_is_not_given_another_plan(bundle: Path, tmp_path: Path) -> None:
    os.truncate(bundle / "graphs/cpu.stage_0.onnx", 10)
    refused(lambda: reuse(bundle, RANDOM, "random"), match="damaged")
    shutil.copyfile(damage.bundle() / "graphs/cpu.stage_0.onnx", bundle / "graphs/cpu.stage_0.onnx")
    shutil.move(bundle / "graphs", tmp_path / "elsewhere")
    (bundle / "graphs").symlink_to(tmp_path / "elsewhere")
    before = damage.contents(tmp_path / "elsewhere")
    refused(lambda: reuse(bundle, RANDOM, "fastv"), match="link that leaves")
    assert damage.contents(tmp_path / "elsewhere") == before
    refused(lambda: reuse(tmp_path, RANDOM, "random"), PatchsieveError, "not a bundle")


def test_the_command_line_refuses_reuse_with_an_output_or_a_checkpoint(bundle: Path) -> None:
    before = damage.contents(bundle)
    for more in (["-o", str(bundle.parent / "new")], [str(damage.checkpoint()), "--cuts", "1"]):
        done = subprocess.run(
            [*COMMAND, "export", "--reuse", str(bundle), *more],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert "--reuse changes the plan of a bundle and nothing else" in done.stderr
    assert damage.contents(bundle) == before
