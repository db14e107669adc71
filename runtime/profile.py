"""How long each part of an answer takes, plans interleaved run by run in one process."""

from __future__ import annotations

import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from patchsieve.contract.errors import RequestError
from patchsieve.runtime.board import machine, power
from patchsieve.runtime.inputs.chat_template import Content
from patchsieve.runtime.model import Model
from patchsieve.runtime.result import Result

PERCENTILES = (50, 90, 95, 99)


@dataclass
class Runs:
    """Raw numbers of one plan; lists hold one entry per run.

    Attributes:
        times_ms: By part: preprocess, vision, prefill, decide, prefill.<stage>, decide.<site>,
            ttft, total; by the GPU's own clock gpu.<graph> and gpu.decode_per_token.
        decode_ms: Steps of each run, [runs][steps].
        survivors: By site, "layer.image".
        energy: Mean and peak watts and joules of each run; empty where nothing measures power.
        last: The last run's result, for what does not change.
    """

    times_ms: dict[str, list[float]] = field(default_factory=dict)
    decode_ms: list[list[float]] = field(default_factory=list)
    survivors: dict[str, list[int]] = field(default_factory=dict)
    energy: list[dict[str, float]] = field(default_factory=list)
    last: Result = field(default_factory=Result)

    def add(self, result: Result, sites: Sequence[int]) -> None:
        """Take in one run; `sites` are the plan's layers."""
        times = dict(result.timings_ms)
        self.decode_ms.append(times.pop("decode_steps"))
        times.pop("decode_per_token")
        for index, value in enumerate(times.pop("prefill_per_stage")):
            times[f"prefill.{index}"] = value
        for layer, value in zip(sites, times.pop("decide_per_site"), strict=False):
            times[f"decide.{layer}"] = value
        for graph, value in times.pop("device").items():
            times[f"gpu.{graph}"] = value
        for name, value in times.items():
            self.times_ms.setdefault(name, []).append(value)
        for site in result.sites:
            key = f"{site.layer}.{site.image}"
            self.survivors.setdefault(key, []).append(len(site.kept))
        self.last = result

    def to_dict(self) -> dict[str, Any]:
        """Statistics and raw values."""
        pooled = [step for run in self.decode_ms for step in run]
        times = {name: statistics(values) for name, values in self.times_ms.items()}
        if pooled:
            times["per_token"] = statistics(pooled)
        return {
            "prompt_tokens": self.last.prompt_tokens,
            "visual_tokens": self.last.visual_tokens,
            "new_tokens": len(self.last.token_ids),
            "times_ms": times,
            "survivors": {
                key: {"min": min(v), "median": float(np.median(v)), "max": max(v)}
                for key, v in self.survivors.items()
            },
            "kv_bytes": self.last.kv_bytes,
            "power": self._power(),
            "raw": {
                "times_ms": self.times_ms,
                "decode_ms": self.decode_ms,
                "survivors": self.survivors,
                "energy": self.energy,
            },
        }

    def _power(self) -> dict[str, Any] | None:
        """Watts over all runs, joules of an answer; None if nothing measures power."""
        if not self.energy:
            return None
        return {
            "mean_w": round(float(np.mean([run["mean_w"] for run in self.energy])), 4),
            "peak_w": max(run["peak_w"] for run in self.energy),
            "joules_per_answer": statistics([run["joules"] for run in self.energy]),
        }


