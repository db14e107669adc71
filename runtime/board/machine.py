"""What this machine is, read from files and one program; every source can be another in a test."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from patchsieve.runtime.board import cuda_provider
from patchsieve.runtime.board import jetson as board
from patchsieve.runtime.board.power import throttling

# Debian packages that have the version of JetPack's TensorRT; the first that is there counts.
TENSORRT_PACKAGES = ("python3-libnvinfer", "libnvinfer10", "libnvinfer8")
_VNNI = {"avx512_vnni", "avx_vnni"}  # in /proc/cpuinfo, of x86 CPUs; Arm's have no "flags"
_SMI = ("name", "driver_version", "memory.total", "compute_cap")


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution; nothing is imported."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def module_version(module: str) -> str | None:
    """Version that a module's own files say, of the copy that an import would take.

    Nothing is imported. None if the module is absent or its version is not a plain text there.
    """
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    if found is None or found.origin is None:
        return None
    folder = Path(found.origin).parent
    for name in ("version.py", "_version.py", "__init__.py"):
        said = re.search(r"^__version__ = ['\"]([\w.+-]+)['\"]", _read(folder / name), re.MULTILINE)
        if said:
            return said.group(1)
    return None


def is_importable(module: str) -> bool:
    """Whether a top-level module can be found; it is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a hook that refuses it, or half a module
        return False


def run_program(command: Sequence[str]) -> str:
    """What a program prints; nothing where it is absent, refuses or hangs."""
    program = shutil.which(command[0])
    if program is None:
        return ""
    try:
        done = subprocess.run([program, *command[1:]], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def onnxruntime_providers() -> list[str]:
    """Execution providers of the installed ONNX Runtime; none if it does not load."""
    try:
        import onnxruntime
    except (ImportError, OSError):
        return []
    return list(onnxruntime.get_available_providers())


@dataclass(frozen=True)
class Probes:
    """Where facts come from.

    Attributes:
        root: The file system under which /proc and /etc lie.
        version: Version of a distribution, None if it is not installed.
        module_version: Version of the module that an import would take, None if it says none.
        importable: Whether a module can be found.
        run: What a program prints, "" where there is none: nvidia-smi, nvpmodel, jetson_clocks.
        providers: Execution providers that ONNX Runtime was built for.
        cuda_obstacle: Why its CUDA provider does not start, "" where it does.
        python: Version of the interpreter.
        architecture: As `uname -m` says.
        disk: Free bytes where bundles would be written.
        in_venv: Python runs in a virtual environment.
    """

    root: Path = Path("/")
    version: Callable[[str], str | None] = installed_version
    module_version: Callable[[str], str | None] = module_version
    importable: Callable[[str], bool] = is_importable
    run: Callable[[Sequence[str]], str] = run_program
    providers: Callable[[], list[str]] = onnxruntime_providers
    cuda_obstacle: Callable[[], str] = cuda_provider.obstacle
    python: str = field(default_factory=platform.python_version)
    architecture: str = field(default_factory=platform.machine)
    disk: Callable[[], int] = lambda: shutil.disk_usage(Path.cwd()).free
    in_venv: bool = field(default_factory=lambda: sys.prefix != sys.base_prefix)


def memory(probes: Probes) -> dict[str, int | None]:
    """Bytes of memory and swap, from /proc/meminfo; zram is the swap that lies in memory itself."""
    text = _read(probes.root / "proc/meminfo")
    kilobytes = dict(re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE))

    def get(name: str) -> int | None:
        return int(kilobytes[name]) * 1024 if name in kilobytes else None

    swaps = board.parse_swaps(_read(probes.root / "proc/swaps"))
    return {
        "total": get("MemTotal"),
        "available": get("MemAvailable"),
        "swap": get("SwapTotal"),
        "zram": sum(size for name, size in swaps.items() if name.startswith("/dev/zram")),
    }


def cpu(probes: Probes) -> dict[str, Any]:
    """Model, cores of the machine, cores that this process may use, and whether it has VNNI.

    VNNI multiplies bytes without saturation, in the x86 CPUs that have it; None for other CPUs.
    """
    text = _read(probes.root / "proc/cpuinfo")
    match = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", text, re.MULTILINE)
    count = len(re.findall(r"^processor\s*:", text, re.MULTILINE))
    flags = re.search(r"^flags\s*:\s*(.+)$", text, re.MULTILINE)
    return {
        "model": match.group(1).strip() if match else probes.architecture,
        "cores": count or os.cpu_count() or 1,
        "cores_allowed": len(os.sched_getaffinity(0)),
        "has_vnni": bool(_VNNI & set(flags.group(1).split())) if flags else None,
    }


