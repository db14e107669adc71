"""What a bundle holds and what it reserves, read from its manifest: no backend, no numpy.

Only the formats of matrices and the measures of a text scorer are read elsewhere: at the beginning
of the weights files.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from patchsieve import cost, memory
from patchsieve.contract import boards, stored
from patchsieve.contract.errors import RequestError
from patchsieve.contract.files import check_files, is_there, read
from patchsieve.contract.graphs import Signature
from patchsieve.contract.manifest import Manifest
from patchsieve.contract.plan import NO_PRUNING, PLACES, Plan
from patchsieve.contract.weights import PARTS, SCORER
from patchsieve.runtime.trt.engines import FILE_NAME as RECORD
from patchsieve.runtime.trt.engines import check_contents, folder_of, read_record

ENGINES = "engines"  # folder of a bundle with one folder per target


def inspect(
    bundle: Path,
    plan: str | None = None,
    text_tokens: int | None = None,
    images: int | None = None,
) -> dict[str, Any]:
    """Describe a bundle without opening its graphs.

    Args:
        bundle: The directory.
        plan: The only plan to describe; all by default.
        text_tokens: Rows of text of the request whose FLOPs are counted; by default the bundle's
            limit.
        images: Its images; by default the bundle's limit.

    Returns:
        Facts that JSON can hold; bytes are counts.

    Raises:
        BundleError: This is not a bundle.
        RequestError: It holds no such plan.
    """
    facts = read(bundle)
    if plan is not None and plan not in facts.plans:
        raise RequestError(
            "the bundle holds no such plan",
            found=plan,
            expected=", ".join(facts.plans),
            do="correct --plan",
        )
    text_tokens = facts.limits.max_text_tokens if text_tokens is None else text_tokens
    images = facts.limits.max_images if images is None else images
    shape = cost.from_bundle(bundle, facts)
    plans = {
        name: plan_costs(facts, name) | plan_flops(shape, facts.plans[name], text_tokens, images)
        for name in ([plan] if plan else facts.plans)
    }
    said = {"bundle": str(bundle), **_model(facts)}
    said |= weights_and_boards(bundle, facts, plan or facts.default_plan)
    return said | {
        "text_tokens": text_tokens,
        "images": images,
        "plans": plans,
        "targets": targets(facts),
        "files": {name: file.size for name, file in facts.files.items()},
        "bytes": sum(file.size for file in facts.files.values()),
        "parts": parts(facts),
        "engines": engines(bundle),
    }


def _model(facts: Manifest) -> dict[str, Any]:
    """What a bundle was made of and how it is divided."""
    return {
        "bundle_schema": facts.schema_version,
        "patchsieve_version": facts.patchsieve_version,
        "checkpoint": facts.checkpoint,
        "precision": facts.numbers,
        "attention": facts.attention,
        "text": asdict(facts.text),
        "vision": asdict(facts.vision),
        "limits": asdict(facts.limits),
        "generation": asdict(facts.generation),
        "eos_token_ids": list(facts.tokens.eos_token_ids),
        "stages": [
            {
                "layers": [stage.first, stage.last - 1],
                "kv_bytes_per_row": facts.row_bytes(stage),
                "engine_slots": stage.slots,
            }
            for stage in facts.stages
        ],
        "default_plan": facts.default_plan,
    }


def weights_and_boards(bundle: Path, facts: Manifest, plan: str) -> dict[str, Any]:
    """Bytes of the weights by part and format, and the boards that hold a request under a plan."""
    rows = stored.shares(bundle, facts)
    return memory.weights(rows) | memory.places(boards.of_bundle(facts, plan))


def plan_costs(facts: Manifest, name: str) -> dict[str, Any]:
    """What a plan prunes, and the KV cache that it reserves, beside no pruning."""
    plan = facts.plans[name]
    stages = []
    rows = zip(
        facts.stages,
        facts.budgets(name),
        facts.slots(name),
        facts.slots(NO_PRUNING),
        strict=True,
    )
    for stage, budget, slots, unpruned in rows:
        width = facts.row_bytes(stage)
        stages.append(
            {
                "layers": [stage.first, stage.last - 1],
                "budget": budget,
                "slots": slots,
                "slots_unpruned": unpruned,
                "kv_bytes": slots * width,
                "kv_bytes_unpruned": unpruned * width,
            }
        )
    return {
        "position_rule": facts.position_rule(name),
        **{place: plan.to_dict()[place] for place in PLACES},
        "num_visual": facts.num_visual(name),
        "sites": [asdict(site) for site in plan.sites],
        "stages": stages,
        "kv_bytes": sum(stage["kv_bytes"] for stage in stages),
        "kv_bytes_unpruned": sum(stage["kv_bytes_unpruned"] for stage in stages),
    }


def plan_flops(shape: cost.ModelShape, plan: Plan, text_tokens: int, images: int) -> dict[str, Any]:
    """FLOPs of a prefill under a plan, as the runtime executes it.

    A plan that adapts to the image is counted at its budgets: an upper bound.
    """
    schedule, is_exact = cost.of_plan(shape, plan, text_tokens=text_tokens)
    pruned, full = (
        cost.cost(shape, each, text_tokens, images=images, convention=cost.RUNTIME)
        for each in (schedule, cost.no_pruning(shape))
    )
    return {
        "flops": pruned.flops.to_dict(),
        "flops_unpruned": full.flops.to_dict(),
        "average_tokens": pruned.average_tokens,
        "is_upper_bound": not is_exact,
    }


def targets(facts: Manifest) -> dict[str, dict[str, Any]]:
    """Graphs of each target with their files' sizes, and what builds or runs them."""
    return {
        target: {
            "graphs": {
                name: {"file": path, "bytes": facts.files[path].size}
                for name, path in graphs.items()
            },
            "bytes": sum(facts.files[path].size for path in graphs.values()),
            "caches": facts.cache_forms[target],
            "needs": asdict(facts.needs[target]) if target in facts.needs else None,
        }
        for target, graphs in facts.targets.items()
    }


