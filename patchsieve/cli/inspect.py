"""`patchsieve inspect BUNDLE`: what is inside and what it reserves."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from patchsieve import inspection, memory
from patchsieve.cli.output import Progress, print_json
from patchsieve.contract.manifest import Needs
from patchsieve.contract.model import Generation
from patchsieve.contract.plan import NO_PRUNING
from patchsieve.tables import flops, plural, size, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("bundle", type=Path)
    add("--plan", metavar="NAME", help="show only this plan; all by default")
    limit = "of the request whose FLOPs are counted (default: the bundle's limit)"
    add("--text-tokens", type=int, metavar="T", help=f"text tokens {limit}")
    add("--images", type=int, help=f"images {limit}")
    add("--tensors", action="store_true", help="names, dtypes and shapes of each graph's tensors")
    add("--files", action="store_true", help="every file with its size")
    add("--check", action="store_true", help="read every file again and compare it with its hash")
    add("--quiet", action="store_true", help="no progress")


def run(args: argparse.Namespace) -> int:
    """Print what the manifest says."""
    facts = inspection.inspect(args.bundle, args.plan, args.text_tokens, args.images)
    if args.tensors:
        facts |= inspection.tensors(args.bundle)
    if args.check:
        progress = Progress.of(args)
        facts["checked_files"] = inspection.check(args.bundle, progress)
        progress.done()
    if args.json:
        print_json(facts)
        return 0
    blocks = [_model(facts), *_plans(facts), _sizes(facts), _targets(facts), _engines(facts)]
    if args.files:
        blocks.append(table(("file", "size"), [(k, size(v)) for k, v in facts["files"].items()]))
    if args.tensors:
        blocks.append(_tensors(facts))
    if args.check:
        blocks.append(f"{facts['checked_files']} files compared with their hashes: all intact")
    print("\n\n".join(block for block in blocks if block))
    return 0


def _model(facts: dict[str, Any]) -> str:
    text, vision, limits = facts["text"], facts["vision"], facts["limits"]
    rows, columns = vision["grid"]
    run = f"{vision['num_layers_run']} of {vision['num_layers']}"
    lines = [
        (
            f"{facts['bundle']}: {facts['checkpoint']}",
            facts["precision"],
            size(facts["bytes"]),
            f"made by patchsieve {facts['patchsieve_version']}",
        ),
        (
            f"decoder  {text['model_type']}",
            f"{text['num_layers']} layers x {text['hidden_size']}",
            f"{text['num_heads']} query and {text['num_kv_heads']} KV heads x {text['head_dim']}",
            f"{text['vocab_size']} tokens",
        ),
        (
            f"tower    {vision['model_type']}",
            f"{run} layers x {vision['hidden_size']}",
            f"{vision['image_size']} px",
            f"{rows} x {columns} patches",
            f"{vision['num_visual']} tokens an image",
        ),
        (
            f"limits   {limits['max_text_tokens']} text tokens",
            f"{limits['max_new_tokens']} new tokens",
            plural(limits["max_images"], "image"),
        ),
    ]
    lines += [(line,) for line in _generation(facts["generation"])]
    if facts["attention"]:
        lines.append((f"half-precision attention for TensorRT: {facts['attention']}",))
    return "\n".join(", ".join(line) for line in lines)


def _generation(asked: dict[str, Any]) -> list[str]:
    """What the checkpoint's generation_config.json asks of every answer, if anything."""
    followed = Generation(**asked | {"not_followed": ()}).options()
    lines = []
    if followed:
        texts = [f"{name} {value}" for name, value in followed.items()]
        texts = [text if len(text) <= 60 else text[:57] + "..." for text in texts]
        lines.append(f"answers  {', '.join(texts)}")
    if asked["not_followed"]:
        lines.append(f"         not followed: {', '.join(asked['not_followed'])}")
    return lines


def _plans(facts: dict[str, Any]) -> list[str]:
    return [_plan(facts, name, costs) for name, costs in facts["plans"].items()]


