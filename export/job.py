"""What an export is to write, decided before the first byte: a blueprint of the bundle."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch._subclasses import FakeTensorMode

from patchsieve.contract import names
from patchsieve.contract.errors import PatchsieveError, UnsupportedModelError
from patchsieve.contract.manifest import Limits
from patchsieve.contract.manifest import Stage as StageEntry
from patchsieve.contract.model import VisionModel
from patchsieve.contract.plan import NO_PRUNING, Plan, check_plan_name
from patchsieve.contract.precision import Precision
from patchsieve.contract.targets import TARGETS, USUAL, WITH_ATTENTION_FORMS, WITH_ENGINES, known
from patchsieve.contract.trained import Trained
from patchsieve.contract.weights import (
    EMBEDDINGS,
    HEAD,
    JOINT,
    LAYER,
    SCORER,
    TOWER,
    Part,
    WeightsFile,
)
from patchsieve.export.cuts import divide, num_bytes
from patchsieve.export.families import Family, family_of
from patchsieve.export.families.specs import DecoderSpec
from patchsieve.export.graphs.joint import JointCls, JointWeights
from patchsieve.export.graphs.layers import RMSNorm
from patchsieve.export.graphs.scorer import TextScorer
from patchsieve.export.graphs.stage import DecoderLayer, Head, Stage
from patchsieve.export.graphs.trace import fake_weights
from patchsieve.export.graphs.vision import Vision
from patchsieve.export.methods import build_method
from patchsieve.export.plan_graphs import decide_graphs, plan_vision
from patchsieve.export.sites import check_sites, layers_read, side_layer
from patchsieve.export.source.checkpoint import Checkpoint
from patchsieve.export.source.clip import ClipSource, open_source
from patchsieve.export.weights import DTYPES, Source, Weight, default_dtype, layout, weights_of

EMBEDDING_TABLE = "embed_tokens.weight"  # [V, C]
OUTPUT_MATRIX = "lm_head.weight"  # [V, C]


@dataclass(frozen=True)
class ExportOptions:
    """What `export` makes of a checkpoint.

    Attributes:
        plan: What prunes where.
        plan_name: The plan's name in the bundle.
        cuts: Further layers at which to divide the decoder, for plans to come.
        build_memory: Bytes that building any engine may take: the decoder is divided at as many
            more layers as that needs. None leaves it at the sites and `cuts`.
        targets: For which to write graphs.
        precision: Type of each part, as `Precision.parse` reads it.
        limits: What requests may ask for.
        attention: How TensorRT's graphs spell float16 and bfloat16 attention, one of
            `names.ATTENTION_FORMS`; None for the default, every one in parts.
        scorer: Where the CLIP comes from that compares the question with an image, for a plan whose
            pseudo_cls wants one (see `clip_source.open_source`).
        revision: Branch, tag or commit of a hub id; None for its main branch.
    """

    plan: Plan = field(default_factory=Plan)
    plan_name: str = NO_PRUNING
    cuts: tuple[int, ...] = ()
    build_memory: int | None = None
    targets: tuple[str, ...] = ("cpu",)
    precision: str = "float32"
    limits: Limits = field(default_factory=lambda: Limits(512, 256, 1))
    scorer: str | None = None
    revision: str | None = None
    attention: str | None = None

    def __post_init__(self) -> None:
        check_plan_name(self.plan_name)
        limits = self.limits
        if min(limits.max_text_tokens, limits.max_new_tokens, limits.max_images) < 1:
            raise PatchsieveError(
                "a limit is below 1",
                found=limits,
                expected="at least 1 each",
                do="raise --max-text-tokens, --max-new-tokens or --max-images",
            )
        if self.plan_name == NO_PRUNING and self.plan.prunes:
            raise PatchsieveError(
                "the plan named none prunes nothing", do="choose another --plan-name"
            )
        if not self.targets:
            raise PatchsieveError(
                "a bundle needs a target", expected=", ".join(TARGETS), do=f"give --targets {USUAL}"
            )
        if self.build_memory is not None and not set(self.targets) & set(WITH_ENGINES):
            raise PatchsieveError(
                "--build-memory has no effect: no engine is built for these targets",
                found=", ".join(self.targets),
                expected=f"one of {', '.join(WITH_ENGINES)} among --targets",
                do="remove --build-memory, or add such a target to --targets",
            )
        precision = Precision.parse(self.precision)
        for target in self.targets:
            taken = known(target).precisions
            if not set(precision.kinds) <= set(taken):
                raise PatchsieveError(
                    f"the target {target} does not compute in this precision",
                    found=precision,
                    expected=", ".join(taken),
                    do=f"leave {target} out of --targets, or choose another --precision",
                )
        if self.attention not in (None, *names.ATTENTION_FORMS):
            raise PatchsieveError(
                "unknown --attention",
                found=self.attention,
                expected=", ".join(names.ATTENTION_FORMS),
                do="give one of these to --attention",
            )
        if self.attention is not None and self.attention_form is None:
            raise PatchsieveError(
                "--attention has no effect: no target and part of this export has a choice",
                found=f"{', '.join(self.targets)} in {precision}",
                expected=f"float16 or bfloat16 for {' or '.join(WITH_ATTENTION_FORMS)}",
                do="leave --attention out, or change --targets or --precision",
            )

    @property
    def attention_form(self) -> str | None:
        """How half-precision attention is spelt; None if no graph has a choice."""
        kinds = Precision.parse(self.precision)
        is_half = {kinds.tower, kinds.decoder} != {"float32"}
        if not is_half or not any(known(t).attention_forms for t in self.targets):
            return None
        return self.attention or names.DECOMPOSED


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
    """

    path: str
    entry: WeightsFile
    weights: tuple[Weight, ...]
    source: Source

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(part.num_bytes for weight in self.weights for part in layout(weight, self.entry))


