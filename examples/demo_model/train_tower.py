"""Train the demo model's CLIP: dense targets for the patches, contrast with captions for the CLS.

    torchrun --nproc-per-node 2 -m examples.demo_model.train_tower demo/training

The patches learn what object they show and how it looks (a dense auxiliary task, far quicker than
contrast alone); the CLS row and the text tower learn together by open_clip's loss. No scene is seen
twice.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip import ClipLoss
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .models import WIDTH, WINDOW, make_clip, pixels
from .questions import NUMBERS, Asker
from .scenes import COLOURS, MOST, SHAPES, Scene, make_scene
from .targets import GROUND_NAMES, NAMES, patch_targets
from .training import Log, Optimiser, save, start_process

COUNTED = len(SHAPES) + len(COLOURS)
_AMONG = len(NUMBERS) + 1  # counts 0 to 4, and more


class Heads(nn.Module):
    """What is read off the tower while it learns; thrown away afterwards."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {name: len(values) + 1 for name, values in NAMES.items()}
        sizes |= {name: len(values) for name, values in GROUND_NAMES.items()}
        self.patch = nn.ModuleDict({n: nn.Linear(WIDTH, size) for n, size in sizes.items()})
        self.centre = nn.Linear(WIDTH, 2)
        grounds = {name: len(values) for name, values in GROUND_NAMES.items()}
        self.whole = nn.ModuleDict({n: nn.Linear(WIDTH, size) for n, size in grounds.items()})
        self.counts = nn.Linear(WIDTH, COUNTED * _AMONG)
        self.amount = nn.Linear(WIDTH, MOST + 1)


def whole_targets(scene: Scene) -> Tensor:
    """How many of each shape and colour, then how many objects, [COUNTED + 1]."""
    shapes = [sum(t.shape == s for t in scene.things) for s in SHAPES]
    colours = [sum(t.colour == c for t in scene.things) for c in COLOURS]
    most = len(NUMBERS)
    return torch.tensor([min(n, most) for n in shapes + colours] + [len(scene.things)])


def caption(asker: Asker, scene: Scene, random: np.random.Generator) -> str:
    """Up to three true sentences, or names of what is there."""
    if random.random() < 0.3:
        things = random.permutation(np.array([t.name for t in scene.things]))[:3]
        return " and ".join(f"a {name}" for name in things)
    kinds = ("count", "colour", "shape", "texture", "position", "ground", "pattern", "common")
    questions = asker.ask(scene, int(random.integers(2, 4)), kinds)
    return " ".join(q.sentence for q in questions)


def batches(rank: int, ranks: int, size: int, tokenizer: Any) -> Iterator[dict[str, Tensor]]:
    """Endless batches of fresh scenes."""
    asker, random, index = Asker(rank), np.random.default_rng(rank), rank
    while True:
        scenes = [make_scene("train", index + ranks * k) for k in range(size)]
        index += ranks * size
        targets = [patch_targets(scene) for scene in scenes]
        words = [caption(asker, scene, random) for scene in scenes]
        text = tokenizer(words, padding="max_length", max_length=WINDOW - 2, truncation=True)
        ids = torch.tensor(text["input_ids"])
        bos, eos = (
            torch.full((size, 1), i) for i in (tokenizer.bos_token_id, tokenizer.eos_token_id)
        )
        yield {
            "pixels": torch.stack([pixels(scene) for scene in scenes]),
            "classes": torch.stack([classes for classes, _ in targets]),
            "centres": torch.stack([centres for _, centres in targets]),
            "whole": torch.stack([whole_targets(scene) for scene in scenes]),
            "ids": torch.cat([bos, ids, eos], 1),
        }


