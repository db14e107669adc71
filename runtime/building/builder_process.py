"""Build each engine in a process of its own, and hear how it goes.

TensorRT keeps memory between builds (TensorRT-RTX 1.7.1: 210 MB after the first engine, 450 MB
after fourteen), and a board's kernel kills a process that takes too much: here that costs one
attempt, after which a smaller one is made.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from patchsieve.contract.errors import BackendMissingError, BundleError, PatchsieveError, ShapeError
from patchsieve.contract.reading import read_as
from patchsieve.runtime.building.compile import Progress, build_engine, part_of
from patchsieve.runtime.building.ladder import CompilerError, OutOfMemoryError
from patchsieve.runtime.building.profiles import Profile
from patchsieve.runtime.trt.engines import Options
from patchsieve.runtime.trt.library import load_tensorrt

_EVERY = 0.1  # seconds between two messages about the same phase
# The errors that cross from the child to its parent, by name.
_KINDS = {
    kind.__name__: kind
    for kind in (
        BackendMissingError,
        BundleError,
        CompilerError,
        OutOfMemoryError,
        PatchsieveError,
        ShapeError,
    )
}


@dataclass(frozen=True)
class Job:
    """What a process is to build: the arguments of `build_engine`.

    Attributes:
        bundle: The bundle, if its files are links.
    """

    onnx_path: str
    out_path: str
    profiles: tuple[Profile, ...]
    target: str
    options: Options
    timing_cache: str | None
    bundle: str | None = None


@dataclass(frozen=True)
class Done:
    """What a build cost.

    Attributes:
        seconds: From parsing to the engine on disk.
        base_bytes: Resident when the library was loaded and nothing parsed; None if the system
            does not say.
        peak_bytes: The most that was resident, the pages of the mapped weights included.
    """

    seconds: float
    base_bytes: int | None
    peak_bytes: int | None
    warnings: tuple[str, ...]
    has_timing_cache: bool


def build_in_process(job: Job, progress: Progress = lambda *_: None) -> Done:
    """Build an engine in a process of its own.

    Raises:
        OutOfMemoryError: TensorRT said so, or the system killed the process.
        CompilerError: TensorRT cannot build the graph, or crashed over it.
        PatchsieveError: What `build_engine` raised, or the process died.
    """
    where = os.pathsep.join(os.path.abspath(path) for path in sys.path)
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            env=os.environ | {"PYTHONPATH": where},
            start_new_session=True,  # Ctrl-C is for the parent, which ends its child itself
        )
        try:
            done = _listen(process, job, progress)
        finally:
            process.kill()
            process.wait()
            part_of(Path(job.out_path)).unlink(missing_ok=True)
        if done is None:
            said.seek(0)
            raise _death(job, process.returncode, said.read().decode(errors="replace"))
    return done


def _listen(process: subprocess.Popen[bytes], job: Job, progress: Progress) -> Done | None:
    """Hand over the job and read messages until the process ends."""
    assert process.stdin is not None and process.stdout is not None
    done: Done | None = None
    # A child that died at once has closed the pipe; what it said is read below.
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
        process.stdin.flush()  # and open: its end shows the child that its parent is gone
    for line in process.stdout:
        message = json.loads(line)
        if "progress" in message:
            progress(*message["progress"])
        elif "error" in message:
            kind, fields = message["error"]
            raise _KINDS[kind](**fields)
        else:
            done = read_as(Done, message["done"], "what the build said")
    process.wait()
    return done


def _death(job: Job, code: int, said: str) -> PatchsieveError:
    """Why a process ended without a word."""
    what = f"the process that built {Path(job.out_path).name} died"
    last = (said.strip().splitlines() or ["it said nothing"])[-1][:200]
    if code == -signal.SIGKILL:
        found = "killed from outside, as the kernel does when memory runs out"
        return OutOfMemoryError(what, found=found, do="free memory or add swap")
    if "bad_alloc" in said or "MemoryError" in said:
        return OutOfMemoryError(what, found=last, do="free memory or add swap")
    if code < 0:
        found = f"signal {signal.Signals(-code).name}: {last}"
        do = "try another release of the library, and report the failure"
        return CompilerError(what, found=found, do=do)
    do = "see patchsieve doctor: the library may be damaged"
    return BundleError(what, found=f"exit code {code}: {last}", do=do)


def main() -> None:
    """Build the job that comes in a line on stdin; messages leave by the first stdout."""
    # TensorRT prints to stdout, which carries the messages: from here on it is stderr.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    say = _speaker(out)
    job = read_as(Job, json.loads(sys.stdin.readline()), "the job")
    threading.Thread(target=_end_with_parent, args=(sys.stdin,), daemon=True).start()
    try:
        load_tensorrt(job.target)
        base = memory_of("VmRSS")
        report = build_engine(
            job.onnx_path,
            job.out_path,
            job.profiles,
            target=job.target,
            options=job.options,
            timing_cache=None if job.timing_cache is None else Path(job.timing_cache),
            bundle=None if job.bundle is None else Path(job.bundle),
            progress=_sparingly(lambda *step: say({"progress": step})),
        )
    except PatchsieveError as error:
        say({"error": [type(error).__name__, error.fields()]})
        return
    done = Done(report.seconds, base, memory_of("VmHWM"), report.warnings, report.has_timing_cache)
    say({"done": asdict(done)})


def memory_of(name: str, process: str = "self") -> int | None:
    """Bytes of a line of /proc/PID/status, such as VmHWM; None if the system does not say.

    Not `ru_maxrss`, which in a child starts with its parent's.
    """
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    found = [line.split()[1] for line in status.splitlines() if line.startswith(f"{name}:")]
    return int(found[0]) * 1024 if found else None


def _speaker(out: IO[str]) -> Callable[[dict[str, Any]], None]:
    lock = threading.Lock()  # progress comes from several threads

    def say(message: dict[str, Any]) -> None:
        with lock:
            out.write(json.dumps(message) + "\n")
            out.flush()

    return say


def _sparingly(progress: Progress) -> Progress:
    """Let through a new phase, its end, and otherwise a message each tenth of a second."""
    last: list[Any] = ["", 0.0]

    def step(phase: str, reached: int, steps: int) -> None:
        now = time.monotonic()
        if phase != last[0] or reached == steps or now - last[1] >= _EVERY:
            last[:] = phase, now
            progress(phase, reached, steps)

    return step


def _end_with_parent(stdin: IO[str]) -> None:
    """A parent that was killed closes the pipe: nobody waits for the engine any more."""
    while stdin.read(1):
        continue
    os._exit(1)


if __name__ == "__main__":
    main()
