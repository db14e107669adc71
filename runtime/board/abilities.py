"""Which targets this machine can export for, build and run, and the line that installs the rest."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from patchsieve.runtime.board.machine import Probes

Libraries = dict[str, str | None]

EXPORT = ("torch", "transformers", "onnx", "onnxscript", "safetensors")
CORE = ("numpy", "pillow", "tokenizers", "jinja2")
CALIBRATION = ("torch", "transformers", "accelerate", "safetensors")
_NVIDIA = "--extra-index-url https://pypi.nvidia.com"
_JETSON_INDEX = "https://pypi.jetson-ai-lab.io/jp6/cu126"
INSTALL = {
    "core": 'pip install "numpy>=1.24" "pillow>=10.1" "tokenizers>=0.21" "jinja2>=3.1.6"',
    "export": 'pip install "torch>=2.8" "transformers>=5.0,<6" "onnx>=1.20" "onnxscript>=0.7" '
    '"safetensors>=0.5" "sentencepiece>=0.2"',
    "calibration": 'pip install "torch>=2.8" "transformers>=5.0,<6" "accelerate>=1.1" '
    '"safetensors>=0.5"',
    "open_clip": 'pip install "open_clip_torch>=3.0"',
    "optimum": 'pip install "optimum>=2.0"',
    "lmms_eval": 'pip install "lmms-eval>=0.7.1"',
    "onnxruntime": 'pip install "onnxruntime>=1.23"',
    "onnxruntime 1.24": 'pip install "onnxruntime>=1.24"',
    "onnxruntime-gpu": 'pip uninstall -y onnxruntime && pip install "onnxruntime-gpu>=1.23"',
    "onnxruntime-gpu on JetPack 6": "pip uninstall -y onnxruntime && pip install onnxruntime-gpu "
    f"--index-url {_JETSON_INDEX}",
    "CUDA libraries": 'pip install "onnxruntime-gpu[cuda,cudnn]"',
    "tensorrt_rtx": 'pip install "tensorrt-rtx>=1.7"',
    "tensorrt": f'pip install "tensorrt>=11" {_NVIDIA}',
    "tensorrt10": f'pip install "tensorrt>=10.15,<11" {_NVIDIA}',
    "jetpack6": f'pip install "tensorrt>=10.3,<10.15" {_NVIDIA}',
    "tensorrt on a board": "sudo apt-get install -y python3-libnvinfer && "
    "python3 -m venv --system-site-packages .venv",
    "cuda-python": 'pip install "cuda-python>=12.6"',
    "cuda-python for CUDA 12": 'pip install "cuda-python<13"',
    "cuda-python on JetPack 6": 'pip install "cuda-python==12.6.*"',
    "driver": "install NVIDIA's driver, or use --target cpu",
}
# Commands that need a library beside those of export and run: what for, which, and its line.
TOOLS = {
    "calibrate": ("learn thresholds: patchsieve calibrate", CALIBRATION, "calibration"),
    "open_clip": ("export --method ivtp --scorer open_clip", ("open_clip",), "open_clip"),
    "optimum": ("optimum-cli export patchsieve", ("optimum",), "optimum"),
    "lmms_eval": ("lmms-eval --model patchsieve", ("lmms_eval",), "lmms_eval"),
}
OPSET_24 = (1, 24)  # ONNX Runtime that loads the reference graphs
CUDA_PROVIDER = "CUDAExecutionProvider"
# Which TensorRT serves a target: from the first version on, below the second. 10.3 to 10.14 have
# none of the operators of opset 23, so they take jetpack6's graphs.
TENSORRT = {
    "tensorrt": ((11, 0), (12, 0)),
    "tensorrt10": ((10, 15), (11, 0)),
    "jetpack6": ((10, 3), (10, 15)),
}
# GPUs that TensorRT-RTX 1.7 lists; it refuses 8.7 (Orin), 9.0 (Hopper) and 11.0 (Thor).
RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")


# What a library's module is called where it is not the library's name.
MODULES = {"cuda-python": "cuda", "pillow": "PIL"}


@dataclass(frozen=True)
class Ability:
    """One thing that a target needs a machine for.

    Attributes:
        can: Whether it works here; None where the target has no such step.
        why: What is missing, or what does it.
        do: The line that mends it, if one does.
    """

    can: bool | None
    why: str = ""
    do: str = ""


def install_line(module: str | None) -> str | None:
    """The line that installs a module which an import did not find; None for what is not ours."""
    top = (module or "").partition(".")[0]
    groups = {"core": CORE, "export": EXPORT, "cuda-python": ("cuda-python",)}
    for line, libraries in groups.items():
        if top in (MODULES.get(name, name) for name in libraries):
            return INSTALL[line]
    return INSTALL[top] if top in ("onnxruntime", "tensorrt", "tensorrt_rtx") else None


def target_of(version: str | None) -> str | None:
    """The target that a version of TensorRT serves; None for 8.x and what is not known."""
    numbers = numbers_of(version)
    return next((t for t, (low, high) in TENSORRT.items() if low <= numbers < high), None)


def is_jetpack_6(board: dict[str, Any] | None) -> bool:
    """Whether a board's driver serves CUDA 12.6 and nothing newer."""
    return board is not None and (board["jetpack"] or "").startswith("6")


