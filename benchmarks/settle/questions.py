"""What only a GPU can answer: one function a question, each on engines that it builds itself.

A function returns its Answer; a PatchsieveError that it raises is the answer "no". References are
NumPy in float64 (reference.py).
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.settle import graphs
from benchmarks.settle import reference as ref
from benchmarks.settle.cuda import Cuda, Engine
from benchmarks.settle.graphs import AttentionSize, MaskedSize, Profile, StageSize
from patchsieve.contract.errors import PatchsieveError
from patchsieve.runtime.building.builder_process import Job, build_in_process
from patchsieve.runtime.building.compile import build_engine
from patchsieve.runtime.trt.engines import Options

YES, NO, NOT_RUN = "yes", "no", "not-run"
PREFILL, DECODE = 0, 1  # profile and, in Setup.stage, context
# Relative to the largest value. float32 engines multiply in TF32 (10 bits); fp16 rounds everywhere.
TOLERANCE = {"float32": 5e-3, "float16": 1e-2}
# Not 7.5: TensorRT-RTX 1.7.1 has no float32 products on Turing, of which scores are made.
PORTABLE = ("8.6", "8.9", "12.0")
BIG = StageSize(hidden=1024, heads=16, kv_heads=8, mlp=4096, slots=512, max_rows=256)  # 76 MB
COMPACTION_ROWS, GATHER_WIDTH = 12, 64


@dataclass
class Answer:
    """One question's answer: yes, no or not-run, a sentence, and its numbers."""

    status: str
    text: str
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Build:
    """A graph and the profiles that it is built with."""

    write: Callable[[Path, str], Path]
    profiles: list[Profile]


def _stage(
    size: StageSize, *, profiles: list[Profile] | None = None, form: graphs.Form = graphs.EXPORTED
) -> Build:
    def write(folder: Path, name: str) -> Path:
        return graphs.save_stage(size, folder, f"{name}.onnx", form)[0]

    return Build(write, graphs.stage_profiles(size) if profiles is None else profiles)


def _small(make: Callable[[], onnx.ModelProto], *profiles: Profile) -> Build:
    def write(folder: Path, name: str) -> Path:
        path = folder / f"{name}.onnx"
        onnx.save(make(), path)
        return path

    return Build(write, list(profiles))


def _lengths(dtype: str, has_mask: bool) -> Build:
    size = AttentionSize(dtype=dtype)
    return _small(
        lambda: graphs.lengths_attention_model(size, has_mask=has_mask),
        size.profile(has_mask=has_mask),
    )


def _masked(size: MaskedSize, *, fused: bool) -> Build:
    return _small(lambda: graphs.masked_attention_model(size, fused=fused), *size.profiles())


HALF = StageSize()
LONG = StageSize(heads=16, kv_heads=8, slots=4096)
WITH_LENGTHS = graphs.Form(has_lengths=True)
# Rows of the decoder of LLaVA-1.5 7B, of a decoder with grouped heads, and of CLIP's tower.
ATTENTIONS = {
    "32/32 heads": MaskedSize(heads=32, kv_heads=32),
    "16/2 heads": MaskedSize(),
    "tower": MaskedSize(
        heads=16, kv_heads=16, head_dim=64, slots=577, rows=(577, 577, 577), has_mask=False
    ),
}
FORMS = {"decomposed": False, "fused": True}
PREFIX = 1290  # slots in use before the first row
BUILDS: dict[str, Build] = {
    "stage_float16": _stage(HALF),
    "stage_float32": _stage(dataclasses.replace(HALF, dtype="float32")),
    "stage_exact_decode": _stage(HALF, profiles=graphs.stage_profiles(HALF, exact_decode=True)),
    "big": _stage(BIG),
    "big_prefill_only": _stage(BIG, profiles=graphs.stage_profiles(BIG)[:1]),
    "long": _stage(LONG),
    "long_lengths": _stage(LONG, form=WITH_LENGTHS),
    "lengths_float16": _lengths("float16", False),
    "lengths_float32": _lengths("float32", False),
    "lengths_mask_float16": _lengths("float16", True),
    "lengths_mask_float32": _lengths("float32", True),
    **{
        f"{form} {name}".replace("/", "-"): _masked(size, fused=fused)
        for name, size in ATTENTIONS.items()
        for form, fused in FORMS.items()
    },
    "compaction": _small(lambda: graphs.compaction_model(COMPACTION_ROWS)),
    "gather": _small(
        lambda: graphs.gather_model(GATHER_WIDTH),
        {
            "hidden": tuple((1, n, GATHER_WIDTH) for n in (1, 16, 32)),
            "keep_indices": ((0,), (8,), (32,)),
        },
    ),
}


