"""Compile every graph of a bundle, ahead of time or on the board that runs it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from patchsieve import manifest, names
from patchsieve.errors import BundleError, PatchsieveError
from patchsieve.manifest import Manifest
from patchsieve.runtime.tensorrt import BuildReport, Profile, build_engine, load_tensorrt
from patchsieve.writing import one_line, write_whole

TARGETS = ("tensorrt-rtx",)
RECORD = "engines.json"
USUAL_TEXT = 64  # rows of text that the prefill kernels are tuned for
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Built:
    """One engine of a build.

    Attributes:
        was_there: An engine of the same graph, weights, library and options stood there already.
        warnings: What TensorRT said, or why a decision was not built.
    """

    graph: str
    path: Path
    engine_bytes: int
    seconds: float
    was_there: bool
    warnings: tuple[str, ...]


def build(
    bundle: Path,
    target: str,
    *,
    memory_limit: int | None = None,
    compute_capabilities: tuple[str, ...] = (),
    force: bool = False,
    progress: Progress = lambda *_: None,
) -> Iterator[Built]:
    """Compile the graphs of a bundle, one at a time; each engine is recorded when it is whole.

    Args:
        bundle: The directory.
        target: One of TARGETS.
        memory_limit: Scratch bytes that a kernel may ask for.
        compute_capabilities: GPUs to compile for; empty is the library's own choice.
        force: Build again what stands there.
        progress: Told the graph and the fraction done.

    Yields:
        Each engine, built or found.

    Raises:
        BackendMissingError: The target's library is absent.
        BundleError: The bundle is damaged or has no graphs for the target.
    """
    facts = manifest.read(bundle)
    graphs = _graphs(facts, target)
    trt = load_tensorrt(target)
    options = {
        "library": f"{trt.__name__} {trt.__version__}",
        "memory_limit": memory_limit,
        "compute_capabilities": list(compute_capabilities),
        "weights_sha256": _weights(facts),
    }
    folder = bundle / "engines" / target
    others = {path for g in facts.targets.values() for path in g.values()} - set(graphs.values())
    manifest.check_files(bundle, facts, paths=[path for path in facts.files if path not in others])
    with one_line(folder):
        folder.mkdir(parents=True, exist_ok=True)
        record = _read_record(folder)
        for done, (graph, path) in enumerate(graphs.items()):
            progress(f"building {graph}", done / len(graphs))
            source = {"graph_sha256": facts.files[path].sha256, **options}
            engine = folder / f"{graph}.engine"
            if misfit := _misfit(facts, graph):
                yield Built(graph, engine, 0, 0.0, False, (misfit,))
                continue
            if not force and _is_current(engine, record.get(graph), source):
                yield Built(graph, engine, engine.stat().st_size, 0.0, True, ())
                continue
            report: BuildReport = build_engine(
                bundle / path,
                engine,
                profiles(facts, graph),
                target=target,
                memory_limit=memory_limit,
                compute_capabilities=compute_capabilities,
            )
            record[graph] = source | {
                "seconds": round(report.seconds, 3),
                "warnings": list(report.warnings),
                **asdict(manifest.hash_file(engine)),
            }
            write_whole(folder / RECORD, (json.dumps(record, indent=1) + "\n").encode())
            yield Built(graph, engine, report.engine_bytes, report.seconds, False, report.warnings)


def _graphs(facts: Manifest, target: str) -> dict[str, str]:
    """The graphs of a target, or why there are none to build."""
    if target not in TARGETS:
        raise PatchsieveError(
            "this target has no engines to build", found=target, expected=", ".join(TARGETS)
        )
    if target not in facts.targets:
        raise BundleError(
            f"the bundle holds no graphs for {target}",
            found=", ".join(sorted(facts.targets)),
            do=f"export it again with --targets cpu,{target}",
        )
    return facts.targets[target]


def _weights(facts: Manifest) -> str:
    """One hash over all weights: graphs only point to them, engines hold them."""
    digest = hashlib.sha256()
    for path in sorted(facts.files):
        if path.startswith(manifest.WEIGHTS):
            digest.update(f"{path} {facts.files[path].sha256}\n".encode())
    return digest.hexdigest()


def _misfit(facts: Manifest, graph: str) -> str:
    """Why a decision is of no use to the engines: its plan needs more slots than they have."""
    plan, _ = names.decided(graph) or ("", 0)
    if not plan or all(
        needed <= stage.slots for needed, stage in zip(facts.slots(plan), facts.stages, strict=True)
    ):
        return ""
    return (
        f"not built: the plan {plan} needs {facts.slots(plan)} slots, the engines reserve "
        f"{[stage.slots for stage in facts.stages]} (export with a larger --budget)"
    )


def profiles(facts: Manifest, graph: str) -> list[Profile]:
    """Shapes that an engine must take, from the limits and budgets of its bundle.

    A stage gets a profile for prefill and one for decode. The latter admits two rows, because
    exactly one makes TensorRT-RTX store float16 weights twice.
    """
    limits = facts.limits
    most = [_most_rows(facts, index) for index in range(len(facts.stages))]
    ranges: dict[str, tuple[int, int, int]] = {
        names.AXIS_IMAGES: (1, 1, limits.max_images),
        names.AXIS_ROWS: (1, most[0], most[0]),
        names.AXIS_WINDOWS: (1, 1, names.MOST_WINDOWS),
    }
    decode = None
    if graph.startswith("stage_"):
        index = int(graph.removeprefix("stage_"))
        before, usual = max(0, index - 1), _budget(facts, index) + USUAL_TEXT
        ranges[names.AXIS_ROWS] = (1, min(usual, most[index]), most[index])
        usual_in = _budget(facts, before) + USUAL_TEXT
        ranges[names.AXIS_ROWS_IN] = (1, min(usual_in, most[before]), most[before])
        decode = ranges | {axis: (1, 1, 2) for axis in (names.AXIS_ROWS, names.AXIS_ROWS_IN)}
    elif graph not in (names.COMPACT, names.SCORER) and not names.is_vision(graph):
        _, layer = names.decided(graph) or ("", 0)
        index = next(i for i, stage in enumerate(facts.stages) if stage.last == layer)
        tokens = _budget(facts, index)
        usual = min(tokens + USUAL_TEXT, most[index])
        ranges |= {
            names.AXIS_ROWS: (1, usual, most[index]),
            names.AXIS_VISUAL: (1, tokens, tokens),
            names.AXIS_TEXT: (1, min(USUAL_TEXT, most[index]), most[index]),
        }
    chosen = [ranges] if decode is None else [ranges, decode]
    return [_profile(facts, graph, given) for given in chosen]


def _profile(facts: Manifest, graph: str, ranges: dict[str, tuple[int, int, int]]) -> Profile:
    """Shapes of the inputs that have an axis of changing length; caches have none."""
    profile: Profile = {}
    for tensor in facts.tensors[graph]["inputs"]:
        shape: list[Any] = tensor["shape"]
        if any(axis in ranges for axis in shape):
            low, usual, high = (
                tuple(ranges[axis][i] if axis in ranges else axis for axis in shape)
                for i in range(3)
            )
            profile[tensor["name"]] = (low, usual, high)
    return profile


def _budget(facts: Manifest, index: int) -> int:
    """Visual tokens per image that a stage's engine has room for."""
    limits = facts.limits
    text = limits.max_text_tokens + limits.max_new_tokens
    return (facts.stages[index].slots - text) // limits.max_images


def _most_rows(facts: Manifest, index: int) -> int:
    """Rows of the longest prefill: the pending token of the turn before counts as text."""
    return facts.stages[index].slots - facts.limits.max_new_tokens


def _is_current(engine: Path, recorded: dict[str, Any] | None, source: dict[str, Any]) -> bool:
    """Whether an engine was built from this graph with these options, and is whole."""
    if recorded is None or not engine.is_file():
        return False
    if any(recorded.get(key) != value for key, value in source.items()):
        return False
    return asdict(manifest.hash_file(engine)) == {k: recorded.get(k) for k in ("size", "sha256")}


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError):
        return {}  # a record that cannot be read proves nothing: all is built again
    return data if isinstance(data, dict) else {}
