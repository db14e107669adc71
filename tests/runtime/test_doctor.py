"""`patchsieve doctor` on machines that are not here, from recorded files and faked libraries."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest

from patchsieve.contract.boards import BOARDS
from patchsieve.contract.formats import FORMATS, parse
from patchsieve.contract.targets import CUDA_LIBRARIES, FULL, TARGETS, of_compiler, of_version
from patchsieve.contract.weights import PARTS
from patchsieve.runtime.board import cuda_provider
from patchsieve.runtime.board.abilities import EXPORT, INSTALL, install_line
from patchsieve.runtime.board.doctor import diagnose
from patchsieve.runtime.board.machine import Probes, module_version
from patchsieve.runtime.board.pitfalls import _WITHOUT_VNNI, bundle_pitfalls
from tests.support.bundles import PHOTO, command, command_json
from tests.support.damage import edit_manifest

pytest_plugins = ["tests.support.bundles"]

RECORDED = Path(__file__).resolve().parents[1] / "recorded" / "jetson"
CORE = {"numpy": "2.2.0", "pillow": "11.0.0", "tokenizers": "0.21.0", "jinja2": "3.1.4"}
CPU_ONLY = CORE | {"onnxruntime": "1.31.0"}
EXPORTER = {name: "9.9" for name in EXPORT}
ORIN_MODEL = "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
THOR_MODEL = "NVIDIA Jetson AGX Thor Developer Kit"
RTX = "NVIDIA GeForce RTX 4090, 570.86.15, 24564, 8.9\n"
HOPPER = "NVIDIA H100 80GB HBM3, 570.86.15, 81559, 9.0\n"
NO_ENGINES = dict.fromkeys(("cuda", "tensorrt-rtx", "tensorrt", "tensorrt10", "jetpack6"), "nnn")
NO_ENGINES["cuda"] = "n-n"
MEMINFO = "MemTotal: {} kB\nMemFree: 1000 kB\nMemAvailable: {} kB\nSwapTotal: {} kB\n"
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
        "module_version": lambda module: None,
        "cuda_obstacle": lambda: "",
        "run": lambda command: programs(command, smi),
        "providers": lambda: ["CPUExecutionProvider"] if has_runtime else [],
        "python": "3.11.9",
        "architecture": "x86_64",
        "disk": lambda: 100 << 30,
        "in_venv": False,
    }
    return Probes(**(given | options))


def programs(command: Sequence[str], smi: str, **others: str) -> str:
    """What nvidia-smi prints when asked for a list, and what other programs print."""
    if command[0] == "nvidia-smi":
        return smi if len(command) > 1 else others.get("table", "")
    return others.get(command[0], "")


def recorded(name: str) -> str:
    return (RECORDED / name).read_text()


def board(
    root: Path, jetpack: str, model: str, soc: str, installed: dict[str, str], **options: Any
) -> dict[str, Any]:
    """Report of a board with a JetPack's recorded files; `files` and `smi` add to them."""
    files = {
        "proc/device-tree/model": model + "\0",
        "proc/device-tree/compatible": f"nvidia,p0000\0nvidia,{soc}\0",
        "etc/nv_tegra_release": recorded(f"jetpack{jetpack}.release.txt"),
    } | options.pop("files", {})
    mode = recorded(f"jetpack{jetpack}.nvpmodel.txt")
    smi, table = options.pop("smi", ""), options.pop("table", "")
    options.setdefault("run", lambda command: programs(command, smi, nvpmodel=mode, table=table))
    return diagnose(probes(root, installed, files=files, architecture="aarch64", **options))


def dpkg(**versions: str) -> str:
    """Dpkg's status file; names with _ for -."""
    records = [
        f"Package: {name.replace('_', '-')}\nStatus: install ok installed\nVersion: {version}\n"
        for name, version in versions.items()
    ]
    gone = "Package: nvidia-jetpack\nStatus: deinstall ok config-files\nVersion: 4.6\n"
    return "\n".join([gone, *records])