def losses(clip: Any, heads: Heads, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each part of the loss, and the share of patches told wholly right."""
    seen = clip.vision_model(batch["pixels"], output_hidden_states=True)
    rows = seen.hidden_states[-2][:, 1:]  # [B, N, C]: what LLaVA will read
    told = [head(rows).float() for head in heads.patch.values()]
    classes, parts = batch["classes"], {}
    is_thing = classes[..., 0] > 0
    each = sum(
        cross_entropy(t.flatten(0, 1), classes[..., k].flatten(), reduction="none")
        for k, t in enumerate(told)
    ).view_as(is_thing)
    # By kind of patch: most show the ground, and would drown what is hard.
    dense = (each * is_thing).sum() / is_thing.sum() + 0.5 * (each * ~is_thing).sum() / (
        ~is_thing
    ).sum()
    off = (heads.centre(rows).float() - batch["centres"]).abs().sum(-1)
    parts["dense"] = dense + (off * is_thing).sum() / is_thing.sum() * 0.5

    cls = seen.pooler_output  # [B, C]
    last = len(NAMES)
    counts = heads.counts(cls).float().view(len(cls), COUNTED, _AMONG)
    parts["whole"] = (
        cross_entropy(heads.whole["ground"](cls).float(), classes[:, 0, last])
        + cross_entropy(heads.whole["pattern"](cls).float(), classes[:, 0, last + 1])
        + cross_entropy(counts.flatten(0, 1), batch["whole"][:, :-1].flatten())
        + cross_entropy(heads.amount(cls).float(), batch["whole"][:, -1])
    )
    text = clip.text_model(input_ids=batch["ids"]).pooler_output
    image, text = clip.visual_projection(cls).float(), clip.text_projection(text).float()
    image, text = image / image.norm(dim=-1, keepdim=True), text / text.norm(dim=-1, keepdim=True)
    parts["image"], parts["text"] = image, text
    right = torch.stack([t.argmax(-1) == classes[..., k] for k, t in enumerate(told)])
    parts["right"] = (right.all(0) & is_thing).sum() / is_thing.sum()
    return parts


def main() -> None:
    """Train, and write tower.pt and a log."""
    parser = argparse.ArgumentParser(description="Train the demo model's CLIP.")
    parser.add_argument("path", metavar="DIR", type=Path, help="directory to write")
    parser.add_argument("--steps", type=int, default=1100, help="steps (1100)")
    parser.add_argument("--batch", type=int, default=32, help="images a process and step (32)")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate (2e-3)")
    parser.add_argument("--warm", type=Path, help="a tower.pt to continue from")
    options = parser.parse_args()
    rank, ranks = start_process()
    options.path.mkdir(parents=True, exist_ok=True)
    clip, tokenizer = make_clip()
    heads, contrast = Heads(), ClipLoss()
    both = nn.ModuleDict({"clip": clip, "heads": heads})
    if options.warm:
        state = torch.load(options.warm)
        clip.load_state_dict(state["clip"])
        heads.load_state_dict(state["heads"])
    optimiser = Optimiser(both, options.rate)
    compiled = torch.compile(lambda batch: losses(clip, heads, batch))
    log = Log(options.path / "tower.jsonl", rank == 0)
    source = batches(rank + (200_000 if options.warm else 0), ranks, options.batch, tokenizer)
    for step in range(options.steps):
        batch = next(source)
        with torch.autocast("cpu", torch.bfloat16):
            parts = compiled(batch)
        pairs = contrast(parts["image"], parts["text"], clip.logit_scale.exp().clamp(max=100))
        (parts["dense"] + 0.5 * parts["whole"] + 0.3 * pairs).backward()
        optimiser.step(step / options.steps)
        if step % 20 == 0 or step == options.steps - 1:
            values = {key: parts[key].item() for key in ("dense", "whole", "right")}
            log.write(
                step=step,
                images=(step + 1) * options.batch * ranks,
                contrast=pairs.item(),
                **values,
            )
        if rank == 0 and (step % 200 == 199 or step == options.steps - 1):
            save(
                options.path / "tower.pt", {"clip": clip.state_dict(), "heads": heads.state_dict()}
            )


if __name__ == "__main__":
    main()
