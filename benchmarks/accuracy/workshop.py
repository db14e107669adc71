"""Data, heads and bundles, made by patchsieve's own commands and kept for the next time."""

from __future__ import annotations

import hashlib
import io
import json
import shlex
import sys
import time
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from PIL import Image

from benchmarks.accuracy.plans import Row
from examples.demo_model import make_data
from patchsieve.cli import main as patchsieve
from patchsieve.export.checkpoint import read_config
from patchsieve.export.recipes import Size
from patchsieve.heads import CONFIG, TENSORS
from patchsieve.manifest import read
from patchsieve.plan import NO_PRUNING, Plan

_GREY = (122, 116, 104)  # CLIP's mean: what normalises to zero
_LIMITS = ("--max-text-tokens", "48", "--max-new-tokens", "16")


def digest(*parts: str | bytes) -> str:
    """A short name for contents."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode() if isinstance(part, str) else part)
        found.update(b"\0")
    return found.hexdigest()[:10]


@dataclass(frozen=True)
class Training:
    """How heads are learned.

    Attributes:
        steps: Optimiser steps.
        batch: Questions of a step.
        rate: Learning rate; the paper's 1e-4 is for 665,000 conversations.
        weight: lambda_ATP.
        pull: lambda_target; the paper's 0.2 counts tokens of 576.
    """

    steps: int = 300
    batch: int = 8
    rate: float = 1e-3
    weight: float = 0.01
    pull: float = 0.05


@dataclass(frozen=True)
class Work:
    """A plan that can be asked: where it is, and what its answers depend on.

    Attributes:
        row: The table's row.
        bundle: The directory.
        plan: The plan's name in it.
        about: Digest of model and plan.
    """

    row: Row
    bundle: Path
    plan: str
    about: str


class Workshop:
    """Everything of one checkpoint in one folder; what is there already is not made again.

    Args:
        checkpoint: Directory of a LLaVA.
        scorer: Directory of its CLIP, for IVTP's choice of words.
        folder: Where to work.
        training: How heads are learned.
    """

    def __init__(self, checkpoint: Path, scorer: Path, folder: Path, training: Training) -> None:
        weights = [p.read_bytes() for p in sorted(checkpoint.glob("*.safetensors"))]
        self.checkpoint, self.scorer, self.training = checkpoint, scorer, training
        self.model = digest(*weights)
        self.folder, self.data = folder / self.model, folder / "data"
        self.folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def size(self) -> Size:
        """What recipes must know of the model."""
        config = read_config(self.checkpoint)
        side = config.vision_config.image_size // config.vision_config.patch_size
        return Size(side * side, config.text_config.num_hidden_layers)

    def questions(self, split: str, count: int, per_image: int = 8) -> Path:
        """A file of questions, drawn anew where it is not there."""
        folder = self.data / f"{split}-{count}-{per_image}"
        path = folder / "questions.jsonl"
        if not path.exists():
            log(f"drawing {count} questions of the split {split}")
            make_data.write(folder, split, count, per_image)
        return path

    @cached_property
    def grey(self) -> Path:
        """The picture of a model that sees nothing."""
        path = self.data / "grey.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (96, 96), _GREY).save(path)
        return path

    def prepare(self, row: Row) -> Work:
        """Make a row's heads, bundle and plan, as far as they are not there."""
        plan, marks = row.plan, []
        if row.heads is not None:
            heads = self.heads(row)
            sites = [replace(s, params=s.params | {"heads": str(heads)}) for s in plan.sites]
            plan = replace(plan, sites=tuple(sites))
            marks = [(heads / name).read_bytes() for name in (CONFIG, TENSORS)]
            marks.append(json.dumps(row.plan.to_dict()).encode())
        bundle = self.folder / "bundles" / row.bundle
        about = digest(self.model, *(marks or [json.dumps(plan.to_dict())]))
        if not plan.prunes:
            name = NO_PRUNING
            if not bundle.exists():
                self._export(plan, bundle, None)
        else:
            name = f"p-{about}"
            if not bundle.exists() or name not in read(bundle).plans:
                self._export(plan, bundle, name)
        return Work(row, bundle, name, about)

    def heads(self, row: Row) -> Path:
        """Thresholds, learned or fixed."""
        wanted, how = row.heads, self.training
        assert wanted is not None
        learning = f"{how.steps}x{how.batch}-{how.rate:g}-{how.weight:g}-{how.pull:g}"
        name = wanted.name + (f"_{learning}" if wanted.method == "atp" else "")
        path = self.folder / "heads" / name
        if path.exists():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        few = str(self.questions("calibration", 300, per_image=2))
        words = ["calibrate", str(self.checkpoint), "--method", wanted.method, "-o", str(path)]
        words += ["--sites", ",".join(map(str, wanted.sites))]
        words += ["--target-tokens", str(wanted.target), *wanted.options]
        if wanted.method == "atp":
            many = self.questions("calibration", how.steps * how.batch, per_image=8)
            words += ["--data", str(many), "--held-out", few, "--steps", str(how.steps)]
            words += ["--batch-size", str(how.batch), "--learning-rate", str(how.rate)]
            words += ["--lambda-atp", str(how.weight), "--lambda-target", str(how.pull)]
        else:
            words += ["--data", few, "--batch-size", "8"]
        found = json.loads(run([*words, "--json"]).splitlines()[-1])
        log(f"  {found['average_tokens']:.1f} tokens on average, target {wanted.target}")
        return path

    def _export(self, plan: Plan, bundle: Path, name: str | None) -> None:
        words = ["export"]
        if bundle.exists():
            words += ["--reuse", str(bundle)]
        else:
            bundle.parent.mkdir(parents=True, exist_ok=True)
            words += [str(self.checkpoint), "-o", str(bundle), "--scorer", str(self.scorer)]
            words += _LIMITS
        if name is not None:
            path = self.folder / "plans" / f"{name}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(plan.to_dict(), indent=1), encoding="utf-8")
            words += ["--plan", str(path), "--plan-name", name]
        run([*words, "--quiet"])


def run(words: list[str]) -> str:
    """Run a patchsieve command in this process, and return what it prints.

    Its words are told, so that a reader can run it too.
    """
    log(f"patchsieve {shlex.join(words)}")
    start, said = time.monotonic(), io.StringIO()
    with redirect_stdout(said):
        code = patchsieve(words)
    if code:
        sys.exit(f"the command failed: patchsieve {shlex.join(words)}\n{said.getvalue()}")
    log(f"  {time.monotonic() - start:.0f} s")
    return said.getvalue()


def log(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)