def can(report: dict[str, Any]) -> dict[str, str]:
    """Steps of each target in three letters: y, n or - for export, build, run."""
    letters = {True: "y", False: "n", None: "-"}
    return {
        target: "".join(letters[abilities[step]["can"]] for step in ("export", "build", "run"))
        for target, abilities in report["targets"].items()
    }


def test_with_nothing_installed_each_step_names_its_line(tmp_path: Path) -> None:
    report = diagnose(probes(tmp_path, {}))
    assert can(report) == {"cpu": "n-n", "reference": "n-n", **NO_ENGINES}
    cpu = report["targets"]["cpu"]
    assert cpu["export"]["why"] == "no torch, transformers, onnx, onnxscript, safetensors"
    assert cpu["export"]["do"] == INSTALL["export"]
    assert cpu["run"]["do"] == INSTALL["core"]
    assert report["targets"]["tensorrt-rtx"]["build"]["do"] == TARGETS["tensorrt-rtx"].install
    assert set(report["libraries"].values()) == {None}
    assert report["warnings"] == report["onnxruntime_providers"] == []


def test_a_board_with_onnxruntime_alone_runs_and_does_not_export(tmp_path: Path) -> None:
    report = diagnose(probes(tmp_path, CPU_ONLY))
    assert can(report) == {"cpu": "n-y", "reference": "n-y", **NO_ENGINES}
    assert report["onnxruntime_providers"] == ["CPUExecutionProvider"]
    assert report["machine"]["memory_bytes"] == {
        "total": 32 << 30,
        "available": 30 << 30,
        "swap": 0,
        "zram": 0,
    }


def test_only_the_missing_runtime_is_named(tmp_path: Path) -> None:
    run = diagnose(probes(tmp_path, CORE))["targets"]["cpu"]["run"]
    assert (run["can"], run["why"], run["do"]) == (False, "no onnxruntime", TARGETS["cpu"].install)


def test_an_onnxruntime_without_opset_24_runs_cpu_graphs_only(tmp_path: Path) -> None:
    old = CORE | {"onnxruntime": "1.23.2"}
    report = diagnose(probes(tmp_path, old, python="3.10.12"))
    assert can(report)["cpu"] == "n-y"
    assert can(report)["reference"] == "n-n"
    assert "Python 3.11" in report["targets"]["reference"]["run"]["do"]
    newer = diagnose(probes(tmp_path, old))["targets"]["reference"]["run"]
    assert newer["do"] == TARGETS["reference"].install


def test_an_rtx_desktop_builds_and_runs_engines(tmp_path: Path) -> None:
    installed = CPU_ONLY | EXPORTER | {"tensorrt-rtx": "1.7.1", "cuda-python": "13.0"}
    report = diagnose(probes(tmp_path, installed, smi=RTX))
    others = dict.fromkeys(of_compiler(FULL), "ynn")
    assert can(report) == {
        "cpu": "y-y",
        "reference": "y-y",
        "cuda": "y-n",
        "tensorrt-rtx": "yyy",
        **others,
    }
    assert report["machine"]["gpus"] == [
        {
            "name": "NVIDIA GeForce RTX 4090",
            "driver": "570.86.15",
            "memory": 24564 << 20,
            "compute_capability": "8.9",
        }
    ]
    assert report["machine"]["label"] == "NVIDIA GeForce RTX 4090"
    assert report["machine"]["unified_memory"] is False
    assert report["warnings"] == []


READY = CPU_ONLY | {
    "onnxruntime-gpu": "1.31.0",
    "tensorrt": "11.0.0.114",
    "tensorrt-rtx": "1.7.1",
    "cuda-python": "13.0",
}
CUDA = {"providers": lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]}