LACKS_LENGTHS = "TRT_Attention came with TensorRT 11"
LACKS_STAGES = "TensorScatter came with TensorRT 10.15"


def lacks(build: str, target: str) -> str:
    """Why a target's TensorRT cannot have an engine; "" where it can."""
    if target == "jetpack6" and build not in ("compaction", "gather"):
        return LACKS_STAGES
    return LACKS_LENGTHS if target == "tensorrt10" and "lengths" in build else ""


@dataclass
class Setup:
    """Where engines go and what they are compiled for."""

    target: str
    folder: Path
    capabilities: tuple[str, ...] = ()

    def build(self, name: str, *, apart: bool = False) -> Path:
        """Build an engine, or find it built.

        Args:
            name: One of BUILDS.
            apart: In a process of its own, so that a compiler that crashes is an answer.
        """
        form = "-".join(self.capabilities) or "default"
        path = self.folder / f"{name}.{form}.engine"
        if not path.exists():
            build, options = BUILDS[name], Options(compute_capabilities=self.capabilities)
            graph = build.write(self.folder, name)
            if apart:
                profiles = tuple(build.profiles)
                build_in_process(Job(str(graph), str(path), profiles, self.target, options, None))
            else:
                build_engine(graph, path, build.profiles, target=self.target, options=options)
        return path

    def engine(self, name: str, *, apart: bool = False) -> Engine:
        """Load an engine on the GPU, its caches paired with their results."""
        engine = Engine(Cuda(), self.build(name, apart=apart), self.target)
        engine.pairs = {n: n.removeprefix("new_") for n in engine.tensors if n.startswith("new_")}
        return engine

    def stage(self, name: str) -> Engine:
        """Load a stage, its context 0 on the prefill profile, its context 1 on the decode one."""
        engine = self.engine(name)
        for profile in (PREFILL, DECODE):
            engine.add_context(profile)
        return engine


def engine_runs_here(setup: Setup) -> Answer:
    """Settle (a): does an engine of the setup's form load and run on this GPU."""
    if lacks("stage_float16", setup.target):
        engine = setup.engine("gather")
        engine.add_context(0)
        hidden = np.ones((1, 4, GATHER_WIDTH), np.float16)
        keep = np.array([1, 3], np.int64)
        rows = engine.run({"hidden": hidden, "keep_indices": keep})["rows"]
        right = np.array_equal(rows, hidden[:, keep])
        return Answer(YES if right else NO, f"runs, gathers right: {right}")
    engine = setup.engine("stage_float16")
    engine.add_context(PREFILL)
    error = _prefill(engine, HALF)[0]
    right = error < TOLERANCE["float16"]
    return Answer(YES if right else NO, f"runs, relative error {error:.1e}", {"error": error})


def _first_call(size: StageSize) -> ref.Feed:
    """Feed 20 survivors of 28 rows; the last is a side row that sees slots 0 to 9 and itself."""
    last_key = np.arange(20, dtype=np.int64)
    last_key[-1] = 9
    return ref.make_feed(size, rows=20, entering=28, slot=0, seed=1, last_key=last_key)


