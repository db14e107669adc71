"""The two parts that are commands of their own: the unproven points, and the tests on a GPU."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import ROOT
from benchmarks.gpu.budget import Budget
from benchmarks.gpu.choice import CPU_TARGETS, ENGINES
from patchsieve.contract.errors import BackendMissingError, PatchsieveError

PARITY_TESTS = ROOT / "tests" / "runtime" / "test_on_gpu.py"
NEEDS_S = 60  # neither part says anything in less
GRACE_S = 30  # between the end that settle works to and the one at which it is stopped


Keep = Callable[[dict[str, Any]], None]


def _nobody(found: dict[str, Any]) -> None:
    """Where nobody keeps what is known so far."""


def settle(target: str, folder: Path, budget: Budget, longest: float) -> dict[str, Any]:
    """Ask every unproven point, each printed yes or no; answers by letter.

    Args:
        target: Whose library is asked.
        folder: For the file of answers.
        budget: Time that is left.
        longest: Seconds of it that the questions may take.

    Raises:
        OutOfTimeError: Too little time is left.
        PatchsieveError: Nothing was answered.
    """
    if target in CPU_TARGETS:
        print("not run: these questions need a GPU", flush=True)
        return {"not_run": "these questions need a GPU"}
    budget.needs(NEEDS_S, "the unproven points")
    file = folder / "settle.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.settle", "--json", str(file)]
    command += ["--longest", f"{longest:.0f}"]
    if target in ENGINES:
        command += ["--target", target]
    try:
        how = f"exit {subprocess.run(command, cwd=ROOT, timeout=longest + GRACE_S).returncode}"
    except subprocess.TimeoutExpired:
        how = f"no end within {longest + GRACE_S:.0f} s"
    if not file.is_file():
        raise PatchsieveError("the unproven points were not asked", found=how)
    told: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return told


def parity(
    target: str, folder: Path, budget: Budget, tests: Path = PARITY_TESTS, keep: Keep = _nobody
) -> dict[str, Any]:
    """Run the tests that compare a target with the CPU: how many passed, which failed or why not.

    Args:
        target: What is compared.
        folder: For pytest's reports.
        budget: Time that is left.
        tests: The file of tests.
        keep: Called with what is known after each precision.

    Returns:
        Counts and names; "error" where time ended, with what had passed until then.

    Raises:
        BackendMissingError: pytest is not installed.
        OutOfTimeError: Too little time is left for any.
    """
    from patchsieve.contract.targets import TARGETS

    if importlib.util.find_spec("pytest") is None:
        raise BackendMissingError("the parity tests need pytest", do="pip install pytest")
    budget.needs(NEEDS_S, "the parity tests")
    told: dict[str, Any] = {"passed": 0, "failed": {}, "skipped": {}}
    on = "reference" if target == "cpu" else target  # a CPU run compares its two lowerings
    precisions = ("float32",) if on == "reference" else TARGETS[on].precisions
    for precision in precisions:
        try:
            budget.needs(NEEDS_S / len(precisions), f"the parity tests in {precision}")
            found = _parity(f"on:{on}:{precision}", folder, budget, tests)
        except PatchsieveError as error:
            return told | {"error": str(error)}
        told["passed"] += found["passed"]
        for kind in ("failed", "skipped"):
            told[kind] |= found[kind]
        keep(told)
    return told


def _parity(name: str, folder: Path, budget: Budget, tests: Path) -> dict[str, Any]:
    """The tests of one target and precision."""
    file = folder / "parity.xml"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", str(tests), "-q", f"--junitxml={file}", "-k", name]
    try:
        code = subprocess.run(command, cwd=ROOT, timeout=budget.left_s).returncode
    except subprocess.TimeoutExpired:
        budget.needs(NEEDS_S, f"the rest of the parity tests {name}")
        raise
    if not file.is_file():
        raise PatchsieveError("the parity tests did not run", found=f"pytest exit {code}")
    return read_junit(file)


def read_junit(file: Path) -> dict[str, Any]:
    """Counts of a pytest run, and names with their reasons."""
    failed: dict[str, str] = {}
    skipped: dict[str, str] = {}
    passed = 0
    for case in ElementTree.parse(file).getroot().iter("testcase"):
        name = case.get("name", "?")
        wrong = case.find("failure")
        wrong = case.find("error") if wrong is None else wrong
        left_out = case.find("skipped")
        if wrong is not None:
            failed[name] = wrong.get("message", "")[:400]
        elif left_out is not None:
            skipped[name] = left_out.get("message", "")[:200]
        else:
            passed += 1
    return {"passed": passed, "failed": failed, "skipped": skipped}
