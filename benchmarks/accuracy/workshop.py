"""Data, heads and bundles, made by patchsieve's own commands and kept for the next time."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shlex
import subprocess
import sys
import time
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from PIL import Image

from benchmarks.accuracy.plans import Budgets, Heads, Row
from examples.demo_model import make_data
from patchsieve.cli import main as patchsieve
from patchsieve.contract.files import read
from patchsieve.contract.plan import NO_PRUNING, Plan
from patchsieve.export.families import family_of
from patchsieve.export.source.checkpoint import read_config
from patchsieve.pruning.heads import CONFIG, TENSORS
from patchsieve.pruning.recipes import Size

_GREY = (122, 116, 104)  # CLIP's mean: what normalises to zero
_FRESH = 1_000_000  # scenes of a tower's training begin here, after all that others took
# Of kinds of questions, from the second round on: relations have stopped to learn, and are noise.
_LATE = ("--weights", "count=2,shape=2,texture=2,relation=0.3")
_ROUNDS = ((1.0, ()), (0.5, _LATE), (0.5, (*_LATE, "--falls", "plan")))  # rate's factor, options
PROCESSES = min(2, os.cpu_count() or 1)  # that train a decoder together; more see other batches
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
    """How heads are learned, and decoders with them.

    Attributes:
        steps: Optimiser steps of heads alone.
        batch: Questions of such a step.
        rate: Learning rate; the paper's 1e-4 is for 665,000 conversations.
        lm_steps: Optimiser steps of a decoder and its heads.
        lm_batch: Questions of such a step, all processes together.
        lm_rate: Of a decoder; the paper's 2e-5 is for one of 7 billion weights.
        tower_steps: Optimiser steps of tower, projector and decoder together, of each round;
            `_ROUNDS` says what differs between rounds.
        tower_batch: Pictures of such a step, twenty questions each, all processes together.
        tower_rate: Learning rate of these steps.
        lm_heads_rate: Of the heads that learn with it.
        finish_steps: Optimiser steps of a decoder with hard masks, after those; a second time
            at half the rate.
        finish_batch: Questions of such a step, all processes together; a multiple of `lm_batch`.
        finish_heads_rate: Of the heads meanwhile, which keep the target.
        weight: lambda_ATP.
        pull: lambda_target; the paper's 0.2 counts tokens of 576.
    """

    steps: int = 300
    batch: int = 8
    rate: float = 1e-3
    lm_steps: int = 1500
    lm_batch: int = 32
    lm_rate: float = 3e-4
    tower_steps: tuple[int, ...] = (2200, 1200, 1200)
    tower_batch: int = 16
    tower_rate: float = 1e-3
    lm_heads_rate: float = 5e-4
    finish_steps: int = 1200
    finish_batch: int = 64
    finish_heads_rate: float = 1e-4
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
        weights = _weights(checkpoint)
        self.checkpoint, self.scorer, self.training = checkpoint, scorer, training
        self.model = digest(*weights)
        self.folder, self.data = folder / self.model, folder / "data"
        self.folder.mkdir(parents=True, exist_ok=True)
        named, judge = self.folder / "scorer", digest(*_weights(scorer))
        if named.exists() and named.read_text(encoding="utf-8") != judge:
            sys.exit(f"{folder} was made with another CLIP | what to do: give another --work")
        named.write_text(judge, encoding="utf-8")

    @cached_property
    def budgets(self) -> Budgets:
        """Plans that fit the model."""
        config = read_config(self.checkpoint)
        tower = family_of(config).vision(config)
        size = Size(tower.num_patches, config.text_config.num_hidden_layers)
        return Budgets(size, tower.num_layers_run)

    def questions(self, split: str, count: int, per_image: int = 8) -> Path:
        """A file of questions, drawn again if it is not there."""
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
        """Make a row's heads, checkpoint, bundle and plan, as far as they are not there."""
        if row.trains:
            return self._own(self.trained(row), row)
        plan, marks = row.plan, []
        if row.heads is not None:
            heads = self.heads(row.heads)
            sites = [replace(s, params=s.params | {"heads": str(heads)}) for s in plan.sites]
            plan = replace(plan, sites=tuple(sites))
            marks = [(heads / name).read_bytes() for name in (CONFIG, TENSORS)]
            marks.append(json.dumps(row.plan.to_dict()).encode())
        bundle = self.folder / "bundles" / row.bundle
        about = digest(self.model, *(marks or [json.dumps(plan.to_dict())]))
        if not plan.prunes:
            name = NO_PRUNING
            if not bundle.exists():
                self._export(self.checkpoint, bundle)
        else:
            name = f"p-{about}"
            if not bundle.exists() or name not in read(bundle).plans:
                self._export(self.checkpoint, bundle, *self._plan_words(plan, name))
        return Work(row, bundle, name, about)

    def _own(self, checkpoint: Path, row: Row) -> Work:
        """A row's plan in a bundle of a checkpoint that was trained."""
        about = digest(*_weights(checkpoint), json.dumps(row.plan.to_dict()))
        bundle, name = self.folder / "bundles" / about, f"p-{about}"  # of these weights alone
        if not bundle.exists():
            words = ["--method", "atp", "--plan-name", name]
            if row.heads is None:
                words = self._plan_words(row.plan, name)
            self._export(checkpoint, bundle, *words)
        return Work(row, bundle, name, about)

    def trained_path(self, row: Row) -> Path:
        """Where the checkpoint of a row that trains is, or will be."""
        how = self.training
        name = row.heads.name if row.heads else digest(json.dumps(row.plan.to_dict()))
        if row.heads and row.heads.method == "atp":
            name += f"_{how.weight:g}-{how.pull:g}"
        if row.trains_tower:
            name = self._tower_name(row.plan, len(how.tower_steps))
        name += f"_{how.lm_steps}x{how.lm_batch}-{how.lm_rate:g}"
        if row.finishes and row.heads is None:
            name += f"_again_{how.finish_steps}x{how.lm_batch}"
        elif row.finishes:
            name += f"_hard_{how.finish_steps}x{how.finish_batch}-{how.lm_rate:g}"
        if row.finishes > 1:
            name += f"_{row.finishes}"
        return self.folder / "trained" / name

    def trained(self, row: Row) -> Path:
        """A checkpoint whose decoder learned to do with what the row's plan leaves."""
        path = self.trained_path(row)
        if path.exists():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._launch(self._finishing(row) if row.finishes else self._learning(row), path)
        return path

    def _launch(self, words: list[str], path: Path) -> None:
        launch = ["torch.distributed.run", "--nproc-per-node", str(PROCESSES)]
        launched([*launch, "-m", *words, "-o", str(path), *_resuming(words, path)])

    def _learning(self, row: Row) -> list[str]:
        """The command that trains a decoder."""
        how = self.training
        data = self.questions("calibration", how.lm_steps * how.lm_batch)
        if row.heads is None:
            start = self._tower(row.plan, len(how.tower_steps) if row.trains_tower else 0)
            untrained = replace(row, trains=False)
            base = self._own(start, row) if row.trains_tower else self.prepare(untrained)
            return self._pruning(start, base, data, how.lm_steps, 1.0)
        words = self._calibrating(row.heads, how.lm_heads_rate)
        words += [str(self.checkpoint), "--data", str(data), "--steps", str(how.lm_steps)]
        words += ["--batch-size", str(how.lm_batch // PROCESSES)]
        words += ["--lm-learning-rate", str(how.lm_rate)]
        is_told = "--positions" in row.heads.options
        return words if is_told else [*words, "--positions", "original"]

    def _pruning(self, start: Path, base: Work, data: Path, steps: int, factor: float) -> list[str]:
        """The command that trains a decoder on what the plan of a bundle leaves."""
        how = self.training
        words = ["examples.demo_model.train_pruned", str(start), "--data", str(data)]
        words += ["--steps", str(steps), "--batch-size", str(how.lm_batch // PROCESSES)]
        words += ["--lm-learning-rate", str(how.lm_rate * factor)]
        return [*words, "--bundle", str(base.bundle), "--plan", base.plan]

    def _tower(self, plan: Plan, rounds: int) -> Path:
        """A checkpoint whose tower learned with the rest, after a plan's first stage."""
        if rounds == 0:
            return self.checkpoint
        how, (factor, options) = self.training, _ROUNDS[rounds - 1]
        path = self.folder / "trained" / self._tower_name(plan, rounds)
        if not path.exists():
            start = self._tower(plan, rounds - 1)
            path.parent.mkdir(parents=True, exist_ok=True)
            words = [str(start), *self._plan_words(plan, path.name)[:2]]
            words += ["--first", str(rounds * _FRESH)]
            words += ["--batch-size", str(how.tower_batch // PROCESSES)]
            words += ["--steps", str(how.tower_steps[rounds - 1])]
            words += ["--learning-rate", str(how.tower_rate * factor), *options]
            self._launch(["examples.demo_model.train_tower_plan", *words], path)
        return path

    def _tower_name(self, plan: Plan, rounds: int) -> str:
        how = self.training
        steps = "-".join(map(str, how.tower_steps[:rounds]))
        name = digest(json.dumps(plan.to_dict()))
        return f"{name}_tower_{steps}x{how.tower_batch}-{how.tower_rate:g}"

    def _finishing(self, row: Row) -> list[str]:
        """The command that trains it further: with hard masks, or on the plan's new choices."""
        how, start = self.training, self.trained(replace(row, finishes=row.finishes - 1))
        data = self.questions("calibration", row.finishes * how.finish_steps * how.finish_batch)
        if row.heads is None:
            return self._pruning(start, self._own(start, row), data, how.finish_steps, 0.5)
        words = self._calibrating(row.heads, how.finish_heads_rate)
        words += [str(start), "--hard", "--data", str(data), "--steps", str(how.finish_steps)]
        words += ["--batch-size", str(how.lm_batch // PROCESSES)]
        words += ["--accumulate", str(how.finish_batch // how.lm_batch)]
        return [*words, "--lm-learning-rate", str(how.lm_rate / 2 ** (row.finishes - 1))]

    def _calibrating(self, heads: Heads, rate: float) -> list[str]:
        few = self.questions("validation", 600, per_image=4)
        words = ["patchsieve", "calibrate", "--train-lm", "--bf16", "--held-out", str(few)]
        return [*words, *self._words(heads, rate)]

    def heads(self, wanted: Heads) -> Path:
        """Thresholds, learned or fixed."""
        how = self.training
        learning = f"{how.steps}x{how.batch}-{how.rate:g}-{how.weight:g}-{how.pull:g}"
        name = wanted.name + (f"_{learning}" if wanted.method == "atp" else "")
        path = self.folder / "heads" / name
        if path.exists():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        few = str(self.questions("calibration", 300, per_image=2))
        words = ["calibrate", str(self.checkpoint), "-o", str(path)]
        words += _resuming(words, path) if wanted.method == "atp" else []
        words += ["--batch-size", str(how.batch), *self._words(wanted, how.rate)]
        if wanted.method == "atp":
            many = self.questions("calibration", how.steps * how.batch, per_image=8)
            words += ["--data", str(many), "--held-out", few, "--steps", str(how.steps)]
        else:
            words += ["--data", few]
        found = json.loads(run([*words, "--json"]).splitlines()[-1])
        log(f"  {found['average_tokens']:.1f} tokens on average, target {wanted.target}")
        return path

    def _words(self, wanted: Heads, rate: float) -> list[str]:
        """The options of `calibrate` that thresholds need."""
        words = ["--method", wanted.method, "--sites", ",".join(map(str, wanted.sites))]
        if "--counts" not in wanted.options:
            words += ["--target-tokens", str(wanted.target)]
        if wanted.method == "atp":
            words += ["--learning-rate", str(rate)]
            words += ["--lambda-atp", str(self.training.weight)]
            words += ["--lambda-target", str(self.training.pull)]
        return [*words, *wanted.options]

    def _plan_words(self, plan: Plan, name: str) -> list[str]:
        """The options of `export` that a plan needs."""
        path = self.folder / "plans" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(plan.to_dict(), indent=1), encoding="utf-8")
        return ["--plan", str(path), "--plan-name", name]

    def _export(self, checkpoint: Path, bundle: Path, *plan: str) -> None:
        words = ["export"]
        if bundle.exists():
            words += ["--reuse", str(bundle)]
        else:
            bundle.parent.mkdir(parents=True, exist_ok=True)
            words += [str(checkpoint), "-o", str(bundle), "--scorer", str(self.scorer), *_LIMITS]
        run([*words, *plan, "--quiet"])


def _resuming(words: list[str], path: Path) -> list[str]:
    """What continues a `calibrate` that an earlier run interrupted; nothing for other commands."""
    is_there = path.with_name(path.name + ".partial").is_dir()
    return ["--resume"] if "calibrate" in words and is_there else []


def _weights(checkpoint: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(checkpoint.rglob("*.safetensors"))]


def launched(words: list[str]) -> None:
    """Run a module of Python in a process of its own, and print its words."""
    log(f"python -m {shlex.join(words)}")
    start = time.monotonic()
    threads = {"OMP_NUM_THREADS": "1"}  # a process each core
    done = subprocess.run([sys.executable, "-m", *words], env=os.environ | threads, check=False)
    if done.returncode:
        sys.exit(f"the command failed: python -m {shlex.join(words)}")
    log(f"  {time.monotonic() - start:.0f} s")


def run(words: list[str]) -> str:
    """Run a patchsieve command in this process, and return what it prints.

    Its words are printed, so that a reader can run it too.
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