def _prefill(
    engine: Engine, size: StageSize, fill: float = 0.0
) -> tuple[float, dict[str, np.ndarray]]:
    """Run the first call; return its error and the expected caches."""
    weights, caches = graphs.stage_weights(size), ref.empty_caches(size, fill)
    feed = _first_call(size)
    expected, after = ref.stage(size, weights, feed, caches)
    found = engine.run({**feed.inputs(), **caches})
    return ref.relative_error(found["hidden_out"], expected), after


def _decode_calls(
    size: StageSize, caches: dict[str, np.ndarray], steps: int = 3
) -> Iterator[tuple[ref.Feed, np.ndarray, dict[str, np.ndarray]]]:
    """Give feed, expected rows and expected caches of decode steps; the first is over slot 19."""
    weights = graphs.stage_weights(size)
    for step in range(steps):
        feed = ref.make_feed(size, rows=1, entering=1, slot=19 + step, seed=50 + step)
        expected, caches = ref.stage(size, weights, feed, caches)
        yield feed, expected, caches


def length_attention_aligns_to_length(setup: Setup) -> Answer:
    """Settle (b): does lower-right causality end at kv_len, and are slots beyond it left alone."""
    facts: dict[str, str] = {}
    for dtype in ("float16", "float32"):
        for has_mask in (False, True):
            name = f"{dtype}{' mask' if has_mask else ''}"
            try:
                engine = setup.engine(f"lengths_{'mask_' if has_mask else ''}{dtype}")
                engine.add_context(0)
            except PatchsieveError as problem:
                facts[name] = f"failed: {problem}"
                continue
            for rows, fill in itertools.product((1, 5), (50.0, np.nan)):
                told = _match_lengths(engine, dtype, rows, fill, has_mask=has_mask)
                facts[f"{name} L={rows} unused={fill}"] = told
    good, finite, masked = (
        all(v.startswith("kv_len") for k, v in facts.items() if choose(k))
        for choose in (
            lambda k: "mask" not in k,
            lambda k: "mask" not in k and "nan" not in k,
            lambda k: "mask" in k,
        )
    )
    text = (
        f"aligned to kv_len: {finite}, also with NaN beyond: {good}; "
        f"with a mask instead of causality: {masked}"
    )
    return Answer(YES if finite else NO, text, facts)


def _match_lengths(engine: Engine, dtype: str, rows: int, fill: float, *, has_mask: bool) -> str:
    """Say which meaning of kv_len the engine's result agrees with."""
    size, kv_len = AttentionSize(dtype=dtype), 20
    rng = np.random.default_rng(rows)
    query = rng.standard_normal((1, size.heads, rows, size.head_dim)) * size.head_dim**-0.5
    key, value = rng.standard_normal((2, 1, size.kv_heads, size.slots, size.head_dim))
    query, key, value = (a.astype(dtype) for a in (query, key, value))
    key[:, :, kv_len:] = value[:, :, kv_len:] = fill
    slots, row = np.arange(size.slots), np.arange(rows)[:, None]
    meanings = {"kv_len": slots <= row + kv_len - rows}
    if not has_mask and np.isfinite(fill):
        meanings["S"] = slots <= row + size.slots - rows
        meanings["upper left"] = slots <= row
    inputs = {"query": query, "key": key, "value": value, "kv_len": np.array([kv_len], np.int32)}
    if has_mask:
        # The mask lets the slots beyond kv_len through: only the length can stop them.
        seen = meanings["kv_len"] | (slots >= kv_len)
        inputs["mask"] = np.where(seen, 0, graphs.NEVER).astype(dtype)[None, None]
    try:
        found = engine.run(inputs)["out"]
    except PatchsieveError as problem:
        return f"failed: {problem}"
    errors = {
        name: ref.relative_error(found, ref.attend(query, key, value, seen))
        for name, seen in meanings.items()
    }
    best = min(errors, key=lambda name: np.nan_to_num(errors[name], nan=np.inf))
    told = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    return f"{best} ({told})" if errors[best] < TOLERANCE[dtype] else f"nothing known ({told})"


