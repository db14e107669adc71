"""What this machine can do, and what to install for the rest. Nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from patchsieve import __version__
from patchsieve.contract import boards, engine_memory, files
from patchsieve.contract.manifest import Manifest
from patchsieve.contract.targets import FULL, RTX, WITH_ENGINES
from patchsieve.runtime.board import machine
from patchsieve.runtime.board.abilities import (
    MODULES,
    Libraries,
    abilities_of,
    tools_of,
)
from patchsieve.runtime.board.machine import Probes
from patchsieve.runtime.board.pitfalls import bundle_pitfalls, pitfalls

# What a row of the report calls a library: its distributions, the first that is there counts.
LIBRARIES = {
    "numpy": ("numpy",),
    "pillow": ("pillow",),
    "tokenizers": ("tokenizers",),
    "jinja2": ("jinja2",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    FULL.module: FULL.distributions,
    RTX.module: RTX.distributions,
    "cuda-python": ("cuda-python", "cuda-bindings"),
    "torch": ("torch",),
    "transformers": ("transformers",),
    "onnx": ("onnx",),
    "onnxscript": ("onnxscript",),
    "safetensors": ("safetensors",),
    "accelerate": ("accelerate",),
    "open_clip": ("open_clip_torch",),
    "optimum": ("optimum",),
    "lmms_eval": ("lmms-eval", "lmms_eval"),
}


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
    disk = probes.disk()
    facts = machine.facts(probes) | {"disk_free_bytes": disk}
    libraries = find_libraries(probes, facts)
    providers = probes.providers() if libraries["onnxruntime"] else []
    abilities = abilities_of(probes, facts, libraries, providers)
    report: dict[str, Any] = {
        "patchsieve": __version__,
        "machine": facts,
        "libraries": libraries,
        "onnxruntime_providers": providers,
        "targets": {
            target: {name: asdict(ability) for name, ability in steps.items()}
            for target, steps in abilities.items()
        },
        "tools": {name: asdict(ability) for name, ability in tools_of(libraries).items()},
        "warnings": pitfalls(probes, facts, libraries, providers) + other_copies(probes),
    }
    if bundle is not None:
        runs = [target for target, steps in abilities.items() if steps["run"].can]
        report["bundle"] = check_bundle(files.read(bundle), bundle, facts, runs)
        report["warnings"] += bundle_pitfalls(report["bundle"], disk)
    return report


def find_libraries(probes: Probes, facts: dict[str, Any]) -> Libraries:
    """Version of each library, None if it is absent; "yes" where only the module is found.

    The version is that of the copy that an import would take, which another installation may have
    overwritten or put before the installed one. JetPack's own TensorRT has no metadata in every
    environment; its Debian package says the version.
    """
    found: Libraries = {}
    for name, distributions in LIBRARIES.items():
        versions = _installed(probes, distributions)
        module = probes.module_version(MODULES.get(name, name)) if versions else None
        same = [version for version in versions if module and _same(module, version)]
        found[name] = next(iter(same), module or next(iter(versions), None))
        if found[name] is None and probes.importable(MODULES.get(name, name)):
            found[name] = "yes"
    if found["tensorrt"] == "yes" and facts["jetson"] and facts["jetson"]["tensorrt"]:
        found["tensorrt"] = facts["jetson"]["tensorrt"].partition("-")[0]
    return found


def other_copies(probes: Probes) -> list[str]:
    """A sentence for each library whose module is of another version than every distribution."""
    found = []
    for name, distributions in LIBRARIES.items():
        versions = _installed(probes, distributions)
        module = probes.module_version(MODULES.get(name, name)) if versions else None
        if module and not any(_same(module, version) for version in versions):
            found.append(
                f"{name} {module} is imported, but the installed distribution is {versions[0]} | "
                "what to do: remove one of the two copies; PYTHONPATH comes before site-packages"
            )
    return found


def _installed(probes: Probes, distributions: tuple[str, ...]) -> list[str]:
    return [version for name in distributions if (version := probes.version(name))]


def _same(module: str, distribution: str) -> bool:
    """A distribution may add a number or a local part: tensorrt 10.3.0.30 brings 10.3.0."""
    one, other = (text.partition("+")[0].split(".") for text in (module, distribution))
    count = min(len(one), len(other))
    return one[:count] == other[:count]


def check_bundle(
    facts: Manifest, bundle: Path, found: dict[str, Any], runs: Sequence[str] = ()
) -> dict[str, Any]:
    """Whether memory holds a bundle, a request under each plan, and a build of engines.

    Args:
        facts: The bundle's manifest.
        bundle: Its directory.
        found: Facts of the machine.
        runs: Targets that run here.
    """
    target = next((name for name in runs if name in facts.targets), boards.target_of(facts.targets))
    memory, available = found["memory_bytes"], found["memory_bytes"]["available"]
    demands = {name: boards.of_bundle(facts, name, target) for name in facts.plans}
    build = max(engine_memory.expectations(facts).values(), default=0)
    on_disk = (memory["swap"] or 0) - memory["zram"]
    # Off a board, the boards that it may be made for.
    places = [] if found["jetson"] else boards.fits(boards.of_bundle(facts, facts.default_plan))
    return {
        "path": str(bundle),
        "targets": sorted(facts.targets),
        "target": target,
        "has_engines": bool(set(WITH_ENGINES) & set(facts.targets)),
        "is_dynamic": "cpu" in facts.targets and facts.is_dynamic,
        "has_vnni": found["cpu"]["has_vnni"],
        "precision": facts.numbers,
        "weight_bytes": sum(facts.files[path].size for path in facts.weights),
        "build_bytes": build,
        "build_fits": None if available is None else build <= available + on_disk,
        "available_bytes": available,
        "plans": {
            name: {
                "kv_bytes": demand.kv,
                "needed_bytes": demand.running,
                "fits": None if available is None else demand.running <= available,
                "memory": demand.to_dict(),
            }
            for name, demand in demands.items()
        },
        "boards": [place.to_dict() for place in places],
    }
