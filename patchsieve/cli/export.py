"""`patchsieve export CHECKPOINT -o BUNDLE`, and `patchsieve export --reuse BUNDLE`."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from patchsieve import memory, plans
from patchsieve.cli import plan_options
from patchsieve.cli.arguments import PRECISION, gigabytes, integers
from patchsieve.cli.output import Progress, print_json, require
from patchsieve.contract import engine_memory, names
from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.files import read
from patchsieve.contract.formats import FORMATS
from patchsieve.contract.manifest import Limits, Manifest
from patchsieve.contract.plan import NO_PRUNING, Plan
from patchsieve.contract.targets import TARGETS, USUAL, WITH_ATTENTION_FORMS, those
from patchsieve.contract.trained import Trained
from patchsieve.contract.writing import check_new_bundle
from patchsieve.export.card import next_commands
from patchsieve.inspection import weights_and_boards
from patchsieve.pruning import catalogue
from patchsieve.pruning.entry import DECODER
from patchsieve.pruning.recipes import Size
from patchsieve.runtime.board.abilities import EXPORT
from patchsieve.tables import size

# Targets of TensorRT without caches in place.
_GROWING = those(lambda row: row.compiler and row.cache == names.NEW_ROWS)
_LIMITS = (512, 256, 1)  # text tokens, new tokens, images
_OF_A_NEW_BUNDLE = (
    "checkpoint",
    "output",
    "revision",
    "cuts",
    "build_memory",
    "scorer",
    "targets",
    "precision",
    "statistics",
    "attention",
    "max_text_tokens",
    "max_new_tokens",
    "max_images",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("checkpoint", nargs="?", help="Hugging Face directory or hub id of a LLaVA model")
    add("-o", "--output", type=Path, metavar="BUNDLE", help="the bundle to make")
    add("--revision", help="branch, tag or commit of a hub id (default: its main branch)")
    add("--reuse", type=Path, metavar="BUNDLE", help="give this bundle another plan on its cuts")
    plan = parser.add_argument_group("what prunes where")
    add = plan.add_argument
    add("--plan", type=Path, metavar="JSON", help="a plan file; instead of the shortcuts below")
    plan_options.add_arguments(plan)
    add("--plan-name", metavar="NAME", help="what requests call the plan")
    _add_bundle_arguments(parser)


def _add_bundle_arguments(parser: argparse.ArgumentParser) -> None:
    bundle = parser.add_argument_group("the bundle")
    add = bundle.add_argument
    add("--cuts", type=integers, metavar="LAYERS", help="further layers to divide at")
    add(
        "--build-memory",
        type=gigabytes,
        metavar="GB",
        help="divide at as many more layers as it takes to build every engine in this much memory "
        "(a rule measured with TensorRT-RTX); beside --cuts",
    )
    add(
        "--scorer",
        metavar="SOURCE",
        help="ivtp: the CLIP that the tower was taken from: open_clip, "
        "open_clip:MODEL:TAG_OR_FILE, a Hugging Face directory or hub id",
    )
    add(
        "--targets",
        help=f"targets, comma-separated: {', '.join(TARGETS)}; or all (default: {USUAL}). "
        f"Caches of {', '.join(_GROWING)} are inputs that grow, so each new token also costs "
        "TensorRT the work of new shapes; the other targets of TensorRT write into their caches",
    )
    add(
        "--precision",
        metavar="P",
        help=f"{PRECISION} (default: float32)",
    )
    add(
        "--statistics",
        type=Path,
        metavar="STATS",
        help="activation statistics that patchsieve calibrate --statistics collected; they guide "
        "the rounding to int8 and int4 (default: what the weights alone say)",
    )
    add(
        "--attention",
        choices=names.ATTENTION_FORMS,
        help=f"how {', '.join(WITH_ATTENTION_FORMS)} get float16 and bfloat16 attention: "
        "decomposed (default) in parts, its scores in float32; fused as one operator, which may be "
        "faster and which TensorRT 10.16 to 11.2 refuses or gets wrong in some shapes "
        "(python -m benchmarks.settle --only i tries it on your GPU); fused-tower: the tower alone",
    )
    _add_limits(bundle)
    add("--quiet", action="store_true", help="no progress")


def _add_limits(group: Any) -> None:
    add = group.add_argument
    add(
        "--max-text-tokens",
        type=int,
        metavar="N",
        help="most tokens of text in a conversation (default: 512); TensorRT reads every reserved "
        "slot at each new token, so fit this limit and the next two to the use",
    )
    add(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="most new tokens of an answer (default: 256)",
    )
    add("--max-images", type=int, metavar="N", help="most images in a conversation (default: 1)")


def run(args: argparse.Namespace) -> int:
    """Export or reuse."""
    require(EXPORT, "export", "export")
    if args.output is not None and args.reuse is None:  # before torch is loaded, for seconds
        check_new_bundle(args.output)
    plan = plan_options.plan_of(args, lambda: _size_of(args), heads=_heads(args))
    taken = {} if args.reuse is None else read(args.reuse).plans
    name = args.plan_name or plans.free_name(plan, taken)
    progress = Progress.of(args)
    start = time.perf_counter()
    spent: dict[str, float] = {}
    if args.reuse is not None:
        from patchsieve.export.reuse import reuse

        given = [name for name in _OF_A_NEW_BUNDLE if getattr(args, name) is not None]
        if given:
            raise PatchsieveError(
                "--reuse changes the plan of a bundle and nothing else",
                found=", ".join(given),
                do="remove them, or export a new bundle",
            )
        bundle, facts = args.reuse, reuse(args.reuse, plan, name, progress, spent)
    else:
        bundle, facts = args.output, _export(args, plan, name, progress, spent)
    progress.done()
    _report(args, bundle, facts, time.perf_counter() - start, spent)
    return 0


def _export(
    args: argparse.Namespace, plan: Plan, name: str, progress: Progress, spent: dict[str, float]
) -> Manifest:
    from patchsieve.export.exporter import ExportOptions, export

    if args.checkpoint is None or args.output is None:
        raise _needs_model()
    targets = list(TARGETS) if args.targets == "all" else (args.targets or USUAL).split(",")
    limits = (args.max_text_tokens, args.max_new_tokens, args.max_images)
    options = ExportOptions(
        plan=plan,
        plan_name=name,
        cuts=tuple(args.cuts or ()),
        build_memory=args.build_memory,
        targets=tuple(dict.fromkeys(target.strip() for target in targets)),
        precision=args.precision or "float32",
        limits=Limits(
            *(usual if n is None else n for n, usual in zip(limits, _LIMITS, strict=True))
        ),
        scorer=args.scorer,
        revision=args.revision,
        attention=args.attention,
        statistics=args.statistics,
    )
    return export(args.checkpoint, args.output, options, progress, spent)


def _size_of(args: argparse.Namespace) -> Size:
    """The size of the model that is exported, which a recipe is fitted to."""
    if args.reuse is not None:
        facts = read(args.reuse)
        return Size(facts.vision.num_patches, facts.text.num_layers)
    if args.checkpoint is None:
        raise _needs_model()
    from patchsieve.export.source.checkpoint import locate, read_config

    config = read_config(locate(args.checkpoint, args.revision, check=read_config))
    side = config.vision_config.image_size // config.vision_config.patch_size
    return Size(side * side, config.text_config.num_hidden_layers)


def _heads(args: argparse.Namespace) -> Path | None:
    """Where learned thresholds lie: as asked, or inside a checkpoint that was trained with them."""
    found = catalogue.find(DECODER, args.method or "")
    has_constants = args.theta_r is not None or args.theta_s is not None
    is_asked = found is not None and found.has("heads") and not has_constants
    if args.heads is not None or not is_asked or args.checkpoint is None:
        return args.heads  # type: ignore[no-any-return]
    from patchsieve.export.source.checkpoint import locate, read_config

    directory = locate(args.checkpoint, args.revision, check=read_config)
    folder = Trained.of(read_config(directory)).heads
    return None if folder is None else directory / folder


def _needs_model() -> PatchsieveError:
    return PatchsieveError(
        "export needs a model and a bundle",
        expected="a checkpoint and -o BUNDLE, or --reuse BUNDLE",
        do="name a checkpoint and add -o BUNDLE",
    )


def _report(
    args: argparse.Namespace,
    bundle: Path,
    facts: Manifest,
    seconds: float,
    spent: dict[str, float],
) -> None:
    made = _facts(bundle, facts) | {
        "seconds": round(seconds, 3),
        "target_seconds": {target: round(spent[target], 3) for target in facts.targets},
    }
    if args.json:
        print_json(made)
    else:
        _print(made, facts)


def _facts(bundle: Path, facts: Manifest) -> dict[str, Any]:
    """What the default plan of a new or changed bundle leaves and reserves."""
    plan = facts.default_plan
    is_fixed = any(TARGETS[target].has_fixed_slots for target in facts.targets)
    slots, full = facts.slots(plan), facts.slots(NO_PRUNING)
    bytes_of = [facts.row_bytes(stage) for stage in facts.stages]
    photo = Path(__file__).resolve().parents[2] / "examples" / "photo.jpg"  # of a clone
    return {
        "bundle": str(bundle),
        "plan": plan,
        "plans": list(facts.plans),
        "num_visual": facts.num_visual(plan),
        "cuts": facts.cuts,
        "budgets": facts.budgets(plan),
        "slots": slots,
        "fits_engines": not is_fixed
        or all(needed <= stage.slots for needed, stage in zip(slots, facts.stages, strict=True)),
        "build_memory_bytes": engine_memory.expectations(facts),
        "kv_bytes_reserved": sum(a * b for a, b in zip(slots, bytes_of, strict=True)),
        "kv_bytes_reserved_unpruned": sum(a * b for a, b in zip(full, bytes_of, strict=True)),
        "bytes": sum(file.size for file in facts.files.values()),
        **weights_and_boards(bundle, facts, plan),
        "graph_bytes": {
            target: sum(facts.files[path].size for path in graphs.values())
            for target, graphs in facts.targets.items()
        },
        "needs": {target: asdict(needs) for target, needs in facts.needs.items()},
        "next": next_commands(bundle, facts, photo if photo.is_file() else "photo.jpg"),
    }


def _print(made: dict[str, Any], facts: Manifest) -> None:
    """The same for people."""
    plan = made["plan"]
    print(f"{made['bundle']}: plan {plan}, {size(made['bytes'])}, {made['seconds']:.1f} s")
    for target, count in made["graph_bytes"].items():
        needs = f"; needs {facts.needs[target]}" if target in facts.needs else ""
        took = f"{made['target_seconds'][target]:.1f} s"
        print(f"  {target}: graphs of {size(count)} on the shared weights, {took}{needs}")
    if facts.plans[plan].prunes_before:
        left, full_count = made["num_visual"], facts.vision.num_visual
        most = "" if facts.has_fixed_count(plan) else "at most "
        print(f"  tower: {most}{left} of {full_count} visual tokens an image enter the decoder")
    for stage, budget, count in zip(facts.stages, made["budgets"], made["slots"], strict=True):
        print(
            f"  layers {stage.first}-{stage.last - 1}: "
            f"at most {budget} visual tokens an image, {count} KV slots"
        )
    formats: dict[str, int] = {}
    for row in made["weights"]:
        formats[row["format"]] = formats.get(row["format"], 0) + row["bytes"]
    stored_as = ", ".join(f"{name} {size(count)}" for name, count in formats.items())
    print(f"  weights: {facts.numbers} ({stored_as})")
    if unproven := [name for name in formats if name in FORMATS and not FORMATS[name].is_proven]:
        print(f"  {', '.join(unproven)}: unproven, no GPU has run such an engine yet")
    reserved, unpruned = made["kv_bytes_reserved"], made["kv_bytes_reserved_unpruned"]
    print(f"  KV reservation {size(reserved)}, unpruned {size(unpruned)}")
    if building := made["build_memory_bytes"]:
        largest = max(building, key=lambda graph: building[graph])
        print(
            f"  building engines takes at most about {size(building[largest])} of memory, for "
            f"{largest} ({engine_memory.source(facts)}; --build-memory sets it)"
        )
    print(f"  {memory.places_line(made)} (patchsieve inspect says why)")
    if not made["fits_engines"]:
        engines = [stage.slots for stage in facts.stages]
        print(
            f"  engines of fixed size reserve {engines}: this plan runs on the other targets only"
        )
    if reserved == unpruned and facts.plans[plan].prunes:
        print("  the plan reserves as much as no pruning: lower it with --budget")
    print("\n".join(["next:", *(f"  {command}" for command in made["next"])]))
