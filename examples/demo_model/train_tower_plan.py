"""Train a demo model, tower and all, on the patches that a plan leaves in the tower.

    torchrun --nproc-per-node 2 -m examples.demo_model.train_tower_plan CHECKPOINT \
        --plan PLAN.json -o demo/trained

The tower is the module that export traces, so that its choices are those of a bundle; they have no
gradient, what the kept rows hold has. In the decoder tokens fall as --falls says: at random, or as
IVTP chooses them by the picture's own CLS. Either way all questions about a picture share what is
left (`train_pruned` continues with the choices for each question). No scene is seen twice. The same
command continues where it was interrupted.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoProcessor, LlavaForConditionalGeneration

from patchsieve.contract.plan import Plan

from .pruned_prefix import PrunedPrefix
from .questions import KINDS
from .save import check_free, save_like
from .shared_prefix import run_layer, run_questions
from .train_language import Looks, Words, accuracy, answer_loss, batches
from .training import Log, Optimiser, State, start_process


def weights_in(words: str) -> dict[str, float]:
    """Read "count=2,shape=1.5"."""
    pairs = (word.partition("=") for word in words.split(",") if word)
    weights = {kind: float(weight) for kind, _, weight in pairs}
    if unknown := set(weights) - set(KINDS):
        raise argparse.ArgumentTypeError(f"found: {unknown} | expected: {', '.join(KINDS)}")
    return weights


def main() -> None:
    """Train, and write a checkpoint and a log."""
    parser = argparse.ArgumentParser(description="Train a whole demo model under a plan.")
    add = parser.add_argument
    add("checkpoint", type=Path, help="the model")
    add("--plan", type=Path, required=True, help="file of a plan that prunes in the tower")
    add("-o", "--out", type=Path, required=True, help="checkpoint to make")
    add("--steps", type=int, default=2200, help="steps (2200)")
    add("--batch-size", type=int, default=8, help="images a process and step (8)")
    add("--learning-rate", type=float, default=1e-3, help="learning rate (1e-3)")
    add("--first", type=int, default=1_000_000, help="number of the first scene (1000000)")
    add(
        "--falls",
        choices=("random", "plan"),
        default="random",
        help="what decides which tokens fall in the decoder: chance, or the plan's ivtp (random)",
    )
    add(
        "--weights",
        type=weights_in,
        default="count=2",
        help="weights of kinds of questions (default: count=2)",
    )
    options = parser.parse_args()
    check_free(options.out)
    rank, ranks = start_process()
    plan = Plan.from_file(options.plan)
    model: Any = LlavaForConditionalGeneration.from_pretrained(
        options.checkpoint, dtype=torch.float32
    )
    words = Words(AutoProcessor.from_pretrained(options.checkpoint))
    is_random, looks = options.falls == "random", Looks()
    make = PrunedPrefix(model, plan, words, options.first + rank, is_random=is_random)
    layer = torch.compile(run_layer)
    parts = nn.ModuleList([make.vision, model.model.language_model, model.lm_head, looks])
    optimiser = Optimiser(parts, options.learning_rate)
    state = State(options, rank, ranks, parts, optimiser)
    done = state.restore()
    log = Log(options.out.with_name(options.out.name + ".jsonl"), rank == 0)
    scene = options.first + rank + done * ranks * options.batch_size
    source = batches(scene, ranks, options.batch_size, words, options.weights)

    def ask(images: Tensor, ids: Tensor) -> Tensor:
        rows, bias, places, _ = make(images)
        return run_questions(model, rows, ids, layer, bias, places)

    for step in range(done, options.steps):
        images, ids, targets, weights, classes = next(source)
        with torch.autocast("cpu", torch.bfloat16):
            rows, bias, places, patches = make(images)
            hidden = run_questions(model, rows, ids, layer, bias, places)
        loss = answer_loss(model, hidden, targets, weights)
        shown = classes.gather(1, patches[..., None].expand(-1, -1, classes.shape[-1]))
        visual = rows[:, words.image : words.image + patches.shape[1]]
        (loss + looks(visual, shown)).backward()
        optimiser.step(step / options.steps)
        if step % 20 == 0:
            log.write(step=step, loss=loss.item())
        if rank == 0 and (step % 250 == 249 or step == options.steps - 1):
            log.write(step=step, validation=accuracy(model, words, 64, ask, "validation"))
        state.keep(step + 1)
    if rank == 0:
        save_like(options.checkpoint, model, options.out)
        state.end()


if __name__ == "__main__":
    main()
