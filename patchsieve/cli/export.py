"""`patchsieve export CHECKPOINT -o BUNDLE`, and `patchsieve export --reuse BUNDLE`."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from patchsieve.cli import ivtp
from patchsieve.cli.arguments import gigabytes, integers, numbers
from patchsieve.cli.output import Progress, print_json, require
from patchsieve.contract import engine_memory as build_memory
from patchsieve.contract import names
from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.files import read
from patchsieve.contract.manifest import Limits, Manifest
from patchsieve.contract.plan import NO_PRUNING, POSITION_RULES, MethodPlan, Plan, SitePlan
from patchsieve.contract.targets import TARGETS, USUAL, WITH_ATTENTION_FORMS, those
from patchsieve.contract.trained import Trained
from patchsieve.contract.writing import check_new_bundle
from patchsieve.export.card import next_commands
from patchsieve.pruning.heads import load_config
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
    add_plan_arguments(plan)
    add("--plan-name", metavar="NAME", help="what requests call the plan")
    _add_bundle_arguments(parser)


def add_plan_arguments(group: Any) -> None:
    """Declare the shortcuts of a plan, which `cost` takes too."""
    add = group.add_argument
    add("--method", default=None, help="none (default), random, fastv, atp, topk, tome or ivtp")
    add("--sites", type=integers, metavar="LAYERS", help="layers at whose input to prune: 4,14,24")
    add(
        "--keep-ratio",
        type=numbers,
        metavar="R",
        help="fraction KEPT of what enters the decoder, one or one per site, halves rounded up "
        "(random, fastv: 0.5)",
    )
    add(
        "--rows",
        choices=("last", "mean"),
        help="fastv: attention of the last row or the question",
    )
    add(
        "--heads",
        type=Path,
        metavar="DIR",
        help="atp: learned thresholds (those of the checkpoint, if it holds any)",
    )
    add("--theta-r", type=float, help="atp without heads: constant redundancy threshold")
    add("--theta-s", type=float, help="atp without heads: constant spatial threshold")
    add(
        "--normalisation",
        choices=("minmax", "rank", "softmax", "none"),
        help="atp without heads: how its scores are scaled (default: minmax)",
    )
    add("--modality", choices=("both", "self", "cross"), help="atp: scores that count (both)")
    add("--causal", action="store_true", default=None, help="atp: eq 3 over causal pairs only")
    add(
        "--budget",
        type=integers,
        metavar="N",
        help="visual tokens per image to reserve, one per site",
    )
    add(
        "--encoder",
        metavar="METHOD",
        help="prune inside the vision tower: gtp (IVTP's groups), topk, random, evit or tome",
    )
    add(
        "--encoder-keep",
        type=int,
        metavar="N",
        help="tokens that leave the tower (64 of 576; gtp: 120)",
    )
    add(
        "--encoder-counts",
        type=integers,
        metavar="N",
        help="tokens left by each pruning: 473,389,320,263,216,178,146,120",
    )
    add("--encoder-group", type=int, metavar="L", help="prune after every L-th layer (gtp: 3)")
    add(
        "--encoder-layers",
        type=integers,
        metavar="LAYERS",
        help="prune at these tower layers; the last one alone is one shot",
    )
    add("--encoder-curve", choices=("geometric", "linear"), help="how the tokens fall from first")
    add(
        "--encoder-fusion",
        choices=("rollout", "single", "mean", "max", "multiply"),
        help="gtp: how a group's layers become one score (default: rollout)",
    )
    add(
        "--encoder-score",
        choices=("attention", "cosine"),
        help="topk: rank patches by the class token's attention (default), or by cosine with it",
    )
    add(
        "--projector",
        metavar="METHOD",
        help="prune between tower and decoder: pooling, topk or random",
    )
    add("--projector-keep", type=int, metavar="N", help="tokens left there; pooling: a square")
    add(
        "--projector-score",
        choices=("attention", "cosine"),
        help="topk: rank patches by the class token's attention (default), or by cosine with it",
    )
    add(
        "--projector-place",
        choices=("before", "after"),
        help="pooling: before (default) or after the projection",
    )
    add(
        "--positions",
        choices=POSITION_RULES,
        help="numbers of the image tokens that enter the decoder: original, with gaps; grid2d, by "
        "row and column; or contiguous (default: as the checkpoint was trained)",
    )
    ivtp.add_arguments(group)


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
        help="float32 (default), float16 or bfloat16, or by part: "
        "tower=float16,decoder=bfloat16,head=float32",
    )
    add(
        "--attention",
        choices=names.ATTENTION_FORMS,
        help=f"how {', '.join(WITH_ATTENTION_FORMS)} get float16 and bfloat16 attention: "
        "decomposed (default) in parts, its scores in float32; fused as one operator, which may be "
        "faster and which TensorRT 10.16 to 11.2 refuses or gets wrong in some shapes "
        "(python -m benchmarks.settle --only i tells on your GPU); fused-tower: the tower alone",
    )
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
    add("--quiet", action="store_true", help="no progress")


def run(args: argparse.Namespace) -> int:
    """Export or reuse."""
    require(EXPORT, "export", "export")
    if args.output is not None and args.reuse is None:  # before torch is loaded, for seconds
        check_new_bundle(args.output)
    plan = plan_of(args)
    name = args.plan_name or _free_name(plan, args.reuse)
    progress = Progress(args.quiet)
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
        raise PatchsieveError("export needs a checkpoint and -o BUNDLE, or --reuse BUNDLE")
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
    )
    return export(args.checkpoint, args.output, options, progress, spent)


_DECODER_OPTIONS = (
    "method",
    "sites",
    "keep_ratio",
    "rows",
    "heads",
    "theta_r",
    "theta_s",
    "normalisation",
    "modality",
    "causal",
    "budget",
    *ivtp.OPTIONS,
)
# Option behind --encoder- or --projector-, and the parameter that it sets.
_METHOD_OPTIONS = {
    "encoder": {
        "keep": "keep",
        "counts": "counts",
        "group": "group_layers",
        "layers": "layers",
        "curve": "curve",
        "fusion": "fusion",
        "score": "score",
    },
    "projector": {"keep": "keep", "score": "score", "place": "place"},
}


def given_shortcuts(args: argparse.Namespace) -> list[str]:
    """The shortcuts of a plan that were given, as they are typed."""
    of_methods = [
        f"{place}{option}"
        for place, options in _METHOD_OPTIONS.items()
        for option in ("", *(f"_{name}" for name in options))
    ]
    shortcuts = (*_DECODER_OPTIONS, *of_methods, "positions")
    return [_option(name) for name in shortcuts if getattr(args, name) is not None]


def plan_of(args: argparse.Namespace, size: Size | None = None) -> Plan:
    """The plan of a file, or of the shortcuts.

    Args:
        args: The parsed arguments.
        size: The model that `--method ivtp` is fitted to; by default the one that `args` names.
    """
    used = given_shortcuts(args)
    if args.plan is not None:
        if used:
            raise PatchsieveError("--plan says it all", found=", ".join(used), do="remove them")
        return Plan.from_file(args.plan)
    if args.method == "ivtp":
        return ivtp.plan(args, used, size)
    plan = Plan(
        _sites(args),
        _method(args, "encoder"),
        _method(args, "projector"),
        args.positions,
        ivtp.pseudo_cls(args) if args.method == "topk" else None,
    )
    if args.positions == "contiguous" and not plan.prunes_before:
        raise PatchsieveError(
            "--positions contiguous has no effect", expected="--encoder or --projector beside it"
        )
    return plan


def _method(args: argparse.Namespace, place: str) -> MethodPlan | None:
    """What prunes inside the tower, or behind it."""
    given = {
        parameter: getattr(args, f"{place}_{option}")
        for option, parameter in _METHOD_OPTIONS[place].items()
        if getattr(args, f"{place}_{option}") is not None
    }
    method = getattr(args, place)
    if method is not None:
        return MethodPlan(method, given)
    if given:
        raise PatchsieveError(
            "options of a pruning method, but no method",
            found=", ".join(given),
            do=f"add --{place} METHOD",
        )
    return None


def _sites(args: argparse.Namespace) -> tuple[SitePlan, ...]:
    """What prunes in the decoder."""
    used = [_option(name) for name in _DECODER_OPTIONS if getattr(args, name) is not None]
    if args.method in (None, NO_PRUNING):
        rest = [option for option in used if option != "--method"]
        if rest:
            raise PatchsieveError(
                "options of a pruning method, but no method",
                found=", ".join(rest),
                do="add --method random, fastv, atp, topk, tome or ivtp",
            )
        return ()
    ivtp.check_other_method(args)
    sites, heads = args.sites, _heads(args)
    if sites is None and heads is not None:
        sites = load_config(heads).sites
    if sites is None:
        raise PatchsieveError(f"--method {args.method} needs --sites", expected="e.g. --sites 2")
    params: dict[str, Any] = {
        "num_keep": args.num_keep,
        "rows": args.rows,
        "heads": None if heads is None else str(heads),
        "theta_r": args.theta_r,
        "theta_s": args.theta_s,
        "normalisation": args.normalisation,
        "modality": args.modality,
        "causal": args.causal,
    }
    params = {key: value for key, value in params.items() if value is not None}
    ratios = _per_site("--keep-ratio", args.keep_ratio, len(sites))
    budgets = _per_site("--budget", args.budget, len(sites))
    return tuple(
        SitePlan(
            layer,
            args.method,
            params | ({} if ratio is None else {"keep_ratio": ratio}),
            budget,
        )
        for layer, ratio, budget in zip(sites, ratios, budgets, strict=True)
    )


def _heads(args: argparse.Namespace) -> Path | None:
    """Where ATP's thresholds lie: as asked, or inside a checkpoint that was trained with them."""
    has_constants = args.theta_r is not None or args.theta_s is not None
    if args.heads is not None or args.method != "atp" or has_constants or args.checkpoint is None:
        return args.heads
    from patchsieve.export.source.checkpoint import locate, read_config

    directory = locate(args.checkpoint, args.revision, check=read_config)
    folder = Trained.of(read_config(directory)).heads
    return None if folder is None else directory / folder


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _per_site(option: str, values: list[Any] | None, count: int) -> list[Any]:
    if values is None:
        return [None] * count
    if len(values) == 1:
        return values * count
    if len(values) != count:
        raise PatchsieveError(
            f"{option} needs one value, or one per site", found=len(values), expected=count
        )
    return values