class Conditions:
    """Power while it is entered; temperatures and throttling before and after."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root, self.reader = root, power.PowerReader.find(root)
        self.temperatures: list[dict[str, float]] = []
        self.throttling: list[dict[str, int]] = []

    def __enter__(self) -> Conditions:
        self._look()
        if self.reader is not None:
            self.reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.reader is not None:
            self.reader.stop()
        self._look()

    def _look(self) -> None:
        self.temperatures.append(power.temperatures(self.root))
        self.throttling.append(power.throttling(self.root))

    def measure(self, run: Callable[[], Result]) -> tuple[Result, list[dict[str, float]]]:
        """Run, and report watts and joules; none if nothing measures them.

        A sample at either end serves a run that is shorter than the interval.
        """
        if self.reader is None:
            return run(), []
        start = self.reader.clock()
        self.reader.sample()
        result = run()
        self.reader.sample()
        used = self.reader.between(start, self.reader.clock())
        return result, [] if used is None else [used]

    def to_dict(self) -> dict[str, Any]:
        """What a credible report says beside the times."""
        return {
            "power": None if self.reader is None else self.reader.describe(),
            "temp_c": dict(zip(("before", "after"), self.temperatures, strict=True)),
            "has_throttled": power.has_throttled(*self.throttling),
        }


def profile(
    model: Model,
    image: Any,
    prompt: str,
    *,
    plan: str | None = None,
    against: str | None = None,
    warmup: int = 3,
    runs: int = 10,
    max_new_tokens: int = 32,
    raw: bool = False,
    system: Content | None = None,
    progress: Callable[[str, float], None] = lambda *_: None,
    root: Path = Path("/"),
) -> dict[str, Any]:
    """Answer one request again and again; on a Jetson, measure power and temperatures as well.

    Args:
        model: The loaded bundle.
        image: One image, several, or None.
        prompt: The user's words.
        plan: Which plan; the bundle's default otherwise.
        against: Another plan, whose runs alternate with this one's; None measures one alone.
        warmup: Runs of each plan that do not count.
        runs: Runs of each plan that do.
        max_new_tokens: Tokens of every answer; end tokens and stop strings do not end it.
        raw: The prompt is the whole text, without chat template.
        system: The system prompt.
        progress: Told what is being run.
        root: The file system whose /sys reports power and temperatures.

    Returns:
        Machine, request, and for each plan statistics and raw values, as JSON can hold them.

    Raises:
        RequestError: A count is too small, or the request does not fit the bundle.
    """
    _check_counts(warmup, runs)
    plan = plan or model.facts.default_plan
    plans = list(dict.fromkeys([plan, *([against] if against else [])]))
    model.spare_caches = max(model.spare_caches, len(plans))  # no run pays for a new cache
    # An answer of fixed length: neither an end token nor a checkpoint's stop strings end it early.
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "ignore_eos": True, "stop": ()}
    ask = partial(model.generate, image, prompt, raw=raw, system=system, **options)
    report = _subject(model) | {"plan": plan, "against": against}
    report |= _measure(ask, model, plans, warmup=warmup, runs=runs, progress=progress, root=root)
    if len(plans) > 1:
        report["ratios"] = ratios(*(report["plans"][name] for name in plans))
    return report


def _check_counts(warmup: int, runs: int) -> None:
    if runs < 1 or warmup < 0:
        raise RequestError(
            "a profile of too few runs",
            found=f"runs {runs}, warmup {warmup}",
            expected="at least 1 and 0",
            do="give --runs 1 or more, and --warmup 0 or more",
        )


def _measure(
    ask: Callable[..., Result],
    model: Model,
    plans: Sequence[str],
    *,
    warmup: int,
    runs: int,
    progress: Callable[[str, float], None],
    root: Path,
) -> dict[str, Any]:
    """Ask with each plan in turn, and sum up what was measured of each."""
    taken = {name: Runs() for name in plans}
    with Conditions(root) as conditions:
        for number in range(warmup + runs):
            for name in plans if number % 2 else plans[::-1]:  # neither always goes first
                progress(f"run {number + 1}, plan {name}", number / (warmup + runs))
                result, energy = conditions.measure(partial(ask, plan=name))
                if number >= warmup:
                    taken[name].add(result, model.facts.plans[name].layers)
                    taken[name].energy += energy
    return {
        "warmup": warmup,
        "runs": runs,
        "plans": {name: made.to_dict() for name, made in taken.items()},
        "conditions": conditions.to_dict(),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _subject(model: Model) -> dict[str, Any]:
    """What is measured, when and where."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine.facts() | {"backend": model.backend.describe()},
        "checkpoint": model.facts.checkpoint,
        "precision": model.facts.numbers,
        "target": model.bundle.target,
    }


def statistics(values: Sequence[float]) -> dict[str, float]:
    """Percentiles and mean."""
    points = np.percentile(values, PERCENTILES)
    named = {f"p{q}": round(float(v), 4) for q, v in zip(PERCENTILES, points, strict=True)}
    return named | {"mean": round(float(np.mean(values)), 4)}


def ratios(plan: dict[str, Any], against: dict[str, Any]) -> dict[str, float]:
    """Medians of a plan over those of another, and KV bytes over KV bytes; below 1 is less."""
    ours, theirs = plan["times_ms"], against["times_ms"]
    shared = [name for name in ours if name in theirs and theirs[name]["p50"] > 0]
    times = {name: round(ours[name]["p50"] / theirs[name]["p50"], 4) for name in shared}
    return times | {
        f"kv_{kind}": round(plan["kv_bytes"][kind] / against["kv_bytes"][kind], 4)
        for kind in ("used", "reserved")
    }
