"""Another plan for a bundle on its cuts: small graphs change, stages and weights do not."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import onnx_ir as ir

from patchsieve.contract import files, names, reads
from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.graphs import STAGE
from patchsieve.contract.manifest import Manifest
from patchsieve.contract.plan import NO_PRUNING, Plan, check_plan_name
from patchsieve.contract.targets import known
from patchsieve.contract.weights import JOINT, LAYER, TOWER
from patchsieve.contract.writing import one_line
from patchsieve.export import card
from patchsieve.export.families.specs import DecoderSpec
from patchsieve.export.graphs.trace import bind, fake_weights
from patchsieve.export.graphs.vision import vision_graph
from patchsieve.export.heads import HEADS, store_heads
from patchsieve.export.methods import build_method
from patchsieve.export.plan_graphs import decide_graphs, plan_vision
from patchsieve.export.sites import layers_read
from patchsieve.export.weights import DTYPES, default_dtype, stored_weights
from patchsieve.export.writer import GraphWriter

Progress = Callable[[str, float], None]
_T = TypeVar("_T")


def reuse(
    bundle: Path,
    plan: Plan,
    plan_name: str,
    progress: Progress = lambda *_: None,
    seconds: dict[str, float] | None = None,
) -> Manifest:
    """Give a bundle another plan on the same cuts. Stage graphs and weights stay as they are.

    The new plan becomes the default; requests may still name the older ones. Interrupted at any
    moment, the bundle holds either its old plans or the new one too. `seconds` takes the time spent
    on each target's graphs.
    """
    check_plan_name(plan_name)
    old = files.read(bundle)
    plan = plan.with_positions(old.text.trained_rule)
    _check(bundle, old, plan, plan_name)
    # Half-precision attention stays as the bundle's stages have it.
    form = old.attention or names.DECOMPOSED
    writer = GraphWriter(bundle / "graphs", tuple(old.targets), form)
    with _all_or_nothing(bundle, old, writer), one_line(bundle):
        plan, graphs = _trace(bundle, old, plan, plan_name, progress)
        # A new generation of names, so that a reader of the old manifest finds its files whole.
        for name, graph in graphs.items():
            progress(f"writing {name}", 0.9)
            _, layer = names.decided(name) or ("", None)
            slots = next((s.slots for s in old.stages if s.last == layer), None)
            writer.save(name, graph, slots=slots, fresh=True)
        plan = store_heads(bundle, plan, writer.written)
        progress("writing the manifest", 0.95)
        new = _with_plan(old, bundle, plan, plan_name, writer)
        readme = _stage_card(bundle, new, writer)
        files.write(bundle, new)
        if readme is not None:
            readme.replace(bundle / card.FILE_NAME)
        if seconds is not None:
            seconds.update(writer.seconds)
    return new


def _check(bundle: Path, old: Manifest, plan: Plan, plan_name: str) -> None:
    """Refuse a plan that does not fit the bundle, and a bundle that is damaged."""
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
    if plan.has_vision and not old.vision.activation:
        raise PatchsieveError(
            "the bundle does not describe its vision tower, in which the plan prunes",
            found=f"schema {old.schema_version}",
            expected="a bundle of schema 2 or later",
            do="export a new bundle with this plan",
        )
    check_queries(old, plan)
    check_next_layers(old, plan)
    files.check_files(bundle, old, hashes=False)


def check_queries(old: Manifest, plan: Plan) -> None:
    """Refuse a plan that reads queries which the bundle's stages do not give."""
    stages = [graph for graph in old.graphs.values() if graph.kind == STAGE]
    for site in plan.sites:
        read = layers_read(build_method(site), site.layer)
        given = {k for k in read if any(stage.output(names.query(k)) for stage in stages)}
        absent = sorted(set(read) - given)
        if absent:
            raise PatchsieveError(
                f"the bundle's stages do not give what {site.method} at layer {site.layer} reads",
                found=f"no queries of layers {absent}",
                expected=f"those of layers {sorted(read)}",
                do="export a new bundle with this plan; stages give what its plan reads",
            )
        over = [s for s in old.stages if any(s.first <= k < s.last for k in read)]
        fixed = [target for target in old.targets if known(target).has_fixed_slots]
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


def next_layers(plan: Plan) -> list[int]:
    """Layers whose norm and projections the plan's decisions hold."""
    return [site.layer for site in plan.sites if reads.NEXT_LAYER in build_method(site).reads]


