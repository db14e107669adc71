"""Which targets this machine can export for, build and run, and the line that installs the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from patchsieve.contract import targets
from patchsieve.contract.targets import (
    CUDA_LIBRARIES,
    FULL,
    TARGETS,
    USUAL,
    Compiler,
    Range,
    Target,
    numbers_of,
    of_compiler,
    of_version,
)
from patchsieve.runtime.board.machine import Probes

Libraries = dict[str, str | None]

EXPORT = ("torch", "transformers", "onnx", "onnxscript", "safetensors")
CORE = ("numpy", "pillow", "tokenizers", "jinja2")
CALIBRATION = ("torch", "transformers", "accelerate", "safetensors")
INSTALL = {
    "core": 'pip install "numpy>=1.24" "pillow>=10.1" "tokenizers>=0.21" "jinja2>=3.1.6"',
    "export": 'pip install "torch>=2.8" "transformers>=5.0,<6" "onnx>=1.20" "onnxscript>=0.7" '
    '"safetensors>=0.5" "sentencepiece>=0.2"',
    "calibration": 'pip install "torch>=2.8" "transformers>=5.0,<6" "accelerate>=1.1" '
    '"safetensors>=0.5"',
    "open_clip": 'pip install "open_clip_torch>=3.0"',
    "optimum": 'pip install "optimum>=2.0"',
    "lmms_eval": 'pip install "lmms-eval>=0.7.1"',
    "cuda-python": 'pip install "cuda-python>=12.6"',
    "cuda-python for CUDA 12": 'pip install "cuda-python<13"',
    "cuda-python on JetPack 6": 'pip install "cuda-python==12.6.*"',
    "driver": f"install NVIDIA's driver, or use --target {USUAL}",
}
# Commands that need a library beside those of export and run: what for, which, and its line.
TOOLS = {
    "calibrate": ("learn thresholds: patchsieve calibrate", CALIBRATION, "calibration"),
    "open_clip": ("export --method ivtp --scorer open_clip", ("open_clip",), "open_clip"),
    "optimum": ("optimum-cli export patchsieve", ("optimum",), "optimum"),
    "lmms_eval": ("lmms-eval --model patchsieve", ("lmms_eval",), "lmms_eval"),
}
CUDA_PROVIDER = "CUDAExecutionProvider"

# What a library's module is called where it is not the library's name.
MODULES = {"cuda-python": "cuda", "pillow": "PIL"}


@dataclass(frozen=True)
class Ability:
    """One thing that a target needs a machine for.

    Attributes:
        can: Whether it works here; None if the target has no such step.
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
    return targets.install_line(top)


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
    return {
        name: _needs(libraries, needed, INSTALL[line]) for name, (_, needed, line) in TOOLS.items()
    }


def abilities_of(
    probes: Probes, facts: dict[str, Any], libraries: Libraries, providers: Sequence[str]
) -> dict[str, dict[str, Ability]]:
    """For each target: export its graphs, build its engines, run its bundles."""
    export = _needs(libraries, EXPORT, INSTALL["export"])
    core = _needs(libraries, CORE, INSTALL["core"])
    found = {}
    for name, row in TARGETS.items():
        build, run = (
            _with_onnxruntime(row, probes, facts, libraries, providers)
            if row.compiler is None
            else _with_engines(row, row.compiler, facts, libraries)
        )
        found[name] = {"export": export, "build": build, "run": _first(core, *run)}
    return found


Steps = tuple[Ability, tuple[Ability, ...]]  # of building, and all that running needs


def _with_onnxruntime(
    row: Target,
    probes: Probes,
    facts: dict[str, Any],
    libraries: Libraries,
    providers: Sequence[str],
) -> Steps:
    none = Ability(None, "no engines")
    if row.device == "cuda":
        provider = _provider(row, facts, libraries, providers)
        return none, (provider, _gpu(facts), _starts(probes, facts, libraries, providers))
    usual = TARGETS[USUAL]
    there = _needs(libraries, (row.backend,), usual.install)
    if row.versions == usual.versions:
        return none, (there,)
    return none, (there, _opset(row, probes, libraries), there)


def _with_engines(
    row: Target, compiler: Compiler, facts: dict[str, Any], libraries: Libraries
) -> Steps:
    gpu, cuda = _gpu(facts), _cuda_python(facts, libraries)
    library = (
        _needs(libraries, (compiler.module,), row.install)
        if row.serves is None
        else _of_right_version(row, row.serves, facts, libraries)
    )
    if compiler.is_ahead_of_time:
        return library, (library, cuda, *_refused(compiler, facts, libraries), gpu)
    return _first(gpu, library), (library, cuda, gpu, library)


def _needs(libraries: Libraries, names: tuple[str, ...], install: str) -> Ability:
    absent = [name for name in names if libraries[name] is None]
    if absent:
        return Ability(False, f"no {', '.join(absent)}", install)
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


def _provider(
    row: Target, facts: dict[str, Any], libraries: Libraries, providers: Sequence[str]
) -> Ability:
    """ONNX Runtime with its CUDA provider; boards take it from an index of their own."""
    if CUDA_PROVIDER in providers:
        return Ability(True, f"onnxruntime {libraries['onnxruntime']} with {CUDA_PROVIDER}")
    why = "no onnxruntime-gpu" if libraries["onnxruntime"] is None else f"no {CUDA_PROVIDER}"
    board = facts["jetson"]
    if board is None:
        return Ability(False, why, row.install)
    if is_jetpack_6(board):
        return Ability(False, why, row.install_on_board)
    target = of_version(libraries["tensorrt"]) or USUAL
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
    return Ability(False, f"{CUDA_PROVIDER} does not start: {obstacle}", CUDA_LIBRARIES)


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


def _refused(compiler: Compiler, facts: dict[str, Any], libraries: Libraries) -> Iterator[Ability]:
    """Why a compiler takes none of the GPUs that are here; nothing if it takes one."""
    found = [gpu["compute_capability"] for gpu in facts["gpus"]]
    if any(found) and not any(capability and compiler.takes(capability) for capability in found):
        other = of_version(libraries[FULL.module]) or of_compiler(FULL)[0]
        yield Ability(
            False,
            f"{compiler.label} does not list compute capability {', '.join(filter(None, found))}",
            f"use --target {other}",
        )


def _of_right_version(
    row: Target, serves: Range, facts: dict[str, Any], libraries: Libraries
) -> Ability:
    """TensorRT of the right version; on a board there is no other than JetPack's."""
    found, board = libraries[row.module], facts["jetson"]
    if found is None:
        line = row.install if board is None else row.install_on_board
        return Ability(False, f"no {row.module}", line)
    serving = of_version(found)
    if serving == row.name:
        return Ability(True, f"{row.module} {found}")
    low, high = serves
    wanted = f"{_dotted(low)} up to below {_dotted(high)}"
    why = f"{row.module} {found} is here, this target needs {wanted}"
    if board is None:
        return Ability(False, why, row.install)
    do = f"use --target {serving}" if serving else "install JetPack 6.1 or newer"
    return Ability(False, why, do)


def _opset(row: Target, probes: Probes, libraries: Libraries) -> Ability:
    """An ONNX Runtime that loads graphs of the target's opset."""
    found = libraries[row.backend]
    if numbers_of(found) >= numbers_of(row.versions):
        return Ability(True, f"{row.backend} {found}")
    older = "" if numbers_of(probes.python) >= (3, 11) else "use Python 3.11 or newer, then "
    return Ability(False, f"{row.backend} {found} has no opset {row.opset}", older + row.install)


def _dotted(numbers: tuple[int, int]) -> str:
    return ".".join(map(str, numbers))
