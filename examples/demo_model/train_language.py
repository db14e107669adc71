"""Train the demo model's projector and language model on questions; the tower stays as it is.

    torchrun --nproc-per-node 2 -m examples.demo_model.train_language demo/training --minutes 70

Some twenty questions share one picture's rows (shared_prefix.py). Half of the answers are one word,
half a sentence. No scene is seen twice; the held-out scenes never.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, rms_norm

from .models import WIDTH, make_clip, make_llava, pixels
from .questions import KINDS, Asker, Question, as_prompt
from .scenes import make_scene
from .shared_prefix import run_layer, run_questions
from .targets import NAMES, patch_targets
from .training import Log, Optimiser, save, start_process

LENGTH = 20  # tokens of a question and its answer at most, the last one not counted
QUESTIONS = 20  # about one picture
WEIGHTS = {"relation": 4.0, "count": 2.0, "position": 1.5, "texture": 1.5}  # learnt last


class Words:
    """Token ids of the prompt around a picture, and of questions with their answers."""

    def __init__(self, processor: Any) -> None:
        self._tokenizer, template = processor.tokenizer, processor.apply_chat_template
        message = [{"type": "image"}, {"type": "text", "text": "QUESTION"}]
        self._whole = template([{"role": "user", "content": message}], add_generation_prompt=True)
        before = self._whole.split("QUESTION")[0]
        self.prefix: list[int] = self._tokenizer(before).input_ids
        self.image = self.prefix.index(self._tokenizer.image_token_id)
        self._known: dict[tuple[str, str], tuple[list[int], int]] = {}

    def encode(self, question: Question, is_short: bool) -> tuple[list[int], int]:
        """Ids after the prefix, end mark included, and how many of them are the answer's."""
        both = as_prompt(question, is_short)
        if both not in self._known:
            self._known[both] = self._encode(*both)
        return self._known[both]

    def _encode(self, text: str, answer: str) -> tuple[list[int], int]:
        prompt = self._whole.replace("QUESTION", text)
        asked = self._tokenizer(prompt).input_ids
        ids = self._tokenizer(f"{prompt} {answer}").input_ids + [self._tokenizer.eos_token_id]
        start = len(self.prefix)
        if ids[: len(asked)] != asked or asked[:start] != self.prefix:
            raise RuntimeError(f"{prompt!r} is not the beginning of its tokens with the answer")
        if len(ids) - start > LENGTH + 1:
            raise RuntimeError(
                f"{prompt!r} | found: {len(ids) - start} tokens | expected: {LENGTH + 1}"
            )
        return ids[start:], len(ids) - len(asked)

    def batch(
        self, asked: Sequence[Sequence[Question]], short: Sequence[Sequence[bool]]
    ) -> tuple[Tensor, Tensor]:
        """Inputs, [B, Q, T], and targets, [B, Q, T]; -100 where nothing is asked of the model."""
        most = max(len(questions) for questions in asked)
        ids = torch.zeros(len(asked), most, LENGTH, dtype=torch.long)
        targets = torch.full((len(asked), most, LENGTH), -100)
        for row, questions in enumerate(asked):
            for column, question in enumerate(questions):
                whole, answer = self.encode(question, short[row][column])
                length = len(whole) - 1
                ids[row, column, :length] = torch.tensor(whole[:-1])
                targets[row, column, length - answer : length] = torch.tensor(whole[-answer:])
        return ids, targets


def embed_prefix(model: Any, words: Words, images: Tensor) -> Tensor:
    """Rows up to the first question, [B, P, C]."""
    seen = model.model.vision_tower(images, output_hidden_states=True).hidden_states[-2][:, 1:]
    rows = model.model.multi_modal_projector(seen.detach())  # [B, N, C]
    text = model.model.language_model.embed_tokens(torch.tensor(words.prefix))
    text = text.expand(len(images), -1, -1).to(rows.dtype)
    return torch.cat([text[:, : words.image], rows, text[:, words.image + 1 :]], 1)


def are_right(model: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """Whether greedy decoding gives the whole answer, [B, Q].

    It does where each token of the answer is the likeliest after the ones before it.
    """
    told = model.lm_head(hidden.float()).argmax(-1)  # [B, Q, T]
    return ((told == targets) | (targets == -100)).all(-1)


@torch.no_grad()
def accuracy(
    model: Any, words: Words, images: int, ask: Callable[[Tensor, Tensor], Tensor], split: str
) -> dict[str, float]:
    """Share of right answers by kind, twenty questions about each of a split's first scenes.

    `ask` takes pictures, [B, 3, h, w], and ids, [B, Q, T], and gives last hidden states.
    """
    asker, hits = Asker(1), defaultdict(list)
    for start in range(0, images, 16):
        scenes = [make_scene(split, k) for k in range(start, min(start + 16, images))]
        asked = [asker.ask(scene, QUESTIONS) for scene in scenes]
        short = [[k % 2 == 0 for k in range(len(questions))] for questions in asked]
        ids, targets = words.batch(asked, short)
        seen = torch.stack([pixels(scene) for scene in scenes])
        right = are_right(model, ask(seen, ids), targets)
        for row, questions in enumerate(asked):
            for column, question in enumerate(questions):
                hits[question.kind].append(right[row, column].item())
    shares = {kind: sum(hits[kind]) / len(hits[kind]) for kind in KINDS if hits[kind]}
    every = [hit for group in hits.values() for hit in group]
    return {"all": sum(every) / len(every), **shares}


class Looks(nn.Module):
    """How objects look, read linearly from their rows; thrown away after training.

    Without this loss the projector lets go of what is asked late (textures), and finds no way back.
    """

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(WIDTH, len(values) + 1) for values in NAMES.values())

    def forward(self, rows: Tensor, classes: Tensor) -> Tensor:
        """Cross-entropy over the patches of objects, 0-d.

        Args:
            rows: Projected, [B, N, C].
            classes: Of each patch, `patch_targets`, [B, N, 6].
        """
        is_thing = classes[..., 0] > 0
        seen = rms_norm(rows[is_thing].float(), (WIDTH,))
        told = [cross_entropy(h(seen), classes[is_thing][:, k]) for k, h in enumerate(self.heads)]
        return torch.stack(told).mean()


