"""From a checkpoint and a plan to a bundle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from patchsieve.contract import files, names
from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.manifest import Manifest
from patchsieve.contract.plan import Plan
from patchsieve.contract.weights import FOLDER, STEP
from patchsieve.contract.writing import check_new_bundle, whole_or_nothing
from patchsieve.export import card, weights
from patchsieve.export.describe import PREPROCESSOR, SCORER_TOKENIZER, describe
from patchsieve.export.graphs.decision import compact_graph
from patchsieve.export.graphs.scorer import scorer_graph
from patchsieve.export.graphs.trace import bind, trace
from patchsieve.export.graphs.vision import vision_graph
from patchsieve.export.heads import store_heads
from patchsieve.export.job import (
    EMBEDDING_TABLE,
    OUTPUT_MATRIX,
    ExportOptions,
    Job,
    plan_export,
)
from patchsieve.export.source.checkpoint import locate, read_config
from patchsieve.export.source.tokenizer import write_tokenizer
from patchsieve.export.writer import GraphWriter

Progress = Callable[[str, float], None]
Stored = dict[str, ir.ExternalTensor]  # tensors of weights files, by name
_STEP = "step:"  # before the name of a tensor of the decoder's second copy
_AFTER_WEIGHTS, _AFTER_GRAPHS = 0.6, 0.95  # fractions of the whole work


def export(
    checkpoint: str,
    out: Path,
    options: ExportOptions,
    progress: Progress = lambda *_: None,
    seconds: dict[str, float] | None = None,
) -> Manifest:
    """Export a checkpoint into a new bundle.

    Args:
        checkpoint: A directory or a hub id.
        out: The bundle's directory, which must not exist.
        options: Plan, targets, limits.
        progress: Called with what is being done and the fraction done.
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
    job = plan_export(directory, read_config(directory), options)
    with whole_or_nothing(out) as partial:
        prompts = _write_texts(job, partial)
        plan = store_heads(partial, job.plan, [])
        stored = write_weights(job, partial, progress)
        writer = _write_graphs(job, plan, partial, stored, progress)
        if seconds is not None:
            seconds.update(writer.seconds)
        name = Path(checkpoint).name or checkpoint
        table = stored[EMBEDDING_TABLE]
        facts = describe(job, plan, name, prompts, table, writer, _hashes(partial))
        files.write(partial, facts)
        text = card.card(facts, card.licence_of(directory))
        (partial / card.FILE_NAME).write_text(text, encoding="utf-8")
    return facts


def _write_texts(job: Job, partial: Path) -> dict[str, Any]:
    """Write tokenizers and preprocessor; returns what the manifest says of prompts."""
    # First, because it may be refused.
    prompts = write_tokenizer(
        job.directory, partial, job.spec.vocab_size, image_token=job.family.image_token
    )
    text = json.dumps(job.preprocessor, indent=1) + "\n"
    (partial / PREPROCESSOR).write_text(text, encoding="utf-8")
    if job.clip is not None:
        (partial / SCORER_TOKENIZER).write_text(job.clip.tokenizer, encoding="utf-8")
    return prompts


def write_weights(job: Job, partial: Path, progress: Progress) -> Stored:
    """Write a bundle's weights files.

    Raises:
        PatchsieveError: The disk is too small, or a number does not fit its type.
    """
    folder = partial / FOLDER
    folder.mkdir(parents=True)
    total, free = sum(file.num_bytes for file in job.weights), shutil.disk_usage(folder).free
    if free < total:
        raise PatchsieveError(
            f"the disk of {partial.parent} is too small for the bundle",
            found=f"{free / 1e9:.2f} GB free",
            expected=f"{total / 1e9:.2f} GB for the weights",
            do="free space, or choose another folder with -o",
        )
    stored: Stored = {}
    done = 0
    for file in job.weights:
        path = partial / file.path

        def step(size: int, name: str = path.stem) -> None:
            nonlocal done
            done += size
            progress(f"writing weights {name}", _AFTER_WEIGHTS * done / total)

        tensors = weights.write(path, file.entry, file.weights, file.source, step, file.hints)
        prefix = _STEP if file.entry.part == STEP.name else ""
        stored |= {prefix + name: tensor for name, tensor in tensors.items()}
    if not job.has_own_head:
        table = stored[EMBEDDING_TABLE]
        place = table.location, table.offset, table.length, table.dtype
        stored[OUTPUT_MATRIX] = ir.ExternalTensor(
            *place, shape=table.shape, name=OUTPUT_MATRIX, base_dir=table.base_dir
        )
    return stored


def _write_graphs(
    job: Job, plan: Plan, partial: Path, stored: Stored, progress: Progress
) -> GraphWriter:
    options = job.options
    form = options.attention_form or names.DECOMPOSED
    writer = GraphWriter(partial / "graphs", options.targets, form)
    has_scorer = job.clip is not None
    stages = len(job.stages) * (1 + job.formats.has_step)
    total = stages + 2 + plan.has_vision + has_scorer + len(job.decisions)
    for done, (name, slots, graph) in enumerate(_graphs(job, stored)):
        share = (_AFTER_GRAPHS - _AFTER_WEIGHTS) * done / total
        progress(f"writing {name}", _AFTER_WEIGHTS + share)
        writer.save(name, graph, slots=slots)
    return writer


def _graphs(job: Job, stored: Stored) -> Iterator[tuple[str, int | None, ir.Model]]:
    """Each graph, bound to its weights, as (name, slots of its caches, graph)."""
    modules = job.modules
    visions = [(names.VISION, modules.vision)]
    if job.plan.has_vision:
        visions.append((names.vision(job.options.plan_name), modules.plan_vision))
    for name, vision in visions:
        graph = vision_graph(vision, modules.mode)
        bind(graph, stored)
        yield name, None, graph
    if modules.scorer is not None:
        graph = scorer_graph(modules.scorer, modules.mode)
        bind(graph, stored)
        yield names.SCORER, None, graph
    inv_freq = ir.tensor(torch.tensor(job.spec.inv_freq).numpy(), name="inv_freq")
    for index, (stage, entry) in enumerate(zip(modules.stages, job.stages, strict=True)):
        inputs = stage.inputs(job.dtype)
        graph = trace(stage, inputs, stage.input_names(), stage.output_names(), modules.mode)
        if job.formats.has_step:
            own = {k.removeprefix(_STEP): t for k, t in stored.items() if k.startswith(_STEP)}
            rest = {k: t for k, t in stored.items() if k.partition(".")[0] != "layers"}
            step = graph.clone()
            bind(step, rest | own | {"inv_freq": inv_freq})
            yield names.step(index), entry.slots, step
        bind(graph, stored | {"inv_freq": inv_freq})
        yield names.stage(index), entry.slots, graph
    yield names.COMPACT, None, compact_graph()
    for site, (name, graph) in zip(job.plan.sites, job.decisions.items(), strict=True):
        # A decision reads the cache of the stage that ends at its layer.
        before = next(entry for entry in job.stages if entry.last == site.layer)
        bind(graph, stored)
        yield name, before.slots, graph


def _hashes(bundle: Path) -> dict[str, files.File]:
    found = sorted(path for path in bundle.rglob("*") if path.is_file())
    return {path.relative_to(bundle).as_posix(): files.hash_file(path) for path in found}