@pytest.mark.parametrize(
    ("target", "lacks", "why", "do"),
    [
        ("cpu", "onnxruntime", "no onnxruntime", TARGETS["cpu"].install),
        ("cuda", "CUDAExecutionProvider", "no CUDAExecution", TARGETS["cuda"].install),
        ("cuda", "gpu", "no NVIDIA GPU", INSTALL["driver"]),
        ("tensorrt-rtx", "tensorrt-rtx", "no tensorrt_rtx", TARGETS["tensorrt-rtx"].install),
        ("tensorrt-rtx", "cuda-python", "no cuda-python", INSTALL["cuda-python"]),
        ("tensorrt-rtx", "gpu", "no NVIDIA GPU", INSTALL["driver"]),
        ("tensorrt", "tensorrt", "no tensorrt", TARGETS["tensorrt"].install),
        ("tensorrt", "cuda-python", "no cuda-python", INSTALL["cuda-python"]),
        ("tensorrt", "gpu", "no NVIDIA GPU", INSTALL["driver"]),
        ("tensorrt", "numpy", "no numpy", INSTALL["core"]),
        ("tensorrt10", "", "11.0.0.114 is here", TARGETS["tensorrt10"].install),
        ("jetpack6", "", "11.0.0.114 is here", TARGETS["jetpack6"].install),
    ],
)
def test_each_missing_component_stops_its_target_with_its_line(
    tmp_path: Path, target: str, lacks: str, why: str, do: str
) -> None:
    installed = {name: v for name, v in READY.items() if name != lacks}
    if lacks == "onnxruntime":
        del installed["onnxruntime-gpu"]
    options = {} if lacks == "CUDAExecutionProvider" else CUDA
    smi = "" if lacks == "gpu" else RTX
    run = diagnose(probes(tmp_path, installed, smi=smi, **options))["targets"][target]["run"]
    assert run["can"] is False
    assert run["why"].startswith(why) or why in run["why"]
    assert run["do"] == do
    whole = diagnose(probes(tmp_path, READY, smi=RTX, **CUDA))["targets"]
    steps = {name: abilities["run"]["can"] for name, abilities in whole.items()}
    assert steps == dict.fromkeys(("tensorrt10", "jetpack6"), False) | dict.fromkeys(
        ("cpu", "cuda", "tensorrt-rtx", "tensorrt", "reference"), True
    )


@pytest.mark.parametrize(
    ("version", "target"),
    [
        ("8.5.2.2", None),
        ("10.3.0.30", "jetpack6"),
        ("10.13.3.9", "jetpack6"),
        ("10.14.1", "jetpack6"),
        ("10.15.1", "tensorrt10"),
        ("10.16.0.1-1+cuda13.2", "tensorrt10"),
        ("11.4.1", "tensorrt"),
        ("yes", None),
        (None, None),
    ],
)
def test_a_version_of_tensorrt_serves_one_target(version: str | None, target: str | None) -> None:
    assert of_version(version) == target


def test_a_gpu_that_rtx_does_not_list_is_a_warning_and_cannot_run(tmp_path: Path) -> None:
    report = diagnose(probes(tmp_path, READY, smi=HOPPER, **CUDA))
    run = report["targets"]["tensorrt-rtx"]["run"]
    assert (run["can"], run["do"]) == (False, "use --target tensorrt")
    assert report["targets"]["tensorrt-rtx"]["build"]["can"] is True
    both, hopper = report["warnings"]
    assert "onnxruntime-gpu" in both
    assert "9.0" in hopper and "12.1" in hopper