def gpus(probes: Probes) -> list[dict[str, Any]]:
    """GPUs that nvidia-smi sees; a Jetson's own is there in any case, with what its board says."""
    query = [f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader,nounits"]
    found = []
    for line in probes.run(["nvidia-smi", *query]).splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != len(_SMI):
            continue
        name, driver, megabytes, capability = cells
        found.append(
            {
                "name": name,
                "driver": driver,
                "memory": int(megabytes) << 20 if megabytes.isdigit() else None,
                "compute_capability": capability if re.fullmatch(r"\d+\.\d+", capability) else None,
            }
        )
    on_board = _capability(probes)
    if on_board and not found:  # JetPack 5 has no nvidia-smi
        found.append({"name": "integrated", "driver": None, "memory": None})
    if on_board and len(found) == 1:
        found[0]["compute_capability"] = found[0].get("compute_capability") or on_board
    return found


def _model(probes: Probes) -> str:
    return _read(probes.root / "proc/device-tree/model").strip("\0\n ")


def _capability(probes: Probes) -> str | None:
    if "Jetson" not in _model(probes):
        return None
    return board.capability_of(_read(probes.root / "proc/device-tree/compatible"), _model(probes))


def jetson(probes: Probes) -> dict[str, Any] | None:
    """Board, L4T, JetPack, its TensorRT, power mode, clocks, throttling; None elsewhere."""
    model = _model(probes)
    l4t = board.parse_release(_read(probes.root / "etc/nv_tegra_release"))
    if l4t is None and "Jetson" not in model:
        return None
    status = _read(probes.root / "var/lib/dpkg/status")
    packages = board.parse_packages(status, ("nvidia-jetpack", *TENSORRT_PACKAGES))
    mode = board.parse_power_mode(probes.run(["nvpmodel", "-q"]))
    return {
        "model": model or None,
        "l4t": l4t,
        "jetpack": packages.get("nvidia-jetpack") or board.jetpack_of(l4t),
        "tensorrt": next((packages[n] for n in TENSORRT_PACKAGES if n in packages), None),
        "power_mode": None if mode is None else asdict(mode) | {"is_full": mode.is_full},
        "clocks_locked": clocks_locked(probes),
        "throttling": throttling(probes.root),
    }


def clocks_locked(probes: Probes) -> bool | None:
    """Whether CPU and GPU clocks cannot move: sysfs answers everyone, jetson_clocks only root."""
    clocks = {}
    system = probes.root / "sys"
    for folder in sorted((system / "devices/system/cpu").glob("cpu[0-9]*/cpufreq")):
        clocks[folder.parent.name] = _clock(folder, "scaling_min_freq", "scaling_max_freq")
    for folder in sorted((system / "class/devfreq").glob("*gpu*")):
        clocks[folder.name] = _clock(folder, "min_freq", "max_freq")
    known = {name: clock for name, clock in clocks.items() if clock is not None}
    return board.are_locked(known or board.parse_clocks(probes.run(["jetson_clocks", "--show"])))


def _clock(folder: Path, lowest: str, highest: str) -> board.Clock | None:
    texts = [_read(folder / name).strip() for name in (lowest, highest)]
    return board.Clock(*map(int, texts)) if all(text.isdigit() for text in texts) else None


def cuda(probes: Probes) -> dict[str, str | None]:
    """CUDA that the driver serves, and the toolkit under /usr/local/cuda."""
    toolkit = re.search(
        r'"cuda"\s*:\s*{[^}]*"version"\s*:\s*"([\d.]+)"',
        _read(probes.root / "usr/local/cuda/version.json"),
    )
    return {
        "driver": board.parse_cuda(probes.run(["nvidia-smi"])),
        "toolkit": toolkit.group(1) if toolkit else None,
    }


def facts(probes: Probes | None = None) -> dict[str, Any]:
    """Machine facts of a report."""
    probes = probes or Probes()
    found_gpus, on_board = gpus(probes), jetson(probes)
    return {
        "label": label(probes, found_gpus, on_board),
        "python": probes.python,
        "architecture": probes.architecture,
        "cpu": cpu(probes),
        "memory_bytes": memory(probes),
        # A GPU that reports no memory of its own shares the machine's.
        "unified_memory": any(gpu["memory"] is None for gpu in found_gpus),
        "gpus": found_gpus,
        "cuda": cuda(probes),
        "jetson": on_board,
    }


def label(probes: Probes, gpus: list[dict[str, Any]], jetson: dict[str, Any] | None) -> str:
    """What a figure measured here is a figure of; only a board's own device tree says Jetson."""
    if jetson is not None:
        return jetson["model"] or f"a board with L4T {jetson['l4t']}"
    return ", ".join(gpu["name"] for gpu in gpus) or cpu(probes)["model"]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
