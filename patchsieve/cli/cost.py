"""`patchsieve cost --model NAME --method M`, with `--config CONFIG_JSON`, and of a bundle."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

from patchsieve import cost as costs
from patchsieve import inspection, memory
from patchsieve.cli import cost_memory, cost_spellings, plan_options
from patchsieve.cli.arguments import PRECISION
from patchsieve.cli.cost_spellings import COSTS_ONLY, Chosen
from patchsieve.cli.output import print_json
from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.files import read
from patchsieve.contract.manifest import Manifest
from patchsieve.contract.plan import NO_PRUNING, Plan
from patchsieve.tables import flops, plural, size, table

_CONVENTIONS = {"papers": costs.PAPERS, "runtime": costs.RUNTIME}
_TEXT_TOKENS = 512  # of a request, where no bundle limits it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "FLOPs, tokens per layer and KV bytes of a plan, bytes of the weights by part and format, "
        "and the boards whose memory holds them: counted from shapes with no weights. A "
        "multiply-accumulate is 2 FLOPs; norms, softmax and the decisions are not counted. "
        f"Methods that have costs only: {', '.join(COSTS_ONLY)} after the tower."
    )
    add = parser.add_argument
    add(
        "bundle", nargs="?", type=Path, help="take the model, its plan and its limits from a bundle"
    )
    add("--config", type=Path, metavar="JSON", help="take the model from a LLaVA config.json")
    add("--model", choices=tuple(costs.MODELS), help="take a model whose shape is known")
    plan = parser.add_argument_group("what prunes where, as export takes it")
    plan.add_argument("--plan", metavar="PLAN", help="a plan file or, with a bundle, a plan's name")
    plan_options.add_arguments(plan)
    cost_spellings.add_arguments(parser.add_argument_group("for costs alone"))
    _add_request_arguments(parser.add_argument_group("the request, and what counts"))


def _add_request_arguments(group: Any) -> None:
    add = group.add_argument
    add(
        "--text-tokens",
        type=int,
        metavar="T",
        help=f"all that is not visual (default: a bundle's limit; else {_TEXT_TOKENS})",
    )
    add("--images", type=int, help="images of the request (default: a bundle's limit; else 1)")
    add(
        "--precision",
        metavar="P",
        help=f"{PRECISION} (default: a bundle's own; else float16)",
    )
    add(
        "--targets",
        metavar="T",
        help="targets that --precision is for, as export takes them: int4 is int4-32 for a CPU and "
        "int4-128 for GPUs alone (default: a bundle's own; else tensorrt, or cpu for mixed)",
    )
    add(
        "--convention",
        choices=tuple(_CONVENTIONS),
        help="papers: lm_head at every row, no projector (default with --config); runtime: what is "
        "executed, lm_head at the last row, projector, IVTP's side row and extra tower layer "
        "(default with a bundle, as inspect counts)",
    )


def run(args: argparse.Namespace) -> int:
    """Count, pruned beside unpruned."""
    manifest = _manifest(args)
    model = cost_memory.subject(args, manifest)
    shape, request = model.shape, _request(args, manifest)
    chosen = _chosen(args, shape, manifest)
    model = model.under(chosen.plan)
    if args.placement is not None and getattr(chosen.plan, "encoder", None) is None:
        raise PatchsieveError(
            "--placement has no effect on a plan that prunes nothing in the tower",
            found=args.placement,
            do="remove --placement",
        )
    schedule, is_exact = _schedule(args, shape, chosen, request["text_tokens"])
    counted = request | {
        "convention": _CONVENTIONS[request["convention"]],
        "precision": model.cache_type,
    }
    pruned, full = (
        costs.cost(shape, each, **counted) for each in (schedule, costs.no_pruning(shape))
    )
    facts: dict[str, Any] = {
        "plan": chosen.name,
        "sites": chosen.plan.layers if isinstance(chosen.plan, Plan) else [],
        "is_costs_only": not chosen.is_exported,
        "is_upper_bound": not is_exact,
        "precision": args.precision or (manifest.numbers if manifest else "float16"),
        "cache_type": model.cache_type,
    } | request
    if manifest is not None and manifest.plans.get(chosen.name) is chosen.plan:
        held = inspection.plan_costs(manifest, chosen.name)
        facts["kv_bytes_reserved"] = held["kv_bytes"]
        facts["kv_bytes_reserved_unpruned"] = held["kv_bytes_unpruned"]
    taken = cost_memory.facts(model, chosen, pruned, request["text_tokens"], request["images"])
    if args.json:
        print_json(facts | as_dict(pruned, full) | taken)
    else:
        _print(facts, pruned, full)
        print(f"\n{memory.weights_table(taken['weights'])}\n\n{memory.places_table(taken)}")
    return 0


def _request(args: argparse.Namespace, manifest: Manifest | None) -> dict[str, Any]:
    """The request, and what counts: as asked, else as the bundle has it."""
    usual: dict[str, Any] = {
        "convention": "papers",
        "text_tokens": _TEXT_TOKENS,
        "images": 1,
    }
    if manifest is not None:
        usual = {
            "convention": "runtime",
            "text_tokens": manifest.limits.max_text_tokens,
            "images": manifest.limits.max_images,
        }
    given = {name: getattr(args, name) for name in usual}
    return usual | {name: value for name, value in given.items() if value is not None}


def _chosen(args: argparse.Namespace, shape: costs.ModelShape, manifest: Manifest | None) -> Chosen:
    """What is counted: a plan file, a bundle's plan, or what the options of a plan ask for."""
    used = plan_options.given(args)
    if used and args.plan is None:
        return cost_spellings.choose(args, shape)
    if used:
        raise PatchsieveError("--plan says it all", found=", ".join(used), do="remove them")
    cost_spellings.refuse(args, allowed={"survivors", "placement"}, why="without --method")
    name, plan = _named(args.plan, manifest)
    return Chosen(name, plan, cost_spellings.survivors_of(args, plan))