def test_a_jetson_orin_of_jetpack_6_is_recognised(tmp_path: Path) -> None:
    status = dpkg(nvidia_jetpack="6.2+b77", python3_libnvinfer="10.3.0.30-1+cuda12.5")
    version = '{"cuda": {"name": "CUDA SDK", "version": "12.6.11"}}'
    options: dict[str, Any] = {
        "files": {
            "var/lib/dpkg/status": status,
            "usr/local/cuda/version.json": version,
            "proc/swaps": "Filename\tType\tSize\tUsed\tPriority\n"
            "/dev/zram0 partition\t1950000\t0\t5\n/dev/zram1 partition\t1950000\t0\t5\n",
        },
        "memory": (7_800_000, 6_000_000, 3_900_000),
        "smi": "Orin (nvgpu), 540.4.0, [N/A], [N/A]\n",
        "python": "3.10.12",
        "in_venv": True,
    }
    given = ("6", ORIN_MODEL, "tegra234", CPU_ONLY | {"cuda-python": "12.6"})
    report = board(tmp_path, *given, **options)
    facts = report["machine"]
    assert facts["jetson"] == {
        "model": ORIN_MODEL,
        "l4t": "36.4.3",
        "jetpack": "6.2+b77",
        "tensorrt": "10.3.0.30-1+cuda12.5",
        "power_mode": {"name": "25W", "number": 1, "is_full": False},
        "clocks_locked": None,
        "throttling": {},
    }
    assert facts["label"] == ORIN_MODEL
    assert facts["cuda"] == {"driver": None, "toolkit": "12.6.11"}
    assert facts["gpus"][0]["memory"] is None and facts["unified_memory"] is True
    assert facts["gpus"][0]["compute_capability"] == "8.7"
    hidden, swap, mode = report["warnings"]
    assert "--system-site-packages" in hidden
    assert "zram" in swap and "swapon" in swap
    assert "25W" in mode and "nvpmodel" in mode
    missing = report["targets"]["jetpack6"]["run"]
    assert (missing["can"], missing["do"]) == (False, TARGETS["tensorrt10"].install_on_board)
    # With the system's packages visible, the module is found though it has no metadata.
    options["importable"] = lambda module: module == "tensorrt"
    seen = board(tmp_path, *given, **options)
    assert seen["libraries"]["tensorrt"] == "10.3.0.30"
    assert seen["warnings"] == [swap, mode]
    assert can(seen) == NO_ENGINES | {"cpu": "n-y", "reference": "n-y", "jetpack6": "nyy"}
    ten = seen["targets"]["tensorrt10"]["build"]
    assert ten["do"] == "use --target jetpack6"
    assert "jp6/cu126" in seen["targets"]["cuda"]["run"]["do"]


def test_a_thor_of_jetpack_7_0_takes_jetpack_6_s_graphs(tmp_path: Path) -> None:
    report = board(
        tmp_path,
        "7.0",
        THOR_MODEL,
        "tegra264",
        CPU_ONLY | {"tensorrt": "10.13.3.9", "cuda-python": "13.0", "tensorrt-rtx": "1.7.1"},
        smi="NVIDIA Thor, 580.00, [N/A], 11.0\n",
        table=recorded("jetpack7.0.smi.txt"),
    )
    facts = report["machine"]
    assert (facts["jetson"]["l4t"], facts["jetson"]["jetpack"]) == ("38.2.0", "7.0")
    assert facts["cuda"]["driver"] == "13.0"
    assert facts["gpus"][0]["compute_capability"] == "11.0"
    assert can(report)["jetpack6"] == "nyy"
    assert can(report)["tensorrt-rtx"] == "nyn"
    assert report["targets"]["tensorrt-rtx"]["run"]["do"] == "use --target jetpack6"
    assert report["targets"]["cuda"]["run"]["do"] == "use --target jetpack6"
    rtx, mode = report["warnings"]
    assert "11.0" in rtx and "120W" in mode


def test_an_orin_of_jetpack_7_2_takes_tensorrt10(tmp_path: Path) -> None:
    installed = CPU_ONLY | {"tensorrt": "10.16.0", "cuda-python": "13.2"}
    files = {"var/lib/dpkg/status": dpkg(nvidia_jetpack="7.2-b187")}
    files |= {f"sys/devices/system/cpu/cpu{n}/cpufreq/scaling_min_freq": "729600" for n in (0, 1)}
    files |= {f"sys/devices/system/cpu/cpu{n}/cpufreq/scaling_max_freq": "729600" for n in (0, 1)}
    gpu = "sys/class/devfreq/17000000.gpu"
    files |= {f"{gpu}/min_freq": "306000000", f"{gpu}/max_freq": "1300500000"}
    report = board(tmp_path, "7.2", "NVIDIA Jetson AGX Orin", "tegra234", installed, files=files)
    jetson = report["machine"]["jetson"]
    assert (jetson["l4t"], jetson["jetpack"]) == ("39.2.0", "7.2-b187")
    assert jetson["clocks_locked"] is False  # the GPU's may still move
    assert can(report)["tensorrt10"] == "nyy" and can(report)["tensorrt"] == "nnn"
    assert any("sudo jetson_clocks" in text for text in report["warnings"])
    (tmp_path / gpu / "min_freq").write_text("1300500000")
    locked = board(tmp_path, "7.2", "NVIDIA Jetson AGX Orin", "tegra234", installed)
    assert locked["machine"]["jetson"]["clocks_locked"] is True
    assert not any("jetson_clocks" in text for text in locked["warnings"])


