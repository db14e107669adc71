"""What a bundle runs as, or is built for, if nobody says: `--target auto`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from patchsieve.contract.errors import BackendMissingError, BundleError
from patchsieve.contract.manifest import Manifest
from patchsieve.contract.targets import TARGETS, USUAL, WITH_ENGINES, compiler_of, of_version
from patchsieve.runtime.board.abilities import CUDA_PROVIDER
from patchsieve.runtime.board.machine import is_importable, onnxruntime_providers
from patchsieve.runtime.trt.device import Device, find_device
from patchsieve.runtime.trt.engines import read_record, runs_on
from patchsieve.runtime.trt.library import load_tensorrt

AUTO = "auto"
Why = dict[str, str]  # target -> why it does not run here, or cannot be built


@dataclass(frozen=True)
class Choice:
    """A target, and why it was taken; no reason is needed for the only one."""

    target: str
    why: str = ""

    def __str__(self) -> str:
        return f"target {self.target}: {self.why}" if self.why else f"target {self.target}"


def choose(
    bundle: Path,
    facts: Manifest,
    *,
    among: Iterable[str] | None = None,
    device: Callable[[], Device | None] = find_device,
) -> Choice:
    """Choose what to run a bundle as.

    The only target; else the one that has engines for this GPU; else the only one that this machine
    can run.

    Args:
        bundle: The directory.
        facts: Its manifest.
        among: The targets in question; all of the bundle's by default.
        device: Finds the GPU.

    Raises:
        BundleError: None or several remain; the line names the choices.
    """
    targets = [t for t in facts.targets if among is None or t in among]
    if len(targets) == 1:
        return Choice(targets[0])
    gpu = device() if targets else None
    built = [t for t in targets if t in WITH_ENGINES and _has_engines(bundle, t, gpu)]
    if len(built) == 1:
        return Choice(built[0], "the one with engines for this GPU")
    lacks = {t: _lacks(t, gpu) for t in targets}
    to_compare = [t for t in targets if t in TARGETS and TARGETS[t].is_to_compare]
    able = built or [t for t in targets if not lacks[t] and t not in to_compare]
    able = able or [t for t in targets if not lacks[t]]
    for target in set(to_compare) - set(able):
        lacks[target] = lacks[target] or "only to compare with"
    return _only(facts, targets, able, lacks, "runs here")


def choose_to_build(
    facts: Manifest, *, device: Callable[[], Device | None] = find_device
) -> Choice:
    """Choose which of a bundle's targets to build engines for.

    The only one that has engines; else the only one that this machine can build.

    Raises:
        BundleError: None or several remain; the line names the choices.
    """
    targets = [t for t in facts.targets if t in WITH_ENGINES]
    if len(targets) == 1:
        return Choice(targets[0])
    gpu = device() if targets else None
    lacks = {t: _lacks_to_build(t, gpu) for t in targets}
    return _only(facts, targets, [t for t in targets if not lacks[t]], lacks, "can be built here")


def _only(facts: Manifest, targets: list[str], able: list[str], lacks: Why, verb: str) -> Choice:
    others = "; ".join(f"{t}: {why}" for t, why in lacks.items() if why)
    if len(able) == 1:
        return Choice(able[0], f"the only one that {verb}" + (f" ({others})" if others else ""))
    if not targets:
        is_build = "built" in verb
        raise BundleError(
            f"the bundle has no target that {verb}",
            found=", ".join(sorted(facts.targets)),
            do="run it without engines: patchsieve run; or export it again with one of "
            f"--targets {', '.join(WITH_ENGINES)}"
            if is_build
            else f"export it again with --targets {USUAL}",
        )
    choices = " or ".join(f"--target {target}" for target in able or targets)
    python = "" if "built" in verb else " (in Python: target=...)"
    if able:
        raise BundleError(
            f"more than one of the bundle's targets {verb}",
            found=", ".join(able),
            do=f"choose {choices}{python}",
        )
    raise BundleError(
        f"none of the bundle's targets {verb}",
        found=others,
        do=f"choose {choices}{python}, which says what to install or build; or see "
        "patchsieve doctor",
    )


def _has_engines(bundle: Path, target: str, gpu: Device | None) -> bool:
    """Whether a record lists engines that were all built for this GPU."""
    if gpu is None:
        return False
    try:
        engines = read_record(bundle, target).engines
    except BundleError:  # none were built, or the record is damaged: then they cannot be loaded
        return False
    return bool(engines) and all(runs_on(engine, gpu.gpu) for engine in engines.values())


def _lacks(target: str, gpu: Device | None) -> str:
    """Why a target does not run here; engines were looked for already."""
    row = TARGETS.get(target)
    if row is None:
        return "unknown to this version"
    if row.compiler is not None:
        return "no NVIDIA GPU" if gpu is None else "no engines for this GPU"
    if not is_importable(row.backend):
        return f"{row.backend} is not installed"
    if row.device == "cpu":
        return ""
    if gpu is None:
        return "no NVIDIA GPU"
    return "" if CUDA_PROVIDER in onnxruntime_providers() else f"no {CUDA_PROVIDER}"


def _lacks_to_build(target: str, gpu: Device | None) -> str:
    compiler = compiler_of(target)
    if gpu is None and not compiler.is_ahead_of_time:
        return "no NVIDIA GPU, on which it is built"
    try:
        library = load_tensorrt(target)
    except BackendMissingError:
        return f"no {compiler.module}"
    if gpu is not None and not compiler.takes(gpu.gpu.compute_capability):
        return f"{compiler.label} does not list compute capability {gpu.gpu.compute_capability}"
    is_right = TARGETS[target].serves is None or of_version(library.__version__) == target
    return "" if is_right else f"{library.__name__} {library.__version__} is another version"
