"""What this machine can do, and what to install for the rest. Nothing heavy is imported."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from patchsieve import __version__, manifest
from patchsieve.manifest import Manifest
from patchsieve.runtime import machine
from patchsieve.runtime.machine import Probes

# What a row of the report calls a library: its distributions, the first that is there counts.
LIBRARIES = {
    "numpy": ("numpy",),
    "pillow": ("pillow",),
    "tokenizers": ("tokenizers",),
    "jinja2": ("jinja2",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt_rtx": ("tensorrt-rtx", "tensorrt_rtx"),
    "cuda-python": ("cuda-python",),
    "torch": ("torch",),
    "transformers": ("transformers",),
    "onnx": ("onnx",),
    "onnxscript": ("onnxscript",),
    "safetensors": ("safetensors",),
}
EXPORT = ("torch", "transformers", "onnx", "onnxscript", "safetensors")
CORE = ("numpy", "pillow", "tokenizers", "jinja2")
INSTALL = {
    "core": 'pip install "numpy>=1.24" "pillow>=10.0" "tokenizers>=0.21" "jinja2>=3.1"',
    "export": 'pip install "torch>=2.8" "transformers>=5.0" "onnx>=1.20" "onnxscript>=0.7" '
    '"safetensors>=0.5"',
    "onnxruntime": 'pip install "onnxruntime>=1.23"',
    "onnxruntime 1.24": 'pip install "onnxruntime>=1.24"',
    "tensorrt": "pip install tensorrt --extra-index-url https://pypi.nvidia.com "
    "(on a board: sudo apt install python3-libnvinfer)",
    "tensorrt_rtx": 'pip install "tensorrt-rtx>=1.7"',
}
# Which library builds the engines of a target.
ENGINES = {name: "tensorrt" for name in ("tensorrt", "tensorrt10", "jetpack6")}
ENGINES["tensorrt-rtx"] = "tensorrt_rtx"
ONE_ONNXRUNTIME = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install --no-cache-dir {}"
OPSET_24 = (1, 24)  # ONNX Runtime that loads the reference graphs
_SPARE = 300e6  # bytes of Python, ONNX Runtime and the activations of one request
_TIGHT_SWAP = 8 << 30  # boards with less memory than 16 GB need this much swap to build


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


def diagnose(probes: Probes | None = None, bundle: Path | None = None) -> dict[str, Any]:
    """Examine this machine.

    Args:
        probes: Where facts come from; this machine by default.
        bundle: A bundle that is to run here.

    Returns:
        Facts, libraries, targets, warnings, as JSON can hold them.

    Raises:
        BundleError: The bundle cannot be read.
    """
    probes = probes or Probes()
    facts = machine.facts(probes) | {"disk_free_bytes": probes.disk()}
    libraries = find_libraries(probes)
    report = {
        "patchsieve": __version__,
        "machine": facts,
        "libraries": libraries,
        "onnxruntime_providers": probes.providers() if libraries["onnxruntime"] else [],
        "targets": {
            target: {name: asdict(ability) for name, ability in abilities.items()}
            for target, abilities in abilities_of(probes, libraries).items()
        },
        "warnings": warnings(probes, facts, libraries),
        "notes": [],
    }
    if facts["gpus"] or facts["jetson"]:
        report["notes"] = ["this version answers on the CPU; it compiles engines for the GPU only"]
    if bundle is not None:
        report["bundle"] = check_bundle(manifest.read(bundle), bundle, facts)
    return report


def find_libraries(probes: Probes) -> dict[str, str | None]:
    """Version of each library, None where it is absent; "yes" where only the module is found."""
    found: dict[str, str | None] = {}
    for name, distributions in LIBRARIES.items():
        versions = (probes.version(distribution) for distribution in distributions)
        found[name] = next((version for version in versions if version), None)
        module = {"cuda-python": "cuda", "pillow": "PIL"}.get(name, name)
        if found[name] is None and probes.importable(module):
            found[name] = "yes"  # JetPack's own packages have no metadata in every environment
    return found


def abilities_of(probes: Probes, libraries: dict[str, str | None]) -> dict[str, dict[str, Ability]]:
    """For each target of this version: export its graphs, build engines, run bundles."""
    export = _needs(libraries, EXPORT, INSTALL["export"])
    core = _needs(libraries, CORE, INSTALL["core"])
    none = Ability(None, "no engines")
    run_cpu = core if not core.can else _needs(libraries, ("onnxruntime",), INSTALL["onnxruntime"])
    run_reference = run_cpu
    if run_cpu.can and _version(libraries["onnxruntime"]) < OPSET_24:
        run_reference = Ability(
            False,
            f"onnxruntime {libraries['onnxruntime']} has no opset 24",
            INSTALL["onnxruntime 1.24"]
            if _version(probes.python) >= (3, 11)
            else "use Python 3.11 or newer, then " + INSTALL["onnxruntime 1.24"],
        )
    return {
        "cpu": {"export": export, "build": none, "run": run_cpu},
        "cuda": {"export": export, "build": none, "run": run_cpu},
        "reference": {"export": export, "build": none, "run": run_reference},
        **{
            target: {
                "export": export,
                "build": _needs(libraries, (library,), INSTALL[library]),
                "run": Ability(False, "not in this version", "run the bundle with --target cpu"),
            }
            for target, library in ENGINES.items()
        },
    }


def warnings(probes: Probes, facts: dict[str, Any], libraries: dict[str, str | None]) -> list[str]:
    """What will go wrong although everything seems to be there."""
    found = []
    if probes.version("onnxruntime") and probes.version("onnxruntime-gpu"):
        keep = "onnxruntime-gpu" if facts["gpus"] else "onnxruntime"
        found.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other | "
            f"what to do: {ONE_ONNXRUNTIME.format(keep)}"
        )
    if libraries["onnxruntime"] and not probes.providers():
        found.append(
            "onnxruntime is installed but does not load | "
            f"what to do: {ONE_ONNXRUNTIME.format('onnxruntime')}"
        )
    board, memory = facts["jetson"], facts["memory_bytes"]
    if board is not None:
        if probes.in_venv and libraries["tensorrt"] is None:
            found.append(
                "JetPack's TensorRT is not visible in this virtual environment | what to do: "
                "python3 -m venv --system-site-packages .venv"
            )
        total, swap = memory["total"], memory["swap"]
        if total is not None and total < 16 << 30 and (swap or 0) < _TIGHT_SWAP:
            found.append(
                f"{total / 1e9:.1f} GB of memory and {(swap or 0) / 1e9:.1f} GB of swap are little "
                "for large bundles | what to do: sudo fallocate -l 8G /swapfile && sudo chmod 600 "
                "/swapfile && sudo mkswap /swapfile && sudo swapon /swapfile"
            )
    return found


def check_bundle(facts: Manifest, bundle: Path, found: dict[str, Any]) -> dict[str, Any]:
    """Whether memory holds a bundle's weights and the KV cache of each plan."""
    graphs = {path for paths in facts.targets.values() for path in paths.values()}
    weights = sum(
        file.size
        for path, file in facts.files.items()
        if path not in graphs and path.endswith(".safetensors")
    )
    available = found["memory_bytes"]["available"]
    plans = {}
    for name in facts.plans:
        pairs = zip(facts.stages, facts.slots(name), strict=True)
        kv_bytes = sum(facts.row_bytes(stage) * slots for stage, slots in pairs)
        needed = weights + kv_bytes + int(_SPARE)
        fits = None if available is None else needed <= available
        plans[name] = {"kv_bytes": kv_bytes, "needed_bytes": needed, "fits": fits}
    return {
        "path": str(bundle),
        "targets": sorted(facts.targets),
        "precision": str(facts.precision),
        "weight_bytes": weights,
        "available_bytes": available,
        "plans": plans,
    }


def _needs(libraries: dict[str, str | None], names: tuple[str, ...], do: str) -> Ability:
    absent = [name for name in names if libraries[name] is None]
    if absent:
        return Ability(False, f"no {', '.join(absent)}", do)
    if len(names) > 2:
        return Ability(True, "all there")
    return Ability(True, ", ".join(f"{name} {libraries[name]}" for name in names))


def _version(text: str | None) -> tuple[int, ...]:
    """The first two numbers; of a version that is not told, the highest."""
    numbers = re.findall(r"\d+", text or "")
    return tuple(int(number) for number in numbers[:2]) if numbers else (1 << 30,)
