"""Checkpoints with outliers: the same function as a given one in float, but hard to round.

Real CLIPs and Llamas have channels that are ten to hundreds of times larger than others, which
small models lack. Each function here writes a copy of a checkpoint that has such channels, and
whose inverse lies in the matrices that read them. Changed tensors are float32, so that the copy
differs by float32's rounding alone.

A channel of the residual stream itself cannot be made large in this way: it would enter the
variance in every norm, which no matrix can undo. The norms' outputs show what it would do there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from patchsieve.export.families import Family, family_of
from patchsieve.export.quantise.smoothing import Group, Smoothed, groups_of
from patchsieve.export.source.checkpoint import read_config

Tensors = dict[str, Tensor]  # by canonical name
_TOWER = "vision_tower."


class Table:
    """A source in memory."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors

    def read(self, name: str) -> Tensor:
        """One tensor."""
        return self.tensors[name]


def scaled_channels(
    checkpoint: Path, out: Path, *, by: float = 30.0, count: int = 6, seed: int = 0
) -> Path:
    """Channels of every norm are `by` times larger, those of tower and decoder alike.

    Args:
        checkpoint: Directory, of safetensors.
        out: Directory to write.
        by: Factor on the norm's weight and bias.
        count: Channels of each norm, drawn for each.
        seed: Draws the channels.
    """
    generator = torch.Generator().manual_seed(seed)

    def change(tensors: Tensors) -> Tensors:
        chosen = [group for group in groups_of(sorted(tensors)) if _is_norm(tensors, group)]
        return _scale(tensors, chosen, by, lambda size: _some(size, count, generator))

    return _rewrite(checkpoint, out, change)


def massive_channels(
    checkpoint: Path, out: Path, *, by: float = 300.0, count: int = 3, seed: int = 0
) -> Path:
    """The same few channels of every norm in the tower's layers are massive, as in real CLIPs.

    Args:
        checkpoint: Directory, of safetensors.
        out: Directory to write.
        by: Factor on the norm's weight and bias.
        count: Channels, the same in all layers.
        seed: Draws the channels.
    """

    def change(tensors: Tensors) -> Tensors:
        chosen = [group for group in groups_of(sorted(tensors)) if group.maker.startswith(_TOWER)]
        size = len(tensors[f"{chosen[0].maker}.weight"])
        channels = _some(size, count, torch.Generator().manual_seed(seed))
        return _scale(tensors, chosen, by, lambda _: channels)

    return _rewrite(checkpoint, out, change)


def massive_units(
    checkpoint: Path, out: Path, *, by: float = 100.0, count: int = 2, layer: int = 1, seed: int = 0
) -> Path:
    """The tower has units between fc1 and fc2 that are massive for some patches, in one layer.

    Every layer gets 128 more units, which keeps to blocks, and all but a few have no weights. Each
    of the few is `by` times a unit of before, and comes twice: fc2 adds the one and subtracts the
    other. No fold undoes them, because the activation lies between.

    Args:
        checkpoint: Directory, of safetensors.
        out: Directory to write.
        by: Factor on the rows of fc1.
        count: Units that are doubled.
        layer: The layer that has them.
        seed: Draws the units.
    """
    more = 128

    def change(tensors: Tensors) -> Tensors:
        changed: Tensors = {}
        for name in tensors:
            prefix, found, _ = name.partition(".mlp.fc1.weight")
            if not found or not prefix.startswith(_TOWER):
                continue
            first, bias, second = (
                tensors[f"{prefix}.mlp.{each}"].float()
                for each in ("fc1.weight", "fc1.bias", "fc2.weight")
            )
            rows, places = torch.zeros(more, first.shape[1]), torch.zeros(more)
            columns = torch.zeros(second.shape[0], more)
            if prefix.endswith(f".{layer}"):
                units = _some(len(first), count, torch.Generator().manual_seed(seed))
                for at, sign in ((slice(0, count), 1), (slice(count, 2 * count), -1)):
                    rows[at], places[at] = first[units] * by, bias[units] * by
                    columns[:, at] = second[:, units] * sign
            changed[f"{prefix}.mlp.fc1.weight"] = torch.cat((first, rows))
            changed[f"{prefix}.mlp.fc1.bias"] = torch.cat((bias, places))
            changed[f"{prefix}.mlp.fc2.weight"] = torch.cat((second, columns), dim=1)
        return changed

    written = _rewrite(checkpoint, out, change)
    path = written / "config.json"
    config = json.loads(path.read_text())
    config["vision_config"]["intermediate_size"] += more
    path.write_text(json.dumps(config, indent=2))
    return written


def _is_norm(tensors: Tensors, group: Group) -> bool:
    return tensors[f"{group.maker}.weight"].dim() == 1


def _some(size: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(size, generator=generator)[:count]


def _scale(
    tensors: Tensors, groups: list[Group], by: float, channels: Callable[[int], Tensor]
) -> Tensors:
    """The tensors of groups, with chosen channels scaled."""

    def factors(group: Group) -> Tensor:
        factors = torch.ones(len(tensors[f"{group.maker}.weight"]))
        factors[channels(len(factors))] = 1 / by
        return factors

    scaled = Smoothed(Table(tensors), groups, factors)
    read = {f"{group.maker}.{kind}" for group in groups for kind in ("weight", "bias")}
    read |= {f"{name}.weight" for group in groups for name in group.readers}
    return {name: scaled.read(name) for name in sorted(read & set(tensors))}


def _rewrite(checkpoint: Path, out: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """Copy a checkpoint; `change` gives the tensors that differ."""
    family: Family = family_of(read_config(checkpoint))
    stored: Tensors = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        stored |= load_file(file)
    out.mkdir(parents=True)
    for file in checkpoint.iterdir():
        if file.is_file() and ".safetensors" not in file.name:
            shutil.copy(file, out / file.name)
    names = {family.canonical(name): name for name in stored}
    changed = change({name: stored[own] for name, own in names.items()})
    stored |= {names[name]: tensor.contiguous() for name, tensor in changed.items()}
    save_file(stored, out / "model.safetensors", {"format": "pt"})
    return out
