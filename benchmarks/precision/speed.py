"""Time and memory of every precision on a model with CLIP-L/336's tower and random weights.

The bundles alternate run by run in one process, so that a slow minute falls on all alike. Each
round has a random picture of its own. Peak memory is that of a process for each bundle.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy.workshop import log, run
from benchmarks.bench_ivtp import SHAPES, Shape, make_models, question
from benchmarks.precision.bundles import size
from benchmarks.precision.peak import NEW_TOKENS, THREADS
from patchsieve.contract.plan import NO_PRUNING, Plan, PseudoCls, SitePlan
from patchsieve.pruning.recipes import Size, ivtp
from patchsieve.runtime.model import Model

PARTS = ("vision", "scorer", "prefill", "decide", "ttft", "decode_per_token")
PLANS = (NO_PRUNING, "ivtp", "atp")
_VOCABULARY = 32064  # LLaVA-1.5's: the head is a tenth of this decoder's bytes
_TEXT = 64  # tokens of the prompt
# ATP's scores at three of IVTP's sites, with the same numbers for every picture: 144 of 576 tokens
# on average over 16 layers, in the shares of the paper's table 2. Thresholds would keep all or
# nothing of a random model's tokens.
_ATP_SITES = {"default": ((3, 80), (6, 44), (12, 20)), "tiny": ((3, 9), (6, 4))}


def measure(folder: Path, precisions: Sequence[str], shape: str, rounds: int) -> dict[str, Any]:
    """Medians of every part under every plan and precision, as JSON holds them.

    Args:
        folder: Where checkpoint and bundles are kept.
        precisions: As `--precision` takes them.
        shape: One of `SHAPES` of benchmarks/bench_ivtp.py.
        rounds: Runs of each plan and precision; one more warms up.
    """
    sizes = replace(SHAPES[shape], vocab_size=_VOCABULARY if shape == "default" else 1216)
    bundles = {each: _bundle(folder / shape, each, shape, sizes) for each in precisions}
    models = {
        each: Model(bundle, threads=THREADS, check="size") for each, bundle in bundles.items()
    }
    text, side = question(next(iter(models.values())), _TEXT), sizes.image_size
    times = _alternate(models, side, text, rounds)
    peaks = {each: _peak(bundle, side, text) for each, bundle in bundles.items()}
    for model in models.values():
        model.close()
    rows = [
        {"plan": plan, "precision": each, "ms": times[each, plan], "bytes": size(bundles[each])}
        | {"peak_bytes": peaks[each]}
        for plan in PLANS
        for each in precisions
    ]
    return {"shape": vars(sizes), "rounds": rounds, "text_tokens": _TEXT, "rows": rows}


def _alternate(
    models: Mapping[str, Model], side: int, text: str, rounds: int
) -> dict[tuple[str, str], dict[str, float]]:
    """Median milliseconds by precision and plan."""
    noise = np.random.default_rng(0)
    runs = [(each, plan) for plan in PLANS for each in models]
    times: dict[tuple[str, str], list[dict[str, float]]] = {key: [] for key in runs}
    for number in range(rounds + 1):  # the first warms up
        image = noise.integers(0, 256, (side, side, 3), np.uint8)
        for each, plan in runs if number % 2 else reversed(runs):
            found = _request(models[each], plan, image, text)
            if number:
                times[each, plan].append(found)
        log(f"  round {number} of {rounds}")
    return {
        key: {part: statistics.median(one[part] for one in found) for part in PARTS}
        for key, found in times.items()
    }


def _request(model: Model, plan: str, image: np.ndarray, text: str) -> dict[str, float]:
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "ignore_eos": True, "stop": ()}
    result = model.generate(image, text, plan=plan, **options)
    return {part: float(result.timings_ms.get(part) or 0.0) for part in PARTS}


def _bundle(folder: Path, precision: str, name: str, shape: Shape) -> Path:
    """The bundle of a precision with all plans, made if it is not there."""
    bundle = folder / "bundles" / precision.replace("=", "-").replace("/", "-")
    if not (folder / "clip").exists():
        folder.mkdir(parents=True, exist_ok=True)
        make_models(shape, folder)
    if bundle.exists():
        return bundle
    patches = (shape.image_size // shape.patch_size) ** 2
    # Any word judges: cosines of a random CLIP mean nothing.
    plan = ivtp(Size(patches, shape.layers), shape.num_keep, pseudo_cls=PseudoCls(tau=0.0))
    open_thresholds = {"theta_r": -1.0, "theta_s": 2.0}  # every score passes one; the budget cuts
    fixed = Plan(tuple(SitePlan(i, "atp", open_thresholds, n) for i, n in _ATP_SITES[name]))
    words = [str(folder / "checkpoint"), "-o", str(bundle), "--scorer", str(folder / "clip")]
    words += ["--precision", precision, "--max-text-tokens", "128"]
    run(["export", *words, "--max-new-tokens", str(NEW_TOKENS), *_plan(folder, "ivtp", plan)])
    run(["export", "--reuse", str(bundle), *_plan(folder, "atp", fixed)])
    return bundle


def _plan(folder: Path, name: str, plan: Plan) -> list[str]:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(plan.to_dict(), indent=1), encoding="utf-8")
    return ["--plan", str(path), "--plan-name", name, "--quiet"]


def _peak(bundle: Path, side: int, text: str) -> int:
    """Peak memory of a process that answers one request under each plan, bytes; 0 if unknown."""
    words = [sys.executable, "-m", "benchmarks.precision.peak", str(bundle), str(side), text]
    return int(subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()[-1])
