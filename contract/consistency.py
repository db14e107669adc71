"""What a manifest must agree on with itself, so that contradictions are refused and never crash."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from patchsieve.contract import names, reads
from patchsieve.contract.errors import BundleError
from patchsieve.contract.formats import FORMATS
from patchsieve.contract.graphs import STAGE, Graph, Signature, identify
from patchsieve.contract.graphs import STEP as STEP_GRAPH
from patchsieve.contract.manifest import Manifest
from patchsieve.contract.plan import GRID2D, NO_PRUNING, check_plan_name
from patchsieve.contract.precision import BYTES
from patchsieve.contract.trained import are_sections
from patchsieve.contract.weights import LAYER, PARTS, STEP

_MOST = 1 << 31  # no size reaches it
_MOST_LAYERS = 4096
_Shape = list[int | None]  # None if an axis changes


def check(facts: Manifest) -> None:
    """Refuse contradictions within a manifest."""
    _check_sizes(facts)
    _check_stages(facts)
    _check_plans(facts)
    _check_files(facts)
    _check_weights(facts)
    _check_graphs(facts)
    _check_generation(facts)


def check_inside(path: Any) -> str:
    """Refuse a path that would leave the bundle, or that no file system takes."""
    pure = PurePosixPath(path) if isinstance(path, str) else None
    if (
        pure is None
        or not pure.parts
        or pure.is_absolute()
        or ".." in pure.parts
        or "\\" in path
        or not path.isprintable()
        or max(map(len, pure.parts)) > 255
        or len(path) > 1024
    ):
        raise BundleError(
            "the manifest names a file outside the bundle",
            found=repr(path)[:120],
            expected="a relative path without ..",
            do="do not use this bundle unless you know who made it",
        )
    return path


def _check_sizes(facts: Manifest) -> None:
    text, vision, limits = facts.text, facts.vision, facts.limits
    sizes = {
        "text.vocab_size": text.vocab_size,
        "text.hidden_size": text.hidden_size,
        "text.num_layers": text.num_layers,
        "text.num_heads": text.num_heads,
        "text.num_kv_heads": text.num_kv_heads,
        "text.head_dim": text.head_dim,
        "vision.image_size": vision.image_size,
        "vision.grid": min(vision.grid),
        "vision.num_visual": vision.num_visual,
        "limits.max_text_tokens": limits.max_text_tokens,
        "limits.max_new_tokens": limits.max_new_tokens,
        "limits.max_images": limits.max_images,
        **{f"stages[{i}].slots": stage.slots for i, stage in enumerate(facts.stages)},
    }
    if facts.scorer is not None:
        # A window holds both marks and at least one token.
        sizes |= {"scorer.window - 2": facts.scorer.window - 2, "scorer.width": facts.scorer.width}
    for name, size in sizes.items():
        if not 0 < size < _MOST:
            raise BundleError(
                "the manifest holds a size that cannot be",
                found=f"{name} = {size}",
                expected=f"1 to {_MOST - 1}",
            )
    if text.num_layers > _MOST_LAYERS:
        raise BundleError(
            "the manifest holds a size that cannot be",
            found=f"text.num_layers = {text.num_layers}",
            expected=f"at most {_MOST_LAYERS}",
        )
    if not are_sections(text.rotary_sections, text.head_dim, bool(text.rotary_sections)):
        raise BundleError(
            "the decoder's rotary sections do not divide its heads",
            found=list(text.rotary_sections)[:8],
            expected=f"2 or 3 numbers whose sum is {text.head_dim // 2}, or none",
        )
    if vision.num_visual != vision.num_patches + vision.has_cls - vision.num_dropped:
        raise BundleError(
            "the visual tokens of an image are not those of its tower",
            found=vision.num_visual,
            expected=f"{vision.num_patches} patches + {int(vision.has_cls)} class token - "
            f"{vision.num_dropped} dropped",
        )


def _check_stages(facts: Manifest) -> None:
    stages = facts.stages
    joined = all(a.last == b.first for a, b in zip(stages, stages[1:], strict=False))
    if not (
        stages
        and stages[0].first == 0
        and stages[-1].last == facts.text.num_layers
        and joined
        and all(stage.num_layers > 0 for stage in stages)
    ):
        raise BundleError(
            "the stages do not cover the decoder's layers",
            found=[(stage.first, stage.last) for stage in stages[:10]],
            expected=f"0 to {facts.text.num_layers} without a gap",
        )


def _check_plans(facts: Manifest) -> None:
    for needed in (NO_PRUNING, facts.default_plan):
        if needed not in facts.plans:
            raise BundleError(
                "the manifest lacks a plan",
                found=", ".join(facts.plans)[:120],
                expected=needed[:60],
            )
    for name, plan in facts.plans.items():
        check_plan_name(name)
        if not set(plan.layers) <= set(facts.cuts):
            raise BundleError(
                f"the plan {name} prunes where the decoder is not divided",
                found=plan.layers[:10],
                expected=facts.cuts[:10],
            )
        if any((site.budget or 1) >= _MOST for site in plan.sites):
            raise BundleError(
                f"the plan {name} holds a budget that cannot be", expected=f"below {_MOST}"
            )
        if facts.position_rule(name) == GRID2D and not facts.text.rotary_sections:
            raise BundleError(f"the plan {name} numbers by a grid, which the decoder does not know")
        if plan.pseudo_cls is not None and plan.pseudo_cls.needs_scorer and facts.scorer is None:
            raise BundleError(f"the plan {name} compares words with an image, but has no scorer")
    if facts.plans[NO_PRUNING].prunes:
        raise BundleError("the plan named none prunes")


def _check_files(facts: Manifest) -> None:
    own = {
        "the tokenizer": facts.tokens.tokenizer,
        "the preprocessor": facts.preprocessor,
        "the embedding table": facts.embeddings.file,
    }
    if facts.scorer is not None:
        own["the scorer's tokenizer"] = facts.scorer.tokenizer
    graphs = [path for graphs in facts.targets.values() for path in graphs.values()]
    for path in (*facts.files, *own.values(), *graphs):
        check_inside(path)
    for what, path in (*own.items(), *(("a graph", path) for path in graphs)):
        if path not in facts.files:
            raise BundleError(f"{what} is not among the bundle's hashed files", found=path)
    table = facts.embeddings
    found = (table.dtype, *table.shape)
    expected = (facts.precision.decoder, facts.text.vocab_size, facts.text.hidden_size)
    if found != expected:
        raise BundleError(
            "the embedding table does not fit the decoder", found=found, expected=expected
        )


def _check_weights(facts: Manifest) -> None:
    """Refuse weights files that are not known, not whole in number, or of another type."""
    if facts.cache_type not in BYTES:
        raise BundleError(
            "the manifest names a type of caches that is not known",
            found=facts.cache_type[:60],
            expected=", ".join(BYTES),
        )
    layers: dict[str, list[int]] = {LAYER.name: [], STEP.name: []}
    for path, entry in facts.weights.items():
        if path not in facts.files:
            raise BundleError(
                "the manifest describes a weights file that it does not list among its files",
                found=path[:120],
                do="export the bundle again",
            )
        part = PARTS.get(entry.part)
        if part is None or entry.format not in FORMATS:
            raise BundleError(
                f"the weights file {path[:120]} holds what this version does not know",
                found=f"{entry.part[:40]} as {entry.format[:40]}",
                expected=f"{', '.join(PARTS)} as {', '.join(FORMATS)}",
                do="upgrade patchsieve",
            )
        kind = getattr(facts.precision, part.precision)
        if entry.type != kind or (entry.layer is not None) != (part in (LAYER, STEP)):
            raise BundleError(
                f"the weights file {path[:120]} does not fit what the manifest says elsewhere",
                found=f"{entry.part}, layer {entry.layer}, {entry.type[:40]}",
                expected=f"{entry.part} in {kind}",
            )
        if entry.layer is not None:
            layers[part.name].append(entry.layer)
    for name, found in layers.items():
        if sorted(found) != list(range(facts.text.num_layers)) and (found or name == LAYER.name):
            copy = "" if name == LAYER.name else ", copied for single rows,"
            raise BundleError(
                f"the manifest does not list the weights of each decoder layer{copy} once",
                found=sorted(found)[:10],
                expected=f"0 to {facts.text.num_layers - 1}",
                do="export the bundle again",
            )
    _check_steps(facts, bool(layers[STEP.name]))


def _check_steps(facts: Manifest, has_copy: bool) -> None:
    """Refuse a copy of the decoder for single rows without its graphs, or some of them alone."""
    count = len(facts.stages) if has_copy else 0
    found = sorted(name for name, graph in facts.graphs.items() if graph.kind == STEP_GRAPH)
    if found != sorted(names.step(index) for index in range(count)):
        raise BundleError(
            "the graphs for single rows are not one for each stage",
            found=", ".join(found)[:120] or "none",
            expected=f"step_0 to step_{count - 1}" if count else "none without their weights",
            do="export the bundle again",
        )


def _check_graphs(facts: Manifest) -> None:
    for target in (*facts.target_graphs, *facts.needs):
        if target not in facts.targets:
            raise BundleError("the manifest describes a target without graphs", found=target[:60])
    if facts.attention not in (None, *names.ATTENTION_FORMS):
        raise BundleError(
            "the manifest names a form of attention that is not known",
            found=facts.attention[:60],
            expected=", ".join(names.ATTENTION_FORMS),
        )
    for name, entry in facts.graphs.items():
        _check_entry(facts, name, entry)
    decisions = [
        names.decide(name, site.layer) for name, plan in facts.plans.items() for site in plan.sites
    ]
    common = _tensors(facts, names.IN_PLACE)
    every = (*common, names.COMPACT, *decisions)
    for graph in every:
        if graph not in facts.graphs:
            raise BundleError(
                f"the manifest does not list the tensors of {graph}",
                found="no entry",
                do="export the bundle again",
            )
        _check_tensors(graph, facts.graphs[graph], common.get(graph, {}))
    for graph in decisions:
        _check_reads(facts, graph)
    for target, graphs in facts.targets.items():
        form = facts.cache_forms.get(target)
        if form not in names.CACHE_FORMS:
            raise BundleError(
                f"the manifest does not say how the target {target[:60]} takes its caches",
                found=repr(form)[:60],
                expected=" or ".join(names.CACHE_FORMS),
            )
        expected = _tensors(facts, form)
        for graph in every:
            if graph not in graphs:
                raise BundleError(f"the target {target[:60]} lacks a graph", found=f"no {graph}")
            _check_tensors(graph, facts.signature(target, graph), expected.get(graph, {}))


def _check_entry(facts: Manifest, name: str, graph: Graph) -> None:
    """Refuse a graph that is not what its name says, or reads weights that are not described."""
    unlisted = [path for path in graph.weights if path not in facts.weights]
    if graph.identity != identify(name) or unlisted:
        raise BundleError(
            f"the manifest's entry of the graph {name[:60]} cannot be",
            found=f"weights {unlisted}"[:120] if unlisted else str(graph.identity)[:120],
            expected="weights files that are described" if unlisted else str(identify(name)),
            do="export the bundle again",
        )


def _check_generation(facts: Manifest) -> None:
    asked = facts.generation
    if asked.repetition_penalty == 0:
        raise BundleError("the repetition penalty cannot be 0", do="export the bundle again")
    if not all(asked.bad_words_ids) or not all(asked.stop):
        raise BundleError(
            "a bad word or a stop string of the bundle is empty", do="export the bundle again"
        )


def _check_tensors(graph: str, listed: Signature, expected: dict[str, _Shape]) -> None:
    """Refuse tensors of a graph that do not fit the model's measures."""
    found = {tensor.name: tensor.shape for tensor in (*listed.inputs, *listed.outputs)}
    for name, shape in expected.items():
        if name not in found or not _fits(found[name], shape):
            raise BundleError(
                f"the tensor {name} of {graph} does not fit what the manifest says elsewhere",
                found=list(found[name]) if name in found else "no such tensor",
                expected=["any" if size is None else size for size in shape],
            )