def cuda_python_line(board: dict[str, Any] | None, *, is_too_new: bool = False) -> str:
    """The line that installs cuda-python.

    Args:
        board: Facts of a Jetson; None elsewhere.
        is_too_new: The one that is here is of a newer CUDA than the driver.
    """
    if is_jetpack_6(board):
        return INSTALL["cuda-python on JetPack 6"]
    return INSTALL["cuda-python for CUDA 12" if is_too_new else "cuda-python"]


def tools_of(libraries: Libraries) -> dict[str, Ability]:
    """Commands that need a library of their own."""
    return {name: _needs(libraries, needed, line) for name, (_, needed, line) in TOOLS.items()}


def abilities_of(
    probes: Probes, facts: dict[str, Any], libraries: Libraries, providers: Sequence[str]
) -> dict[str, dict[str, Ability]]:
    """For each target: export its graphs, build its engines, run its bundles."""
    export = _needs(libraries, EXPORT, "export")
    core = _needs(libraries, CORE, "core")
    none = Ability(None, "no engines")
    gpu = _gpu(facts)
    starts = _starts(probes, facts, libraries, providers)
    cuda = _cuda_python(facts, libraries)
    run_cpu = _first(core, _needs(libraries, ("onnxruntime",), "onnxruntime"))
    steps = {
        "cpu": (none, run_cpu),
        "cuda": (none, _first(core, _provider(facts, libraries, providers), gpu, starts)),
        "tensorrt-rtx": (
            _needs(libraries, ("tensorrt_rtx",), "tensorrt_rtx"),
            _first(core, *_rtx(facts, libraries), gpu),
        ),
    }
    for target in TENSORRT:
        library = _tensorrt(target, facts, libraries)
        steps[target] = (_first(gpu, library), _first(core, library, cuda, gpu, library))
    steps["reference"] = (none, _first(run_cpu, _opset_24(probes, libraries), run_cpu))
    return {
        target: {"export": export, "build": build, "run": run}
        for target, (build, run) in steps.items()
    }


def _needs(libraries: Libraries, names: tuple[str, ...], install: str) -> Ability:
    absent = [name for name in names if libraries[name] is None]
    if absent:
        return Ability(False, f"no {', '.join(absent)}", INSTALL[install])
    if len(names) > 2:
        return Ability(True, "all there")
    return Ability(True, ", ".join(f"{name} {libraries[name]}" for name in names))


def _first(*abilities: Ability) -> Ability:
    """The first that is missing, else the last."""
    return next((ability for ability in abilities if not ability.can), abilities[-1])


def _gpu(facts: dict[str, Any]) -> Ability:
    if not facts["gpus"]:
        return Ability(False, "no NVIDIA GPU that nvidia-smi sees", INSTALL["driver"])
    gpu = facts["gpus"][0]
    return Ability(True, f"{gpu['name']}, compute capability {gpu['compute_capability'] or '?'}")


