"""What will go wrong although everything seems to be there; each with the line that mends it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from patchsieve.contract.targets import RTX, USUAL, numbers_of
from patchsieve.runtime.board.abilities import Libraries
from patchsieve.runtime.board.machine import Probes

ONE_ONNXRUNTIME = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install --no-cache-dir {}"
SWAPFILE = (
    "sudo fallocate -l {0}G /swapfile && sudo chmod 600 /swapfile && sudo mkswap /swapfile && "
    "sudo swapon /swapfile"
)
_WITHOUT_VNNI = "int4,tower=int8-weights,scorer=int8-weights,decisions=int8-weights"
_TIGHT_SWAP = 8 << 30  # boards with less memory than 16 GB need this much swap to build
_OLDEST_JETPACK = (6, 1)  # 5 has TensorRT 8.5 and 6.0 has 8.6, which no target of ours serves


def pitfalls(
    probes: Probes, facts: dict[str, Any], libraries: Libraries, providers: list[str]
) -> list[str]:
    """Warnings about this machine, each a sentence and what to do."""
    found = [*_onnxruntime(probes, facts, libraries, providers), *_rtx(facts, libraries)]
    if facts["jetson"] is not None:
        found += [*_jetpack(probes, facts, libraries), *_swap(facts), *_speed(facts["jetson"])]
    return found


def _onnxruntime(
    probes: Probes, facts: dict[str, Any], libraries: Libraries, providers: list[str]
) -> Iterator[str]:
    if probes.version("onnxruntime") and probes.version("onnxruntime-gpu"):
        keep = "onnxruntime-gpu" if facts["gpus"] else "onnxruntime"
        yield (
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other | "
            f"what to do: {ONE_ONNXRUNTIME.format(keep)}"
        )
    if libraries["onnxruntime"] and not providers:
        yield (
            "onnxruntime is installed but does not load | "
            f"what to do: {ONE_ONNXRUNTIME.format('onnxruntime')}"
        )


def _rtx(facts: dict[str, Any], libraries: Libraries) -> Iterator[str]:
    if libraries[RTX.module] is None or RTX.capabilities is None:
        return
    for gpu in facts["gpus"]:
        capability = gpu["compute_capability"]
        if not RTX.takes(capability):
            yield (
                f"{RTX.label} builds here but does not list this GPU: {gpu['name']}, compute "
                f"capability {capability} | expected: one of {', '.join(RTX.capabilities)} | "
                "what to do: use the full TensorRT"
            )


def _jetpack(probes: Probes, facts: dict[str, Any], libraries: Libraries) -> Iterator[str]:
    board = facts["jetson"]
    if numbers_of(board["jetpack"])[:2] < _OLDEST_JETPACK:
        yield (
            f"JetPack {board['jetpack']} has a TensorRT that no target serves | "
            f"what to do: flash JetPack 6.1 or newer, or use --target {USUAL}"
        )
    if libraries["tensorrt"] is None and probes.in_venv:
        yield (
            "JetPack's TensorRT is not visible in this virtual environment | what to do: "
            "python3 -m venv --system-site-packages .venv"
        )


def _swap(facts: dict[str, Any]) -> Iterator[str]:
    memory = facts["memory_bytes"]
    total, swap = memory["total"], memory["swap"] or 0
    on_disk = swap - memory["zram"]
    if total is None or total >= 16 << 30 or on_disk >= _TIGHT_SWAP:
        return
    zram = f" ({memory['zram'] / 1e9:.1f} GB of it zram, which lies in memory itself)"
    yield (
        f"{total / 1e9:.1f} GB of memory and {swap / 1e9:.1f} GB of swap"
        f"{zram if memory['zram'] else ''} are little for large bundles | "
        f"what to do: {SWAPFILE.format(_TIGHT_SWAP >> 30)}"
    )


def _speed(board: dict[str, Any]) -> Iterator[str]:
    mode = board["power_mode"]
    if mode is not None and not mode["is_full"]:
        yield (
            f"the power mode {mode['name']} caps the clocks | what to do: "
            "sudo nvpmodel -p --verbose lists the modes, sudo nvpmodel -m N sets one"
        )
    if board["clocks_locked"] is False:
        yield "clocks are not locked, times will scatter | what to do: sudo jetson_clocks"
    alerts = [n for n, state in board["throttling"].items() if "throttle" in n and state]
    if alerts:
        yield f"the board is slowed down now: {', '.join(alerts)} | what to do: cool it"


def bundle_pitfalls(bundle: dict[str, Any], disk: int) -> Iterator[str]:
    """Warnings about one bundle on this machine, from what doctor worked out of it."""
    for name, plan in bundle["plans"].items():
        if plan["fits"] is False:
            yield (
                f"plan {name} does not fit in memory | found: "
                f"{bundle['available_bytes'] / 1e9:.1f} GB available | expected: "
                f"{plan['needed_bytes'] / 1e9:.1f} GB | what to do: close other programs, or "
                "export with a smaller --budget, or --precision int4"
            )
    if bundle["is_dynamic"] and bundle["has_vnni"] is False:
        yield (
            "this CPU has no VNNI, so products of int8 saturate in ONNX Runtime and answers get "
            f"worse | found: {bundle['precision']} | expected: avx512_vnni or avx_vnni in "
            f"/proc/cpuinfo | what to do: export with --precision {_WITHOUT_VNNI}"
        )
    if not bundle["has_engines"]:
        return
    if bundle["build_fits"] is False:
        missing = bundle["build_bytes"] - (bundle["available_bytes"] or 0)
        yield (
            "building engines may need more than memory and swap hold | expected: "
            f"{bundle['build_bytes'] / 1e9:.1f} GB for the largest engine | "
            f"what to do: {SWAPFILE.format(max(1, -(-missing // (1 << 30))))}"
        )
    if disk < bundle["weight_bytes"]:
        yield (
            f"the disk has no room for engines | found: {disk / 1e9:.1f} GB free | expected: "
            f"{bundle['weight_bytes'] / 1e9:.1f} GB"
        )