def test_jetpack_5_is_told_to_be_too_old_and_its_gpu_is_known(tmp_path: Path) -> None:
    installed = CPU_ONLY | {"tensorrt": "8.5.2.2"}
    report = board(tmp_path, "5", "Jetson AGX Orin", "tegra234", installed)
    assert report["machine"]["jetson"]["jetpack"] == "5.1.2"
    assert report["machine"]["gpus"] == [
        {"name": "integrated", "driver": None, "memory": None, "compute_capability": "8.7"}
    ]
    (old,) = report["warnings"]
    assert "JetPack 5.1.2" in old and "JetPack 6.1" in old
    build = report["targets"]["jetpack6"]["build"]
    assert (build["can"], build["do"]) == (False, "install JetPack 6.1 or newer")


@pytest.mark.parametrize(("swap", "is_little"), [("/dev/zram0", True), ("/swapfile", False)])
def test_swap_that_lies_in_memory_does_not_count(
    tmp_path: Path, swap: str, is_little: bool
) -> None:
    files = {"proc/swaps": f"Filename Type Size Used Priority\n{swap} x {9 * GIB} 0 5\n"}
    memory = (7_800_000, 6_000_000, 9 * GIB)
    report = board(tmp_path, "6", ORIN_MODEL, "tegra234", {}, files=files, memory=memory)
    assert any("large bundles" in text for text in report["warnings"]) == is_little


def test_a_board_that_is_throttled_now_says_so(tmp_path: Path) -> None:
    alert = "sys/class/thermal/cooling_device3"
    files = {f"{alert}/type": "gpu-throttle-alert\n", f"{alert}/cur_state": "1\n"}
    report = board(tmp_path, "7.0", THOR_MODEL, "tegra264", {}, files=files, in_venv=False)
    assert any("slowed down now: gpu-throttle-alert" in text for text in report["warnings"])


def test_a_release_file_alone_makes_no_jetson_label_of_a_desktop(tmp_path: Path) -> None:
    report = diagnose(probes(tmp_path, CPU_ONLY, smi=RTX))
    assert report["machine"]["jetson"] is None
    assert "Jetson" not in report["machine"]["label"]


def test_both_onnxruntimes_are_a_warning_with_the_line_that_mends_it(tmp_path: Path) -> None:
    both = CPU_ONLY | {"onnxruntime-gpu": "1.31.0"}
    (cpu,) = diagnose(probes(tmp_path, both))["warnings"]
    assert cpu.endswith("install --no-cache-dir onnxruntime")
    (gpu,) = diagnose(probes(tmp_path, both, smi=RTX))["warnings"]
    assert gpu.endswith("install --no-cache-dir onnxruntime-gpu")