def _check_reads(facts: Manifest, graph: str) -> None:
    """Refuse a decision that reads what the runtime cannot give, or layers that no stage gives."""
    given = {
        tensor.name
        for stage in facts.graphs.values()
        if stage.kind == STAGE
        for tensor in stage.outputs
    }
    for tensor in facts.graphs[graph].inputs:
        what = reads.named(tensor.name)
        if what is None or (what.layer is not None and names.query(what.layer) not in given):
            lower = sorted(n for n in given if n.startswith(f"{names.QUERY}."))
            raise BundleError(
                f"{graph} reads what no stage gives",
                found=tensor.name[:60],
                expected=", ".join([*reads.TABLE, *lower]),
            )


def _tensors(facts: Manifest, caches: str) -> dict[str, dict[str, _Shape]]:
    """Shapes that follow from the model's measures, None if an axis is dynamic."""
    text, vision = facts.text, facts.vision
    side = vision.image_size
    tensors: dict[str, dict[str, _Shape]] = {
        graph: {
            names.PIXEL_VALUES: [None, 3, side, side],
            names.IMAGE_FEATURES: [None, count, text.hidden_size],
            names.IMAGE_IDS: [None, count],
        }
        for graph, count in _visual_counts(facts).items()
    }
    for graph in list(tensors):
        listed = facts.graphs.get(graph)
        if listed is not None and listed.output(names.NUM_WANTED) is not None:
            tensors[graph][names.NUM_WANTED] = [None]  # one number an image, which says how many
    for name, plan in facts.plans.items():
        if plan.pseudo_cls is not None:
            made = tensors[names.vision(name)]
            made[names.CLS_FEATURES] = [None, text.hidden_size]
            if plan.pseudo_cls.needs_scorer and facts.scorer is not None:
                made[names.CLS_JOINT] = [None, facts.scorer.width]
    if facts.scorer is not None:
        tensors[names.SCORER] = {
            names.TEXT_IDS: [None, facts.scorer.window],
            names.TEXT_FEATURES: [None, facts.scorer.window, facts.scorer.width],
        }
    is_rows = caches == names.NEW_ROWS
    cache: _Shape = [1, text.num_kv_heads, None, text.head_dim]
    rows: _Shape = [1, None, text.num_kv_heads * text.head_dim]
    axes = [len(text.rotary_sections)] if text.rotary_sections else []
    for index, stage in enumerate(facts.stages):
        shapes: dict[str, _Shape] = {
            names.HIDDEN: [1, None, text.hidden_size],
            names.POSITION_IDS: [None, *axes],
        }
        for layer in range(stage.first, stage.last):
            for name in (names.key_cache(layer), names.value_cache(layer)):
                shapes[name] = rows if is_rows else cache
                shapes[name + (names.NEW if is_rows else names.OUT)] = shapes[name]
        if stage.last == text.num_layers:
            shapes[names.LOGITS] = [1, 1, text.vocab_size]
        else:
            shapes[names.HIDDEN_OUT] = [1, None, text.hidden_size]
            shapes[names.query(stage.last - 1)] = [1, None, text.num_heads * text.head_dim]
        same = (names.stage(index), names.step(index))
        tensors |= {graph: shapes for graph in same if graph == same[0] or graph in facts.graphs}
    return tensors


def _visual_counts(facts: Manifest) -> dict[str, int]:
    """Tokens that each vision graph gives; those of a plan are in its own list of tensors."""
    counts = {names.VISION: facts.vision.num_visual}
    for name in (name for name, plan in facts.plans.items() if plan.has_vision):
        graph = names.vision(name)
        listed = facts.graphs.get(graph)
        features = None if listed is None else listed.output(names.IMAGE_FEATURES)
        shape = (None, None) if features is None else features.shape
        found = shape[1] if len(shape) == 3 else None
        if not isinstance(found, int) or not 0 < found <= facts.vision.num_visual:
            raise BundleError(
                f"the manifest does not say how many tokens {graph} gives",
                found=repr(found)[:60],
                expected=f"1 to {facts.vision.num_visual}",
            )
        counts[graph] = found
    return counts


def _fits(found: tuple[int | str, ...], shape: _Shape) -> bool:
    return len(found) == len(shape) and all(
        size is None or size == here for here, size in zip(found, shape, strict=True)
    )
