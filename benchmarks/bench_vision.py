"""The vision tower on the CPU, pruned inside by IVTP's groups beside unpruned.

    python benchmarks/bench_vision.py                    # CLIP-L/336, 576 patches to 120
    python benchmarks/bench_vision.py --shape tiny       # seconds, to see that it works

A random LLaVA with the true tower is exported once and given a plan for each method. Each plan's
vision graph sees the same picture; the plans take turns in every round, so that the machine's mood
falls on all alike, and each ratio is of one round. Decisions are inside the graphs and their times.
Printed first: the floor of the ratio, from FLOPs. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import make_checkpoint  # noqa: E402  (beside this folder)

from patchsieve import cost  # noqa: E402
from patchsieve.contract.plan import NO_PRUNING, MethodPlan, Plan  # noqa: E402
from patchsieve.export.exporter import ExportOptions, export  # noqa: E402
from patchsieve.export.reuse import reuse  # noqa: E402
from patchsieve.runtime.model import Model  # noqa: E402

SHAPES: dict[str, dict[str, int]] = {
    "clip-l-336": {
        "vision_layers": 24,
        "vision_hidden": 1024,
        "image_size": 336,
        "patch_size": 14,
    },
    "tiny": {"vision_layers": 7, "vision_hidden": 64, "image_size": 48, "patch_size": 8},
}
BAR = 0.62  # of the unpruned vision time, decisions included


def make_bundle(shape: dict[str, int], methods: list[str], folder: Path) -> Path:
    """Export a checkpoint whose decoder is next to nothing, with a plan for each method."""
    model, processor = make_checkpoint.make_llava("llama", layers=1, hidden=64, std=0.04, **shape)
    checkpoint = make_checkpoint.save_llava(folder / "checkpoint", model, processor)
    del model
    bundle = folder / "bundle"
    export(str(checkpoint), bundle, ExportOptions())
    for method in methods:
        reuse(bundle, Plan(encoder=MethodPlan(method)), method)
    return bundle


def measure(model: Model, plans: list[str], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each plan's vision graph in each round, after one that warms up."""
    side = model.facts.vision.image_size
    pixels = np.random.default_rng(0).standard_normal((1, 3, side, side), np.float32)
    rng = np.random.default_rng(0)
    times: dict[str, list[float]] = {plan: [] for plan in plans}
    for number in range(rounds + 1):
        for plan in plans:
            start = time.perf_counter()
            model.pipeline.see(pixels, plan, rng)
            if number:
                times[plan].append((time.perf_counter() - start) * 1e3)
    return times


def floors(model: Model, plans: list[str]) -> dict[str, float]:
    """FLOPs of each plan's tower over those of the unpruned one, decisions not counted."""
    shape, counted = cost.from_manifest(model.facts), {}
    for plan in plans:
        schedule, _ = cost.of_plan(shape, model.facts.plans[plan])
        counted[plan] = cost.cost(shape, schedule, 0, convention=cost.RUNTIME).flops.vision
    return {plan: counted[plan] / counted[NO_PRUNING] for plan in plans}


def main() -> int:
    """Export, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="clip-l-336")
    parser.add_argument("--methods", default="gtp", help="with commas: gtp,topk,evit,tome,random")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    methods = args.methods.split(",")
    folder = Path(tempfile.mkdtemp(prefix="bench-vision-"))
    try:
        bundle = make_bundle(SHAPES[args.shape], methods, folder)
        model = Model(bundle, threads=args.threads, check="size")
        plans = [NO_PRUNING, *methods]
        floor = floors(model, plans)
        print(f"floor from FLOPs: {', '.join(f'{p} {floor[p]:.3f}' for p in plans)}")
        times = measure(model, plans, args.rounds)
        result = {plan: row(model, plan, times, floor[plan]) for plan in plans}
        for plan, told in result.items():
            print(
                f"{plan}: {told['tokens']} tokens, {told['ms']:.1f} ms, "
                f"{told['ratio']:.3f} of unpruned (floor {told['floor']:.3f})"
            )
        about: dict[str, Any] = {"benchmark": "vision", "shape": args.shape, "bar": BAR}
        about |= {"date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        about |= model.backend.describe()
        model.close()
    finally:
        shutil.rmtree(folder)
    print(json.dumps(about | {"plans": result}))
    return 0


def row(model: Model, plan: str, times: dict[str, list[float]], floor: float) -> dict[str, Any]:
    """Medians of one plan; its ratio round by round."""
    pairs = zip(times[plan], times[NO_PRUNING], strict=True)
    graph = model.facts.targets["cpu"][model.facts.vision_graph(plan)]
    return {
        "tokens": model.facts.num_visual(plan),
        "ms": round(statistics.median(times[plan]), 2),
        "ratio": round(statistics.median(a / b for a, b in pairs), 4),
        "floor": round(floor, 4),
        "graph_bytes": model.facts.files[graph].size,
        "rounds": len(times[plan]),
    }


if __name__ == "__main__":
    sys.exit(main())
