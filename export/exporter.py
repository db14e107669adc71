"""From a checkpoint and a plan to a bundle."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from patchsieve import __version__
from patchsieve.contract import files, manifest, model, names
from patchsieve.contract.errors import PatchsieveError, UnsupportedModelError
from patchsieve.contract.plan import NO_PRUNING, Plan, check_plan_name
from patchsieve.contract.precision import BYTES, Precision
from patchsieve.contract.targets import TARGETS, USUAL, WITH_ATTENTION_FORMS, WITH_ENGINES, known
from patchsieve.contract.trained import Trained
from patchsieve.contract.writing import check_new_bundle, whole_or_nothing
from patchsieve.export import card
from patchsieve.export import weights as weights_module
from patchsieve.export.cuts import divide, num_bytes
from patchsieve.export.families import decoder_spec
from patchsieve.export.graphs.decision import compact_graph
from patchsieve.export.graphs.joint import JointCls, JointWeights
from patchsieve.export.graphs.layers import RMSNorm
from patchsieve.export.graphs.scorer import TextScorer, scorer_graph
from patchsieve.export.graphs.stage import DecoderLayer, Head, Stage
from patchsieve.export.graphs.trace import bind, fake_weights, trace
from patchsieve.export.graphs.vision import Vision, vision_graph, vision_model
from patchsieve.export.methods import (
    build_method,
    check_sites,
    layers_read,
    side_layer,
    store_heads,
)
from patchsieve.export.reuse import decide_graphs, plan_vision
from patchsieve.export.source.checkpoint import Checkpoint, locate, read_config
from patchsieve.export.source.clip import ClipSource, open_source
from patchsieve.export.source.processor import preprocessor_from_checkpoint
from patchsieve.export.source.tokenizer import write_tokenizer
from patchsieve.export.weights import DTYPES, Weight, default_dtype, weights_of
from patchsieve.export.writer import GraphWriter

Progress = Callable[[str, float], None]
EMBEDDINGS = "embed_tokens"
HEAD = "lm_head.weight"
SCORER_TOKENIZER = "scorer_tokenizer.json"


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
    limits: manifest.Limits = field(default_factory=lambda: manifest.Limits(512, 256, 1))
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
        """How half-precision attention is spelt; None where no graph has a choice."""
        kinds = Precision.parse(self.precision)
        is_half = {kinds.tower, kinds.decoder} != {"float32"}
        if not is_half or not any(known(t).attention_forms for t in self.targets):
            return None
        return self.attention or names.DECOMPOSED


def export(
    checkpoint: str,
    out: Path,
    options: ExportOptions,
    progress: Progress = lambda *_: None,
    seconds: dict[str, float] | None = None,
) -> manifest.Manifest:
    """Export a checkpoint into a new bundle.

    Args:
        checkpoint: A directory or a hub id.
        out: The bundle's directory, which must not exist.
        options: Plan, targets, limits.
        progress: Told what is being done and the fraction done.
        seconds: Takes the time spent on each target's graphs.

    Returns:
        The bundle's manifest.

    Raises:
        UnsupportedModelError: The checkpoint has a structure that is not known.
        PatchsieveError: The plan does not fit, the disk is full, the target exists.
    """
    check_new_bundle(out)
    progress("reading the checkpoint", 0.0)
    directory = locate(checkpoint, options.revision, check=read_config)
    config = read_config(directory)
    job = _Job(directory, config, options)
    with whole_or_nothing(out) as partial:
        job.write(partial, progress)
        if seconds is not None:
            seconds.update(job.writer.seconds)
        return job.finish(partial, Path(checkpoint).name or checkpoint)


class _Job:
    """One export: what to write, decided before the first byte."""

    def __init__(self, directory: Path, config: object, options: ExportOptions) -> None:
        self.directory, self.config, self.options = directory, config, options
        self.precision = Precision.parse(options.precision)
        tower_dtype, self.dtype, head_dtype = (DTYPES[kind][0] for kind in self.precision.kinds)
        trained = Trained.of(config)
        self.spec = replace(
            decoder_spec(config.text_config),  # type: ignore[attr-defined]
            rotary_sections=trained.rotary_sections,
        )
        self.plan = options.plan.with_positions(trained.position_rule)
        self.no_pruning = Plan().with_positions(trained.position_rule)
        self.vision_facts = vision_model(config)
        self.preprocessor = preprocessor_from_checkpoint(directory)
        self._check_image_size()
        cuts = sorted({*options.plan.layers, *options.cuts})
        outside = [cut for cut in cuts if not 0 < cut < self.spec.num_layers]
        if outside:
            raise PatchsieveError(
                "a site or cut lies outside the decoder",
                found=outside,
                expected=f"layers 1 to {self.spec.num_layers - 1}",
                do="change --sites or --cuts",
            )
        self.clip = None if options.scorer is None else open_source(options.scorer)
        methods = [build_method(site) for site in options.plan.sites]
        check_sites(options.plan, methods)
        self.side_layer = side_layer(options.plan, methods)
        pairs = zip(options.plan.sites, methods, strict=True)
        queries = {layer for site, m in pairs for layer in layers_read(m, site.layer)}
        with fake_weights() as self.mode:
            with default_dtype(tower_dtype):
                width = None if self.clip is None else self.clip.text.width
                sizes = self.vision_facts, self.spec.hidden_size
                self.vision = Vision(*sizes, out_dtype=self.dtype)
                self.plan_vision = plan_vision(options.plan, *sizes, width, self.dtype)
                if self.clip is not None:
                    self.scorer = TextScorer(self.clip.text)
                    self.joint = JointCls(self.vision_facts, self.clip.text.width)
            with default_dtype(self.dtype):
                edges = [0, *self._cuts(cuts, head_dtype), self.spec.num_layers]
                self.stages = [
                    Stage(self.spec, a, b, head_dtype, queries)
                    for a, b in zip(edges, edges[1:], strict=False)
                ]
        most = options.limits.slots(self.vision.num_visual, self.side_layer > 0)
        if most > self.spec.max_rows:
            raise UnsupportedModelError(
                "the reserved rows exceed what the decoder was made for",
                found=f"{most} rows (text + new tokens + images x {self.vision.num_visual})",
                expected=f"at most {self.spec.max_rows} (positions or sliding window)",
                do="lower --max-text-tokens, --max-new-tokens or --max-images",
            )
        self.checkpoint = Checkpoint(directory)
        self.is_tied = self._is_tied()
        if self.is_tied and self.precision.head != self.precision.decoder:
            raise PatchsieveError(
                "the output matrix is the embedding table, so both have one precision",
                found=self.precision,
                expected=f"head={self.precision.decoder}",
                do="give the head the decoder's precision, or leave it out of --precision",
            )
        self.files = self._weight_files()
        wanted = [weight for weights in self.files.values() for weight in weights]
        self.checkpoint.require({weight.source: weight.source_shape for weight in wanted})
        self.sources: dict[str, weights_module.Source] = {}  # of files that hold something else
        if self.clip is not None:
            self._add_scorer(self.clip)
        # Last, because tracing takes seconds and all else is refused at once.
        self.plan, self.graphs = decide_graphs(
            self.plan,
            options.plan_name,
            self.spec.hidden_size,
            self.spec.heads,
            self.vision_facts,
            self.plan_vision.num_visual,
            self.dtype,
        )

    def _cuts(self, cuts: list[int], head_dtype: torch.dtype) -> list[int]:
        """The given cuts, and those that the memory of a build asks for."""
        memory = self.options.build_memory
        if memory is None:
            return cuts
        others = {"the vision tower": num_bytes(self.plan_vision)}
        if self.clip is not None:
            others["the scorer"] = num_bytes(self.scorer)
        spec = self.spec
        norm = RMSNorm(spec.hidden_size, spec.norm_eps, head_dtype)
        sizes = num_bytes(DecoderLayer(spec)), num_bytes(norm, Head(spec, head_dtype))
        return divide(spec.num_layers, cuts, *sizes, memory, others)

    def write(self, partial: Path, progress: Progress) -> None:
        """Write tokenizer, preprocessor, weights and graphs."""
        # First, because it may be refused
        self.tokenizer = write_tokenizer(self.directory, partial, self.spec.vocab_size)
        _dump(partial / "preprocessor.json", self.preprocessor)
        if self.clip is not None:
            (partial / SCORER_TOKENIZER).write_text(self.clip.tokenizer, encoding="utf-8")
        self.plan = store_heads(partial, self.plan, [])
        graphs = partial / "graphs"
        stored = self._write_weights(graphs / weights_module.DIRECTORY, progress)
        self.embeddings = stored[f"{EMBEDDINGS}.weight"]
        if self.is_tied:
            stored[HEAD] = ir.ExternalTensor(
                self.embeddings.location,
                self.embeddings.offset,
                self.embeddings.length,
                self.embeddings.dtype,
                shape=self.embeddings.shape,
                name=HEAD,
                base_dir=self.embeddings.base_dir,
            )
        form = self.options.attention_form or names.DECOMPOSED
        self.writer = GraphWriter(graphs, self.options.targets, form)
        self.paths: dict[str, dict[str, str]] = {}
        has_scorer = self.clip is not None
        total = len(self.stages) + 2 + self.plan.has_vision + has_scorer + len(self.graphs)
        for done, (name, slots, graph) in enumerate(self._graphs(stored)):
            progress(f"writing {name}", 0.6 + 0.35 * done / total)
            for target, path in self.writer.save(name, graph, slots=slots).items():
                self.paths.setdefault(target, {})[name] = path

    def finish(self, partial: Path, checkpoint: str) -> manifest.Manifest:
        """Hash every file and write the manifest."""
        options = self.options
        text = self.config.text_config  # type: ignore[attr-defined]
        plans = {NO_PRUNING: self.no_pruning} | {options.plan_name: self.plan}
        facts = manifest.Manifest(
            patchsieve_version=__version__,
            checkpoint=checkpoint,
            precision=self.precision,
            text=model.TextModel(
                model_type=text.model_type,
                vocab_size=self.spec.vocab_size,
                hidden_size=self.spec.hidden_size,
                intermediate_size=self.spec.intermediate_size,
                num_layers=self.spec.num_layers,
                num_heads=self.spec.num_heads,
                num_kv_heads=self.spec.num_kv_heads,
                head_dim=self.spec.head_dim,
                rotary_sections=self.spec.rotary_sections,
            ),
            vision=self.vision_facts,
            tokens=self._tokens(),
            embeddings=model.Embeddings(
                file=f"graphs/{self.embeddings.location}",
                offset=self.embeddings.offset or 0,
                dtype=self.precision.decoder,
                shape=(self.spec.vocab_size, self.spec.hidden_size),
            ),
            limits=options.limits,
            stages=tuple(self._stage_facts()),
            plans=plans,
            default_plan=options.plan_name,
            preprocessor="preprocessor.json",
            targets=self.paths,
            tensors=self.writer.tensors,
            target_tensors=self.writer.target_tensors,
            needs={target: manifest.Needs.of(known(target)) for target in options.targets},
            files=_hashes(partial),
            scorer=self._scorer_facts(),
            generation=self.tokenizer["generation"],
            attention=options.attention_form,
        )
        files.write(partial, facts)
        text = card.card(facts, card.licence_of(self.directory))
        (partial / card.FILE_NAME).write_text(text, encoding="utf-8")
        return facts

    def _check_image_size(self) -> None:
        made: dict[str, Any] = self.preprocessor
        side = made["shortest_edge"]
        crop = made["crop_size"] if made["do_center_crop"] else None
        found = list(crop or made["resize_to"] or (side, side))
        expected = [self.vision_facts.image_size] * 2
        if found != expected:
            raise UnsupportedModelError(
                "the image processor does not yield the size that the tower takes",
                found=found,
                expected=expected,
            )

    def _tokens(self) -> model.Tokens:
        made = self.tokenizer
        return model.Tokens(
            tokenizer="tokenizer.json",
            chat_template=made["chat_template"],
            image_token=made["image_token"],
            image_token_id=self.config.image_token_id,  # type: ignore[attr-defined]
            eos_token_ids=tuple(made["eos_token_ids"]),
            special_tokens=made["special_tokens"],
        )

    def _stage_facts(self) -> Iterator[manifest.Stage]:
        at = {site.layer: site.budget for site in self.plan.sites}
        budget = self.plan_vision.num_visual
        for stage in self.stages:
            budget = min(budget, at.get(stage.first) or budget)
            slots = self.options.limits.slots(budget, stage.last <= self.side_layer)
            yield manifest.Stage(stage.first, stage.last, slots)

    def _is_tied(self) -> bool:
        """Tell whether the table of embeddings is the output matrix too, as transformers decides.

        A stored lm_head.weight goes before the flags; either config's flag ties (transformers 5.23,
        `LlavaConfig.__post_init__` and `PreTrainedModel.tie_weights`).
        """
        if HEAD in self.checkpoint:
            return False
        config: Any = self.config
        return bool(config.tie_word_embeddings or config.text_config.tie_word_embeddings)

    def _weight_files(self) -> dict[str, list[Weight]]:
        shape = (self.spec.vocab_size, self.spec.hidden_size)
        table = f"{EMBEDDINGS}.weight"
        files = {TOWER.path(): list(weights_of(self.vision))}
        files[EMBEDDINGS.path()] = [Weight(table, table, shape)]
        for stage in self.stages:
            for number, layer in stage.layers.items():
                prefix = f"layers.{number}."
                files[LAYER.path(int(number))] = list(weights_of(layer, prefix, prefix))
        last = self.stages[-1]
        files[HEAD.path()] = list(weights_of(last.norm, "norm.", "norm."))
        if not self.is_tied:
            files[HEAD.path()] += weights_of(last.lm_head, "lm_head.", "lm_head.")
        return files

    def _add_scorer(self, clip: ClipSource) -> None:
        """The text tower's weights, and those that carry an image into its space."""
        scorer, joint = list(weights_of(self.scorer)), list(weights_of(self.joint, "joint."))
        shapes = {weight.source: weight.source_shape for weight in scorer}
        clip.tensors.require(shapes, f"the scorer {clip.name}")
        source = JointWeights(self.checkpoint, clip)
        source.require(joint)
        self.files |= {"scorer": scorer, "joint": joint}
        self.sources |= {"scorer": clip.tensors, "joint": source}

    def _scorer_facts(self) -> model.Scorer | None:
        clip = self.clip
        if clip is None:
            return None
        return model.Scorer(
            source=clip.name,
            tokenizer=SCORER_TOKENIZER,
            bos_id=clip.bos_id,
            eos_id=clip.eos_id,
            window=clip.text.window,
            width=clip.text.width,
        )

    def _precision_of(self, file: str) -> str:
        """Type of the tensors of a weights file."""
        tower, head = self.precision.tower, self.precision.head
        own = {"vision": tower, "joint": tower, "scorer": tower, "head": head}
        return own.get(file, self.precision.decoder)

    def _write_weights(self, folder: Path, progress: Progress) -> dict[str, ir.ExternalTensor]:
        folder.mkdir(parents=True)
        total = sum(
            sum(math.prod(weight.shape) for weight in weights) * BYTES[self._precision_of(file)]
            for file, weights in self.files.items()
        )
        free = shutil.disk_usage(folder).free
        if free < total:
            raise PatchsieveError(
                f"the disk of {folder.parents[1].parent} is too small for the bundle",
                found=f"{free / 1e9:.2f} GB free",
                expected=f"{total / 1e9:.2f} GB for the weights",
            )
        stored: dict[str, ir.ExternalTensor] = {}
        done = 0
        for file, weights in self.files.items():

            def step(size: int, file: str = file) -> None:
                nonlocal done
                done += size
                progress(f"writing weights {file}", 0.6 * done / total)

            stored |= weights_module.write(
                folder / f"{file}.safetensors",
                weights,
                self.sources.get(file, self.checkpoint),
                self._precision_of(file),
                step,
            )
        return stored

    def _graphs(
        self, stored: dict[str, ir.ExternalTensor]
    ) -> Iterator[tuple[str, int | None, ir.Model]]:
        """Each graph, bound to its weights, as (name, slots of its caches, graph)."""
        own = [(names.vision(self.options.plan_name), self.plan_vision)]
        for name, vision in [(names.VISION, self.vision), *(own if self.plan.has_vision else ())]:
            graph = vision_graph(vision, self.mode)
            bind(graph, stored)
            yield name, None, graph
        if self.clip is not None:
            graph = scorer_graph(self.scorer, self.mode)
            bind(graph, stored)
            yield names.SCORER, None, graph
        inv_freq = ir.tensor(torch.tensor(self.spec.inv_freq).numpy(), name="inv_freq")
        for index, (stage, facts) in enumerate(zip(self.stages, self._stage_facts(), strict=True)):
            inputs = stage.inputs(self.dtype)
            graph = trace(stage, inputs, stage.input_names(), stage.output_names(), self.mode)
            bind(graph, stored | {"inv_freq": inv_freq})
            yield names.stage(index), facts.slots, graph
        yield names.COMPACT, None, compact_graph()
        for site, (name, graph) in zip(self.plan.sites, self.graphs.items(), strict=True):
            # A decision reads the cache of the stage that ends at its layer.
            before = next(f for f in self._stage_facts() if f.last == site.layer)
            yield name, before.slots, graph


def _hashes(bundle: Path) -> dict[str, manifest.File]:
    files = sorted(path for path in bundle.rglob("*") if path.is_file())
    return {path.relative_to(bundle).as_posix(): files.hash_file(path) for path in files}


def _dump(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