def caches_are_written_in_place(setup: Setup) -> Answer:
    """Settle (c): prefill and three decode steps on caches in place, clean and with NaN beyond."""
    facts: dict[str, Any] = {}
    for dtype in ("float32", "float16"):
        size = dataclasses.replace(HALF, dtype=dtype)
        engine = setup.stage(f"stage_{dtype}")
        for fill in (0.0, np.nan):
            errors = _prefill_and_decode(engine, size, fill)
            facts[f"{dtype} unused={fill}"] = errors
    good = {
        name: all(e < TOLERANCE[name.split()[0]] for e in errors)  # NaN < x is false
        for name, errors in facts.items()
    }
    clean = all(ok for name, ok in good.items() if name.endswith("0.0"))
    poisoned = all(ok for name, ok in good.items() if name.endswith("nan"))
    text = f"in place and right: {clean}; NaN in unused slots does no harm: {poisoned}"
    return Answer(YES if clean else NO, text, facts)


def _prefill_and_decode(engine: Engine, size: StageSize, fill: float) -> list[float]:
    """Errors of prefill, each decode step, and the caches at the end."""
    error, after_prefill = _prefill(engine, size, fill)
    errors, final = [error], after_prefill
    for feed, expected, final in _decode_calls(size, after_prefill):  # noqa: B007 - the last is used
        found = engine.run(feed.inputs(), DECODE)
        errors.append(ref.relative_error(found["hidden_out"], expected))
    used = np.s_[:, :, :22]
    for name, cache in final.items():
        errors.append(ref.relative_error(engine.read(name, PREFILL)[used], cache[used]))
    return errors


def profiles_share_memory(setup: Setup) -> Answer:
    """Settle (d): are weights held once for two profiles, and activations for two contexts."""
    weight_bytes = sum(w.nbytes for w in graphs.stage_weights(BIG).values())
    path = setup.build("big")
    alone = setup.build("big_prefill_only").stat().st_size
    cuda = Cuda()
    cuda.call("cudaMalloc", 256)  # the context of the process itself is not to be counted
    start = cuda.used_bytes()
    engine = setup.engine("big")
    loaded = cuda.used_bytes()
    activation = int(engine.engine.device_memory_size_v2)
    own = [engine.add_context(0), engine.add_context(1)]
    with_own = cuda.used_bytes()
    shared = (int(cuda.call("cudaMalloc", max(activation, 256))), activation)
    prefill, decode = engine.add_context(0, shared), engine.add_context(1, shared)
    with_shared = cuda.used_bytes()
    outputs = {}
    feeds = (_first_call(BIG), ref.make_feed(BIG, rows=1, entering=1, slot=20, seed=9))
    for pair in (own, [prefill, decode]):
        first = engine.run({**feeds[0].inputs(), **ref.empty_caches(BIG)}, pair[0])["hidden_out"]
        second = engine.run(feeds[1].inputs(), pair[1])["hidden_out"]
        outputs[pair[0]] = (first, second)
    same = all(np.array_equal(a, b) for a, b in zip(outputs[own[0]], outputs[prefill], strict=True))
    facts = {
        "weight_bytes": weight_bytes,
        "engine_bytes": path.stat().st_size,
        "engine_bytes_one_profile": alone,
        "device_bytes_loaded": loaded - start,
        "device_bytes_two_contexts": with_own - loaded,
        "device_bytes_two_more_sharing": with_shared - with_own,
        "activation_bytes": activation,
        "shared_activations_give_the_same": same,
    }
    once = loaded - start < 1.5 * weight_bytes and path.stat().st_size < 1.1 * alone
    text = f"weights once: {once}; two contexts on one activation buffer agree: {same}"
    return Answer(YES if once and same else NO, text, facts)


