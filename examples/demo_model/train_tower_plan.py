"""Train a demo model, tower and all, on the patches that a plan leaves in the tower.

    torchrun --nproc-per-node 2 -m examples.demo_model.train_tower_plan CHECKPOINT \
        --plan PLAN.json -o demo/trained

The tower is the module that export traces, so that its choices are those of a bundle; they have no
gradient, what the kept rows hold has. Of what the decoder's sites leave only the number is
followed: which tokens fall there is drawn at random, the same for all questions about a picture
(`train_pruned` goes on with the plan's own choices). No scene is seen twice.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoProcessor, LlavaForConditionalGeneration

from patchsieve.calibration.passes import GONE
from patchsieve.errors import PatchsieveError
from patchsieve.export.checkpoint import canonical
from patchsieve.export.methods import build_encoder
from patchsieve.export.vision import Vision, vision_model
from patchsieve.export.weights import weights_of
from patchsieve.plan import Plan

from .questions import KINDS
from .save import check_free, save_like
from .shared_prefix import run_layer, run_questions
from .train_language import Looks, Words, accuracy, answer_loss, batches
from .training import Log, Optimiser, start_process


def weights_in(words: str) -> dict[str, float]:
    """Read "count=2,shape=1.5"."""
    pairs = (word.partition("=") for word in words.split(",") if word)
    weights = {kind: float(weight) for kind, _, weight in pairs}
    if unknown := set(weights) - set(KINDS):
        raise argparse.ArgumentTypeError(f"found: {unknown} | expected: {', '.join(KINDS)}")
    return weights


def vision_of(model: Any, plan: Plan) -> Vision:
    """The module that export traces, on a model's own weights: who trains it trains the model."""
    config = model.config
    vision = Vision(
        vision_model(config), config.text_config.hidden_size, build_encoder(plan.encoder)
    )
    own = {canonical(name): parameter for name, parameter in model.named_parameters()}
    for weight in weights_of(vision):
        values = own[weight.source].detach()
        owner, _, name = weight.name.rpartition(".")
        values = values.T if weight.transposed else values  # a view
        setattr(vision.get_submodule(owner), name, nn.Parameter(values))
    return vision


class PrunedPrefix:
    """What the decoder reads before a question, and what of it falls there.

    Args:
        model: The LLaVA model.
        plan: What prunes.
        words: Of the model's prompt.
        seed: Of what falls.
    """

    def __init__(self, model: Any, plan: Plan, words: Words, seed: int) -> None:
        counted = all("num_keep" in site.params for site in plan.sites)
        if plan.projector is not None or plan.position_rule == "contiguous" or not counted:
            raise PatchsieveError(
                "training follows plans with a method in the tower, sites that keep a number, and "
                "original positions",
                found=plan.to_dict(),
            )
        self.vision = vision_of(model, plan)
        self._language, self._words = model.model.language_model, words
        self._counts = {site.layer: int(site.params["num_keep"]) for site in plan.sites}
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The prefix of each image.

        Returns:
            Rows, [B, P, C]; what hides those that fall, [layers, B, P]; their rotary positions,
            [B, P]; and the raster ids of the patches among them, [B, N].
        """
        with torch.autocast("cpu", enabled=False):  # a bundle chooses in float32
            visual, ids, _ = self.vision(images)
        first, patches = self._words.image, self.vision.facts.num_patches
        text = self._language.embed_tokens(torch.tensor(self._words.prefix))
        text = text.expand(len(images), -1, -1)
        rows = torch.cat([text[:, :first], visual.to(text.dtype), text[:, first + 1 :]], 1)
        places = torch.arange(len(self._words.prefix) - 1 + patches).expand(len(images), -1)
        places = torch.cat([places[:, :first], first + ids, places[:, first + patches :]], 1)
        order = torch.rand(ids.shape, generator=self._generator).argsort(1)
        bias = torch.zeros(len(self._language.layers), *rows.shape[:2])
        for layer, count in self._counts.items():
            bias[layer:, :, first : first + ids.shape[1]] = (order >= count) * GONE
        return rows, bias, places, ids


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
    add("--weights", type=weights_in, default="count=2", help="of kinds of questions (count=2)")
    options = parser.parse_args()
    check_free(options.out)
    rank, ranks = start_process()
    plan = Plan.from_file(options.plan)
    model: Any = LlavaForConditionalGeneration.from_pretrained(
        options.checkpoint, dtype=torch.float32
    )
    words = Words(AutoProcessor.from_pretrained(options.checkpoint))
    make, looks = PrunedPrefix(model, plan, words, options.first + rank), Looks()
    layer = torch.compile(run_layer)
    parts = [make.vision, model.model.language_model, model.lm_head, looks]
    optimiser = Optimiser(nn.ModuleList(parts), options.learning_rate)
    log = Log(options.out.with_name(options.out.name + ".jsonl"), rank == 0)
    source = batches(options.first + rank, ranks, options.batch_size, words, options.weights)

    def ask(images: Tensor, ids: Tensor) -> Tensor:
        rows, bias, places, _ = make(images)
        return run_questions(model, rows, ids, layer, bias, places)

    for step in range(options.steps):
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
    if rank == 0:
        save_like(options.checkpoint, model, options.out)


if __name__ == "__main__":
    main()
