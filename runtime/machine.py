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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# L4T's major release -> JetPack's.
JETPACKS = {"32": "4", "34": "5", "35": "5", "36": "6", "38": "7"}
_SMI = ("name", "driver_version", "memory.total", "compute_cap")


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution; nothing is imported."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_importable(module: str) -> bool:
    """Whether a top-level module can be found; it is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a hook that refuses it, or half a module
        return False


def run_nvidia_smi() -> str:
    """One line per GPU, or nothing where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    query = [program, f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def onnxruntime_providers() -> list[str]:
    """Execution providers of the installed ONNX Runtime; none where it does not load."""
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
        version: Version of a distribution, None where it is not installed.
        importable: Whether a module can be found.
        nvidia_smi: Output of nvidia-smi for `name, driver_version, memory.total, compute_cap`.
        providers: Execution providers of ONNX Runtime.
        python: Version of the interpreter.
        architecture: As `uname -m` says.
        disk: Free bytes where bundles would be written.
        in_venv: Python runs in a virtual environment.
    """

    root: Path = Path("/")
    version: Callable[[str], str | None] = installed_version
    importable: Callable[[str], bool] = is_importable
    nvidia_smi: Callable[[], str] = run_nvidia_smi
    providers: Callable[[], list[str]] = onnxruntime_providers
    python: str = field(default_factory=platform.python_version)
    architecture: str = field(default_factory=platform.machine)
    disk: Callable[[], int] = lambda: shutil.disk_usage(Path.cwd()).free
    in_venv: bool = field(default_factory=lambda: sys.prefix != sys.base_prefix)


def memory(probes: Probes) -> dict[str, int | None]:
    """Bytes of memory and swap, from /proc/meminfo."""
    text = _read(probes.root / "proc/meminfo")
    kilobytes = dict(re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE))

    def get(name: str) -> int | None:
        return int(kilobytes[name]) * 1024 if name in kilobytes else None

    return {
        "total": get("MemTotal"),
        "available": get("MemAvailable"),
        "swap": get("SwapTotal"),
    }


def cpu(probes: Probes) -> dict[str, Any]:
    """Model, cores of the machine, and cores that this process may use."""
    text = _read(probes.root / "proc/cpuinfo")
    match = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", text, re.MULTILINE)
    count = len(re.findall(r"^processor\s*:", text, re.MULTILINE))
    return {
        "model": match.group(1).strip() if match else probes.architecture,
        "cores": count or os.cpu_count() or 1,
        "cores_allowed": len(os.sched_getaffinity(0)),
    }


def gpus(probes: Probes) -> list[dict[str, Any]]:
    """GPUs that nvidia-smi sees; Jetson's own lists none or gives no memory."""
    found = []
    for line in probes.nvidia_smi().splitlines():
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
    return found


def jetson(probes: Probes) -> dict[str, Any] | None:
    """Board, L4T release and JetPack; None elsewhere."""
    model = _read(probes.root / "proc/device-tree/model").strip("\0\n ")
    text = _read(probes.root / "etc/nv_tegra_release")
    release = re.search(r"# R(\d+) \(release\), REVISION: ([\d.]+)", text)
    if release is None and "Jetson" not in model:
        return None
    major = release.group(1) if release else None
    return {
        "model": model or None,
        "l4t": f"{major}.{release.group(2)}" if release else None,
        "jetpack": JETPACKS.get(major) if major else None,
    }


def facts(probes: Probes | None = None) -> dict[str, Any]:
    """Machine facts of a report."""
    probes = probes or Probes()
    return {
        "python": probes.python,
        "architecture": probes.architecture,
        "cpu": cpu(probes),
        "memory_bytes": memory(probes),
        "gpus": gpus(probes),
        "jetson": jetson(probes),
    }


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
