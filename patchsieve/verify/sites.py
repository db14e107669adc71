"""A site's decision on the checkpoint's side of `verify`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from patchsieve.contract import names, reads
from patchsieve.contract.plan import SitePlan
from patchsieve.export.methods import build_method
from patchsieve.export.sites import layers_read
from patchsieve.pruning.decoder.site import Site
from patchsieve.pruning.decoder.tome import merge
from patchsieve.verify.reference import Layers


class Decided(NamedTuple):
    """What a method decided of an image's N tokens.

    Attributes:
        keep: Which stay, bool [N].
        scores: [N].
        moved: Token that each merged into, [N]; None if the method does not merge.
    """

    keep: np.ndarray
    scores: np.ndarray
    moved: np.ndarray | None


class NextLayer(NamedTuple):
    """Queries and keys that the checkpoint's layer at the site makes of all rows.

    Attributes:
        queries: Rotated, [1, H, L, D].
        keys: Rotated, [1, G, L, D].
    """

    queries: Tensor
    keys: Tensor

    def query(self, rows: Tensor) -> Tensor:
        """Those of chosen rows [R], [1, H, R, D]."""
        return self.queries.index_select(2, rows)

    def key(self) -> Tensor:
        """Those of all rows, [1, G, L, D]."""
        return self.keys


@torch.no_grad()
def decide(
    bundle: Path,
    plan: SitePlan,
    made: Layers,
    fed: Mapping[str, np.ndarray],
    grid: tuple[int, int],
    num_visual: int,
    next_layer: Callable[[int], tuple[Tensor, Tensor]],
) -> Decided:
    """Run a site's method in torch on given activations.

    Args:
        bundle: Where learned heads lie.
        plan: The site.
        made: What the layers before it made.
        fed: What the host fed to the bundle's decision: rows, patch ids, budget, noise.
        grid: Patch rows and columns.
        num_visual: Tokens of the image that entered the decoder.
        next_layer: Queries and keys that a layer would make of the rows.
    """
    method, top = build_method(plan, bundle), plan.layer - 1
    below = layers_read(method, plan.layer)[1:]
    given = {name: torch.from_numpy(np.asarray(value)) for name, value in fed.items()}
    if not len(given[names.SIDE_ROW]):
        del given[names.SIDE_ROW]
    del given[names.SLOT]  # caches here end with the rows present
    own = {names.QUERY: made.query, names.KEY: made.key, names.VALUE: made.value}
    states = {name: layers[top] for name, layers in own.items()}
    states |= {names.HIDDEN: made.hidden[top], names.EMBEDDINGS: made.row_embeddings}
    states |= {names.query(k): made.query[k] for k in below}
    states |= {names.key(k): made.key[k] for k in below}
    given |= {name: torch.from_numpy(value) for name, value in states.items()}
    reads_next = reads.NEXT_LAYER in method.reads
    site = Site.of(
        given,
        below,
        made.key[top].shape[-1],
        grid,
        num_visual,
        NextLayer(*next_layer(plan.layer)) if reads_next else None,
    )
    decision = method.decide(site, given[names.BUDGET])
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
