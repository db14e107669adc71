"""What an export is to write, decided before the first byte: a blueprint of the bundle."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch._subclasses import FakeTensorMode

from patchsieve.contract import formats
from patchsieve.contract.errors import PatchsieveError, UnsupportedModelError
from patchsieve.contract.formats import FLOAT, FORMATS, Formats, names_matched
from patchsieve.contract.manifest import Limits
from patchsieve.contract.manifest import Stage as StageEntry
from patchsieve.contract.model import TextModel, VisionModel
from patchsieve.contract.plan import Plan
from patchsieve.contract.precision import Precision
from patchsieve.contract.sizes import groups
from patchsieve.contract.trained import Trained
from patchsieve.contract.weights import (
    EMBEDDINGS,
    HEAD,
    JOINT,
    LAYER,
    SCORER,
    STEP,
    TOWER,
    Part,
    WeightsFile,
)
from patchsieve.export.cuts import cuts_for
from patchsieve.export.families import Family, family_of
from patchsieve.export.families.specs import DecoderSpec
from patchsieve.export.graphs.joint import JointCls, JointWeights
from patchsieve.export.graphs.scorer import TextScorer
from patchsieve.export.graphs.stage import Stage
from patchsieve.export.graphs.trace import fake_weights
from patchsieve.export.graphs.vision import Vision
from patchsieve.export.methods import build_method
from patchsieve.export.options import ExportOptions as ExportOptions
from patchsieve.export.plan_graphs import decide_graphs, plan_vision
from patchsieve.export.quantise.guide import guide
from patchsieve.export.quantise.hints import NOTHING
from patchsieve.export.quantise.statistics import Statistics
from patchsieve.export.sites import check_sites, layers_read, side_layer
from patchsieve.export.source.checkpoint import Checkpoint
from patchsieve.export.source.clip import ClipSource, open_source
from patchsieve.export.weights import (
    DTYPES,
    HintsOf,
    Source,
    Weight,
    default_dtype,
    layout,
    weights_of,
)

_LOG = logging.getLogger(__name__)
EMBEDDING_TABLE = "embed_tokens.weight"  # [V, C]
_HEAD = "lm_head"
OUTPUT_MATRIX = f"{_HEAD}.weight"  # [V, C]; [C, V] where it is stored in another format than float


@dataclass(frozen=True)
class Modules:
    """The torch modules of a bundle's graphs, which hold no weights in memory.

    Attributes:
        mode: The fake tensors' mode in which they were built.
        vision: The tower and the projector where nothing prunes before the decoder.
        plan_vision: The same for the plan.
        stages: The decoder, divided.
        scorer: CLIP's text tower; None without one.
        joint: What carries an image into the scorer's space; None without one.
    """

    mode: FakeTensorMode
    vision: Vision
    plan_vision: Vision
    stages: tuple[Stage, ...]
    scorer: TextScorer | None
    joint: JointCls | None


@dataclass(frozen=True)
class StoredFile:
    """A weights file to be written.

    Attributes:
        path: In the bundle.
        entry: What the manifest says of it.
        weights: Its tensors, in their order.
        source: Where they come from.
        hints: What guides the rounding of its matrices.
    """

    path: str
    entry: WeightsFile
    weights: tuple[Weight, ...]
    source: Source
    hints: HintsOf = lambda _: NOTHING

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors."""
        stored = (layout(weight, self.entry.type) for weight in self.weights)
        return sum(part.num_bytes for parts in stored for part in parts)


@dataclass(frozen=True)
class Job:
    """One export.

    Attributes:
        directory: The checkpoint.
        config: Its config, as transformers reads it.
        options: What the user asks for.
        family: The checkpoint's model class.
        spec: The decoder.
        vision: Measures of the tower and the projector.
        preprocessor: Fields of the runtime's `Preprocessor`.
        plan: The plan, with its budgets and its position rule.
        no_pruning: The plan that prunes nothing.
        clip: The CLIP that the scorer comes from.
        modules: What the graphs are traced from.
        stages: Layers and slots of each stage.
        weights: The files to be written.
        has_own_head: The output matrix is stored apart from the table of embeddings.
        decisions: The traced decisions of the plan, by name.
    """

    directory: Path
    config: Any
    options: ExportOptions
    family: Family
    spec: DecoderSpec
    vision: VisionModel
    preprocessor: dict[str, Any]
    plan: Plan
    no_pruning: Plan
    clip: ClipSource | None
    modules: Modules
    stages: tuple[StageEntry, ...]
    weights: tuple[StoredFile, ...]
    has_own_head: bool
    decisions: dict[str, ir.Model]

    @property
    def precision(self) -> Precision:
        """Type of each part."""
        return self.options.chosen.types

    @property
    def formats(self) -> Formats:
        """Format of each matrix."""
        return self.options.chosen.formats

    @property
    def dtype(self) -> torch.dtype:
        """Type of the decoder: of hidden rows, queries and caches."""
        return DTYPES[self.precision.decoder][0]