def _provider(facts: dict[str, Any], libraries: Libraries, providers: Sequence[str]) -> Ability:
    """ONNX Runtime with its CUDA provider; boards take it from an index of their own."""
    if CUDA_PROVIDER in providers:
        return Ability(True, f"onnxruntime {libraries['onnxruntime']} with {CUDA_PROVIDER}")
    why = "no onnxruntime-gpu" if libraries["onnxruntime"] is None else f"no {CUDA_PROVIDER}"
    board = facts["jetson"]
    if board is None:
        return Ability(False, why, INSTALL["onnxruntime-gpu"])
    if is_jetpack_6(board):
        return Ability(False, why, INSTALL["onnxruntime-gpu on JetPack 6"])
    target = target_of(libraries["tensorrt"]) or "cpu"
    return Ability(
        False, f"{why}, and no wheel is known for this JetPack", f"use --target {target}"
    )


def _starts(
    probes: Probes, facts: dict[str, Any], libraries: Libraries, providers: Sequence[str]
) -> Ability:
    """Whether the CUDA provider starts; tried only where it is built in and a GPU is there."""
    ready = Ability(True, f"onnxruntime {libraries['onnxruntime']} with {CUDA_PROVIDER}")
    if CUDA_PROVIDER not in providers or not facts["gpus"]:
        return ready
    obstacle = probes.cuda_obstacle()
    if not obstacle:
        return ready
    return Ability(False, f"{CUDA_PROVIDER} does not start: {obstacle}", INSTALL["CUDA libraries"])


def _cuda_python(facts: dict[str, Any], libraries: Libraries) -> Ability:
    """cuda-python of no newer CUDA than the driver's."""
    there, board = libraries["cuda-python"], facts["jetson"]
    if there is None:
        return Ability(False, "no cuda-python", cuda_python_line(board))
    driver = "12.6" if is_jetpack_6(board) else facts["cuda"]["driver"]
    if driver is None or there == "yes" or numbers_of(there)[0] <= numbers_of(driver)[0]:
        return Ability(True, f"cuda-python {there}")
    why = f"cuda-python {there} is here, this driver serves CUDA {driver}"
    return Ability(False, why, cuda_python_line(board, is_too_new=True))


def _rtx(facts: dict[str, Any], libraries: Libraries) -> tuple[Ability, ...]:
    capabilities = [gpu["compute_capability"] for gpu in facts["gpus"]]
    there = _needs(libraries, ("tensorrt_rtx",), "tensorrt_rtx")
    cuda = _cuda_python(facts, libraries)
    if not any(capabilities) or set(capabilities) & set(RTX_CAPABILITIES):
        return there, cuda
    other = target_of(libraries["tensorrt"]) or "tensorrt"
    refused = Ability(
        False,
        f"TensorRT-RTX does not list compute capability {', '.join(filter(None, capabilities))}",
        f"use --target {other}",
    )
    return there, cuda, refused


def _tensorrt(target: str, facts: dict[str, Any], libraries: Libraries) -> Ability:
    """TensorRT of the right version; on a board there is no other than JetPack's."""
    found, board = libraries["tensorrt"], facts["jetson"]
    if found is None:
        line = INSTALL[target] if board is None else INSTALL["tensorrt on a board"]
        return Ability(False, "no tensorrt", line)
    serves = target_of(found)
    if serves == target:
        return Ability(True, f"tensorrt {found}")
    low, high = TENSORRT[target]
    why = f"tensorrt {found} is here, this target needs {_dotted(low)} up to below {_dotted(high)}"
    if board is None:
        return Ability(False, why, INSTALL[target])
    do = f"use --target {serves}" if serves else "install JetPack 6.1 or newer"
    return Ability(False, why, do)


def _opset_24(probes: Probes, libraries: Libraries) -> Ability:
    found = libraries["onnxruntime"]
    if numbers_of(found) >= OPSET_24:
        return Ability(True, f"onnxruntime {found}")
    older = "" if numbers_of(probes.python) >= (3, 11) else "use Python 3.11 or newer, then "
    why = f"onnxruntime {found} has no opset 24"
    return Ability(False, why, older + INSTALL["onnxruntime 1.24"])


def _dotted(numbers: tuple[int, int]) -> str:
    return ".".join(map(str, numbers))


def numbers_of(version: str | None) -> tuple[int, ...]:
    """The first two numbers; of a version that is not told, the highest."""
    numbers = re.findall(r"\d+", version or "")
    return tuple(int(number) for number in numbers[:2]) if numbers else (1 << 30,)