def decode_replays_as_a_graph(setup: Setup) -> Answer:
    """Settle (e): one captured decode step, replayed at other slots by rewriting its inputs."""
    engine = setup.stage("stage_float16")
    _, caches = _prefill(engine, HALF)
    errors, graph, facts = [], None, {}
    for feed, expected, _ in _decode_calls(HALF, caches, steps=5):
        if graph is None:
            engine.run(feed.inputs(), DECODE)  # lazily compiled kernels must exist before capture
            if hasattr(engine.contexts[DECODE], "is_stream_capturable"):  # TensorRT-RTX only
                context = engine.contexts[DECODE]
                facts["capturable"] = bool(context.is_stream_capturable(int(engine.stream)))
            graph = engine.capture(DECODE)
        for name, value in feed.inputs().items():
            engine.write(name, value)
        engine.launch(graph)
        errors.append(ref.relative_error(engine.read("hidden_out", DECODE), expected))
    facts["graph_us"] = _microseconds(lambda: engine.launch(graph))
    facts["enqueue_us"] = _microseconds(lambda: (engine.enqueue(DECODE), engine.synchronize()))
    good = all(error < TOLERANCE["float16"] for error in errors)
    text = f"captured at slot 19, replayed at 19 to 23: right {good}"
    return Answer(YES if good else NO, text, {"errors": errors, **facts})


def _microseconds(call: Callable[[], object], count: int = 200) -> float:
    for _ in range(20):
        call()
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count * 1e6


def indices_work(setup: Setup) -> Answer:
    """Settle (f): gather by int64 indices of any length, zero too, and packing without NonZero."""
    rng = np.random.default_rng(3)
    hidden = rng.standard_normal((1, 30, GATHER_WIDTH)).astype(np.float16)
    facts: dict[str, Any] = {}
    engine = setup.engine("gather")
    engine.add_context(0)
    for count in (1, 7, 30, 0):
        keep = np.sort(rng.choice(30, count, replace=False)).astype(np.int64)
        try:
            rows = engine.run({"hidden": hidden, "keep_indices": keep})["rows"]
            facts[f"gather {count}"] = bool(np.array_equal(rows, hidden[:, keep]))
        except PatchsieveError as problem:
            facts[f"gather {count}"] = str(problem)
    engine = setup.engine("compaction")
    engine.add_context(0)
    masks = {"some": rng.random(COMPACTION_ROWS) < 0.5, "none": np.zeros(COMPACTION_ROWS, bool)}
    masks["all"] = ~masks["none"]
    for name, keep in masks.items():
        found = engine.run({"keep": keep})
        kept = np.flatnonzero(keep)
        right = int(found["num_keep"][0]) == kept.size
        facts[f"compaction {name}"] = bool(
            right and np.array_equal(found["keep_indices"][: kept.size], kept)
        )
    wrong = [name for name, fact in facts.items() if fact is not True]
    text = f"wrong: {', '.join(wrong)}" if wrong else "gathers and packs as NumPy does"
    return Answer(NO if wrong else YES, text, facts)


def single_row_decode_is_right(setup: Setup) -> Answer:
    """Settle (h): fp16 decode of one row on the 1/1/2 profile, beside an exact profile."""
    facts = {name: _decode(setup, name, HALF) for name in ("stage_float16", "stage_exact_decode")}
    good = all(e < TOLERANCE["float16"] for e in facts["stage_float16"]["errors"])
    return Answer(YES if good else NO, f"1/1/2 at L=1 right: {good}; {_told(facts)}", facts)


def fused_attention_is_right(setup: Setup) -> Answer:
    """Settle (i): is half-precision attention as one operator right, and is it faster.

    A form that cannot be built, or whose compiler crashes, is wrong. What was found before a crash
    of the engine itself is on stderr.
    """
    facts: dict[str, dict[str, Any]] = {}
    for name in ATTENTIONS:
        for form in FORMS:
            facts[f"{form} {name}"] = found = _attend(setup, form, name)
            print(f"{form} {name}: {found}", file=sys.stderr, flush=True)
    right = {
        name: bool(fact.get("errors"))
        and all(error < TOLERANCE["float16"] for error in fact["errors"].values())
        for name, fact in facts.items()
    }
    told = [
        f"{name}: {'right' if right[name] else 'wrong'}"
        + "".join(f", L={rows} {us:.0f} us" for rows, us in fact.get("us", {}).items())
        for name, fact in facts.items()
    ]
    return Answer(YES if all(right.values()) else NO, "; ".join(told), facts)