def plan_export(directory: Path, config: Any, options: ExportOptions) -> Job:
    """Decide what an export writes, and refuse what cannot be exported.

    Raises:
        UnsupportedModelError: The checkpoint has a structure that is not known.
        PatchsieveError: The plan or the options do not fit it.
    """
    family = family_of(config)
    trained = Trained.of(config)
    spec = replace(family.decoder(config), rotary_sections=trained.rotary_sections)
    vision = family.vision(config)
    preprocessor = family.preprocessor(directory, vision)
    cuts = _given_cuts(options, spec)
    clip = None if options.scorer is None else open_source(options.scorer)
    last_read, queries = _read_by_sites(options.plan)
    modules = _modules(options, spec, vision, clip, cuts, queries)
    _check_room(options, spec, modules.vision.num_visual, last_read > 0)
    checkpoint = Checkpoint(directory, family)
    is_tied = OUTPUT_MATRIX not in checkpoint and family.is_tied(config)
    has_own_head = not is_tied or modules.stages[-1].has_packed_head
    _check_head(options.chosen.types, has_own_head)
    weights = _weights(checkpoint, options, modules, clip, is_tied)
    _say_quantised(checkpoint, weights)
    # Last, because tracing takes seconds and all else is refused at once.
    plan, decisions = decide_graphs(
        options.plan.with_positions(trained.position_rule),
        options.plan_name,
        spec,
        vision,
        modules.plan_vision.num_visual,
        DTYPES[options.chosen.types.decoder][0],
    )
    return Job(
        directory=directory,
        config=config,
        options=options,
        family=family,
        spec=spec,
        vision=vision,
        preprocessor=preprocessor,
        plan=plan,
        no_pruning=Plan().with_positions(trained.position_rule),
        clip=clip,
        modules=modules,
        stages=_stages(options.limits, plan, modules, last_read),
        weights=tuple(weights),
        has_own_head=has_own_head,
        decisions=decisions,
    )


def _read_by_sites(plan: Plan) -> tuple[int, set[int]]:
    """The last site that reads side rows (0 for none), and the layers whose queries are read.

    Raises:
        PatchsieveError: A site cannot read what its method needs.
    """
    methods = [build_method(site) for site in plan.sites]
    check_sites(plan, methods)
    sites = zip(plan.sites, methods, strict=True)
    queries = {layer for site, method in sites for layer in layers_read(method, site.layer)}
    return side_layer(plan, methods), queries


def _given_cuts(options: ExportOptions, spec: DecoderSpec) -> list[int]:
    """Layers at which the user divides the decoder."""
    cuts = sorted({*options.plan.layers, *options.cuts})
    outside = [cut for cut in cuts if not 0 < cut < spec.num_layers]
    if outside:
        raise PatchsieveError(
            "a site or cut lies outside the decoder",
            found=outside,
            expected=f"layers 1 to {spec.num_layers - 1}",
            do="change --sites or --cuts",
        )
    return cuts


def _modules(
    options: ExportOptions,
    spec: DecoderSpec,
    vision: VisionModel,
    clip: ClipSource | None,
    cuts: list[int],
    queries: set[int],
) -> Modules:
    tower_dtype, dtype, head_dtype = (DTYPES[kind][0] for kind in options.chosen.types.kinds)
    head = options.chosen.formats.of(formats.HEAD, _HEAD, spec.hidden_size, spec.vocab_size)
    scorer, joint = None, None
    with fake_weights() as mode:
        with default_dtype(tower_dtype):
            width = None if clip is None else clip.text.width
            sizes = vision, spec.hidden_size
            unpruned = Vision(*sizes, out_dtype=dtype)
            planned = plan_vision(options.plan, *sizes, width, dtype)
            if clip is not None:
                scorer, joint = TextScorer(clip.text), JointCls(vision, clip.text.width)
        with default_dtype(dtype):
            if options.build_memory is not None:
                measured = TextModel("", **vars(spec)), vision
                found = groups(*measured, scorer=None if clip is None else clip.text.measures)
                cuts = cuts_for(options.build_memory, cuts, found, options.chosen)
            edges = [0, *cuts, spec.num_layers]
            stages = tuple(
                Stage(spec, first, last, head_dtype, queries, has_packed_head=head != FLOAT)
                for first, last in zip(edges, edges[1:], strict=False)
            )
    return Modules(mode, unpruned, planned, stages, scorer, joint)


def _check_room(
    options: ExportOptions, spec: DecoderSpec, num_visual: int, has_side_rows: bool
) -> None:
    """Refuse limits that reserve more rows than the decoder has positions for."""
    most = options.limits.slots(num_visual, has_side_rows)
    if most > spec.max_rows:
        raise UnsupportedModelError(
            "the reserved rows exceed what the decoder was made for",
            found=f"{most} rows (text + new tokens + images x {num_visual})",
            expected=f"at most {spec.max_rows} (positions or sliding window)",
            do="lower --max-text-tokens, --max-new-tokens or --max-images",
        )


