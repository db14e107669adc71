"""LLaVA-1.5-7B's shape with random weights: unpruned beside ATP's published survivors.

Weights are random and survivors are drawn by lot, exactly as many as the paper reports: times and
bytes depend on counts and not on which tokens survive. The steps leave their results in a folder,
so that a second call continues where the first one had no time left.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import patchsieve
from benchmarks.checkpoint import LLAVA_7B, ROOT, TINY, Shape, write_checkpoint
from benchmarks.gpu.budget import Budget
from benchmarks.gpu.choice import CPU_TARGETS, ENGINES
from benchmarks.gpu.floors import Floor, floors, peak_of
from patchsieve.cli.picture import picture
from patchsieve.contract import files
from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.manifest import Limits, Manifest
from patchsieve.contract.plan import NO_PRUNING, Plan, SitePlan
from patchsieve.runtime.bundle import Bundle
from patchsieve.runtime.profile import profile
from patchsieve.tables import size, table

SHAPES = {shape.name: shape for shape in (LLAVA_7B, TINY)}
PROMPT = "What is on the table, and how many people are there? Please answer in one word."
MAX_TEXT = 128
WARMUP, RUNS = 2, 5
# Seconds that a step takes at most on the machines seen, at 7B: 90 s of export on two cores.
SECONDS = {"checkpoint": 60, "export": 150, "build": 200, "measure": 60, "transformers": 120}
# ATP-LLaVA's table 6: decimal MB of visual keys and values; how much less CUDA time.
PAPER_KV_MB = {NO_PRUNING: 302.4, "atp-144": 75.6, "atp-88": 46.2}
PAPER_CUDA_TIME_SAVED = {"atp-144": 0.384}
PAPER_FLOPS_SAVED = {"atp-144": 0.781, "atp-88": 0.844}


@dataclass
class Bench:
    """One model shape on one target.

    Attributes:
        folder: Where checkpoint, bundle and engines lie, and are found again.
        facts: What was made and how long each step took; goes into the report.
        keep: Called when there is something new in `facts`.
    """

    shape: Shape
    target: str
    precision: str
    folder: Path
    budget: Budget
    device: str
    facts: dict[str, Any] = field(default_factory=dict)
    keep: Callable[[], None] = lambda: None

    @property
    def checkpoint(self) -> Path:
        """The Hugging Face directory."""
        return self.folder / f"checkpoint-{self.shape.name}-{self.shape.layers}"

    @property
    def bundle(self) -> Path:
        """The bundle; a target of its own, for export writes all targets at once."""
        name = f"{self.shape.name}-{self.shape.layers}-{self.precision}-{self.target}"
        return self.folder / f"bundle-{name}"

    @property
    def new_tokens(self) -> int:
        """Tokens of every answer."""
        return 64 if self.shape.name == LLAVA_7B.name else 4

    def make_checkpoint(self) -> None:
        """Write random weights, unless they are there."""
        if (self.checkpoint / "model.safetensors.index.json").is_file():
            return  # the index is written last
        self._needs("checkpoint")
        with self._timed("checkpoint_s"):
            self.facts["weight_bytes"] = write_checkpoint(self.checkpoint, self.shape)

    def make_bundle(self) -> Manifest:
        """Export, with a plan for each row of the paper, unless it is there."""
        plans = {name: fixed_plan(self.shape, name) for name in self.shape.plans}
        if not (self.bundle / files.FILE_NAME).is_file():
            from patchsieve.export.exporter import ExportOptions, export

            self._needs("export")
            options = ExportOptions(
                cuts=self.shape.cuts,
                targets=(self.target,),
                precision=self.precision,
                limits=Limits(MAX_TEXT, self.new_tokens, 1),
            )
            with self._timed("export_s"):
                export(str(self.checkpoint), self.bundle, options)
        facts = files.read(self.bundle)
        for name, plan in plans.items():
            if name not in facts.plans:
                from patchsieve.export.reuse import reuse

                facts = reuse(self.bundle, plan, name)
        return facts

    def build(self) -> None:
        """Compile what is not compiled yet, in a process of its own, from where it ended."""
        if self.target not in ENGINES:
            return
        self._needs("build")
        command = [sys.executable, "-m", "patchsieve", "build", str(self.bundle)]
        command += ["--target", self.target, "--quiet", "--json"]
        with self._timed("build_s"):
            try:
                done = subprocess.run(
                    command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=self.budget.left_s
                )
            except subprocess.TimeoutExpired:
                self._needs("build")  # says that the time is over, and what to do
                raise
        if done.returncode:
            raise PatchsieveError("the engines were not built", found=f"exit {done.returncode}")
        self.facts["build"] = json.loads(done.stdout)

    def measure(self, facts: Manifest) -> None:
        """Profile each plan beside the unpruned one, run by run in turn; each is kept at once."""
        self._needs("measure")
        threads = {"threads": 1} if self.target in CPU_TARGETS else {}
        with self._timed("load_s"):
            model = patchsieve.load(self.bundle, target=self.target, check="size", **threads)
        counts: dict[str, Any] = {"warmup": WARMUP, "runs": RUNS}
        counts["max_new_tokens"] = self.new_tokens
        plans: dict[str, Any] = {}
        self.facts["plans"] = plans
        try:
            for name in self.shape.plans or (NO_PRUNING,):
                report = profile(model, picture(), PROMPT, plan=name, against=NO_PRUNING, **counts)
                if not plans:
                    self.facts["conditions"] = report["conditions"]
                    plans[NO_PRUNING] = report["plans"][NO_PRUNING] | {"ratios": {}}
                plans[name] = report["plans"][name] | {"ratios": report.get("ratios", {})}
                self.keep()
            self.facts["backend"] = model.backend.describe()
        finally:
            model.close()
        for name, made in plans.items():
            check_counts(self.shape, name, made["survivors"])
            made["kv_bytes"]["reserved_alone"] = reserved_alone(facts, name)
            made["cuda_ms"] = cuda_time(made)

    def _needs(self, step: str) -> None:
        is_small = self.shape.name != LLAVA_7B.name
        scale = 0.05 if is_small else self.shape.layers / LLAVA_7B.layers
        self.budget.needs(SECONDS[step] * scale, step)

    def _timed(self, name: str) -> _Timed:
        return _Timed(self.facts, name)


class _Timed:
    """Adds the seconds that passed inside to a report."""

    def __init__(self, facts: dict[str, Any], name: str) -> None:
        self.facts, self.name = facts, name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.facts[self.name] = round(time.perf_counter() - self.start, 2)


def fixed_plan(shape: Shape, name: str) -> Plan:
    """A plan that keeps exactly so many tokens after each site, whatever the picture.

    `random` keeps floor(keep_ratio * N + 1/2) tokens, which is n where keep_ratio is n / N.
    """
    sites, counts = shape.plans[name]
    return Plan(
        tuple(
            SitePlan(layer, "random", {"keep_ratio": count / shape.num_visual}, count)
            for layer, count in zip(sites, counts, strict=True)
        )
    )


def check_counts(shape: Shape, name: str, survivors: dict[str, dict[str, float]]) -> None:
    """Refuse a measurement in which another number of tokens survived.

    Raises:
        PatchsieveError: A site kept another count in any run.
    """
    sites, counts = shape.plans.get(name, ((), ()))
    wanted = {f"{layer}.0": count for layer, count in zip(sites, counts, strict=True)}
    found = {key: (kept["min"], kept["max"]) for key, kept in survivors.items()}
    if found != {key: (count, count) for key, count in wanted.items()}:
        raise PatchsieveError(f"plan {name} kept other counts", found=found, expected=wanted)


def cuda_time(made: dict[str, Any]) -> dict[str, float] | None:
    """Milliseconds by the GPU's own clock: of prefill with the tower, of a token, of an answer.

    None on a CPU.
    """
    times = {name: value["p50"] for name, value in made["times_ms"].items()}
    per_token = times.get("gpu.decode_per_token")
    graphs = [value for name, value in times.items() if name.startswith("gpu.")]
    if per_token is None:
        return None
    prefill = sum(graphs) - per_token
    answer = prefill + (made["new_tokens"] - 1) * per_token
    told = {"prefill": prefill, "per_token": per_token, "answer": answer}
    return {name: round(value, 4) for name, value in told.items()}


def reserved_alone(facts: Manifest, plan: str) -> int:
    """KV bytes that a bundle of this plan alone reserves; engines reserve for the largest plan."""
    pairs = zip(facts.stages, facts.slots(plan), strict=True)
    return sum(facts.row_bytes(stage) * slots for stage, slots in pairs)


def run(bench: Bench) -> Iterator[str]:
    """Make, build and measure; yields what is to be printed, floors before measurements.

    Raises:
        OutOfTimeError: The rest does not fit the budget; the facts hold what is there.
        PatchsieveError: A step failed.
    """
    bench.make_checkpoint()
    facts = bench.make_bundle()
    text_tokens = count_text(bench.bundle, bench.target)
    least = floors(facts, text_tokens)
    peak = peak_of(bench.device)
    bench.facts["text_tokens"] = text_tokens
    bench.facts["floors"] = {name: floor.to_dict(peak) for name, floor in least.items()}
    bench.keep()
    yield floor_table(bench.facts["floors"])
    bench.build()
    bench.measure(facts)
    yield times_table(bench.facts["plans"])
    bench.facts["paper"] = paper(bench.shape, bench.facts["plans"], least)
    bench.keep()
    yield paper_table(bench.facts["paper"])


def count_text(bundle: Path, target: str) -> int:
    """Rows of the benchmark's prompt that are not visual, by the bundle's own tokenizer."""
    prompts = Bundle(bundle, target, check="size").prompts
    prompt = prompts.build([prompts.user_message(PROMPT, 1)], 1)
    return len(prompt.token_ids) - 1


def paper(shape: Shape, plans: dict[str, Any], least: dict[str, Floor]) -> dict[str, Any]:
    """Table 6 of ATP-LLaVA beside what was measured; only at the paper's shape.

    KV memory follows from counts. The paper's FLOPs do not follow from its own equations
    (docs/papers.md), and its CUDA time names no GPU: they are shown, not expected.
    """
    if shape.name != LLAVA_7B.name or shape.layers != LLAVA_7B.layers:
        return {}
    rows = {}
    for name in plans:
        flops = 1 - least[name].prefill_flops / least[NO_PRUNING].prefill_flops
        rows[name] = {
            "visual_kv_mb": round(least[name].visual_kv_bytes / 1e6, 2),
            "paper_visual_kv_mb": PAPER_KV_MB.get(name),
            "cuda_time_saved": _saved(plans[name]["cuda_ms"], plans[NO_PRUNING]["cuda_ms"]),
            "paper_cuda_time_saved": PAPER_CUDA_TIME_SAVED.get(name),
            "prefill_flops_saved": round(flops, 4),
            "paper_flops_saved": PAPER_FLOPS_SAVED.get(name),
        }
    return rows


def _saved(plan: dict[str, float] | None, whole: dict[str, float] | None) -> float | None:
    return None if plan is None or whole is None else round(1 - plan["answer"] / whole["answer"], 4)


def floor_table(least: dict[str, Any]) -> str:
    """FLOPs and bytes of each plan, and milliseconds where the peak is known."""
    rows = []
    for name, floor in least.items():
        ms = floor["ms"] or {}
        rows.append(
            (
                name,
                f"{floor['vision_flops'] / 1e12:.3f}",
                f"{floor['prefill_flops'] / 1e12:.3f}",
                size(floor["decode_bytes"]),
                *(ms.get(part, "?") for part in ("vision", "prefill", "per_token")),
            )
        )
    header = ("floor", "vision T", "prefill T", "read a token", "vision ms", "prefill ms", "ms")
    return table(header, rows)


def times_table(plans: dict[str, Any]) -> str:
    """Medians of each part, one column a plan."""
    names = list(dict.fromkeys(part for made in plans.values() for part in made["times_ms"]))
    rows: list[list[Any]] = [
        [part, *(made["times_ms"].get(part, {}).get("p50") for made in plans.values())]
        for part in names
    ]
    for part in ("prefill", "per_token", "answer"):
        if all(made["cuda_ms"] for made in plans.values()):
            rows.append([f"CUDA, {part}", *(made["cuda_ms"][part] for made in plans.values())])
    for kind in ("used", "reserved", "reserved_alone"):
        rows.append([f"KV {kind}", *(size(made["kv_bytes"][kind]) for made in plans.values())])
    return table(["ms, median", *plans], rows)


def paper_table(rows: dict[str, Any]) -> str:
    """Table 6 beside ours."""
    if not rows:
        return "table 6 of ATP-LLaVA: another shape than the paper's, nothing to compare"
    header = ["ATP-LLaVA table 6", *next(iter(rows.values()))]
    return table(header, [(name, *row.values()) for name, row in rows.items()])
