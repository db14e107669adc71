"""Save the trained demo model as Hugging Face does, in float16: the LLaVA, and its CLIP as scorer.

    python -m examples.demo_model.save demo/training examples/demo_model
    python -m examples.demo_model.save demo/trained examples/demo_model/atp

The second form takes a checkpoint that `patchsieve calibrate --train-lm` wrote, its heads included.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from examples.make_checkpoint import save_llava
from patchsieve.contract.writing import whole_or_nothing

from .models import make_clip, make_llava


def check_free(path: Path) -> None:
    """Refuse, before a training, to write where something is."""
    if os.path.lexists(path):
        raise SystemExit(
            f"{path} exists already | what to do: remove it, or choose another with -o"
        )


def save_like(checkpoint: Path, model: Any, path: Path) -> None:
    """Write a model that was trained further, with the other files of its checkpoint."""
    with whole_or_nothing(path) as folder:
        model.half().save_pretrained(folder)
        for file in checkpoint.iterdir():
            if file.is_file() and not (folder / file.name).exists():
                (folder / file.name).write_bytes(file.read_bytes())


def halve(checkpoint: Path, path: Path) -> None:
    """Write a checkpoint again with its weights in float16; heads keep their type."""
    check_free(path)
    with whole_or_nothing(path) as folder:
        shutil.copytree(
            checkpoint, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("log.jsonl")
        )
        weights = folder / "model.safetensors"
        tensors = {name: tensor.half() for name, tensor in load_file(weights).items()}
        save_file(tensors, weights, metadata={"format": "pt"})
        config = folder / "config.json"
        text = config.read_text(encoding="utf-8").replace('"float32"', '"float16"')
        config.write_text(text, encoding="utf-8")
        for file in folder.rglob("*.*"):
            file.chmod(0o644)


def main() -> None:
    """Write DIR/checkpoint and DIR/clip, or a trained checkpoint to DIR."""
    parser = argparse.ArgumentParser(description="Save the trained demo model.")
    parser.add_argument(
        "training", type=Path, help="directory with tower.pt and language.pt, or a checkpoint"
    )
    parser.add_argument("path", metavar="DIR", type=Path, help="directory to write (into)")
    options = parser.parse_args()
    if (options.training / "config.json").is_file():
        halve(options.training, options.path)
        return
    clip, clip_tokenizer = make_clip()
    clip.load_state_dict(torch.load(options.training / "tower.pt")["clip"])
    model, processor = make_llava(clip)
    model.load_state_dict(torch.load(options.training / "language.pt"))
    save_llava(options.path / "checkpoint", model.half(), processor)
    # The LLaVA holds the vision tower; a scorer reads CLIP's projections and its text tower.
    clip.half().save_pretrained(options.path / "clip")
    clip_tokenizer.save_pretrained(options.path / "clip")


if __name__ == "__main__":
    main()
