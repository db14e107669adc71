"""What both trainings share: processes that each take half of a batch, optimisers, the log."""

from __future__ import annotations

import json
import math
import os
import time
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

WARMUP = 0.06  # share of the training


def start_process() -> tuple[int, int]:
    """Join the other processes of `torchrun`, where there are any: rank and number of them."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if "RANK" not in os.environ:
        return 0, 1
    dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Make every process's gradients the mean of all."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


class Optimiser:
    """Muon for the matrices inside layers, AdamW for the rest; warm-up, then a cosine to zero."""

    def __init__(self, model: nn.Module, rate: float) -> None:
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        inner = [p for n, p in named if p.ndim == 2 and "layers." in n]
        inner_ids = {id(p) for p in inner}
        outer = [p for _, p in named if id(p) not in inner_ids]
        self.parameters = inner + outer
        self._parts = [
            torch.optim.Muon(inner, lr=rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(outer, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self._rate = rate

    def step(self, done: float) -> None:
        """Apply the gradients, at a share of the whole training from 0 to 1, and clear them."""
        factor = min(1.0, (done + 1e-3) / WARMUP) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        average_gradients(self.parameters)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = self._rate * factor
            part.step()
            part.zero_grad()

    def state_dict(self) -> list[Any]:
        """What the next steps depend on."""
        return [part.state_dict() for part in self._parts]

    def load_state_dict(self, state: list[Any]) -> None:
        """Continue from it."""
        for part, own in zip(self._parts, state, strict=True):
            part.load_state_dict(own)


class State:
    """What an interrupted training continues from: a file beside the checkpoint that it makes.

    Args:
        options: The command line; `out` is the checkpoint.
        rank: This process; the first one writes.
        ranks: Processes.
        model: What learns.
        optimiser: Its optimiser.
    """

    _EVERY = 250  # steps

    def __init__(
        self, options: Namespace, rank: int, ranks: int, model: nn.Module, optimiser: Optimiser
    ) -> None:
        self._path = options.out.with_name(options.out.name + ".state")
        told = {name: str(value) for name, value in vars(options).items() if name != "out"}
        self._options, self._is_writer = told | {"processes": str(ranks)}, rank == 0
        self._model, self._optimiser = model, optimiser

    def restore(self) -> int:
        """Continue from the file, if there is one: steps done."""
        if not self._path.exists():
            return 0
        kept = torch.load(self._path)
        if kept["options"] != self._options:
            raise SystemExit(
                f"{self._path} is of another training | found: {kept['options']} | expected: "
                f"{self._options} | what to do: remove it, or give its options"
            )
        self._model.load_state_dict(kept["model"])
        self._optimiser.load_state_dict(kept["optimiser"])
        return int(kept["done"])

    def keep(self, done: int) -> None:
        """Write the file now and then, after `done` steps."""
        if self._is_writer and done % self._EVERY == 0:
            model, optimiser = self._model.state_dict(), self._optimiser.state_dict()
            facts = {"done": done, "options": self._options}
            save(self._path, facts | {"model": model, "optimiser": optimiser})

    def end(self) -> None:
        """Remove it: the checkpoint is written."""
        self._path.unlink(missing_ok=True)


class Log:
    """A JSON line now and then, to a file and to the terminal."""

    def __init__(self, path: Path, is_writer: bool) -> None:
        self._path, self._is_writer, self._start = path, is_writer, time.monotonic()

    def write(self, **facts: Any) -> None:
        """One line; the seconds since the start are added."""
        if not self._is_writer:
            return
        facts = {
            key: round(value, 4) if isinstance(value, float) else value
            for key, value in (facts | {"seconds": time.monotonic() - self._start}).items()
        }
        line = json.dumps(facts)
        print(line, flush=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a state, by a temporary name first."""
    temporary = path.with_name(path.name + ".part")
    torch.save(state, temporary)
    temporary.replace(path)