def _attend(setup: Setup, form: str, name: str) -> dict[str, Any]:
    """Errors against float64 and microseconds for each L; or why there are none."""
    size = ATTENTIONS[name]
    try:
        engine = setup.engine(f"{form} {name}".replace("/", "-"), apart=True)
    except PatchsieveError as problem:
        return {"failed": str(problem)}
    contexts = [engine.add_context(number) for number in range(len(size.profiles()) or 1)]
    facts: dict[str, Any] = {"errors": {}, "us": {}}
    try:
        for context, rows in zip(contexts, (size.rows[1], 1), strict=False):
            for is_apart in (False, True) if rows == 1 else (False,):
                feed, seen = _attention_feed(size, rows, is_apart)
                found = engine.run(feed, context)["out"]
                expected = ref.attend(*list(feed.values())[:3], seen, size.head_dim**-0.5)
                case = f"{rows}{' apart' if is_apart else ''}"
                facts["errors"][case] = ref.relative_error(found, expected)
            graph = engine.capture(context)
            facts["us"][str(rows)] = _microseconds(partial(engine.launch, graph))
    except PatchsieveError as problem:
        facts["errors"]["failed"] = np.nan
        facts["failed"] = str(problem)
    return facts


def _attention_feed(
    size: MaskedSize, rows: int, is_apart: bool
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Inputs of an attention, and what its rows see, [L, S].

    Args:
        size: Of the attention.
        rows: L; they come after the prefix, and slots after them hold zeros.
        is_apart: The row is in the last slot, and sees the prefix and itself.
    """
    rng = np.random.default_rng(rows)
    query = 2 * rng.standard_normal((1, size.heads, rows, size.head_dim))
    key, value = rng.standard_normal((2, 1, size.kv_heads, size.slots, size.head_dim))
    if not size.has_mask:
        seen = np.ones((rows, size.slots), bool)
    else:
        slots = np.arange(size.slots)
        own = np.arange(rows)[:, None] + (size.slots - rows if is_apart else PREFIX)
        seen = (slots < PREFIX) | ((slots <= own) & (slots >= own.min()))
        unused = ~seen.any(axis=0)
        key[:, :, unused] = value[:, :, unused] = 0
    names = ("query", "key", "value")
    arrays = (array.astype(size.dtype) for array in (query, key, value))
    feed = dict(zip(names, arrays, strict=True))
    if size.has_mask:
        feed["mask"] = np.where(seen, 0, graphs.NEVER).astype(np.float32)[None, None]
    return feed, seen


def own_attention_serves_a_stage(setup: Setup) -> Answer:
    """Settle (j): is a stage right on TRT_Attention with mask and key length, and does it pay."""
    facts = {name: _decode(setup, name, LONG) for name in ("long", "long_lengths")}
    good = {
        name: all(error < TOLERANCE["float16"] for error in fact["errors"])
        for name, fact in facts.items()
    }
    text = (
        f"right: {good['long_lengths']}, as exported: {good['long']}; 20 of {LONG.slots} slots in "
        f"use: {_told(facts)}"
    )
    return Answer(YES if all(good.values()) else NO, text, facts)


def _decode(setup: Setup, name: str, size: StageSize) -> dict[str, Any]:
    """Errors of three decode steps after prefill, time of one, bytes of the engine."""
    engine = setup.stage(name)
    _, caches = _prefill(engine, size)
    errors = []
    for feed, expected, _ in _decode_calls(size, caches):
        found = engine.run(feed.inputs(), DECODE)["hidden_out"]
        errors.append(ref.relative_error(found, expected))
    return {
        "errors": errors,
        "engine_bytes": setup.build(name).stat().st_size,
        "step_us": _microseconds(lambda: (engine.enqueue(DECODE), engine.synchronize())),
    }


def _told(facts: dict[str, dict[str, Any]]) -> str:
    return ", ".join(f"{name} {fact['step_us']:.0f} us a step" for name, fact in facts.items())