def _check_head(precision: Precision, has_own_head: bool) -> None:
    if not has_own_head and precision.head != precision.decoder:
        raise PatchsieveError(
            "the output matrix is the embedding table, so both have one precision",
            found=precision,
            expected=f"head={precision.decoder}",
            do="give the head the decoder's precision, or leave it out of --precision",
        )


def _weights(
    checkpoint: Checkpoint,
    options: ExportOptions,
    modules: Modules,
    clip: ClipSource | None,
    is_tied: bool,
) -> list[StoredFile]:
    """The weights files of a bundle; refuses a checkpoint or a CLIP that lacks some."""
    chosen = options.chosen
    measured = None if options.statistics is None else Statistics.read(options.statistics)

    def file(
        part: Part, weights: list[Weight], layer: int | None = None, source: Source = checkpoint
    ) -> StoredFile:
        stored = tuple(_in_format(part, weight, chosen.formats) for weight in weights)
        entry = part.entry(chosen.types, layer, _usual_format(stored))
        own = {"grid": checkpoint.grid} if source is checkpoint else {}
        guided = guide(stored, source, measured, **own)
        return StoredFile(part.path(layer), entry, guided.weights, guided.source, guided.hints)

    last = modules.stages[-1]
    shape = (last.spec.vocab_size, last.spec.hidden_size)
    files = [
        file(TOWER, list(weights_of(modules.vision))),
        file(EMBEDDINGS, [Weight(EMBEDDING_TABLE, EMBEDDING_TABLE, shape)]),
    ]
    for part in (LAYER, STEP) if chosen.formats.has_step else (LAYER,):
        for stage in modules.stages:
            for number, layer in stage.layers.items():
                prefix = f"layers.{number}."
                files.append(file(part, list(weights_of(layer, prefix, prefix)), int(number)))
    head = list(weights_of(last.norm, "norm.", "norm."))
    if not is_tied or last.has_packed_head:
        matrix = weights_of(last.lm_head, f"{_HEAD}.", f"{_HEAD}.")
        head += [replace(w, source=EMBEDDING_TABLE) if is_tied else w for w in matrix]
    files.append(file(HEAD, head))
    wanted = [weight for each in files for weight in each.weights]
    checkpoint.require({weight.source: weight.source_shape for weight in wanted})
    if clip is not None and modules.scorer is not None and modules.joint is not None:
        scorer = list(weights_of(modules.scorer))
        joint = list(weights_of(modules.joint, "joint."))
        shapes = {weight.source: weight.source_shape for weight in scorer}
        clip.tensors.require(shapes, f"the scorer {clip.name}")
        source = JointWeights(checkpoint, clip)
        source.require(joint)
        files += [file(SCORER, scorer, source=clip.tensors), file(JOINT, joint, source=source)]
    matrices = (w.name for each in files for w in each.weights if w.transposed)
    names_matched(chosen.formats, (name.removesuffix(".weight") for name in matrices))
    return files


def _say_quantised(checkpoint: Checkpoint, files: list[StoredFile]) -> None:
    """Say how the matrices of a checkpoint that came quantised are stored."""
    said = checkpoint.report(
        (weight.source, FORMATS[weight.format], DTYPES[file.entry.type][0])
        for file in files
        for weight in file.weights
    )
    if said is not None:
        _LOG.warning("%s", said)


def _in_format(part: Part, weight: Weight, chosen: Formats) -> Weight:
    """A tensor of a part with the format that it is stored in."""
    if part.key is None or not weight.transposed:
        return weight
    name = weight.name.removesuffix(".weight")
    key = formats.PROJECTOR if name.startswith("multi_modal_projector.") else part.key
    return replace(weight, format=chosen.of(key, name, *weight.shape))


def _usual_format(weights: tuple[Weight, ...]) -> str:
    """The format of most numbers in the matrices of a file."""
    counts = dict.fromkeys(FORMATS, 0)
    for weight in weights:
        counts[weight.format] += weight.transposed * math.prod(weight.shape)
    return max(counts, key=counts.__getitem__)


def _stages(limits: Limits, plan: Plan, modules: Modules, last_read: int) -> tuple[StageEntry, ...]:
    """Layers and slots of each stage; side rows are fed up to the layer `last_read`."""
    at = {site.layer: site.budget for site in plan.sites}
    budget, found = modules.plan_vision.num_visual, []
    for stage in modules.stages:
        budget = min(budget, at.get(stage.first) or budget)
        slots = limits.slots(budget, stage.last <= last_read)
        found.append(StageEntry(stage.first, stage.last, slots))
    return tuple(found)
