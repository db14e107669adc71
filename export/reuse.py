"""Another plan for a bundle on its cuts: decision graphs change, stages and weights do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import torch

from patchsieve import manifest, names
from patchsieve.errors import PatchsieveError
from patchsieve.export.decision import decide_graph
from patchsieve.export.families.specs import HeadShape
from patchsieve.export.graphs import GraphWriter
from patchsieve.export.methods import (
    HEADS,
    build_method,
    check_sites,
    layers_read,
    resolve_budgets,
    store_heads,
)
from patchsieve.export.weights import DTYPES
from patchsieve.plan import NO_PRUNING, Plan, check_plan_name
from patchsieve.writing import one_line

Progress = Callable[[str, float], None]


def reuse(
    bundle: Path, plan: Plan, plan_name: str, progress: Progress = lambda *_: None
) -> manifest.Manifest:
    """Give a bundle another plan on the same cuts. Stage graphs and weights stay as they are.

    The new plan becomes the default; requests may still name the older ones. Interrupted at any
    moment, the bundle holds either its old plans or the new one too.
    """
    check_plan_name(plan_name)
    old = manifest.read(bundle)
    missing = [layer for layer in plan.layers if layer not in old.cuts]
    if missing:
        raise PatchsieveError(
            f"the decoder of {bundle} is not divided where the plan prunes",
            found=f"sites {plan.layers}",
            expected=f"some of {old.cuts}",
            do="export a new bundle; --cuts divides it at further layers",
        )
    if plan_name == NO_PRUNING and plan.sites:
        raise PatchsieveError("the plan named none prunes nothing", do="choose another --plan-name")
    _check_queries(old, plan)
    manifest.check_files(bundle, old, hashes=False)
    heads = HeadShape(old.text.num_heads, old.text.num_kv_heads, old.text.head_dim)
    dtype = DTYPES[old.precision][0]
    writer = GraphWriter(bundle / "graphs", tuple(old.targets))
    written: dict[str, dict[str, str]] = {}
    new = old
    try:
        with one_line(bundle):
            plan, graphs = decide_graphs(plan, plan_name, heads, old.vision, dtype, progress)
            # A new generation of names, so that a reader of the old manifest finds its files whole.
            for site, (name, graph) in zip(plan.sites, graphs.items(), strict=True):
                progress(f"writing {name}", 0.9)
                slots = next(stage.slots for stage in old.stages if stage.last == site.layer)
                for target, path in writer.save(name, graph, slots=slots, fresh=True).items():
                    written.setdefault(target, {})[name] = path
            plan = store_heads(bundle, plan, writer.written)
            progress("writing the manifest", 0.95)
            new = _with_plan(old, bundle, plan, plan_name, written, writer.tensors)
            manifest.write(bundle, new)
    finally:
        # The manifest that stands decides what stays, whenever an interrupt came.
        stands = manifest.read(bundle).files
        replaced = {bundle / name for name in set(old.files) - set(new.files)}
        for file in {*writer.written, *replaced}:
            if file.relative_to(bundle).as_posix() not in stands:
                file.unlink(missing_ok=True)
    return new


def _check_queries(old: manifest.Manifest, plan: Plan) -> None:
    """Refuse a plan that reads queries which the bundle's stages do not give."""
    given = {
        tensor["name"]
        for index in range(len(old.stages))
        for tensor in old.tensors[names.stage(index)]["outputs"]
    }
    for site in plan.sites:
        read = layers_read(build_method(site), site.layer)
        absent = [layer for layer in read if names.query(layer) not in given]
        if absent:
            raise PatchsieveError(
                f"the bundle's stages do not give what {site.method} at layer {site.layer} reads",
                found=f"no queries of layers {sorted(absent)}",
                expected=f"those of layers {sorted(read)}",
                do="export a new bundle with this plan; stages give what its plan reads",
            )


def decide_graphs(
    plan: Plan,
    plan_name: str,
    heads: HeadShape,
    vision: manifest.VisionModel,
    dtype: torch.dtype,
    progress: Progress = lambda *_: None,
) -> tuple[Plan, dict[str, ir.Model]]:
    """Resolve a plan's budgets and trace its decisions."""
    methods = [build_method(site) for site in plan.sites]
    check_sites(plan, methods)
    plan = resolve_budgets(plan, methods, vision.num_visual)
    graphs = {}
    for done, (site, method) in enumerate(zip(plan.sites, methods, strict=True)):
        progress(f"tracing {site.method} at layer {site.layer}", done / len(methods))
        graphs[names.decide(plan_name, site.layer)] = decide_graph(
            method, site.layer, heads, vision.grid, vision.num_visual, dtype
        )
    return plan, graphs


def _with_plan(
    old: manifest.Manifest,
    bundle: Path,
    plan: Plan,
    plan_name: str,
    written: dict[str, dict[str, str]],
    tensors: dict[str, dict[str, list[dict[str, object]]]],
) -> manifest.Manifest:
    """The manifest with a plan added or replaced."""
    prefix = names.decide(plan_name, 0).rsplit(".", 1)[0] + "."
    targets, files = {}, dict(old.files)
    for target, graphs in old.targets.items():
        stale = {name: path for name, path in graphs.items() if name.startswith(prefix)}
        for path in stale.values():
            files.pop(path, None)
        new = written.get(target, {})
        targets[target] = {k: v for k, v in graphs.items() if k not in stale} | new
        files |= {path: manifest.hash_file(bundle / path) for path in new.values()}
    plans = old.plans | {plan_name: plan}
    sites = [site for each in plans.values() for site in each.sites]
    heads = {site.params["heads"] for site in sites if "heads" in site.params}
    files = {k: v for k, v in files.items() if not k.startswith(f"{HEADS}/")}
    for file in (path for folder in heads for path in (bundle / folder).iterdir()):
        files[file.relative_to(bundle).as_posix()] = manifest.hash_file(file)
    return replace(
        old,
        plans=plans,
        default_plan=plan_name,
        targets=targets,
        tensors={k: v for k, v in old.tensors.items() if not k.startswith(prefix)} | tensors,
        files=files,
    )