def parts(facts: Manifest) -> dict[str, int]:
    """Bytes by what they are for: layers, tower, embeddings, head, scorer, graphs, the rest."""
    graphs = {path for paths in facts.targets.values() for path in paths.values()}
    held = {entry.part for entry in facts.weights.values()}
    labels = [part.label for part in PARTS.values() if part.name in held]
    sizes = dict.fromkeys([*labels, "graphs", "other files"], 0)
    for path, file in facts.files.items():
        part = "other files"
        if path in graphs:
            part = "graphs"
        elif path in facts.weights:
            part = PARTS[facts.weights[path].part].label
        elif facts.scorer is not None and path == facts.scorer.tokenizer:
            part = SCORER.label
        sizes[part] += file.size
    return sizes


def engines(bundle: Path) -> dict[str, dict[str, Any]]:
    """Engines that were built into the bundle: for each target its files' sizes, and its record."""
    found = {}
    folder = bundle / ENGINES
    for place in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not place.is_dir():
            continue
        files = sorted(path for path in place.rglob("*") if path.is_file())
        records = [path for path in files if path.suffix == ".json"]
        found[place.name] = {
            "files": {path.relative_to(place).as_posix(): path.stat().st_size for path in files},
            "bytes": sum(path.stat().st_size for path in files),
            "record": _read(records[0]) if records else None,
        }
    return found


def tensors(bundle: Path) -> dict[str, Any]:
    """Inputs and outputs of each graph: names, dtypes, shapes; where targets depart, theirs too."""
    facts = read(bundle)
    return {
        "tensors": {name: _sides(graph) for name, graph in facts.graphs.items()},
        "target_tensors": {
            target: {name: _sides(signature) for name, signature in graphs.items()}
            for target, graphs in facts.target_graphs.items()
        },
    }


def _sides(signature: Signature) -> dict[str, Any]:
    return {
        "inputs": [asdict(tensor) for tensor in signature.inputs],
        "outputs": [asdict(tensor) for tensor in signature.outputs],
    }


def check(bundle: Path, progress: Callable[[str, float], None]) -> int:
    """Read every file again, engines too, compare it with its hash, and return how many there are.

    Raises:
        BundleError: A file is missing, truncated or altered.
    """
    facts = read(bundle)
    total = max(1, sum(file.size for file in facts.files.values()))
    done = 0

    def step(path: str) -> None:
        nonlocal done
        progress(f"checking {path}", done / total)
        done += facts.files[path].size

    check_files(bundle, facts, again=True, progress=step)
    count = len(facts.files)
    for target in facts.targets:
        if is_there(folder_of(bundle, target) / RECORD):
            progress(f"checking the engines for {target}", 1.0)
            count += check_contents(read_record(bundle, target))
    return count


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return None