def test_a_cuda_provider_that_does_not_start_says_what_is_missing(tmp_path: Path) -> None:
    installed = CORE | {"onnxruntime-gpu": "1.31.1"}
    missing = "libcublasLt.so.13: cannot open shared object file"
    given = probes(tmp_path, installed, smi=RTX, cuda_obstacle=lambda: missing, **CUDA)
    run = diagnose(given)["targets"]["cuda"]["run"]
    assert run["can"] is False
    assert missing in run["why"] and run["do"] == CUDA_LIBRARIES
    asked: list[str] = []
    for smi, providers in (("", CUDA), (RTX, {})):  # nothing to start: it is not tried
        tried = {"cuda_obstacle": lambda: asked.append("tried") or ""} | providers
        assert diagnose(probes(tmp_path, installed, smi=smi, **tried))["targets"]["cuda"]
    assert not asked


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (
            "\x1b[1;31m[E:onnxruntime] Failed to load x.so with error: libcudnn.so.9: cannot "
            "open\n\x1b[m\n[W] Failed to create CUDAExecutionProvider\n",
            "libcudnn.so.9: cannot open",
        ),
        ("Traceback ...\nRuntimeError: CUDA failure 35\n", "RuntimeError: CUDA failure 35"),
        ("", "the process that tried it ended with code -11"),
    ],
)
def test_the_reason_is_the_missing_library_or_the_last_line(said: str, reason: str) -> None:
    assert cuda_provider.reason_of(said, -11) == reason


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(),
    reason="this onnxruntime was built with CUDA",
)
def test_an_onnxruntime_for_the_cpu_alone_starts_no_cuda_provider() -> None:
    assert "was built without CUDA" in cuda_provider.obstacle()
    model = onnx.load_from_string(cuda_provider.IDENTITY)
    onnx.checker.check_model(model)
    assert [node.op_type for node in model.graph.node] == ["Identity"]


@pytest.mark.parametrize(
    ("distributions", "module", "version", "warns"),
    [
        ({"onnxruntime": "1.30.0"}, "1.31.1", "1.31.1", True),
        ({"onnxruntime": "1.30.0", "onnxruntime-gpu": "1.31.1"}, "1.31.1", "1.31.1", False),
        ({"onnxruntime": "1.30.0"}, "1.30.0", "1.30.0", False),
        ({"onnxruntime": "1.30.0"}, None, "1.30.0", False),
        ({"tensorrt": "10.3.0.30"}, "10.3.0", "10.3.0.30", False),
        ({"torch": "2.13.0+cpu"}, "2.13.0", "2.13.0+cpu", False),
        ({}, "1.31.1", None, False),
    ],
)
def test_the_version_is_that_of_the_module_that_is_imported(
    tmp_path: Path, distributions: dict[str, str], module: str | None, version: str, warns: bool
) -> None:
    report = diagnose(probes(tmp_path, distributions, module_version=lambda name: module))
    name = next(iter(distributions), "onnxruntime")
    assert report["libraries"][name] == version
    said = [text for text in report["warnings"] if "is imported, but" in text]
    assert bool(said) == warns and all("remove one" in text for text in said)