@dataclass(frozen=True)
class Job:
    """One export.

    Attributes:
        directory: The checkpoint.
        config: Its config, as transformers reads it.
        options: What the user asks for.
        family: The checkpoint's model class.
        precision: Type of each part.
        spec: The decoder.
        vision: Measures of the tower and the projector.
        preprocessor: Fields of the runtime's `Preprocessor`.
        plan: The plan, with its budgets and its position rule.
        no_pruning: The plan that prunes nothing.
        clip: The CLIP that the scorer comes from.
        modules: What the graphs are traced from.
        stages: Layers and slots of each stage.
        weights: The files to be written.
        is_tied: The output matrix is the table of embeddings.
        decisions: The traced decisions of the plan, by name.
    """

    directory: Path
    config: Any
    options: ExportOptions
    family: Family
    precision: Precision
    spec: DecoderSpec
    vision: VisionModel
    preprocessor: dict[str, Any]
    plan: Plan
    no_pruning: Plan
    clip: ClipSource | None
    modules: Modules
    stages: tuple[StageEntry, ...]
    weights: tuple[StoredFile, ...]
    is_tied: bool
    decisions: dict[str, ir.Model]

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
    precision, family = Precision.parse(options.precision), family_of(config)
    trained = Trained.of(config)
    spec = replace(family.decoder(config), rotary_sections=trained.rotary_sections)
    vision = family.vision(config)
    preprocessor = family.preprocessor(directory, vision)
    cuts = _given_cuts(options, spec)
    clip = None if options.scorer is None else open_source(options.scorer)
    last_read, queries = _read_by_sites(options.plan)
    modules = _modules(options, precision, spec, vision, clip, cuts, queries)
    _check_room(options, spec, modules.vision.num_visual, last_read > 0)
    checkpoint = Checkpoint(directory, family)
    is_tied = OUTPUT_MATRIX not in checkpoint and family.is_tied(config)
    _check_head(precision, is_tied)
    weights = _weights(checkpoint, precision, modules, clip, is_tied)
    # Last, because tracing takes seconds and all else is refused at once.
    plan, decisions = decide_graphs(
        options.plan.with_positions(trained.position_rule),
        options.plan_name,
        spec,
        vision,
        modules.plan_vision.num_visual,
        DTYPES[precision.decoder][0],
    )
    return Job(
        directory=directory,
        config=config,
        options=options,
        family=family,
        precision=precision,
        spec=spec,
        vision=vision,
        preprocessor=preprocessor,
        plan=plan,
        no_pruning=Plan().with_positions(trained.position_rule),
        clip=clip,
        modules=modules,
        stages=_stages(options.limits, plan, modules, last_read),
        weights=tuple(weights),
        is_tied=is_tied,
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
    precision: Precision,
    spec: DecoderSpec,
    vision: VisionModel,
    clip: ClipSource | None,
    cuts: list[int],
    queries: set[int],
) -> Modules:
    tower_dtype, dtype, head_dtype = (DTYPES[kind][0] for kind in precision.kinds)
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
                others = {"the vision tower": num_bytes(planned)}
                if scorer is not None:
                    others["the scorer"] = num_bytes(scorer)
                norm = RMSNorm(spec.hidden_size, spec.norm_eps, head_dtype)
                parts = num_bytes(DecoderLayer(spec)), num_bytes(norm, Head(spec, head_dtype))
                cuts = divide(spec.num_layers, cuts, *parts, options.build_memory, others)
            edges = [0, *cuts, spec.num_layers]
            stages = tuple(
                Stage(spec, first, last, head_dtype, queries)
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


def _check_head(precision: Precision, is_tied: bool) -> None:
    if is_tied and precision.head != precision.decoder:
        raise PatchsieveError(
            "the output matrix is the embedding table, so both have one precision",
            found=precision,
            expected=f"head={precision.decoder}",
            do="give the head the decoder's precision, or leave it out of --precision",
        )


def _weights(
    checkpoint: Checkpoint,
    precision: Precision,
    modules: Modules,
    clip: ClipSource | None,
    is_tied: bool,
) -> list[StoredFile]:
    """The weights files of a bundle; refuses a checkpoint or a CLIP that lacks some."""

    def file(
        part: Part, weights: list[Weight], layer: int | None = None, source: Source = checkpoint
    ) -> StoredFile:
        entry = part.entry(precision, layer)
        return StoredFile(part.path(layer), entry, tuple(weights), source)

    last = modules.stages[-1]
    shape = (last.spec.vocab_size, last.spec.hidden_size)
    files = [
        file(TOWER, list(weights_of(modules.vision))),
        file(EMBEDDINGS, [Weight(EMBEDDING_TABLE, EMBEDDING_TABLE, shape)]),
    ]
    for stage in modules.stages:
        for number, layer in stage.layers.items():
            prefix = f"layers.{number}."
            files.append(file(LAYER, list(weights_of(layer, prefix, prefix)), int(number)))
    head = list(weights_of(last.norm, "norm.", "norm."))
    if not is_tied:
        head += weights_of(last.lm_head, "lm_head.", "lm_head.")
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
    return files


def _stages(limits: Limits, plan: Plan, modules: Modules, last_read: int) -> tuple[StageEntry, ...]:
    """Layers and slots of each stage; side rows are fed up to the layer `last_read`."""
    at = {site.layer: site.budget for site in plan.sites}
    budget, found = modules.plan_vision.num_visual, []
    for stage in modules.stages:
        budget = min(budget, at.get(stage.first) or budget)
        slots = limits.slots(budget, stage.last <= last_read)
        found.append(StageEntry(stage.first, stage.last, slots))
    return tuple(found)
