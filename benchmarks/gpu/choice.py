"""Which target a machine is to be measured with, and what it lacks for the others."""

from __future__ import annotations

from typing import Any

from patchsieve.contract.errors import BackendMissingError

# The first that runs here is taken: TensorRT before ONNX Runtime, newer before older.
GPU_TARGETS = ("tensorrt", "tensorrt10", "jetpack6", "tensorrt-rtx", "cuda")
CPU_TARGETS = ("cpu", "reference")
TARGETS = (*GPU_TARGETS, *CPU_TARGETS)
# The module that compiles a target's engines; the others run ONNX graphs as they are.
ENGINES = {
    "tensorrt": "tensorrt",
    "tensorrt10": "tensorrt",
    "jetpack6": "tensorrt",
    "tensorrt-rtx": "tensorrt_rtx",
}


def choose(report: dict[str, Any], wanted: str | None) -> str:
    """The target to measure, from doctor's report.

    A target that is asked for is taken as it is, for doctor only reads lists: TensorRT-RTX on a
    GPU that it does not list is one of the questions.

    Raises:
        BackendMissingError: No GPU target runs here, or no GPU is there for the one asked for.
    """
    if wanted in CPU_TARGETS:
        return str(wanted)
    if not report["machine"]["gpus"]:
        raise BackendMissingError("no NVIDIA GPU that nvidia-smi sees")
    if wanted is not None:
        return wanted
    for target in GPU_TARGETS:
        if report["targets"][target]["run"]["can"]:
            return target
    if report["libraries"]["tensorrt_rtx"] is not None:
        return "tensorrt-rtx"  # doctor knows a reason against it; a run will show
    raise BackendMissingError("no GPU target runs here")


def absent(report: dict[str, Any]) -> list[str]:
    """One line for each GPU target that cannot run: what is missing, and what to do."""
    lines = []
    for target in GPU_TARGETS:
        run = report["targets"][target]["run"]
        if not run["can"]:
            lines.append(f"{target}: {run['why']} | what to do: {run['do']}")
    return lines