def test_a_module_s_version_is_read_from_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, file, text in (
        ("plain_one", "__init__.py", '"""Text."""\n__version__ = "1.31.1"\nraise SystemExit\n'),
        ("apart_one", "version.py", "debug = False\n__version__ = '2.13.0+cpu'\n"),
        ("silent_one", "__init__.py", "from .native import __version__\n"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        (tmp_path / name / file).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    found = [module_version(name) for name in ("plain_one", "apart_one", "silent_one", "no_one")]
    assert found == ["1.31.1", "2.13.0+cpu", None, None]


def test_cuda_python_of_a_newer_cuda_than_the_driver_cannot_run(tmp_path: Path) -> None:
    installed = CPU_ONLY | {"tensorrt": "10.3.0.30", "cuda-python": "13.0.1"}
    orin = board(tmp_path, "6", ORIN_MODEL, "tegra234", installed)["targets"]["jetpack6"]["run"]
    assert (orin["can"], orin["do"]) == (False, INSTALL["cuda-python on JetPack 6"])
    assert "13.0.1" in orin["why"] and "12.6" in orin["why"]
    absent = {name: v for name, v in installed.items() if name != "cuda-python"}
    orin = board(tmp_path, "6", ORIN_MODEL, "tegra234", absent)["targets"]["jetpack6"]["run"]
    assert orin["do"] == 'pip install "cuda-python==12.6.*"'
    table = recorded("jetpack7.0.smi.txt").replace("13.0", "12.8")
    smi = lambda command: programs(command, RTX, table=table)  # noqa: E731
    desktop = probes(tmp_path / "desktop", READY, run=smi)
    run = diagnose(desktop)["targets"]["tensorrt-rtx"]["run"]
    assert (run["can"], run["do"]) == (False, INSTALL["cuda-python for CUDA 12"])


def test_commands_with_a_library_of_their_own_say_what_is_absent(tmp_path: Path) -> None:
    report = diagnose(probes(tmp_path, EXPORTER | {"optimum": "2.3.0"}))
    tools = {name: (one["can"], one["why"], one["do"]) for name, one in report["tools"].items()}
    assert tools["calibrate"] == (False, "no accelerate", INSTALL["calibration"])
    assert tools["optimum"][0] is True
    assert tools["open_clip"] == (False, "no open_clip", INSTALL["open_clip"])
    assert tools["lmms_eval"] == (False, "no lmms_eval", INSTALL["lmms_eval"])
    assert report["libraries"]["optimum"] == "2.3.0" and report["libraries"]["lmms_eval"] is None


def test_an_onnxruntime_that_does_not_load_is_a_warning(tmp_path: Path) -> None:
    (warning,) = diagnose(probes(tmp_path, CPU_ONLY, providers=lambda: []))["warnings"]
    assert "does not load" in warning


@pytest.mark.parametrize(("available", "fits"), [(8 * GIB, True), (100_000, False)])
def test_a_bundle_that_does_not_fit_in_memory_is_seen(
    tmp_path: Path, tiny_bundle: Path, available: int, fits: bool
) -> None:
    machine = probes(tmp_path, CPU_ONLY, memory=(8 * GIB, available, 0))
    report = diagnose(machine, tiny_bundle)
    bundle = report["bundle"]
    assert sum("does not fit in memory" in text for text in report["warnings"]) == (
        0 if fits else 2
    )
    assert {plan["fits"] for plan in bundle["plans"].values()} == {fits}
    full, half = bundle["plans"]["none"], bundle["plans"]["half"]
    assert half["kv_bytes"] < full["kv_bytes"]
    assert full["needed_bytes"] > bundle["weight_bytes"] + full["kv_bytes"]


def test_an_empty_proc_leaves_unknowns_and_no_error(tmp_path: Path, tiny_bundle: Path) -> None:
    empty = probes(tmp_path, {}, files={"proc/meminfo": ""})
    report = diagnose(empty, tiny_bundle)
    memory = report["machine"]["memory_bytes"]
    assert memory == {"total": None, "available": None, "swap": None, "zram": 0}
    assert report["bundle"]["plans"]["none"]["fits"] is None


def test_a_build_that_memory_and_swap_cannot_hold_is_seen(tmp_path: Path) -> None:
    bundle = {"plans": {}, "has_engines": True, "weight_bytes": 14e9, "build_bytes": 20 << 30}
    bundle |= {"available_bytes": 6 << 30, "build_fits": False, "is_dynamic": False}
    build, disk = bundle_pitfalls(bundle, disk=10 << 30)
    assert "fallocate -l 14G" in build
    assert "10.7 GB free" in disk and "14.0 GB" in disk
    assert not list(bundle_pitfalls(bundle | {"has_engines": False}, disk=0))


CPUINFO = "processor\t: 0\nmodel name\t: A CPU\nflags\t\t: fpu avx2 {}\n"


@pytest.mark.parametrize(
    ("cpuinfo", "precision", "is_warned"),
    [
        (CPUINFO.format("avx512f"), "int8", True),
        (CPUINFO.format("avx512f avx512_vnni"), "int8", False),
        (CPUINFO.format("avx_vnni"), "int8", False),
        ("processor\t: 0\nFeatures\t: fp asimd asimddp\n", "int8", False),  # Arm
        (CPUINFO.format(""), _WITHOUT_VNNI, False),
        (CPUINFO.format(""), "float32", False),
    ],
)
def test_int8_on_a_cpu_without_vnni_is_a_warning(
    tmp_path: Path, tiny_bundle: Path, cpuinfo: str, precision: str, is_warned: bool
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, folder)
    chosen = parse(precision).formats.parts
    keys = {part.name: part.key for part in PARTS.values()}

    def change(data: dict[str, Any]) -> None:
        for entry in data["weights"].values():
            entry["format"] = chosen.get(keys[entry["part"]] or "", "float")

    edit_manifest(folder, change)
    machine = probes(tmp_path / "root", CPU_ONLY, files={"proc/cpuinfo": cpuinfo})
    warnings = [text for text in diagnose(machine, folder)["warnings"] if "VNNI" in text]
    assert bool(warnings) is is_warned
    for text in warnings:
        assert f"--precision {_WITHOUT_VNNI}" in text and "tower and decoder int8" in text


def test_what_is_advised_without_vnni_rounds_no_rows() -> None:
    used = parse(_WITHOUT_VNNI).formats.used
    assert used and not any(FORMATS[form].is_dynamic for form in used)


def test_a_bundle_says_its_target_and_the_boards_that_hold_it(
    tmp_path: Path, tiny_bundle: Path
) -> None:
    bundle = diagnose(probes(tmp_path / "a", CPU_ONLY), tiny_bundle)["bundle"]
    assert bundle["target"] == "cpu"
    assert [fit["memory"] for fit in bundle["boards"]] == [board.name for board in BOARDS]
    assert all(fit["runs"] and fit["builds"] is None for fit in bundle["boards"])
    files = {"etc/nv_tegra_release": recorded("jetpack6.release.txt")}
    on_board = diagnose(probes(tmp_path / "b", CPU_ONLY, files=files), tiny_bundle)
    assert on_board["machine"]["jetson"] and on_board["bundle"]["boards"] == []


def test_every_target_that_export_writes_is_in_the_table(tmp_path: Path) -> None:
    assert set(diagnose(probes(tmp_path, {}))["targets"]) >= set(TARGETS)


HIDE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] == sys.argv[1]:
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Absent())
from patchsieve.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("module", "arguments", "line"),
    [
        ("numpy", ("run", "BUNDLE"), INSTALL["core"]),
        ("PIL", ("run", "BUNDLE"), INSTALL["core"]),
        ("tokenizers", ("run", "BUNDLE"), INSTALL["core"]),
        ("jinja2", ("run", "BUNDLE"), INSTALL["core"]),
        ("numpy", ("profile", "BUNDLE"), INSTALL["core"]),
        ("onnxruntime", ("run", "BUNDLE"), "onnxruntime"),
        ("onnxscript", ("export", "x", "-o", "y"), INSTALL["export"]),
    ],
)
def test_a_command_that_lacks_a_library_is_refused_in_one_line(
    tiny_bundle: Path, module: str, arguments: tuple[str, ...], line: str
) -> None:
    words = [str(tiny_bundle) if word == "BUNDLE" else word for word in arguments]
    words += ["--image", PHOTO, "--prompt", "what?"] if words[0] == "run" else []
    done = subprocess.run(
        [sys.executable, "-c", HIDE, module, *words],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    (said,) = done.stderr.strip().splitlines()
    assert module in said and "not installed" in said and line in said


def test_a_module_that_is_not_ours_has_no_line() -> None:
    assert install_line("somebodys_module") is None and install_line(None) is None
    assert install_line("cuda.bindings.runtime") == INSTALL["cuda-python"]
    assert install_line("tensorrt_rtx") == TARGETS["tensorrt-rtx"].install


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
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "plan half" in done.stdout


def test_the_command_prints_a_table_and_json(tiny_bundle: Path) -> None:
    code, out, _ = command("doctor", tiny_bundle)
    assert code == 0
    assert "cpu" in out and "plan half" in out
    assert "Azure" not in out and "for cpu" in out  # providers that no target runs on
    assert "optimum-cli export patchsieve" in out
    code, said = command_json("doctor")
    assert (code, said["schema_version"]) == (0, 1)
    assert said["targets"]["cpu"]["run"]["can"] is True