def _plan(facts: dict[str, Any], name: str, costs: dict[str, Any]) -> str:
    lines = [f"plan {name}" + (" (default)" if name == facts["default_plan"] else "")]
    if name != NO_PRUNING:
        lines[0] += f", positions: {costs['position_rule']}"
    where = {"encoder": "inside the tower", "projector": "after the tower"}
    pruning = [(text, costs[place]) for place, text in where.items() if costs[place]]
    pruning += [(f"before layer {site['layer']}", site) for site in costs["sites"]]
    for text, method in pruning:
        params = ", ".join(f"{key} {value}" for key, value in method["params"].items())
        lines.append(f"  {text}: {method['method']} {params}".rstrip())
    lines.append(_flops(facts, costs))
    rows: list[tuple[Any, ...]] = [
        (
            f"{stage['layers'][0]}-{stage['layers'][1]}",
            stage["budget"],
            stage["slots"],
            stage["slots_unpruned"],
            size(stage["kv_bytes"]),
            size(stage["kv_bytes_unpruned"]),
        )
        for stage in costs["stages"]
    ]
    used, full = costs["kv_bytes"], costs["kv_bytes_unpruned"]
    rows.append((f"all, {used / full:.0%}", "", "", "", size(used), size(full)))
    header = ("layers", "tokens an image", "slots", "unpruned", "KV bytes reserved", "unpruned")
    return "\n".join([*lines, table(header, rows, indent=2)])


def _flops(facts: dict[str, Any], costs: dict[str, Any]) -> str:
    """FLOPs by part, each with its share of the unpruned part."""
    pruned, full = costs["flops"], costs["flops_unpruned"]
    parts = [
        f"{part} {flops(pruned[part])}"
        + (f" ({pruned[part] / full[part]:.0%})" if full[part] else "")
        for part in ("vision", "llm", "scorer", "total")
        if pruned[part]
    ]
    request = f"{plural(facts['images'], 'image')} and {plural(facts['text_tokens'], 'text token')}"
    bound = ", at most" if costs["is_upper_bound"] else ""
    return f"  FLOPs of {request}{bound}: {', '.join(parts)}"


def _sizes(facts: dict[str, Any]) -> str:
    """Weights by part and format, all other files, and the boards that hold them."""
    graphs = facts["parts"]["graphs"]
    other = facts["bytes"] - facts["weight_bytes"] - graphs
    held = memory.weights_table(facts["weights"], {"graphs": graphs, "other files": other})
    return f"{held}\n\n{memory.places_table(facts)}"


def _targets(facts: dict[str, Any]) -> str:
    """Graphs of each target, the weights apart, which all of them share."""
    rows: list[tuple[str, str]] = []
    for target, made in facts["targets"].items():
        rows.append((f"{target}, {len(made['graphs'])} graphs", size(made["bytes"])))
        rows += [(f"  {name}", size(graph["bytes"])) for name, graph in made["graphs"].items()]
    needs = [
        f"{target} needs {Needs(**made['needs'])}; caches: {made['caches']}"
        for target, made in facts["targets"].items()
        if made["needs"] is not None
    ]
    return "\n".join([table(("target", "size without weights"), rows), "", *needs]).rstrip()


def _engines(facts: dict[str, Any]) -> str:
    if not facts["engines"]:
        return "engines: none built"
    rows = [(k, len(v["files"]), size(v["bytes"])) for k, v in facts["engines"].items()]
    return table(("engines", "files", "size"), rows)


def _tensors(facts: dict[str, Any]) -> str:
    blocks = []
    departing = {
        f"{graph} for {target}": tensors
        for target, graphs in facts["target_tensors"].items()
        for graph, tensors in graphs.items()
    }
    for graph, tensors in (facts["tensors"] | departing).items():
        rows = [
            (f"{way[:-1]} {tensor['name']}", tensor["dtype"], "x".join(map(str, tensor["shape"])))
            for way in ("inputs", "outputs")
            for tensor in tensors[way]
        ]
        blocks.append(f"{graph}\n" + table(("tensor", "dtype", "shape"), rows, indent=2))
    return "\n\n".join(blocks)