def _named(plan: str | None, manifest: Manifest | None) -> tuple[str, Plan]:
    """A plan file, a bundle's plan, or no pruning."""
    if manifest is None:
        return (NO_PRUNING, Plan()) if plan is None else (plan, Plan.from_file(Path(plan)))
    name = plan or manifest.default_plan
    if name not in manifest.plans:
        raise PatchsieveError(
            "the bundle has no such plan",
            found=name,
            expected=", ".join(manifest.plans),
            do="correct --plan",
        )
    return name, manifest.plans[name]


def _schedule(
    args: argparse.Namespace, shape: costs.ModelShape, chosen: Chosen, text_tokens: int
) -> tuple[costs.Schedule, bool]:
    """Tokens per layer, and whether they are known or only bounded."""
    if isinstance(chosen.plan, costs.Schedule):
        return chosen.plan, True
    placement: str | None = args.placement
    return costs.of_plan(
        shape, chosen.plan, chosen.survivors, text_tokens=text_tokens, placement=placement
    )


def as_dict(pruned: costs.Cost, full: costs.Cost) -> dict[str, Any]:
    """A cost as commands print it in JSON, the unpruned one beside it."""
    return _facts(pruned) | {
        "unpruned": _facts(full),
        "ratio": pruned.flops.total / full.flops.total,
        "kv_ratio": pruned.kv_bytes / full.kv_bytes,
    }


def _facts(each: costs.Cost) -> dict[str, Any]:
    return {
        "flops": each.flops.to_dict(),
        "tokens_per_layer": {"vision": each.vision_tokens, "llm": each.llm_tokens},
        "average_tokens": each.average_tokens,
        "kv_bytes": each.kv_bytes,
    }


def _manifest(args: argparse.Namespace) -> Manifest | None:
    """What the bundle says of itself; None if the model is no bundle."""
    given = [name for name in ("bundle", "config", "model") if getattr(args, name) is not None]
    if len(given) != 1:
        raise PatchsieveError(
            "cost needs one model",
            found=" and ".join(given) or "none",
            expected="--config CONFIG_JSON, --model NAME, or a bundle",
            do="name one of these" if given else "add --model or --config, or name a bundle",
        )
    return None if args.bundle is None else read(args.bundle)


def _print(facts: dict[str, Any], pruned: costs.Cost, full: costs.Cost) -> None:
    full_flops = full.flops.to_dict()
    rows: list[tuple[str, float, float, Callable[[float], str]]] = [
        (f"{part} FLOPs", count, full_flops[part], flops)
        for part, count in pruned.flops.to_dict().items()
    ]
    mean = "visual tokens, mean of layers"
    rows += [
        (mean, pruned.average_tokens, full.average_tokens, _mean),
        ("KV bytes of the prefill", pruned.kv_bytes, full.kv_bytes, size),
    ]
    if "kv_bytes_reserved" in facts:
        held = facts["kv_bytes_reserved"], facts["kv_bytes_reserved_unpruned"]
        rows.append(("KV bytes reserved", *held, size))
    print(
        table(
            ("", facts["plan"], "unpruned", "%"),
            [
                (name, write(a), write(b), f"{100 * a / b:.1f}" if b else "-")
                for name, a, b, write in rows
            ],
        )
    )
    print(f"tower rows: {_runs(pruned.vision_tokens)}")
    print(f"visual tokens in the decoder: {_runs(pruned.llm_tokens)}")
    print(
        f"{plural(facts['text_tokens'], 'text token')}, {plural(facts['images'], 'image')}, "
        f"{facts['precision']}, counted as {facts['convention']} (see --convention)"
    )
    if facts["is_costs_only"]:
        print(f"costs only: export makes no such plan of {facts['plan']} in this version")
    if facts["is_upper_bound"]:
        print("an upper bound: the plan adapts to the image and was counted at its budget")


def _runs(counts: tuple[int, ...]) -> str:
    """Counts by layer, equal neighbours together: 0-3: 576, 4-31: 126."""
    parts, layer = [], 0
    for count, same in groupby(counts):
        last = layer + len(list(same)) - 1
        parts.append(f"{layer}-{last}: {count}" if last > layer else f"{layer}: {count}")
        layer = last + 1
    return ", ".join(parts)


def _mean(count: float) -> str:
    return f"{count:.4f}".rstrip("0").rstrip(".")