def name_of(plan: Plan) -> str:
    """A name that says what a plan does: gtp64-fastv-2-50, ivtp-64."""
    if plan.sites and all(site.method == "ivtp" for site in plan.sites):
        return f"ivtp-{plan.sites[-1].params.get('num_keep', '')}".rstrip("-")
    parts = [
        f"{method.method}{method.params.get('keep', '')}"
        for method in (plan.encoder, plan.projector)
        if method is not None
    ]
    if plan.sites:
        parts += dict.fromkeys(site.method for site in plan.sites)
        parts += [str(layer) for layer in plan.layers]
        ratios = [site.params.get("keep_ratio") for site in plan.sites]
        if len(set(map(repr, ratios))) == 1:
            ratios = ratios[:1]
        parts += [f"{ratio * 100:.0f}" for ratio in ratios if isinstance(ratio, (int, float))]
    return "-".join(parts)[:56] or NO_PRUNING


def _free_name(plan: Plan, bundle: Path | None) -> str:
    """A name that no other plan of the bundle has; the same plan keeps its own."""
    name, there = name_of(plan), {} if bundle is None else read(bundle).plans
    candidates = (f"{name}{suffix}" for suffix in ("", *(f"-v{n}" for n in range(2, 1000))))
    return next(c for c in candidates if c not in there or _is_same(plan, there[c]))


