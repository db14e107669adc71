"""Settle on an NVIDIA GPU what documentation and a build alone cannot.

    python -m benchmarks.settle --json settle.json        # on a GPU, under ten minutes
    python -m benchmarks.settle --build-only              # anywhere: do the graphs compile

Each question runs in a process of its own, so that a crash costs one answer. The last line is JSON.
Exit code: 0 when every question was asked, 1 when a build of --build-only failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.settle import onnxruntime_cuda, questions
from benchmarks.settle.cuda import Cuda
from benchmarks.settle.questions import BUILDS, NO, NOT_RUN, PORTABLE, YES, Answer, Setup
from patchsieve.contract.errors import BackendMissingError, PatchsieveError
from patchsieve.contract.targets import of_version
from patchsieve.contract.writing import check_file
from patchsieve.runtime.building.compile import build_engine
from patchsieve.runtime.trt.engines import Options
from patchsieve.runtime.trt.library import load_tensorrt

SCHEMA_VERSION = 1
ROOT = Path(__file__).resolve().parents[2]
MODULES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
TARGETS = ("tensorrt-rtx", "tensorrt", "tensorrt10", "jetpack6")
PACKAGES = ("onnx", "onnxruntime", "onnxruntime-gpu", "numpy", "cuda-bindings")
Question = Callable[[Setup], Answer]
# letter -> what it asks, and who answers
QUESTIONS: dict[str, tuple[str, Question]] = {
    "a": ("an engine loads and runs on this GPU", questions.engine_runs_here),
    "b": (
        "TRT_Attention with a key length and lower-right causality ends at that length",
        questions.length_attention_aligns_to_length,
    ),
    "c": (
        "additive mask and TensorScatter at a dynamic slot are right, in place",
        questions.caches_are_written_in_place,
    ),
    "d": (
        "prefill and decode profiles share weights, contexts share activations",
        questions.profiles_share_memory,
    ),
    "e": (
        "a decode step captured once replays at any slot",
        questions.decode_replays_as_a_graph,
    ),
    "f": (
        "gather by keep_indices and compaction without NonZero are right",
        questions.indices_work,
    ),
    "g": (
        "ONNX Runtime's CUDA provider has our operators",
        lambda _: onnxruntime_cuda.cuda_provider_has_our_operators(),
    ),
    "h": (
        "fp16 decode of one row on the 1/1/2 profile is right",
        questions.single_row_decode_is_right,
    ),
    "i": (
        "half-precision attention as one operator is right (export --attention fused)",
        questions.fused_attention_is_right,
    ),
    "j": (
        "a stage on TRT_Attention with mask and key length is right",
        questions.own_attention_serves_a_stage,
    ),
}
WITHOUT_TENSORRT = {"g"}
# The engines without which a question means nothing, of those that some TensorRTs lack.
NEEDS = dict.fromkeys("cdehi", "stage_float16") | {"b": "lengths_float16", "j": "long_lengths"}


def find_target() -> str | None:
    """Name the target of the library that is installed: of `tensorrt`, its version decides."""
    for target in ("tensorrt-rtx", "tensorrt"):
        try:
            library = load_tensorrt(target)
        except BackendMissingError:
            continue
        return target if target == "tensorrt-rtx" else of_version(library.__version__)
    return None


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter; absent ones are named so."""
    versions = {"python": platform.python_version(), "machine": platform.machine()}
    for target, module in MODULES.items():  # several packages can bring the module
        try:
            versions[module] = load_tensorrt(target).__version__
        except BackendMissingError:
            versions[module] = "absent"
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    return versions


def gpu_facts(cuda: Cuda) -> dict[str, str]:
    """Compute capability, CUDA versions, and name and driver if nvidia-smi reports them.

    Raises:
        BackendMissingError: No GPU answers.

    """
    facts = {"compute_capability": cuda.compute_capability(), **cuda.versions()}
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader", "--id=0"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        facts["name"], _, facts["driver"] = told.stdout.strip().partition(", ")
    except (OSError, subprocess.SubprocessError):  # Jetson has no nvidia-smi to ask
        facts["name"] = facts["driver"] = "unknown"
    return facts


