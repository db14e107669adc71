"""The manifest of a bundle that was written: what it says follows from the job and the graphs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import onnx_ir as ir

from patchsieve import __version__
from patchsieve.contract.formats import FORMATS
from patchsieve.contract.manifest import File, Manifest, Needs
from patchsieve.contract.model import Embeddings, Scorer, TextModel, Tokens
from patchsieve.contract.plan import NO_PRUNING, Plan
from patchsieve.contract.targets import known
from patchsieve.export.job import Job
from patchsieve.export.writer import GraphWriter

TOKENIZER = "tokenizer.json"
PREPROCESSOR = "preprocessor.json"
SCORER_TOKENIZER = "scorer_tokenizer.json"


def describe(
    job: Job,
    plan: Plan,
    checkpoint: str,
    prompts: dict[str, Any],
    table: ir.ExternalTensor,
    writer: GraphWriter,
    files: dict[str, File],
) -> Manifest:
    """The manifest of a bundle.

    Args:
        job: What was to be written.
        plan: Its plan, the paths of its heads relative to the bundle.
        checkpoint: The name of the checkpoint.
        prompts: What `write_tokenizer` found.
        table: Where the embedding table is.
        writer: What wrote the graphs.
        files: Size and hash of every file.
    """
    options = job.options
    is_quantised = any(FORMATS[name].bits for name in job.formats.used)
    return Manifest(
        patchsieve_version=__version__,
        checkpoint=checkpoint,
        precision=job.precision,
        text=TextModel(model_type=job.config.text_config.model_type, **asdict(job.spec)),
        vision=job.vision,
        tokens=_tokens(job, prompts),
        embeddings=_embeddings(job, table),
        limits=options.limits,
        stages=job.stages,
        plans={NO_PRUNING: job.no_pruning} | {options.plan_name: plan},
        default_plan=options.plan_name,
        preprocessor=PREPROCESSOR,
        targets=writer.paths,
        graphs=writer.graphs,
        cache_forms={target: known(target).cache for target in options.targets},
        cache_type=job.precision.decoder,
        weights={file.path: file.entry for file in job.weights},
        target_graphs=writer.target_graphs,
        needs={
            target: Needs.of(known(target), is_quantised=is_quantised) for target in options.targets
        },
        files=files,
        scorer=_scorer(job),
        generation=prompts["generation"],
        attention=options.attention_form,
    )


def _embeddings(job: Job, table: ir.ExternalTensor) -> Embeddings:
    return Embeddings(
        file=f"graphs/{table.location}",
        offset=table.offset or 0,
        dtype=job.precision.decoder,
        shape=(job.spec.vocab_size, job.spec.hidden_size),
    )


def _tokens(job: Job, prompts: dict[str, Any]) -> Tokens:
    return Tokens(
        tokenizer=TOKENIZER,
        chat_template=prompts["chat_template"],
        image_token=prompts["image_token"],
        image_token_id=job.config.image_token_id,
        eos_token_ids=tuple(prompts["eos_token_ids"]),
        special_tokens=prompts["special_tokens"],
    )


def _scorer(job: Job) -> Scorer | None:
    clip = job.clip
    if clip is None:
        return None
    return Scorer(
        source=clip.name,
        tokenizer=SCORER_TOKENIZER,
        bos_id=clip.bos_id,
        eos_id=clip.eos_id,
        window=clip.text.window,
        width=clip.text.width,
    )
