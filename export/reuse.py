"""Another plan for a bundle on its cuts: small graphs change, stages and weights do not."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import torch

from patchsieve.contract import files, manifest, model, names, weights
from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.plan import NO_PRUNING, TEXTS, Plan, check_plan_name
from patchsieve.contract.targets import TARGETS
from patchsieve.contract.writing import one_line
from patchsieve.export import card
from patchsieve.export.families.specs import HeadShape
from patchsieve.export.graphs.decision import decide_graph
from patchsieve.export.graphs.joint import JointCls
from patchsieve.export.graphs.trace import bind, fake_weights
from patchsieve.export.graphs.vision import Vision, vision_graph
from patchsieve.export.methods import (
    HEADS,
    build_encoder,
    build_method,
    build_projector,
    check_sites,
    layers_read,
    resolve_budgets,
    store_heads,
)
from patchsieve.export.weights import DTYPES, default_dtype, stored_weights
from patchsieve.export.writer import GraphWriter

Progress = Callable[[str, float], None]


def reuse(
    bundle: Path,
    plan: Plan,
    plan_name: str,
    progress: Progress = lambda *_: None,
    seconds: dict[str, float] | None = None,
) -> manifest.Manifest:
    """Give a bundle another plan on the same cuts. Stage graphs and weights stay as they are.

    The new plan becomes the default; requests may still name the older ones. Interrupted at any
    moment, the bundle holds either its old plans or the new one too. `seconds` takes the time spent
    on each target's graphs.
    """
    check_plan_name(plan_name)
    old = files.read(bundle)
    plan = plan.with_positions(old.text.trained_rule)
    missing = [layer for layer in plan.layers if layer not in old.cuts]
    if missing:
        raise PatchsieveError(
            f"the decoder of {bundle} is not divided where the plan prunes",
            found=f"sites {plan.layers}",
            expected=f"some of {old.cuts}",
            do="export a new bundle; --cuts divides it at further layers",
        )
    if plan_name == NO_PRUNING and plan.prunes:
        raise PatchsieveError("the plan named none prunes nothing", do="choose another --plan-name")
    check_queries(old, plan)
    files.check_files(bundle, old, hashes=False)
    heads = HeadShape(old.text.num_heads, old.text.num_kv_heads, old.text.head_dim)
    dtype = DTYPES[old.precision.decoder][0]
    with fake_weights() as mode, default_dtype(DTYPES[old.precision.tower][0]):
        joint_width = None if old.scorer is None else old.scorer.width
        vision = plan_vision(plan, old.vision, old.text.hidden_size, joint_width, dtype)
    stored: dict[str, ir.ExternalTensor] = {}
    for part in ("vision", "joint") if old.scorer is not None else ("vision",):
        stored |= stored_weights(bundle / weights.FOLDER / f"{part}.safetensors")
    form = old.attention or names.DECOMPOSED
    writer = GraphWriter(bundle / "graphs", tuple(old.targets), form)
    written: dict[str, dict[str, str]] = {}
    new = old
    try:
        with one_line(bundle):
            plan, graphs = decide_graphs(
                plan,
                plan_name,
                old.text.hidden_size,
                heads,
                old.vision,
                vision.num_visual,
                dtype,
                progress,
            )
            if plan.has_vision:
                progress("tracing the vision tower", 0.8)
                graphs[names.vision(plan_name)] = vision_graph(vision, mode)
                bind(graphs[names.vision(plan_name)], stored)
            # A new generation of names, so that a reader of the old manifest finds its files whole.
            for name, graph in graphs.items():
                progress(f"writing {name}", 0.9)
                _, layer = names.decided(name) or ("", None)
                slots = next((s.slots for s in old.stages if s.last == layer), None)
                for target, path in writer.save(name, graph, slots=slots, fresh=True).items():
                    written.setdefault(target, {})[name] = path
            plan = store_heads(bundle, plan, writer.written)
            progress("writing the manifest", 0.95)
            new = _with_plan(old, bundle, plan, plan_name, written, writer)
            readme = _stage_card(bundle, new, writer)
            files.write(bundle, new)
            if readme is not None:
                readme.replace(bundle / card.FILE_NAME)
            if seconds is not None:
                seconds.update(writer.seconds)
    finally:
        # The manifest that stands decides what stays, whenever an interrupt came.
        stands = files.read(bundle).files
        replaced = {bundle / name for name in set(old.files) - set(new.files)}
        for file in {*writer.written, *replaced}:
            if file.relative_to(bundle).as_posix() not in stands:
                file.unlink(missing_ok=True)
    return new


def _stage_card(bundle: Path, new: manifest.Manifest, writer: GraphWriter) -> Path | None:
    """Write the bundle's README.md beside it, so that a full disk is met before the manifest.

    Returns:
        The file that is to take its name; None where people have written their own.
    """
    if not card.may_write(bundle):
        return None
    path = bundle / f".{card.FILE_NAME}.{os.getpid()}"
    writer.written.append(path)  # taken back with the others
    path.write_text(card.card(new, card.licence_of(bundle)), encoding="utf-8")
    return path


def check_queries(old: manifest.Manifest, plan: Plan) -> None:
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
        over = [s for s in old.stages if any(s.first <= k < s.last for k in read)]
        fixed = [target for target in old.targets if TARGETS[target].has_fixed_slots]
        if len({s.slots for s in over}) > 1 and fixed:
            same = min(s.first for s in over if s.slots == over[-1].slots)
            raise PatchsieveError(
                f"the group of {site.method} at layer {site.layer} lies over stages of the bundle "
                f"that reserve different numbers of slots, which {fixed[0]} fixes in its engines",
                found=", ".join(f"{s.slots} in layers {s.first} to {s.last - 1}" for s in over),
                expected=f"one number in layers {read[-1]} to {read[0]}",
                do=f"export a new bundle with this plan, or give the site a group of at most "
                f"{site.layer - same}",
            )


def decide_graphs(
    plan: Plan,
    plan_name: str,
    size: int,
    heads: HeadShape,
    vision: model.VisionModel,
    num_visual: int,
    dtype: torch.dtype,
    progress: Progress = lambda *_: None,
) -> tuple[Plan, dict[str, ir.Model]]:
    """Resolve a plan's budgets and trace its decisions on images of `num_visual` tokens.

    The decoder is `size` wide.
    """
    methods = [build_method(site) for site in plan.sites]
    check_sites(plan, methods)
    plan = resolve_budgets(plan, methods, num_visual)
    graphs = {}
    for done, (site, method) in enumerate(zip(plan.sites, methods, strict=True)):
        progress(f"tracing {site.method} at layer {site.layer}", done / len(methods))
        graphs[names.decide(plan_name, site.layer)] = decide_graph(
            method, site.layer, heads, vision.grid, num_visual, size, dtype
        )
    return plan, graphs


def plan_vision(
    plan: Plan,
    facts: model.VisionModel,
    size: int,
    joint_width: int | None,
    out_dtype: torch.dtype | None = None,
) -> Vision:
    """The module of a plan's vision graph.

    Args:
        plan: The plan.
        facts: The tower's measures.
        size: Width of the decoder.
        joint_width: Of the space that the scorer's text lies in, E; None without a scorer.
        out_dtype: Of the features, that of the decoder; by default the tower's own.

    Raises:
        PatchsieveError: A method is unknown, or does not fit the tower; or the plan compares words
            with images and there is no scorer, or no class token.
    """
    joint, pseudo = None, plan.pseudo_cls
    if pseudo is not None and pseudo.needs_scorer:
        others = ", ".join(text for text in TEXTS if text != pseudo.text)
        if not facts.has_cls:
            raise PatchsieveError(
                "a plan cannot compare words with a tower that has no class token",
                found=facts.model_type,
                expected=f"a pseudo_cls with one of the texts {others}",
                do="add --text all",
            )
        if joint_width is None:
            raise PatchsieveError(
                "the plan compares words with images, but there is no scorer",
                expected="the CLIP that the vision tower was taken from",
                do="add --scorer open_clip (or a Hugging Face CLIP directory) to the export of a "
                "new bundle; or do without by --text all or --text none",
            )
        joint = JointCls(facts, joint_width, has_last=pseudo.cls == "last")
    return Vision(
        facts,
        size,
        build_encoder(plan.encoder),
        build_projector(plan.projector, facts.num_layers_run),
        out_dtype=out_dtype,
        has_cls_outputs=pseudo is not None,
        joint=joint,
    )


def _with_plan(
    old: manifest.Manifest,
    bundle: Path,
    plan: Plan,
    plan_name: str,
    written: dict[str, dict[str, str]],
    writer: GraphWriter,
) -> manifest.Manifest:
    """The manifest with a plan added or replaced."""
    prefix = names.decide(plan_name, 0).rsplit(".", 1)[0] + "."

    def is_old(graph: str) -> bool:
        return graph.startswith(prefix) or graph == names.vision(plan_name)

    def without(tensors: manifest.Tensors) -> manifest.Tensors:
        return {graph: both for graph, both in tensors.items() if not is_old(graph)}

    targets, files = {}, dict(old.files)
    for target, graphs in old.targets.items():
        stale = {name: path for name, path in graphs.items() if is_old(name)}
        for path in stale.values():
            files.pop(path, None)
        new = written.get(target, {})
        targets[target] = {k: v for k, v in graphs.items() if k not in stale} | new
        files |= {path: files.hash_file(bundle / path) for path in new.values()}
    plans = old.plans | {plan_name: plan}
    sites = [site for each in plans.values() for site in each.sites]
    heads = {site.params["heads"] for site in sites if "heads" in site.params}
    files = {k: v for k, v in files.items() if not k.startswith(f"{HEADS}/")}
    for file in (path for folder in heads for path in (bundle / folder).iterdir()):
        files[file.relative_to(bundle).as_posix()] = files.hash_file(file)
    return replace(
        old,
        plans=plans,
        default_plan=plan_name,
        targets=targets,
        tensors=without(old.tensors) | writer.tensors,
        target_tensors={
            target: without(old.target_tensors.get(target, {}))
            | writer.target_tensors.get(target, {})
            for target in {**old.target_tensors, **writer.target_tensors}
        },
        files=files,
    )