def check_next_layers(old: Manifest, plan: Plan) -> None:
    """Refuse a plan that needs the decoder's description, if the bundle is from before it."""
    if not old.text.inv_freq and (layers := next_layers(plan)):
        raise PatchsieveError(
            "the bundle does not describe its decoder, whose layers this plan's decisions compute",
            found=f"sites {layers} that judge by the next layer, schema {old.schema_version}",
            expected="a bundle of schema 4",
            do="export a new bundle with this plan",
        )


def _trace(
    bundle: Path, old: Manifest, plan: Plan, plan_name: str, progress: Progress
) -> tuple[Plan, dict[str, ir.Model]]:
    """The plan with its budgets, and its graphs, bound to the bundle's weights."""
    dtype = DTYPES[old.precision.decoder][0]
    mode, vision = None, None
    if plan.has_vision:
        with fake_weights() as mode, default_dtype(DTYPES[old.precision.tower][0]):
            joint_width = None if old.scorer is None else old.scorer.width
            vision = plan_vision(plan, old.vision, old.text.hidden_size, joint_width, dtype)
    plan, graphs = decide_graphs(
        plan,
        plan_name,
        DecoderSpec.of_facts(old.text),
        old.vision,
        old.vision.num_visual if vision is None else vision.num_visual,
        dtype,
        progress,
    )
    if vision is not None:
        progress("tracing the vision tower", 0.8)
        graphs[names.vision(plan_name)] = vision_graph(vision, mode)
    read, stored = next_layers(plan), dict[str, ir.ExternalTensor]()
    for path, entry in old.weights.items():
        is_layer = entry.part == LAYER.name and entry.layer in read  # not its copy for single rows
        if entry.part in (TOWER.name, JOINT.name) or is_layer:
            stored |= stored_weights(bundle / path)
    for graph in graphs.values():
        bind(graph, stored)
    return plan, graphs


@contextmanager
def _all_or_nothing(bundle: Path, old: Manifest, writer: GraphWriter) -> Iterator[None]:
    """Remove what the bundle's manifest does not list, whenever an interrupt comes."""
    try:
        yield
    finally:
        # The manifest that is on disk decides what stays.
        listed = files.read(bundle).files
        replaced = {bundle / name for name in set(old.files) - set(listed)}
        for file in {*writer.written, *replaced}:
            if file.relative_to(bundle).as_posix() not in listed:
                file.unlink(missing_ok=True)


def _stage_card(bundle: Path, new: Manifest, writer: GraphWriter) -> Path | None:
    """Write the bundle's README.md beside it, so that a full disk is met before the manifest.

    Returns:
        The file that is to take its name; None if people have written their own.
    """
    if not card.may_write(bundle):
        return None
    path = bundle / f".{card.FILE_NAME}.{os.getpid()}"
    writer.written.append(path)  # taken back with the others
    path.write_text(card.card(new, card.licence_of(bundle)), encoding="utf-8")
    return path


def _with_plan(
    old: Manifest, bundle: Path, plan: Plan, plan_name: str, writer: GraphWriter
) -> Manifest:
    """The manifest with a plan added or replaced."""
    stale = {name for name, graph in old.graphs.items() if graph.identity.plan == plan_name}

    def without(graphs: dict[str, _T]) -> dict[str, _T]:
        return {name: each for name, each in graphs.items() if name not in stale}

    targets, listed = {}, dict(old.files)
    for target, graphs in old.targets.items():
        for name in stale & set(graphs):
            listed.pop(graphs[name], None)
        new = writer.paths[target]
        targets[target] = without(graphs) | new
        listed |= {path: files.hash_file(bundle / path) for path in new.values()}
    plans = old.plans | {plan_name: plan}
    sites = [site for each in plans.values() for site in each.sites]
    heads = {site.params["heads"] for site in sites if "heads" in site.params}
    listed = {k: v for k, v in listed.items() if not k.startswith(f"{HEADS}/")}
    for file in (path for folder in heads for path in (bundle / folder).iterdir()):
        listed[file.relative_to(bundle).as_posix()] = files.hash_file(file)
    own = {**old.target_graphs, **writer.target_graphs}
    return replace(
        old,
        plans=plans,
        default_plan=plan_name,
        targets=targets,
        graphs=without(old.graphs) | writer.graphs,
        target_graphs={
            target: without(old.target_graphs.get(target, {}))
            | writer.target_graphs.get(target, {})
            for target in own
        },
        files=listed,
    )
