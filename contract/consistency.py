"""What a manifest must agree on with itself, so that contradictions are refused and never crash."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from patchsieve.contract import names, reads
from patchsieve.contract.errors import BundleError
from patchsieve.contract.plan import GRID2D, NO_PRUNING, check_plan_name
from patchsieve.contract.trained import are_sections

if TYPE_CHECKING:
    from patchsieve.contract.manifest import Manifest

_MOST = 1 << 31  # no size reaches it
_MOST_LAYERS = 4096
_Shape = list[int | None]
_SIDES = ("inputs", "outputs")


def check(facts: Manifest) -> None:
    """Refuse contradictions within a manifest."""
    _check_sizes(facts)
    _check_stages(facts)
    _check_plans(facts)
    _check_files(facts)
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


def _check_graphs(facts: Manifest) -> None:
    for target in (*facts.target_tensors, *facts.needs):
        if target not in facts.targets:
            raise BundleError("the manifest describes a target without graphs", found=target[:60])
    decisions = [
        names.decide(name, site.layer) for name, plan in facts.plans.items() for site in plan.sites
    ]
    if facts.attention not in (None, *names.ATTENTION_FORMS):
        raise BundleError(
            "the manifest names a form of attention that is not known",
            found=facts.attention[:60],
            expected=", ".join(names.ATTENTION_FORMS),
        )
    for target, graphs in facts.targets.items():
        expected = _tensors(facts, facts.caches(target))
        every = (*expected, names.COMPACT, *decisions)
        for graph in every:
            if graph not in graphs:
                raise BundleError(f"the target {target[:60]} lacks a graph", found=f"no {graph}")
        listed = facts.tensors_of(target)
        for graph in every:
            # The runtime reads some from the common list, whatever a target has of its own.
            for tensors in (facts.tensors, listed):
                _check_sides(graph, tensors.get(graph))
            _check_tensors(graph, listed[graph], expected.get(graph, {}))
    for graph in decisions:
        _check_reads(facts, graph)


def _check_generation(facts: Manifest) -> None:
    asked = facts.generation
    if asked.repetition_penalty == 0:
        raise BundleError("the repetition penalty cannot be 0", do="export the bundle again")
    if not all(asked.bad_words_ids) or not all(asked.stop):
        raise BundleError(
            "a bad word or a stop string of the bundle is empty", do="export the bundle again"
        )


def _check_sides(graph: str, listed: dict[str, Any] | None) -> None:
    """Refuse a graph whose inputs or outputs are not listed."""
    missing = [side for side in _SIDES if side not in (listed or {})]
    if missing:
        raise BundleError(
            f"the manifest does not list the tensors of {graph}",
            found="no entry" if listed is None else f"no {' and no '.join(missing)}",
            expected=" and ".join(_SIDES),
            do="export the bundle again",
        )


def _check_tensors(graph: str, listed: dict[str, Any], expected: dict[str, _Shape]) -> None:
    """Refuse tensors of a graph that are not well formed or do not fit the model's measures."""
    found: dict[str, Any] = {}
    for side in _SIDES:
        for tensor in listed[side]:
            is_named = all(isinstance(tensor.get(key), str) for key in ("name", "dtype"))
            if not is_named or not is_shape(tensor.get("shape")):
                raise BundleError(
                    f"the manifest's tensors of {graph} are not well formed",
                    found=repr(tensor)[:120],
                    expected="name, dtype and shape",
                )
            found[tensor["name"]] = tensor["shape"]
    for name, shape in expected.items():
        if name not in found or not _fits(found[name], shape):
            raise BundleError(
                f"the tensor {name} of {graph} does not fit what the manifest says elsewhere",
                found=found.get(name, "no such tensor"),
                expected=["any" if size is None else size for size in shape],
            )


def _check_reads(facts: Manifest, graph: str) -> None:
    """Refuse a decision that reads what the runtime cannot give, or layers that no stage gives."""
    given = {
        str(tensor.get("name"))
        for index in range(len(facts.stages))
        for tensor in facts.tensors.get(names.stage(index), {}).get("outputs", [])
    }
    for tensor in facts.tensors.get(graph, {}).get("inputs", []):
        name = str(tensor.get("name"))
        what = reads.named(name)
        if what is None or (what.layer is not None and names.query(what.layer) not in given):
            lower = sorted(n for n in given if n.startswith(f"{names.QUERY}."))
            raise BundleError(
                f"{graph} reads what no stage gives",
                found=name[:60],
                expected=", ".join([*reads.TABLE, *lower]),
            )


def _tensors(facts: Manifest, caches: str) -> dict[str, dict[str, _Shape]]:
    """Shapes that follow from the model's measures, None where an axis is dynamic."""
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
        outputs = facts.tensors.get(graph, {}).get("outputs", [])
        if any(tensor.get("name") == names.NUM_WANTED for tensor in outputs):
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
        tensors[names.stage(index)] = shapes
    return tensors


def _visual_counts(facts: Manifest) -> dict[str, int]:
    """Tokens that each vision graph gives; those of a plan stand in its own list of tensors."""
    counts = {names.VISION: facts.vision.num_visual}
    for name in (name for name, plan in facts.plans.items() if plan.has_vision):
        graph = names.vision(name)
        outputs = facts.tensors.get(graph, {}).get("outputs", [])
        shape = next((t["shape"] for t in outputs if _is_features(t)), [None, None])
        found = shape[1]
        if type(found) is not int or not 0 < found <= facts.vision.num_visual:
            raise BundleError(
                f"the manifest does not say how many tokens {graph} gives",
                found=repr(found)[:60],
                expected=f"1 to {facts.vision.num_visual}",
            )
        counts[graph] = found
    return counts


def _is_features(tensor: dict[str, Any]) -> bool:
    shape = tensor.get("shape")
    is_listed = isinstance(shape, list) and is_shape(shape) and len(shape) == 3
    return is_listed and tensor.get("name") == names.IMAGE_FEATURES


def is_shape(shape: Any) -> bool:
    """Whether a JSON value is a list of lengths and axes' names."""
    return isinstance(shape, list) and all(type(size) in (int, str) for size in shape)


def _fits(found: list[int | str], shape: _Shape) -> bool:
    return len(found) == len(shape) and all(
        size is None or size == here for here, size in zip(found, shape, strict=True)
    )
