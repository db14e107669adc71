"""A site's decision on the checkpoint's side of `verify`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from patchsieve.contract import names
from patchsieve.contract.plan import SitePlan
from patchsieve.export.methods import build_method
from patchsieve.export.sites import layers_read
from patchsieve.pruning.decoder.site import Site
from patchsieve.pruning.decoder.tome import merge
from patchsieve.verify.reference import Layers


class Decided(NamedTuple):
    """What a method decided of an image's N tokens.

    Attributes:
        keep: Which go on, bool [N].
        scores: [N].
        moved: Token that each merged into, [N]; None where the method does not merge.
    """

    keep: np.ndarray
    scores: np.ndarray
    moved: np.ndarray | None


@torch.no_grad()
def decide(
    bundle: Path,
    plan: SitePlan,
    made: Layers,
    fed: Mapping[str, np.ndarray],
    grid: tuple[int, int],
    num_visual: int,
) -> Decided:
    """Run a site's method in torch on given activations.

    Args:
        bundle: Where learned heads lie.
        plan: The site.
        made: What the layers before it made.
        fed: What the bundle's decision was fed besides: rows, patch ids, budget, noise.
        grid: Patch rows and columns.
        num_visual: Tokens of the image that entered the decoder.
    """
    method, head_dim = build_method(plan, bundle), made.key[-1].shape[-1]
    tensor = {name: torch.from_numpy(np.asarray(value)) for name, value in fed.items()}

    def states(layer: int) -> tuple[Tensor, Tensor]:
        query = torch.from_numpy(made.query[layer])  # [1, L, H * D]
        heads = query.view(1, query.shape[1], -1, head_dim).transpose(1, 2)
        return heads, torch.from_numpy(made.key[layer])

    top = plan.layer - 1
    query, key = states(top)
    side = tensor[names.SIDE_ROW]
    site = Site(
        query=query,
        key=key,
        value=torch.from_numpy(made.value[top]),
        lower=tuple(states(layer) for layer in layers_read(method, plan.layer)[1:]),
        visual_rows=tensor[names.VISUAL_ROWS],
        text_rows=tensor[names.TEXT_ROWS],
        patch_ids=tensor[names.PATCH_IDS],
        side_row=side if len(side) else None,
        last_row=tensor[names.LAST_ROW],
        grid=grid,
        num_visual=num_visual,
        noise=tensor.get(names.NOISE),
        hidden=torch.from_numpy(made.hidden[top]),
        sizes=tensor[names.SIZES][None],
    )
    decision = method.decide(site, tensor[names.BUDGET])
    moved = None if decision.moved is None else decision.moved[0].numpy()
    return Decided(decision.keep[0].numpy(), decision.scores[0].numpy(), moved)


def merged(
    hidden: np.ndarray, visual_rows: np.ndarray, sizes: np.ndarray, moved: np.ndarray
) -> np.ndarray:
    """Rows [1, L, C] in which an image's tokens merged as a bundle says.

    Args:
        hidden: The rows, which stay as they are.
        visual_rows: The image's, [N].
        sizes: Patches that each stands for, [N].
        moved: Token that each merged into, [N].
    """
    out = hidden.copy()
    rows = torch.from_numpy(hidden[:, visual_rows])
    given = torch.from_numpy(sizes)[None], torch.from_numpy(moved)[None]
    out[:, visual_rows] = merge(rows, *given).numpy()
    return out
