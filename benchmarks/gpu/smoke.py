"""The first run on a device: every verb of Driver, then whole answers, with no TensorRT needed.

ONNX Runtime's CUDA provider takes TensorRT's place (ort_engines.py). A tiny model answers under
FastV, with caches in place and a captured graph (`tensorrt`) and with caches of new rows
(`jetpack6`), and is compared with the CPU: tokens, survivors, logits, and memory that grows.

On a GPU each piece runs in a process of its own, as a lost context takes all of its process along.
A dry run does the same in one process on a GPU made of byte arrays.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.checkpoint import ROOT
from benchmarks.gpu.budget import Budget
from benchmarks.gpu.parts import Keep
from patchsieve.cli.picture import picture
from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.manifest import Limits
from patchsieve.contract.plan import Plan, SitePlan
from patchsieve.runtime.board import cuda_provider

QUESTION, SECOND_QUESTION = "What is on the table?", "And here?"
COUNT = 48  # tokens of an answer
TURNS = 3  # of the same answer: first caches, then a capture, then replays alone
REQUESTS = 30  # short answers, after which memory must be as before
PLAN = Plan(
    (SitePlan(1, "fastv", {"keep_ratio": 0.75}), SitePlan(3, "fastv", {"keep_ratio": 0.25}))
)
LIMITS = Limits(max_text_tokens=200, max_new_tokens=80, max_images=2)
# Small, and with weights large enough that pruning and a wrong position change the answer.
SHAPE: dict[str, Any] = {
    "layers": 4,
    "hidden": 64,
    "heads": 4,
    "kv_heads": 2,
    "vision_layers": 3,
    "vision_hidden": 32,
    "image_size": 32,
    "std": 0.16,
}
TARGETS = ("tensorrt", "jetpack6")  # caches in place, caches of new rows
# Largest difference of a logit from the CPU's in float32, as far as the tokens are the same. TF32
# is off; float16 rounds to 2^-11 per operation, and the CPU itself differs by 0.027.
LARGEST_ERROR = {"float32": 1e-3, "float16": 0.1}
GROWTH = 6_000_000  # bytes; cudaMalloc gives pages of 2 MB
DRIVER = "driver"
PIECES = (DRIVER, *(f"{p}:{t}" for p in LARGEST_ERROR for t in TARGETS))
# Seconds that a piece takes; a first load of CUDA's libraries may take much longer.
SECONDS, LONGEST_S = 30, 120


@dataclass(frozen=True)
class Smoke:
    """Where the bundles lie, and on what they run.

    Attributes:
        folder: A bundle for each precision, named after it.
        is_dry: On a CPU.
        plan: Name of the plan that is asked.
        bundles: Made already, by precision.
    """

    folder: Path
    is_dry: bool
    plan: str = "fastv"
    bundles: Mapping[str, Path] = field(default_factory=dict)

    def bundle(self, precision: str) -> Path:
        """The bundle of a precision."""
        return self.bundles.get(precision, self.folder / precision)


@dataclass(frozen=True)
class Turn:
    """One answer beside the CPU's.

    Attributes:
        same_tokens: Tokens before the first that differs.
        has_same_survivors: At every site.
        logits_error: Largest difference, up to the first token that differs.
    """

    seconds: float
    same_tokens: int
    has_same_survivors: bool
    logits_error: float


def run(folder: Path, budget: Budget, *, is_dry: bool, keep: Keep) -> dict[str, Any]:
    """Run every piece.

    Args:
        folder: For checkpoint and bundles.
        budget: Time that is left.
        is_dry: On a CPU.
        keep: Called with all results so far after every piece.

    Returns:
        By piece what was found; under "wrong" a line for everything that is not right.
    """
    smoke = Smoke(folder / "smoke", is_dry)
    told: dict[str, Any] = {"is_dry": is_dry, "pieces": {}, "wrong": []}
    absent = "" if is_dry else cuda_provider.obstacle()
    for piece in PIECES:
        try:
            if piece != DRIVER and absent:
                found = {"not_run": f"ONNX Runtime has no GPU here: {absent}", "wrong": []}
            else:
                budget.needs(SECONDS if not is_dry else 1, f"the smoke run's {piece}")
                found = _piece(smoke, piece, budget)
        except PatchsieveError as error:
            found = {"wrong": [str(error)]}
        told["pieces"][piece] = found
        told["wrong"] += [f"{piece}: {text}" for text in found["wrong"]]
        print(line_of(piece, found), flush=True)
        keep(told)
    return told


def line_of(piece: str, found: dict[str, Any]) -> str:
    """A piece in one line."""
    if found["wrong"]:
        return f"{piece}: WRONG: {'; '.join(found['wrong'])}"
    if "not_run" in found:
        return f"{piece}: not run: {found['not_run']}"
    if piece == DRIVER:
        return f"{piece}: {len(found['found'])} checks right on {found['gpu']}"
    turns = found["turns"]
    same = min(turn["same_tokens"] for turn in turns)
    error = max(turn["logits_error"] for turn in turns)
    return (
        f"{piece}: {same} of {COUNT} tokens and all survivors, logits within {error:.1e}, "
        f"{found['backend']['decode']}, grown by {found['grown_bytes']} B, "
        f"{turns[-1]['seconds']:.2f} s an answer"
    )


def work(smoke: Smoke, piece: str) -> dict[str, Any]:
    """What one piece finds; "wrong" holds what is not right."""
    if piece == DRIVER:
        from benchmarks.gpu.driver_checks import check_driver

        return check_driver(_device(smoke.is_dry)[1])
    precision, _, target = piece.partition(":")
    return answers(smoke, precision, target)


def answers(smoke: Smoke, precision: str, target: str) -> dict[str, Any]:
    """Whole answers on the device beside those of the CPU in float32."""
    from benchmarks.gpu.fake_tensorrt import build_fakes
    from benchmarks.gpu.ort_engines import OrtTensorRT
    from patchsieve.runtime.gpu.backend import TensorRTBackend
    from patchsieve.runtime.gpu.driver import Driver
    from patchsieve.runtime.model import Model

    cpu = Model(smoke.bundle("float32"), target="cpu", threads=1, check="size")
    right = _Answer.of(cpu, smoke.plan)
    cpu.close()
    gpu, cuda = _device(smoke.is_dry)
    trt = OrtTensorRT(gpu)
    driver = Driver(cuda)
    build_fakes(smoke.bundle(precision), target, trt, driver.gpu)
    driver.close()
    backend = partial(TensorRTBackend, trt=trt, cuda=cuda)
    model = Model(smoke.bundle(precision), target=target, check="size", backend=backend)
    try:
        turns = [right.compare(_Answer.of(model, smoke.plan)) for _ in range(TURNS)]
        grown = _growth(model, smoke.plan)
        told = {
            "turns": [asdict(turn) for turn in turns],
            "token_ids": right.token_ids,
            "grown_bytes": grown,
            "backend": model.backend.describe(),
        }
    finally:
        model.close()
    return told | {"wrong": [*faults(turns, precision), *_leaks(grown), *gpu.wrong]}


def faults(turns: list[Turn], precision: str) -> list[str]:
    """What is not right in an answer; in float16 a near tie of two tokens may fall otherwise."""
    found = []
    for number, turn in enumerate(turns, 1):
        if not turn.has_same_survivors:
            found.append(f"answer {number} kept other tokens than the CPU")
        if not turn.logits_error < LARGEST_ERROR[precision]:
            found.append(f"answer {number} has logits off by {turn.logits_error:.3g}")
        if precision == "float32" and turn.same_tokens < COUNT:
            found.append(f"answer {number} has {turn.same_tokens} of {COUNT} tokens right")
    return found


def make_bundles(folder: Path) -> None:
    """Export a tiny random model once for each precision, unless it is there."""
    from examples.make_checkpoint import make_llava, save_llava
    from patchsieve.export.exporter import ExportOptions, export

    checkpoint = folder / "checkpoint"
    if not checkpoint.is_dir():
        save_llava(checkpoint, *make_llava("qwen2", **SHAPE))
    for precision in LARGEST_ERROR:
        if (folder / precision).is_dir():
            continue
        targets = ("cpu", *TARGETS) if precision == "float32" else TARGETS
        options = ExportOptions(
            plan=PLAN, plan_name="fastv", targets=targets, precision=precision, limits=LIMITS
        )
        export(str(checkpoint), folder / precision, options)


@dataclass(frozen=True)
class _Answer:
    seconds: float
    token_ids: list[int]
    sites: Any
    logits: np.ndarray  # [COUNT, V]

    @classmethod
    def of(cls, model: Any, plan: str) -> _Answer:
        """Ask a model about two pictures."""
        from benchmarks.gpu.recording import recorded_logits

        images = [picture(), picture()[::-1, :200]]
        seen, start = recorded_logits(model), time.perf_counter()
        result = model.generate(images, QUESTION, plan=plan, max_new_tokens=COUNT, ignore_eos=True)
        seconds = time.perf_counter() - start
        del model.pipeline.prefill, model.pipeline.decode
        rows = [np.asarray(row, np.float32).reshape(-1) for row in seen]
        return cls(round(seconds, 3), list(result.token_ids), result.sites, np.stack(rows))

    def compare(self, other: _Answer) -> Turn:
        """Another answer beside this one, the right one."""
        pairs = zip(self.token_ids, other.token_ids, strict=True)
        same = next((n for n, (ours, theirs) in enumerate(pairs) if ours != theirs), COUNT)
        rows = slice(min(same + 1, COUNT))  # the next ones answer another question
        error = float(np.abs(other.logits[rows] - self.logits[rows]).max())
        return Turn(other.seconds, same, other.sites == self.sites, error)


def _growth(model: Any, plan: str) -> int:
    """Device memory that short answers keep; a first one takes what all of them need."""
    driver = model.backend.driver

    def ask() -> None:
        model.generate([picture()], SECOND_QUESTION, plan=plan, max_new_tokens=4)

    ask()
    before = driver.memory()[0]
    for _ in range(REQUESTS):
        ask()
    return int(before - driver.memory()[0])


def _leaks(grown: int) -> list[str]:
    return [f"{REQUESTS} answers left {grown} B on the GPU"] if grown > GROWTH else []


def _device(is_dry: bool) -> tuple[Any, Any]:
    """What counts and what computes: a GPU made of byte arrays, or the real one."""
    if is_dry:
        from benchmarks.gpu.fake_cuda import FakeGpu

        gpu = FakeGpu(has_host_addresses=True)
        return gpu, gpu.module()
    from benchmarks.gpu.ort_engines import RealGpu
    from patchsieve.runtime.gpu.driver import load_cudart

    return RealGpu(), load_cudart("tensorrt-rtx")


def _piece(smoke: Smoke, piece: str, budget: Budget) -> dict[str, Any]:
    """Make what a piece needs and run it, on a GPU in a process of its own."""
    if piece != DRIVER and not smoke.bundles:
        make_bundles(smoke.folder)
    if smoke.is_dry:
        return work(smoke, piece)
    smoke.folder.mkdir(parents=True, exist_ok=True)
    file = smoke.folder / "found.json"
    file.unlink(missing_ok=True)
    longest = min(LONGEST_S, budget.left_s)
    command = [sys.executable, "-m", "benchmarks.gpu.smoke", piece, str(smoke.folder)]
    try:
        done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=longest)
    except subprocess.TimeoutExpired:
        return {"wrong": [f"no end within {longest:.0f} s"]}
    if not file.is_file():
        tail = " / ".join(done.stderr.strip().splitlines()[-6:])
        return {"wrong": [f"ended with code {done.returncode}: {tail}"], "stderr": done.stderr}
    told: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return told


def main(argv: list[str]) -> None:
    """Run one piece and leave what it found as a file for the process that asked."""
    piece, folder = argv
    smoke = Smoke(Path(folder), is_dry=False)
    smoke.folder.mkdir(parents=True, exist_ok=True)
    try:
        found = work(smoke, piece)
    except PatchsieveError as error:
        found = {"wrong": [str(error)]}
    text = json.dumps(found, default=str)
    (smoke.folder / "found.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