def batches(
    first: int, ranks: int, size: int, words: Words, weighs: Mapping[str, float]
) -> Iterator[Any]:
    """Endless fresh pictures from a number on, with questions and the weight of each by its kind.

    Yields:
        Pixels, [B, 3, h, w]; ids and targets, [B, Q, T]; weights, [B, Q]; what each patch shows.
    """
    asker, index = Asker(100 + first), first
    noise = torch.Generator().manual_seed(first)
    while True:
        scenes = [make_scene("train", index + ranks * k) for k in range(size)]
        index += ranks * size
        asked = [asker.ask(scene, QUESTIONS) for scene in scenes]
        short = (torch.rand(size, QUESTIONS, generator=noise) < 0.5).tolist()
        ids, targets = words.batch(asked, short)
        weights = torch.zeros(ids.shape[:2])
        for row, questions in enumerate(asked):
            for column, question in enumerate(questions):
                weights[row, column] = weighs.get(question.kind, 1.0)
        classes = torch.stack([patch_targets(scene)[0] for scene in scenes])
        yield torch.stack([pixels(scene) for scene in scenes]), ids, targets, weights, classes


def answer_loss(model: Any, hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Nats an answer, a mean over questions by their weights, [B, Q]; 0-d."""
    is_asked = targets != -100
    logits = model.lm_head(hidden[is_asked].float())
    each = weights[..., None].expand_as(targets)[is_asked]
    return (cross_entropy(logits, targets[is_asked], reduction="none") * each).sum() / weights.sum()


def prepare(path: Path) -> tuple[Any, Any]:
    """The model on the trained tower, with the tower frozen, and its processor."""
    clip, _ = make_clip()
    clip.load_state_dict(torch.load(path / "tower.pt")["clip"])
    model, processor = make_llava(clip)
    model.requires_grad_(True)
    model.model.vision_tower.requires_grad_(False)
    return model, processor


def main() -> None:
    """Train, and write language.pt and a log."""
    parser = argparse.ArgumentParser(description="Train the demo model's language model.")
    parser.add_argument("path", metavar="DIR", type=Path, help="directory with tower.pt")
    parser.add_argument("--minutes", type=float, default=70, help="how long (70)")
    parser.add_argument("--batch", type=int, default=8, help="images a process and step (8)")
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate (3e-3)")
    parser.add_argument("--warm", type=Path, help="a language.pt to continue from")
    parser.add_argument("--first", type=int, default=0, help="number of the first scene (0)")
    options = parser.parse_args()
    rank, ranks = start_process()
    model, processor = prepare(options.path)
    if options.warm:
        model.load_state_dict(torch.load(options.warm))
    words = Words(processor)
    looks, layer = Looks(), torch.compile(run_layer)

    def ask(images: Tensor, ids: Tensor) -> Tensor:
        return run_questions(model, embed_prefix(model, words, images), ids, layer)

    optimiser = Optimiser(nn.ModuleList([model, looks]), options.rate)
    log = Log(options.path / "language.jsonl", rank == 0)
    source = batches(options.first + rank, ranks, options.batch, words, WEIGHTS)
    start, step, done = time.monotonic(), 0, torch.zeros(1)
    while done.item() < 1:
        images, ids, targets, weights, classes = next(source)
        with torch.autocast("cpu", torch.bfloat16):
            prefix = embed_prefix(model, words, images)
            hidden = run_questions(model, prefix, ids, layer)
        loss = answer_loss(model, hidden, targets, weights)
        rows = prefix[:, words.image : words.image + classes.shape[1]]
        dense = looks(rows, classes)
        (loss + dense).backward()
        done[0] = (time.monotonic() - start) / (options.minutes * 60)
        if ranks > 1:
            dist.broadcast(done, 0)
        optimiser.step(done.item())
        step += 1
        if step % 20 == 0:
            log.write(
                step=step,
                questions=step * ranks * options.batch * QUESTIONS,
                loss=loss.item(),
                dense=dense.item(),
            )
        if rank == 0 and (step % 250 == 0 or done.item() >= 1):
            right = accuracy(model, words, 64, ask, "validation")
            log.write(step=step, done=done.item(), validation=right)
            save(options.path / "language.pt", model.state_dict())
    if rank == 0:
        log.write(held_out=accuracy(model, words, 256, ask, "held-out"))


if __name__ == "__main__":
    main()
