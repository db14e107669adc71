"""`patchsieve doctor [BUNDLE]`: what this machine can do, and what to install for the rest."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from patchsieve import memory
from patchsieve.cli.output import print_json
from patchsieve.tables import size, table

# Execution providers of ONNX Runtime that a target runs on.
_DEVICES = {"CUDAExecutionProvider": "cuda", "CPUExecutionProvider": "cpu"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("bundle", type=Path, nargs="?", help="does this bundle fit here?")


def run(args: argparse.Namespace) -> int:
    """Examine and print."""
    from patchsieve.runtime.board.doctor import diagnose

    report = diagnose(bundle=args.bundle)
    if args.json:
        print_json(report)
        return 0
    blocks = [_machine(report), _libraries(report), _targets(report), _tools(report)]
    blocks.append(_installs(report))
    if "bundle" in report:
        blocks.append(_bundle(report["bundle"]))
    blocks += [f"warning: {text}" for text in report["warnings"]]
    print("\n\n".join(block for block in blocks if block))
    return 0


def _machine(report: dict[str, Any]) -> str:
    facts = report["machine"]
    found, cpu = facts["memory_bytes"], facts["cpu"]
    shared = ", shared with the GPU" if facts["unified_memory"] else ""
    zram = f" ({size(found['zram'])} zram)" if found["zram"] else ""
    lines = [
        f"patchsieve {report['patchsieve']}, Python {facts['python']}, {facts['architecture']}",
        f"cpu     {cpu['model']}, {cpu['cores_allowed']} of {cpu['cores']} cores",
        f"memory  {_size(found['total'])}{shared}, {_size(found['available'])} available, "
        f"swap {_size(found['swap'])}{zram}, disk {size(facts['disk_free_bytes'])} free",
    ]
    lines += _board(facts["jetson"]) if facts["jetson"] else []
    for gpu in facts["gpus"]:
        capability = gpu["compute_capability"] or "?"
        own = "memory shared" if gpu["memory"] is None else size(gpu["memory"])
        lines.append(
            f"gpu     {gpu['name']}, {own}, compute capability {capability}, "
            f"driver {gpu['driver'] or '?'}"
        )
    cuda = facts["cuda"]
    if facts["gpus"] or cuda["toolkit"]:
        lines.append(
            f"cuda    driver serves {cuda['driver'] or '?'}, toolkit {cuda['toolkit'] or '-'}"
        )
    if not facts["gpus"]:
        lines.append("gpu     none that nvidia-smi sees")
    return "\n".join(lines)


def _board(board: dict[str, Any]) -> list[str]:
    jetpack = f"JetPack {board['jetpack']}" if board["jetpack"] else "unknown JetPack"
    locked = {True: "locked", False: "not locked", None: "unknown"}[board["clocks_locked"]]
    mode = board["power_mode"]["name"] if board["power_mode"] else "unknown"
    return [
        f"board   {board['model'] or '?'}, L4T {board['l4t'] or '?'}, {jetpack}",
        f"power   mode {mode}, clocks {locked}, TensorRT package {board['tensorrt'] or '-'}",
    ]


def _libraries(report: dict[str, Any]) -> str:
    rows = []
    for name, version in report["libraries"].items():
        providers = report["onnxruntime_providers"] if name == "onnxruntime" else []
        devices = [device for provider, device in _DEVICES.items() if provider in providers]
        rows.append((name, version or "-", f"for {', '.join(devices)}" if devices else ""))
    return table(("library", "version", ""), rows)


def _targets(report: dict[str, Any]) -> str:
    rows = [
        (target, *(_word(abilities[step]) for step in ("export", "build", "run")))
        for target, abilities in report["targets"].items()
    ]
    return table(("target", "export", "build", "run"), rows)


def _tools(report: dict[str, Any]) -> str:
    """Commands that need a library of their own, and whether it is there."""
    from patchsieve.runtime.board.abilities import TOOLS

    rows = [(TOOLS[name][0], _word(ability)) for name, ability in report["tools"].items()]
    return table(("also", "here"), rows)


def _word(ability: dict[str, Any]) -> str:
    if ability["can"] is None:
        return "-"
    return "yes" if ability["can"] else f"no: {ability['why']}"


def _installs(report: dict[str, Any]) -> str:
    """What is missing and the line for it, each line once."""
    lines: dict[str, list[str]] = {}
    for target, abilities in report["targets"].items():
        for step, ability in abilities.items():
            if ability["can"] is False and ability["do"]:
                lines.setdefault(ability["do"], []).append(f"{step} {target}")
    for name, ability in report["tools"].items():
        if not ability["can"]:
            lines.setdefault(ability["do"], []).append(f"use {name}")
    return "\n".join(f"to {', '.join(what)}: {do}" for do, what in lines.items())


def _bundle(bundle: dict[str, Any]) -> str:
    """Whether each plan fits here; and off a board, which boards hold the bundle."""
    rows = [
        (
            f"plan {name}",
            size(plan["memory"]["weights"]),
            size(plan["kv_bytes"]),
            size(plan["needed_bytes"]),
            _size(bundle["available_bytes"]),
            {True: "fits", False: "DOES NOT FIT", None: "unknown"}[plan["fits"]],
        )
        for name, plan in bundle["plans"].items()
    ]
    header = (f"{bundle['path']}, {bundle['target']}", "weights", "KV cache")
    lines = [table((*header, "needed", "available", ""), rows), bundle["precision"]]
    if bundle["boards"]:
        lines.append(memory.places_line(bundle))
    return "\n".join(lines)


def _size(count: int | None) -> str:
    return "?" if count is None else size(count)
