"""Manifests of schemas 1 to 3 in the form of today: the only place that knows what they left out.

They name the tensors of each graph and nothing else of it. What a graph is follows from its name,
what a weights file holds from the file's name, how caches are taken from the tensors of the first
stage. A bundle of half-precision graphs that does not say how TensorRT gets attention is from
before there was a choice: it has the single operator.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from patchsieve.contract import names
from patchsieve.contract.errors import BundleError
from patchsieve.contract.graphs import SCORER, STAGE, VISION, Identity, Signature, identify
from patchsieve.contract.manifest import Stage
from patchsieve.contract.model import Embeddings, TextModel
from patchsieve.contract.plan import Plan
from patchsieve.contract.precision import BYTES, Precision
from patchsieve.contract.reading import read_as
from patchsieve.contract.targets import TARGETS
from patchsieve.contract.weights import HEAD, JOINT, LAYER, TOWER, of_path
from patchsieve.contract.weights import SCORER as SCORER_WEIGHTS

_CONTENT = "the manifest's content"
_Sizes = dict[str, int]  # path of a weights file -> bytes


def modernise(data: dict[str, Any], precision: Precision, plans: dict[str, Plan]) -> dict[str, Any]:
    """The content of an older manifest as one of today has it.

    Args:
        data: What JSON holds; no part of it has been checked, and it is not changed.
        precision: Type of each part.
        plans: The bundle's plans, which `data` no longer holds.

    Raises:
        BundleError: It is not well formed.
    """
    data = dict(data)
    tensors = data.pop("tensors", {})
    own = data.pop("target_tensors", {})
    targets = data.get("targets")
    sides = read_as(dict[str, Signature], tensors, f"{_CONTENT}.tensors")
    own_sides = read_as(dict[str, dict[str, Signature]], own, f"{_CONTENT}.target_tensors")
    read_as(dict[str, dict[str, str]], targets, f"{_CONTENT}.targets")
    sizes = _weights(data)
    graphs = {}
    for graph in sides:
        identity = identify(graph)
        if identity is None:
            raise BundleError("the manifest lists a graph that is not known", found=graph[:60])
        reads = _read_by(identity, data, precision, plans, sizes)
        graphs[graph] = tensors[graph] | {
            "identity": asdict(identity),
            "weights": [path for path in reads if path in sizes],
        }
    entries = {path: of_path(path) for path in sizes}
    first = names.stage(0)
    return data | {
        "vision": _vision(data.get("vision")),
        "graphs": graphs,
        "target_graphs": own,
        "cache_forms": {
            target: _cache_form(own_sides.get(target, {}).get(first) or sides.get(first))
            for target in targets or {}
        },
        "cache_type": precision.decoder,
        "weights": {
            path: asdict(entry[0].entry(precision, entry[1]))
            for path, entry in entries.items()
            if entry is not None
        },
        "attention": data.get("attention") or _attention(targets or {}, precision),
    }


def _vision(vision: Any) -> Any:
    """The tower of a manifest of schema 1, which says too little to trace it again.

    An empty `activation` marks that: `export --reuse` refuses plans that prune in such a tower.
    """
    if not isinstance(vision, dict) or "activation" in vision:
        return vision
    read = read_as(_OldVision, vision, f"{_CONTENT}.vision")
    has_cls = read.model_type == "clip_vision_model"
    return vision | {
        "num_dropped": max(0, read.grid[0] * read.grid[1] + has_cls - read.num_visual),
        "has_cls": has_cls,
        "has_pre_norm": has_cls,
        "patch_bias": not has_cls,
        "norm_eps": 0.0,
        "activation": "",
        "feature_layers": [read.num_layers_run],
        "projector_activation": "",
        "projector_bias": True,
    }


@dataclass(frozen=True)
class _OldVision:
    """What schema 1 says of the tower."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_layers_run: int
    num_heads: int
    image_size: int
    patch_size: int
    grid: tuple[int, int]
    num_visual: int


def _weights(data: dict[str, Any]) -> _Sizes:
    files = read_as(dict[str, Any], data.get("files"), f"{_CONTENT}.files")
    return {
        path: file["size"]
        for path, file in files.items()
        if of_path(path) is not None and isinstance(file, dict) and type(file.get("size")) is int
    }


def _read_by(
    identity: Identity,
    data: dict[str, Any],
    precision: Precision,
    plans: dict[str, Plan],
    sizes: _Sizes,
) -> list[str]:
    """The weights files that a graph points into."""
    if identity.kind == SCORER:
        return [SCORER_WEIGHTS.path()]
    if identity.kind == VISION:
        # The tower of a plan that compares words with an image carries its class token further.
        pseudo = plans[identity.plan].pseudo_cls if identity.plan in plans else None
        return [TOWER.path(), *([JOINT.path()] if pseudo and pseudo.needs_scorer else [])]
    if identity.kind != STAGE or identity.stage is None:
        return []
    stages = read_as(list[Stage], data.get("stages"), f"{_CONTENT}.stages")
    if identity.stage >= len(stages):
        return []
    stage = stages[identity.stage]
    layers = [LAYER.path(layer) for layer in range(stage.first, min(stage.last, 1 << 12))]
    text = read_as(TextModel, data.get("text"), f"{_CONTENT}.text")
    if stage.last != text.num_layers:
        return layers
    matrix = text.vocab_size * text.hidden_size * BYTES[precision.head]
    if sizes.get(HEAD.path(), 0) >= matrix:
        return [*layers, HEAD.path()]
    # The output matrix is the table of embeddings.
    table = read_as(Embeddings, data.get("embeddings"), f"{_CONTENT}.embeddings")
    return [*layers, HEAD.path(), table.file]


def _cache_form(stage: Signature | None) -> str:
    """How the first stage takes its caches."""
    outputs = () if stage is None else stage.outputs
    is_rows = any(tensor.name.endswith(names.NEW) for tensor in outputs)
    return names.NEW_ROWS if is_rows else names.IN_PLACE


def _attention(targets: dict[str, Any], precision: Precision) -> str | None:
    """How the graphs of a bundle spell half-precision attention that does not say."""
    has_choice = any(name in TARGETS and TARGETS[name].attention_forms for name in targets)
    is_half = {precision.tower, precision.decoder} != {"float32"}
    return names.FUSED if has_choice and is_half else None
