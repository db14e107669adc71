"""`patchsieve doctor` on machines that are not here, from recorded files and faked libraries."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from patchsieve.export.lowering import LOWERINGS
from patchsieve.runtime.doctor import ENGINES, EXPORT, INSTALL, diagnose
from patchsieve.runtime.machine import Probes
from tests.bundles import command, command_json

pytest_plugins = ["tests.bundles"]

CORE = {"numpy": "2.2.0", "pillow": "11.0.0", "tokenizers": "0.21.0", "jinja2": "3.1.4"}
CPU_ONLY = CORE | {"onnxruntime": "1.31.0"}
EXPORTER = {name: "9.9" for name in EXPORT}
ORIN_RELEASE = (
    "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, "
    "DATE: Wed Jan  8 01:49:37 UTC 2025\n"
    "# KERNEL_VARIANT: oot\nTARGET_USERSPACE_LIB_DIR=nvidia\n"
)
ORIN_MODEL = "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0"
RTX = "NVIDIA GeForce RTX 4090, 570.86.15, 24564, 8.9\n"
MEMINFO = "MemTotal: {} kB\nMemFree: 1000 kB\nMemAvailable: {} kB\nSwapTotal: {} kB\n"
ON_ORT = ("cpu", "cuda", "reference")
GIB = 1 << 20  # in kB


def probes(
    root: Path,
    installed: dict[str, str],
    *,
    files: dict[str, str] | None = None,
    memory: tuple[int, int, int] = (32 * GIB, 30 * GIB, 0),
    smi: str = "",
    **options: Any,
) -> Probes:
    recorded = {"proc/meminfo": MEMINFO.format(*memory)} | (files or {})
    for name, text in recorded.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    has_runtime = any(name.startswith("onnxruntime") for name in installed)
    given: dict[str, Any] = {
        "root": root,
        "version": installed.get,
        "importable": lambda module: False,
        "nvidia_smi": lambda: smi,
        "providers": lambda: ["CPUExecutionProvider"] if has_runtime else [],
        "python": "3.11.9",
        "architecture": "x86_64",
        "disk": lambda: 100 << 30,
        "in_venv": False,
    }
    return Probes(**(given | options))


def can(report: dict[str, Any]) -> dict[str, str]:
    """Steps of each target in three letters: y, n or - for export, build, run."""
    letters = {True: "y", False: "n", None: "-"}
    return {
        target: "".join(letters[abilities[step]["can"]] for step in ("export", "build", "run"))
        for target, abilities in report["targets"].items()
    }


def test_with_nothing_installed_each_step_names_its_line(tmp_path: Path) -> None:
    report = diagnose(probes(tmp_path, {}))
    assert can(report) == {
        "cpu": "n-n",
        "cuda": "n-n",
        "reference": "n-n",
        **dict.fromkeys(ENGINES, "nnn"),
    }
    cpu = report["targets"]["cpu"]
    assert cpu["export"]["why"] == "no torch, transformers, onnx, onnxscript, safetensors"
    assert cpu["export"]["do"] == INSTALL["export"]
    assert cpu["run"]["do"] == INSTALL["core"]
    assert report["targets"]["tensorrt-rtx"]["build"]["do"] == INSTALL["tensorrt_rtx"]
    assert set(report["libraries"].values()) == {None}
    assert report["warnings"] == report["onnxruntime_providers"] == []


def test_a_board_with_onnxruntime_alone_runs_and_does_not_export(tmp_path: Path) -> None:
    report = diagnose(probes(tmp_path, CPU_ONLY))
    assert can(report) == {
        "cpu": "n-y",
        "cuda": "n-y",
        "reference": "n-y",
        **dict.fromkeys(ENGINES, "nnn"),
    }
    assert report["onnxruntime_providers"] == ["CPUExecutionProvider"]
    assert report["machine"]["memory_bytes"] == {
        "total": 32 << 30,
        "available": 30 << 30,
        "swap": 0,
    }


def test_only_the_missing_runtime_is_named(tmp_path: Path) -> None:
    run = diagnose(probes(tmp_path, CORE))["targets"]["cpu"]["run"]
    assert (run["can"], run["why"], run["do"]) == (False, "no onnxruntime", INSTALL["onnxruntime"])


def test_an_onnxruntime_without_opset_24_runs_cpu_graphs_only(tmp_path: Path) -> None:
    old = CORE | {"onnxruntime": "1.23.2"}
    report = diagnose(probes(tmp_path, old, python="3.10.12"))
    assert can(report)["cpu"] == "n-y"
    assert can(report)["reference"] == "n-n"
    assert "Python 3.11" in report["targets"]["reference"]["run"]["do"]
    newer = diagnose(probes(tmp_path, old))["targets"]["reference"]["run"]
    assert newer["do"] == INSTALL["onnxruntime 1.24"]


def test_an_rtx_desktop_builds_engines_and_shows_its_gpu(tmp_path: Path) -> None:
    installed = CPU_ONLY | EXPORTER | {"tensorrt-rtx": "1.7.1"}
    report = diagnose(probes(tmp_path, installed, smi=RTX))
    engines = dict.fromkeys(ENGINES, "ynn") | {"tensorrt-rtx": "yyn"}
    assert can(report) == dict.fromkeys(ON_ORT, "y-y") | engines
    assert report["machine"]["gpus"] == [
        {
            "name": "NVIDIA GeForce RTX 4090",
            "driver": "570.86.15",
            "memory": 24564 << 20,
            "compute_capability": "8.9",
        }
    ]
    assert report["notes"]


def test_a_jetson_orin_of_jetpack_6_is_recognised(tmp_path: Path) -> None:
    files = {"proc/device-tree/model": ORIN_MODEL, "etc/nv_tegra_release": ORIN_RELEASE}
    memory = (7_800_000, 6_000_000, 3_900_000)
    options: dict[str, Any] = {"files": files, "memory": memory, "architecture": "aarch64"}
    options |= {"smi": "Orin (nvgpu), 540.4.0, [N/A], [N/A]\n", "in_venv": True}
    report = diagnose(probes(tmp_path, CPU_ONLY, **options))
    assert report["machine"]["jetson"] == {
        "model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
        "l4t": "36.4.3",
        "jetpack": "6",
    }
    assert report["machine"]["gpus"][0]["memory"] is None
    assert report["machine"]["gpus"][0]["compute_capability"] is None
    hidden, swap = report["warnings"]
    assert "--system-site-packages" in hidden
    assert "swapon" in swap
    # With the system's packages visible, the module is found though it has no metadata.
    options["importable"] = lambda module: module == "tensorrt"
    seen = diagnose(probes(tmp_path, CPU_ONLY, **options))
    assert seen["libraries"]["tensorrt"] == "yes"
    assert len(seen["warnings"]) == 1


@pytest.mark.parametrize(
    ("major", "jetpack"), [("R35", "5"), ("R36", "6"), ("R38", "7"), ("R99", None)]
)
def test_the_l4t_release_tells_the_jetpack(tmp_path: Path, major: str, jetpack: str | None) -> None:
    files = {"etc/nv_tegra_release": ORIN_RELEASE.replace("R36", major)}
    board = diagnose(probes(tmp_path, {}, files=files))["machine"]["jetson"]
    assert (board["jetpack"], board["model"]) == (jetpack, None)


def test_both_onnxruntimes_are_a_warning_with_the_line_that_mends_it(tmp_path: Path) -> None:
    both = CPU_ONLY | {"onnxruntime-gpu": "1.31.0"}
    (cpu,) = diagnose(probes(tmp_path, both))["warnings"]
    assert cpu.endswith("install --no-cache-dir onnxruntime")
    (gpu,) = diagnose(probes(tmp_path, both, smi=RTX))["warnings"]
    assert gpu.endswith("install --no-cache-dir onnxruntime-gpu")


def test_an_onnxruntime_that_does_not_load_is_a_warning(tmp_path: Path) -> None:
    (warning,) = diagnose(probes(tmp_path, CPU_ONLY, providers=lambda: []))["warnings"]
    assert "does not load" in warning


@pytest.mark.parametrize(("available", "fits"), [(8 * GIB, True), (100_000, False)])
def test_a_bundle_that_does_not_fit_in_memory_is_seen(
    tmp_path: Path, tiny_bundle: Path, available: int, fits: bool
) -> None:
    machine = probes(tmp_path, CPU_ONLY, memory=(8 * GIB, available, 0))
    bundle = diagnose(machine, tiny_bundle)["bundle"]
    assert {plan["fits"] for plan in bundle["plans"].values()} == {fits}
    full, half = bundle["plans"]["none"], bundle["plans"]["half"]
    assert half["kv_bytes"] < full["kv_bytes"]
    assert full["needed_bytes"] > bundle["weight_bytes"] + full["kv_bytes"]


def test_an_empty_proc_leaves_unknowns_and_no_error(tmp_path: Path, tiny_bundle: Path) -> None:
    empty = probes(tmp_path, {}, files={"proc/meminfo": ""})
    report = diagnose(empty, tiny_bundle)
    assert report["machine"]["memory_bytes"] == {"total": None, "available": None, "swap": None}
    assert report["bundle"]["plans"]["none"]["fits"] is None


def test_every_target_that_export_writes_is_in_the_table(tmp_path: Path) -> None:
    assert set(diagnose(probes(tmp_path, {}))["targets"]) == set(LOWERINGS)


def test_doctor_runs_where_nothing_but_python_is_installed(tiny_bundle: Path) -> None:
    script = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {'numpy', 'PIL', 'torch', 'onnx', 'onnxruntime', 'jinja2',
                                      'transformers', 'tokenizers', 'tensorrt', 'cuda'}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from patchsieve.cli import main
sys.exit(main(['doctor', sys.argv[1]]) or main(['inspect', sys.argv[1]]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tiny_bundle)],
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "plan half" in done.stdout


def test_the_command_prints_a_table_and_json(tiny_bundle: Path) -> None:
    code, out, _ = command("doctor", tiny_bundle)
    assert code == 0
    assert "cpu" in out and "plan half" in out
    code, said = command_json("doctor")
    assert (code, said["schema_version"]) == (0, 1)
    assert said["targets"]["cpu"]["run"]["can"] is True
