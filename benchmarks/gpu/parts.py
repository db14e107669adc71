"""The two parts that are commands of their own: the unproven points, and the tests on a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import ROOT
from benchmarks.gpu.budget import Budget
from benchmarks.gpu.choice import CPU_TARGETS, ENGINES
from patchsieve.errors import PatchsieveError

PARITY_TESTS = ROOT / "tests" / "test_on_gpu.py"
NEEDS_S = 60  # neither part says anything in less


def settle(target: str, folder: Path, budget: Budget) -> dict[str, Any]:
    """Ask every unproven point, each printed yes or no; answers by letter.

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
    command += ["--longest", f"{budget.left_s:.0f}"]
    if target in ENGINES:
        command += ["--target", target]
    code = subprocess.run(command, cwd=ROOT).returncode
    if not file.is_file():
        raise PatchsieveError("the unproven points were not asked", found=f"exit {code}")
    told: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return told


def parity(target: str, folder: Path, budget: Budget, tests: Path = PARITY_TESTS) -> dict[str, Any]:
    """Run the tests that compare a target with the CPU: how many passed, which failed or why not.

    Raises:
        OutOfTimeError: Too little time is left, or it ended before the tests did.
    """
    budget.needs(NEEDS_S, "the parity tests")
    file = folder / "parity.xml"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", str(tests), "-q", f"--junitxml={file}"]
    on = "reference" if target == "cpu" else target  # a CPU run compares its two lowerings
    command += ["-k", f"on:{on}:"]
    try:
        code = subprocess.run(command, cwd=ROOT, timeout=budget.left_s).returncode
    except subprocess.TimeoutExpired:
        budget.needs(NEEDS_S, "the rest of the parity tests")
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
