"""`patchsieve profile BUNDLE`: latency of each part, survivors and KV bytes."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from patchsieve.cli import USER_ERROR
from patchsieve.cli.inputs import take_inputs
from patchsieve.cli.loading import add_request_options, add_run_options, load, say_target
from patchsieve.cli.output import Progress, error_json, print_json
from patchsieve.cli.picture import picture
from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.plan import NO_PRUNING
from patchsieve.contract.writing import check_file, write_result
from patchsieve.tables import size, table

PROMPT = "Describe the image."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("bundle", type=Path, help="the bundle's directory")
    add(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="an image file; repeat it for several (default: a generated picture)",
    )
    add(
        "--prompt",
        default=PROMPT,
        metavar="TEXT",
        help=f"the question, or - for stdin (default: {PROMPT})",
    )
    add_request_options(parser)
    add(
        "--against",
        default=NO_PRUNING,
        metavar="NAME",
        help="the plan to compare with (default: none, which prunes nothing)",
    )
    add("--alone", action="store_true", help="measure one plan, and compare it with nothing")
    add(
        "--warmup",
        type=int,
        default=3,
        metavar="N",
        help="the runs before those that count (default: 3)",
    )
    add("--runs", type=int, default=10, metavar="N", help="the runs that count (default: 10)")
    add(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="the tokens of each answer (default: 32, or what the bundle reserves if fewer)",
    )
    add(
        "--output",
        type=Path,
        metavar="FILE",
        help="also write the JSON object to this file, for `patchsieve compare`",
    )
    add_run_options(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    from patchsieve.runtime.profile import profile

    if args.output is not None:
        check_file(args.output)
    take_inputs(args)
    model = load(args)
    progress = Progress.of(args)
    plan = args.plan or model.facts.default_plan
    report = profile(
        model,
        args.image or picture(),
        args.prompt,
        plan=plan,
        against=None if args.alone or args.against == plan else args.against,
        warmup=args.warmup,
        runs=args.runs,
        max_new_tokens=min(32, model.facts.limits.max_new_tokens)
        if args.max_new_tokens is None
        else args.max_new_tokens,
        raw=args.raw,
        system=args.system,
        progress=progress,
    )
    progress.done()
    report = {"bundle": str(args.bundle)} | report
    report["stages"] = [[stage.first, stage.last - 1] for stage in model.facts.stages]
    model.close()
    failure = None if args.output is None else _write(args.output, report)
    if args.json:
        print_json(report | ({} if failure is None else error_json(failure)))
    else:
        print("\n\n".join([_head(report), _times(report), _caches(report), _foot(report)]))
        say_target(args, model.bundle.choice)
    if failure is not None:
        print(f"patchsieve: {failure}", file=sys.stderr)
        return USER_ERROR
    return 0


def _write(path: Path, report: dict[str, Any]) -> PatchsieveError | None:
    """Write the report; give the error back if that fails, so that the measurement is printed."""
    content = json.dumps({"schema_version": 1} | report, indent=1) + "\n"
    try:
        write_result(path, content.encode())
    except PatchsieveError as error:
        return error
    return None


def _head(report: dict[str, Any]) -> str:
    machine, made = report["machine"], report["plans"][report["plan"]]
    backend, cpu = machine["backend"], machine["cpu"]
    return "\n".join(
        [
            f"{report['bundle']}: {report['checkpoint']}, {report['precision']}, "
            f"target {report['target']}, {report['date']}",
            *_board(machine),
            f"{cpu['model']}, {cpu['cores_allowed']} of {cpu['cores']} cores, "
            f"{backend['library']}, {backend['device']}",
            f"{made['prompt_tokens']} rows in, {made['visual_tokens']} of them visual, "
            f"{made['new_tokens']} tokens out, {report['runs']} runs after {report['warmup']}",
        ]
    )


def _board(machine: dict[str, Any]) -> list[str]:
    """What a figure of a Jetson must be told with; nothing elsewhere."""
    board = machine["jetson"]
    if board is None:
        return []
    locked = {True: "locked", False: "not locked", None: "unknown"}[board["clocks_locked"]]
    mode = board["power_mode"]["name"] if board["power_mode"] else "unknown"
    return [
        f"{machine['label']}, L4T {board['l4t'] or '?'}, JetPack {board['jetpack'] or '?'}, "
        f"CUDA {machine['cuda']['toolkit'] or '?'}, TensorRT {board['tensorrt'] or '?'}, "
        f"power mode {mode}, clocks {locked}"
    ]


def _times(report: dict[str, Any]) -> str:
    """Milliseconds of each part, then the median of the plan compared with, and the ratio."""
    plan, against = report["plan"], report["against"]
    ours = report["plans"][plan]["times_ms"]
    theirs = report["plans"][against]["times_ms"] if against else {}
    header = [f"ms, plan {plan}", "p50", "p90", "p95", "p99", "mean"]
    if against:
        header += [f"{against} p50", "ratio"]
    rows = []
    for name in _order(report, ours):
        cells: list[Any] = [_label(report, name), *(ours[name][k] for k in header[1:6])]
        if against:
            cells.append(theirs[name]["p50"] if name in theirs else None)
            cells.append(report["ratios"].get(name))
        rows.append(cells)
    return table(header, rows)


def _order(report: dict[str, Any], times: dict[str, Any]) -> list[str]:
    """Parts in the order of computation."""
    names = ["preprocess", "vision"]
    for index, (_, last) in enumerate(report["stages"]):
        names += [f"prefill.{index}", f"decide.{last + 1}"]
    names += ["ttft", "per_token", "total", *(n for n in times if n.startswith("gpu."))]
    return [name for name in names if name in times]


def _label(report: dict[str, Any], name: str) -> str:
    kind, _, number = name.partition(".")
    if kind == "prefill":
        first, last = report["stages"][int(number)]
        return f"prefill, layers {first}-{last}"
    if kind == "decide":
        return f"decision before layer {number}"
    if kind == "gpu":
        return f"{number} on the GPU's clock"
    words = {"ttft": "time to first token", "per_token": "time per token"}
    return words.get(name, name)


def _caches(report: dict[str, Any]) -> str:
    """KV bytes of each stage, and what survives to enter it."""
    plan, against = report["plan"], report["against"]
    made = report["plans"][plan]
    other = report["plans"][against]["kv_bytes"]["per_stage"] if against else None
    header = ["KV cache", "survivors", "rows", "used", "reserved"]
    header += [f"{against} used"] if against else []
    rows = []
    for index, stage in enumerate(made["kv_bytes"]["per_stage"]):
        first, last = stage["layers"]
        cells = [
            f"layers {first}-{last}",
            _survivors(made["survivors"], first),
            stage["slots_used"],
            size(stage["used"]),
            size(stage["reserved"]),
        ]
        rows.append([*cells, *([size(other[index]["used"])] if other else [])])
    return table(header, rows)


def _survivors(survivors: dict[str, Any], layer: int) -> str:
    """Min/median/max of each image at a site, or one number where they agree."""
    texts = []
    for key, counts in survivors.items():
        if key.split(".")[0] == str(layer):
            low, middle, high = counts["min"], counts["median"], counts["max"]
            texts.append(str(low) if low == high else f"{low}/{middle:g}/{high}")
    return " ".join(texts) or "-"


def _foot(report: dict[str, Any]) -> str:
    text = f"peak memory of the process {size(report['peak_rss_bytes'])}"
    if report["against"]:
        ratios = report["ratios"]
        text += f"; KV bytes used {ratios['kv_used']:.0%}, reserved {ratios['kv_reserved']:.0%}"
        text += f" of plan {report['against']}"
    return "\n".join([text, *_power(report), *_heat(report["conditions"])])


def _power(report: dict[str, Any]) -> list[str]:
    """Watts and joules of each plan, where something measures them."""
    lines = []
    for name, made in report["plans"].items():
        if used := made["power"]:
            joules = used["joules_per_answer"]
            lines.append(
                f"plan {name}: {used['mean_w']:.2f} W mean, {used['peak_w']:.2f} W peak, "
                f"{joules['p50']:.3f} J an answer"
            )
    return lines


def _heat(conditions: dict[str, Any]) -> list[str]:
    """The hottest zone before and after, and whether the board slowed down."""
    before, after = conditions["temp_c"]["before"], conditions["temp_c"]["after"]
    if not before or not after:
        return []
    throttled = {True: "throttled", False: "no throttling", None: "throttling unknown"}
    word = throttled[conditions["has_throttled"]]
    return [f"{max(before.values()):.1f} C before, {max(after.values()):.1f} C after, {word}"]