def ask(letter: str, setup: Setup, seconds: float) -> Answer:
    """Ask one question in its own process and wait `seconds` for it."""
    answer_file = setup.folder / f"{letter}.json"
    answer_file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.settle", "--one", letter]
    command += ["--target", setup.target, "--folder", str(setup.folder)]
    command += ["--capabilities", ",".join(setup.capabilities)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return Answer(NOT_RUN, f"no answer within {seconds:.0f} s; raise --seconds")
    if not answer_file.exists():
        tail = " / ".join(done.stderr.strip().splitlines()[-4:])
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"code {done.returncode}"
        return Answer(NO, f"crashed with {how}: {tail}", {"stderr": done.stderr[-4000:]})
    return Answer(**json.loads(answer_file.read_text()))


def ask_forms(setup: Setup, seconds: float) -> Answer:
    """Ask (a) for each form that an engine can be compiled in, within `seconds` for all of them."""
    forms = [("current",), (), PORTABLE] if setup.target == "tensorrt-rtx" else [()]
    facts: dict[str, Any] = {"works": None}
    told = []
    end = time.monotonic() + seconds
    for form in forms:
        name = " ".join(form) or "library's choice"
        wait = max(1, end - time.monotonic())
        answer = ask("a", replace(setup, capabilities=form), wait)
        facts[name] = asdict(answer)
        told.append(f"{name}: {answer.status}, {answer.text}")
        if facts["works"] is None and answer.status == YES:
            facts["works"] = list(form)
    return Answer(NO if facts["works"] is None else YES, "\n    ".join(told), facts)


def answer_one(letter: str, setup: Setup) -> None:
    """Answer one question and leave it as a file for the process that asked."""
    try:
        answer = QUESTIONS[letter][1](setup)
    except BackendMissingError as error:
        answer = Answer(NOT_RUN, str(error))
    except PatchsieveError as error:
        answer = Answer(NO, str(error))
    (setup.folder / f"{letter}.json").write_text(json.dumps(strict(asdict(answer))))


def strict(value: Any) -> Any:
    """Spell NaN and infinity as text: JSON has no such numbers."""
    if isinstance(value, dict):
        return {name: strict(item) for name, item in value.items()}
    if isinstance(value, list):
        return [strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def ask_all(
    letters: str, target: str | None, folder: Path, seconds: float, longest: float = 570
) -> dict[str, Answer]:
    """Ask in order, printing each answer; where (a) is no, what needs an engine is not run."""
    answers: dict[str, Answer] = {}
    end = time.monotonic() + longest
    setup = Setup(target or "tensorrt-rtx", folder)
    refusal = None if target else "neither tensorrt_rtx nor tensorrt 10.3 or newer is installed"
    if refusal is None and letters != "g" and "a" not in letters:
        letters = "a" + letters  # it finds the form of engine that the others use
    for letter in letters:
        lacking = questions.lacks(NEEDS[letter], setup.target) if letter in NEEDS else ""
        if (refusal or lacking) and letter not in WITHOUT_TENSORRT:
            answers[letter] = Answer(NOT_RUN, refusal or lacking)
        else:
            wait = min(seconds, max(1, end - time.monotonic()))
            answers[letter] = (ask_forms if letter == "a" else partial(ask, letter))(setup, wait)
        answer = answers[letter]
        if letter == "a" and answer.status != YES and refusal is None:
            refusal = "(a) found no engine that runs on this GPU"
        elif letter == "a" and answer.status == YES:
            setup = Setup(setup.target, folder, tuple(answer.facts["works"]))
        print(f"({letter}) {answer.status}: {QUESTIONS[letter][0]}\n    {answer.text}", flush=True)
    return answers


def build_all(target: str, folder: Path) -> dict[str, Answer]:
    """Build every engine for the library's own choice of GPUs, and one for a portable list."""
    names = [name for name in BUILDS if not questions.lacks(name, target)]
    cases: list[tuple[str, tuple[str, ...]]] = [(name, ()) for name in names]
    if target == "tensorrt-rtx":
        cases.append(("stage_float16", PORTABLE))
    answers = {}
    for name, capabilities in cases:
        label = f"{name} for {', '.join(capabilities)}" if capabilities else name
        build = BUILDS[name]
        try:
            report = build_engine(
                build.write(folder, name),
                folder / f"{name}.engine",
                build.profiles,
                target=target,
                options=Options(compute_capabilities=capabilities),
            )
            text = f"{report.engine_bytes / 1e6:.1f} MB in {report.seconds:.1f} s"
            answer = Answer(YES, text, {"engine_bytes": report.engine_bytes})
        except PatchsieveError as error:
            answer = Answer(NO, str(error))
        answers[label] = answer
        print(f"{answer.status}: {label}: {answer.text}", flush=True)
    return answers


def report(kind: str, facts: dict[str, Any], answers: dict[str, Answer], file: Path | None) -> None:
    """Print the JSON line, and write it where asked."""
    line = json.dumps(
        {
            "schema_version": SCHEMA_VERSION,
            "kind": kind,
            **facts,
            "answers": {name: strict(asdict(answer)) for name, answer in answers.items()},
        }
    )
    print(line)
    if file is not None:
        file.write_text(line + "\n")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.settle", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", type=Path, help="also write the last line to this file")
    parser.add_argument("--build-only", action="store_true", help="compile every graph; no GPU")
    parser.add_argument("--only", default="".join(QUESTIONS), help="letters to ask, as in `ace`")
    parser.add_argument("--target", choices=TARGETS, help="default: what is installed")
    parser.add_argument("--seconds", type=float, default=120, help="longest wait for one answer")
    parser.add_argument("--longest", type=float, default=570, help="seconds of the whole run")
    for hidden in ("--one", "--folder", "--capabilities"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    unknown = sorted(set(arguments.only) - set(QUESTIONS))
    if unknown:
        parser.error(f"--only: no question {', '.join(unknown)}; there are {', '.join(QUESTIONS)}")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    arguments = parse_arguments(argv)
    if arguments.one:
        capabilities = tuple(filter(None, arguments.capabilities.split(",")))
        answer_one(arguments.one, Setup(arguments.target, Path(arguments.folder), capabilities))
        return 0
    if arguments.json:
        check_file(arguments.json)
    target = arguments.target or find_target()
    versions = installed_versions()
    print(", ".join(f"{name} {version}" for name, version in versions.items()), flush=True)
    facts: dict[str, Any] = {"versions": versions, "target": target}
    with tempfile.TemporaryDirectory(prefix="settle-") as folder:
        try:
            if arguments.build_only:
                load_tensorrt(target or "tensorrt-rtx")
                answers = build_all(target or "tensorrt-rtx", Path(folder))
            else:
                facts["gpu"] = gpu_facts(Cuda())
                print(", ".join(f"{k} {v}" for k, v in facts["gpu"].items()), flush=True)
                waits = arguments.seconds, arguments.longest
                answers = ask_all(arguments.only, target, Path(folder), *waits)
        except BackendMissingError as error:
            print(f"settle: {error}", file=sys.stderr)
            return 2
    kind = "settle-build" if arguments.build_only else "settle"
    report(kind, facts, answers, arguments.json)
    failed = arguments.build_only and any(a.status != YES for a in answers.values())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
