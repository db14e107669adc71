"""What the thresholds do on data: survivors of every image, budgets, constant thresholds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from patchsieve.calibration.model import PrunedLlava
from patchsieve.calibration.passes import PruningPass
from patchsieve.calibration.samples import Samples, collate
from patchsieve.calibration.thresholds import KEEP_ALL, OFF, set_constant
from patchsieve.contract.errors import PatchsieveError
from patchsieve.pruning.decoder.training import average_tokens

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Survivors:
    """Tokens per image that go on at a site.

    Attributes:
        layer: The site.
        mean: Mean over the images.
        fewest: Of the image that keeps fewest.
        most: Of the image that keeps most.
        reserved: Tokens that a bundle reserves: a percentile of what the images keep.
    """

    layer: int
    mean: float
    fewest: int
    most: int
    reserved: int

    def to_dict(self) -> dict[str, Any]:
        """The site as `calibrate --json` prints it."""
        return {
            "layer": self.layer,
            "mean tokens": round(self.mean, 2),
            "fewest": self.fewest,
            "most": self.most,
            "reserved": self.reserved,
        }


def measure(
    model: PrunedLlava, samples: Samples, percentile: float, batch_size: int, progress: Progress
) -> tuple[Survivors, ...]:
    """Count the survivors of every site, and choose what a bundle reserves for them.

    Args:
        model: The model.
        samples: Conversations, better those that it did not learn from.
        percentile: Share of images, in per cent, whose survivors fit the reserved tokens.
        batch_size: Samples of one pass.
        progress: Takes what is done.

    Raises:
        PatchsieveError: No sample has an image.
    """
    counts = count_survivors(model, samples, batch_size, progress)
    return tuple(
        Survivors(layer, sum(kept) / len(kept), min(kept), max(kept), reserved)
        for (layer, kept), reserved in zip(counts.items(), budgets(counts, percentile), strict=True)
    )


def average(model: PrunedLlava, sites: Sequence[Survivors]) -> float:
    """Mean visual tokens over all layers of a model, those before the first site included."""
    means, layers = [site.mean for site in sites], [site.layer for site in sites]
    return average_tokens(means, layers, model.num_layers, len(model.patch_ids))


def hard_passes(
    model: PrunedLlava, samples: Samples, batch_size: int, progress: Callable[[float], None]
) -> Iterator[PruningPass]:
    """Run samples through the model as a bundle would prune them, batch by batch."""
    was_hard, model.is_hard = model.is_hard, True
    model.eval()
    device = model.patch_ids.device
    loader = DataLoader(samples, batch_size, collate_fn=collate)
    try:
        with torch.no_grad():
            for number, batch in enumerate(loader):
                progress(number / len(loader))
                model(**{name: tensor.to(device) for name, tensor in batch.items()})
                if model.last is not None and model.last.sites:
                    yield model.last
    finally:
        model.is_hard = was_hard


def count_survivors(
    model: PrunedLlava, samples: Samples, batch_size: int, progress: Progress
) -> dict[int, list[int]]:
    """Tokens that each image keeps behind each site, by site."""
    counts: dict[int, list[int]] = {site: [] for site in model.methods}
    for seen in hard_passes(
        model, samples, batch_size, lambda part: progress("counting survivors", part)
    ):
        for site, record in seen.sites.items():
            counts[site] += record.alive.sum(-1).tolist()
    if not any(counts.values()):
        raise PatchsieveError("no record of the data holds an image", do="give data with images")
    return counts


def budgets(counts: dict[int, list[int]], percentile: float) -> tuple[int, ...]:
    """Tokens per image to reserve behind each site: a percentile of what images keep there.

    Args:
        counts: Survivors by site, ascending sites.
        percentile: 100 reserves for the image that keeps most.
    """
    reserved = []
    for site in sorted(counts):
        ordered = sorted(counts[site])
        place = math.ceil(percentile / 100 * len(ordered)) - 1
        reserved.append(ordered[max(0, place)])
    return tuple(reserved)


def geometric_counts(
    num_visual: int, sites: Sequence[int], num_layers: int, target: float
) -> list[float]:
    """Mean counts n r, n r^2, ... behind the sites, whose average over all layers is the target.

    Raises:
        PatchsieveError: See `check_target`.
    """
    check_target(num_visual, sites, num_layers, target)
    low, high = 0.0, 1.0
    for _ in range(60):
        ratio = (low + high) / 2
        counts = [num_visual * ratio ** (k + 1) for k in range(len(sites))]
        is_low = average_tokens(counts, sites, num_layers, num_visual) < target
        low, high = (ratio, high) if is_low else (low, ratio)
    return [max(1.0, count) for count in counts]


def check_counts(counts: Sequence[float], num_visual: int) -> None:
    """Refuse numbers of tokens that cannot stay, site after site.

    Raises:
        PatchsieveError: A number is larger than the one before it, or than all tokens.
    """
    before = [num_visual, *counts]
    if any(not 0 < count <= most for count, most in zip(counts, before, strict=False)):
        raise PatchsieveError(
            "the sites cannot keep these numbers of tokens",
            found=", ".join(f"{count:g}" for count in counts),
            expected=f"numbers above 0 that do not rise, the first at most {num_visual}",
            do="correct --counts",
        )


def check_target(num_visual: int, sites: Sequence[int], num_layers: int, target: float) -> None:
    """Refuse an average that no choice behind the sites has.

    Raises:
        PatchsieveError: Even a single token behind the first site averages more than the target, or
            the target is all tokens.
    """
    least = (sites[0] * num_visual + num_layers - sites[0]) / num_layers
    if not least <= target < num_visual:
        raise PatchsieveError(
            "the sites cannot reach this target",
            found=f"{target:g} tokens",
            expected=f"from {least:.1f} to {num_visual - 1}: all layers before the first site "
            "hold every token",
            do="move --sites to earlier layers, or change --target-tokens",
        )


def fix_thresholds(
    model: PrunedLlava,
    samples: Samples,
    wanted: Sequence[float],
    batch_size: int,
    progress: Progress,
) -> None:
    """Set constant thresholds that keep a mean number of tokens, site after site.

    Still adaptive: an image with more tokens above the quantile keeps more. Spatial sampling is
    switched off. Needs heads whose trunks are zero (`constant_heads`).

    Args:
        model: The model.
        samples: What the scores are taken of.
        wanted: Mean tokens that each site leaves.
        batch_size: Samples of one pass.
        progress: Takes what is done.

    Raises:
        PatchsieveError: No sample has an image.
    """
    sites = list(model.methods)
    for done, (site, count) in enumerate(zip(sites, wanted, strict=True)):

        def step(part: float, done: int = done, site: int = site) -> None:
            progress(f"scores at layer {site}", (done + part) / len(sites))

        scores, images = [], 0
        for seen in hard_passes(model, samples, batch_size, step):
            scores += seen.sites[site].s_red
            images += len(seen.images)
        if not images:
            raise PatchsieveError(
                "no record of the data holds an image", do="give data with images"
            )
        theta = _between(torch.cat(scores), round(count * images))
        set_constant(model.methods[site].thresholds, theta, OFF)


def _between(scores: Tensor, count: int) -> float:
    """A threshold that `count` scores exceed; where the next ties with the last, fewer do."""
    ordered = scores.sort(descending=True).values
    if count >= len(ordered):
        return KEEP_ALL
    last, following = float(ordered[count - 1]), float(ordered[count])
    middle = (last + following) / 2
    return middle if following < middle < last else following