def _is_same(plan: Plan, stored: Plan) -> bool:
    """Whether a plan is the stored one, whose budgets export may have worked out."""
    rule = plan.position_rule or stored.position_rule
    if replace(plan, sites=(), position_rule=rule) != replace(stored, sites=()):
        return False
    return len(plan.sites) == len(stored.sites) and all(
        (a.layer, a.method, a.params) == (b.layer, b.method, b.params)
        and a.budget in (None, b.budget)
        for a, b in zip(plan.sites, stored.sites, strict=True)
    )


def _report(
    args: argparse.Namespace,
    bundle: Path,
    facts: Manifest,
    seconds: float,
    spent: dict[str, float],
) -> None:
    plan = facts.default_plan
    total = sum(file.size for file in facts.files.values())
    per_target = {
        target: sum(facts.files[path].size for path in graphs.values())
        for target, graphs in facts.targets.items()
    }

    is_fixed = any(TARGETS[target].has_fixed_slots for target in facts.targets)
    slots, full = facts.slots(plan), facts.slots(NO_PRUNING)
    bytes_of = [facts.row_bytes(stage) for stage in facts.stages]
    reserved = sum(a * b for a, b in zip(slots, bytes_of, strict=True))
    unpruned = sum(a * b for a, b in zip(full, bytes_of, strict=True))
    building = build_memory.expectations(facts)
    photo = Path(__file__).resolve().parents[2] / "examples" / "photo.jpg"  # of a clone
    following = next_commands(bundle, facts, photo if photo.is_file() else "photo.jpg")
    fits = not is_fixed or all(
        needed <= stage.slots for needed, stage in zip(slots, facts.stages, strict=True)
    )
    if args.json:
        print_json(
            {
                "bundle": str(bundle),
                "plan": plan,
                "plans": list(facts.plans),
                "num_visual": facts.num_visual(plan),
                "cuts": facts.cuts,
                "budgets": facts.budgets(plan),
                "slots": slots,
                "fits_engines": fits,
                "build_memory_bytes": building,
                "kv_bytes_reserved": reserved,
                "kv_bytes_reserved_unpruned": unpruned,
                "bytes": total,
                "graph_bytes": per_target,
                "seconds": round(seconds, 3),
                "target_seconds": {target: round(spent[target], 3) for target in per_target},
                "needs": {target: asdict(needs) for target, needs in facts.needs.items()},
                "next": following,
            }
        )
        return
    print(f"{bundle}: plan {plan}, {size(total)}, {seconds:.1f} s")
    for target, count in per_target.items():
        needs = f"; needs {facts.needs[target]}" if target in facts.needs else ""
        took = f"{spent[target]:.1f} s"
        print(f"  {target}: graphs of {size(count)} on the shared weights, {took}{needs}")
    if facts.plans[plan].prunes_before:
        left, full_count = facts.num_visual(plan), facts.vision.num_visual
        print(f"  tower: {left} of {full_count} visual tokens an image enter the decoder")
    for stage, budget, count in zip(facts.stages, facts.budgets(plan), slots, strict=True):
        print(
            f"  layers {stage.first}-{stage.last - 1}: "
            f"at most {budget} visual tokens an image, {count} KV slots"
        )
    print(f"  KV reservation {size(reserved)}, unpruned {size(unpruned)}")
    if building:
        largest = max(building, key=lambda graph: building[graph])
        print(
            f"  building engines takes at most about {size(building[largest])} of memory, for "
            f"{largest} ({build_memory.source(facts)}; --build-memory sets it)"
        )
    if not fits:
        engines = [stage.slots for stage in facts.stages]
        print(
            f"  engines of fixed size reserve {engines}: this plan runs on the other targets only"
        )
    if reserved == unpruned and facts.plans[plan].prunes:
        print("  the plan reserves as much as no pruning: lower it with --budget")
    print("\n".join(["next:", *(f"  {command}" for command in following)]))
