"""Train a demo model's decoder to do with the tokens that a plan leaves.

    torchrun --nproc-per-node 2 -m examples.demo_model.train_pruned CHECKPOINT -o demo/trained \
        --bundle BUNDLE --plan PLAN --data demo/calibration/questions.jsonl

Which tokens survive, and what the tower makes of them, is what the bundle of the untrained model
says, question by question; tower and projector stay as they are. The choices of the trained
model's own bundle differ a little, because its attention moved. Plans that merge tokens in the
decoder cannot be followed. The same command continues where it was interrupted.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import LlavaForConditionalGeneration

from patchsieve.calibration.attention import PASS, install
from patchsieve.calibration.encoder import Encoder
from patchsieve.calibration.passes import GONE
from patchsieve.contract.errors import PatchsieveError
from patchsieve.evaluation.questions import questions_of
from patchsieve.runtime.model import Model
from patchsieve.runtime.records import Records

from .save import check_free, save_like
from .training import Log, Optimiser, State, start_process


@dataclass(frozen=True)
class Pruned:
    """A question and its answer as they go through a decoder that prunes.

    Attributes:
        ids: Tokens of the L rows that enter the decoder, [L].
        labels: Answer tokens, -100 elsewhere, [L].
        places: Rotary positions, those of the unpruned rows, [L].
        features: Of the visual tokens, [N, C].
        visual: Rows of them, [N].
        gone: By site, which rows have fallen, bool [L].
    """

    ids: Tensor
    labels: Tensor
    places: Tensor
    features: Tensor
    visual: Tensor
    gone: dict[int, Tensor]


class Pruner:
    """Makes pruned samples of records, by a bundle.

    Args:
        checkpoint: The model.
        bundle: Exported from it.
        plan: Name of a plan in the bundle.
        data: Conversations of one question about one picture.
    """

    def __init__(self, checkpoint: Path, bundle: Path, plan: str, data: Path) -> None:
        self.encode, self.records, self.plan = Encoder(str(checkpoint)), Records(data, None), plan
        self.questions = questions_of(self.records, "<image>")
        self.model = Model(bundle, threads=1, check="size")
        self.model.pipeline.spare_images = 1  # an answer and its sample take the same features
        rules = self.encode.trained.position_rule, self.model.facts.plans[plan].position_rule
        if set(rules) - {"original", None}:
            raise PatchsieveError(
                "training follows original positions alone", found=" and ".join(map(str, rules))
            )

    def __getitem__(self, index: int) -> Pruned:
        """The sample of a record."""
        sample, question = self.encode(self.records[index]), self.questions[index]
        assert sample.pixel_values is not None
        files = [str(path) for path in question.images]
        told = self.model.generate(
            files, question.content, system=question.system, plan=self.plan, max_new_tokens=1
        )
        noise = np.random.default_rng(0)
        (seen,) = self.model.pipeline.see(sample.pixel_values.numpy(), self.plan, noise)
        patches = torch.from_numpy(self.encode.patch_ids)
        is_kept = torch.ones(len(sample.input_ids), dtype=torch.bool)
        is_kept[sample.visual[0]] = torch.isin(patches, torch.from_numpy(seen.ids))
        places = torch.nonzero(is_kept)[:, 0]
        visual = torch.nonzero(torch.isin(places, sample.visual[0]))[:, 0]
        gone = {}
        for site in told.sites:
            gone[site.layer] = torch.zeros(len(places), dtype=torch.bool)
            gone[site.layer][visual] = True
            gone[site.layer][visual[site.places]] = False
        features = torch.from_numpy(np.array(seen.features, np.float32))
        ids, labels = sample.input_ids[is_kept], sample.labels[is_kept]
        return Pruned(ids, labels, places, features, visual, gone)


class Known:
    """Survivors that are known before, as `calibration.attention` asks for them."""

    def __init__(self, samples: Sequence[Pruned]) -> None:
        self._biases = {
            layer: pad_sequence([s.gone[layer].float() * GONE for s in samples], batch_first=True)
            for layer in samples[0].gone
        }

    def bias(self, layer: int) -> Tensor | None:
        """What a layer adds to the logits of each key, [B, L]."""
        site = max((site for site in self._biases if site <= layer), default=None)
        return None if site is None else self._biases[site]

    def see(self, *_: Any) -> None:
        """Nothing is left to decide."""


def read_answers(model: Any, samples: Sequence[Pruned]) -> tuple[Tensor, Tensor]:
    """What the model would say at each of the T answer tokens of a batch.

    Returns:
        Logits, [T, V], and the tokens themselves, [T].
    """

    def pad(rows: list[Tensor], value: int = 0) -> Tensor:
        return pad_sequence(rows, batch_first=True, padding_value=value)

    ids, labels = pad([s.ids for s in samples]), pad([s.labels for s in samples], -100)
    rows = model.get_input_embeddings()(ids)
    where = (
        torch.cat([torch.full_like(s.visual, k) for k, s in enumerate(samples)]),
        torch.cat([s.visual for s in samples]),
    )
    rows = rows.index_put(where, torch.cat([s.features for s in samples]).to(rows.dtype))
    hidden = model.model.language_model(
        inputs_embeds=rows,
        attention_mask=pad([torch.ones_like(s.ids) for s in samples]),
        position_ids=pad([s.places for s in samples]),
        use_cache=False,
        **{PASS: Known(samples)},
    ).last_hidden_state
    is_told = labels[:, 1:] != -100
    return model.lm_head(hidden[:, :-1][is_told]).float(), labels[:, 1:][is_told]


def batches(
    pruner: Pruner, rank: int, ranks: int, size: int, done: int = 0
) -> Iterator[list[Pruned]]:
    """Endless batches after the first `done`; every process takes records of its own."""
    order, rest = np.random.default_rng(rank), np.arange(rank, len(pruner.questions), ranks)
    if len(rest) < size:
        raise PatchsieveError(
            "a process has too few questions for a batch",
            found=len(rest),
            expected=f"{size} or more",
        )
    while True:
        drawn = order.permutation(rest)
        for start in range(0, len(drawn) - size + 1, size):
            if (done := done - 1) < 0:
                yield [pruner[int(index)] for index in drawn[start : start + size]]


def main() -> None:
    """Train, and write a checkpoint."""
    parser = argparse.ArgumentParser(description="Train a decoder under a plan.")
    add = parser.add_argument
    add("checkpoint", type=Path, help="the model")
    add("--bundle", type=Path, required=True, help="exported from it")
    add("--plan", required=True, help="name of a plan in the bundle")
    add("--data", type=Path, required=True, help="questions with their answers")
    add("-o", "--out", type=Path, required=True, help="checkpoint to make")
    add("--steps", type=int, default=1500, help="steps (1500)")
    add("--batch-size", type=int, default=16, help="questions a process and step (16)")
    add("--lm-learning-rate", type=float, default=3e-4, help="learning rate (3e-4)")
    options = parser.parse_args()
    check_free(options.out)
    rank, ranks = start_process()
    pruner = Pruner(options.checkpoint, options.bundle, options.plan, options.data)
    model: Any = LlavaForConditionalGeneration.from_pretrained(
        options.checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).requires_grad_(False)
    trained = nn.ModuleList([model.model.language_model, model.lm_head]).requires_grad_(True)
    install(model.model.language_model)
    optimiser = Optimiser(trained, options.lm_learning_rate)
    state = State(options, rank, ranks, trained, optimiser)
    first = state.restore()
    source = batches(pruner, rank, ranks, options.batch_size, first)
    log = Log(options.out.with_name(options.out.name + ".jsonl"), rank == 0)
    for step in range(first, options.steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss = cross_entropy(*read_answers(model, next(source)))
        loss.backward()
        optimiser.step(step / options.steps)
        if step % 20 == 0:
            log.write(step=step, loss=loss.item())
        state.keep(step + 1)
    if rank == 0:
        save_like(options.checkpoint, model, options.out)
        state.end()


if __name__ == "__main__":
    main()
