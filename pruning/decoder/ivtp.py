"""IVTP in the decoder: group-wise token pruning by a pseudo-CLS (Huang et al., 2024, eqs. 2-4).

The pseudo-CLS is a side row: it attends to the visual tokens of its image and is seen by nobody.
Here its attention, rolled out over a group of layers, says which tokens stay. What the row holds
(eqs. 5-8) is made by the runtime.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchsieve.contract.errors import ShapeError
from patchsieve.pruning.decoder.rule import KeepNumber
from patchsieve.pruning.decoder.site import Site
from patchsieve.pruning.rollout import Layer, importance, rollout_row, start_row, value_norms


@dataclass(frozen=True)
class IVTP(KeepNumber):
    """Keep the tokens that the pseudo-CLS attends to through a group of layers.

    A group is the `group` layers that end at the site. S_i = R[cls, i] ||V_i|| / sum_j (eq. 4),
    where R is the rollout of eq. 3 over the group and V the values of its top layer.

    The paper leaves open: which rows the maps hold (`block`), whether the group's first layer gets
    an identity too (eq. 3 gives it none, Abnar and Zuidema do), heads (their mean is taken) and
    the norm of V (over all heads side by side).

    Attributes:
        group: Layers of the group.
        fusion: "rollout" is eq. 3. The paper's ablations: "single" takes the CLS row of the top
            layer only; "mean", "max" and "multiply" join the CLS rows of the group's layers entry
            by entry.
        block: "visual": maps over the image's tokens and the pseudo-CLS, each row normalised
            again. "prefix": the rows as they are, so that what comes before the image keeps its
            share of the attention.
        identity_first: Add the identity at the group's first layer too; for "rollout".
    """

    name: ClassVar[str] = "ivtp"

    group: int = 3
    fusion: str = "rollout"
    block: str = "visual"
    identity_first: bool = False

    @property
    def reads(self) -> tuple[str, ...]:
        """What its decision takes (see `Method.reads`): queries and keys of the whole group."""
        depth = 1 if self.fusion == "single" else self.group
        below = tuple(f"{what}.{k}" for k in range(1, depth) for what in ("query", "key"))
        return ("query", "key", "value", "side_row", *below)

    def scores(self, site: Site) -> Tensor:
        """Share of each visual token in attention times value, float32 [B, N] (eq. 4).

        Raises:
            ShapeError: The site lacks values, a side row or the group's lower layers.
        """
        layers = self._layers(site)
        if self.fusion == "rollout":
            cls = site.visual_rows.shape[0] + torch.zeros_like(site.visual_rows[:1])  # [1]
            row = rollout_row(layers, cls, identity_first=self.identity_first)
        else:
            row = fuse([cls_row(site, layer) for layer in reversed(layers)], self.fusion)
        visual = site.visual_rows + site.first_key
        assert site.value is not None  # `_layers` has looked
        norms = value_norms(site.value.index_select(2, visual))  # [B, N]
        return importance(row[:, :-1], norms)  # the pseudo-CLS itself left out

    def _layers(self, site: Site) -> list[Layer]:
        """The group over the block's rows, the lowest layer first."""
        depth = 1 if self.fusion == "single" else self.group
        if site.value is None or site.side_row is None or len(site.lower) < depth - 1:
            raise ShapeError(
                "ivtp does not find what it reads",
                found=f"{1 + len(site.lower)} layers, "
                f"{'no' if site.side_row is None else 'a'} side row, "
                f"{'no' if site.value is None else 'with'} values",
                expected=f"{depth} layers, a side row and the top layer's values",
                do="feed what `reads` names",
            )
        group = [(site.query, site.key), *site.lower[: depth - 1]]
        return [block_layer(site, *layer, self.block) for layer in reversed(group)]


def block_layer(site: Site, query: Tensor, key: Tensor, block: str = "prefix") -> Layer:
    """One layer over the n = N + 1 rows [visual; pseudo-CLS] of an image (eq. 2).

    Args:
        site: The image at the site; its side row is there.
        query: Queries of a layer, [B, H, L, D].
        key: Keys of the same layer, [B, G, S, D].
        block: "visual" keeps the keys of these rows only; "prefix" all, what comes before the
            image included.
    """
    assert site.side_row is not None
    rows = torch.cat((site.visual_rows, site.side_row))  # [n]
    slots = rows + site.first_key
    # A row sees all up to itself, but no further than the image's end; and itself.
    limit = torch.minimum(slots, slots[-2])  # [n]
    columns = None if block == "visual" else slots
    if columns is None:
        key, key_slots = key.index_select(2, slots), slots
    else:
        key_slots = torch.arange(key.shape[2], device=key.device)
    mask = (key_slots[None] <= limit[:, None]) | (key_slots[None] == slots[:, None])  # [n, S]
    scale = query.shape[-1] ** -0.5
    return Layer(query.index_select(2, rows), key, scale, mask, columns=columns)


def cls_row(site: Site, layer: Layer) -> Tensor:
    """The pseudo-CLS's own attention over the block's rows, float32 [B, N + 1]."""
    cls = site.visual_rows.shape[0] + torch.zeros_like(site.visual_rows[:1])  # [1]
    return start_row(layer, cls)


def fuse(rows: Sequence[Tensor], fusion: str) -> Tensor:
    """Join the CLS rows of several layers entry by entry (table 5), up to a common factor.

    Args:
        rows: One of each layer, the top one first, [B, n] each.
        fusion: "single" (the top one's), "mean", "max" or "multiply".
    """
    fused = rows[0]
    for row in rows[1:] if fusion != "single" else ():
        if fusion == "mean":
            fused = fused + row  # eq. 4 divides by the sum, so the number of layers cancels
        elif fusion == "max":
            fused = torch.maximum(fused, row)
        else:  # the factor n keeps a product over many layers from vanishing, and cancels too
            fused = fused * row * row.shape[-1]
    return fused
