"""IVTP in the decoder: group-wise token pruning by a pseudo-CLS (Huang et al., 2024, eqs. 2-4).

The pseudo-CLS is a side row: it attends to the visual tokens of its image and is seen by nobody.
Here its attention, rolled out over a group of layers, says which tokens go on. What the row holds
(eqs. 5-8) is made by the runtime.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchsieve.errors import PatchsieveError, ShapeError
from patchsieve.pruning.rows import HIDDEN_LOGIT, mean_over
from patchsieve.pruning.select import check_num_keep, keep_count
from patchsieve.pruning.site import Decision, Site

FUSIONS = ("rollout", "single", "mean", "max", "multiply")
BLOCKS = ("visual", "prefix")


@dataclass(frozen=True)
class IVTP:
    """Keep the tokens that the pseudo-CLS attends to through a group of layers.

    A group is the `group` layers that end at the site. S_i = R[cls, i] ||V_i|| / sum_j (eq. 4),
    where R is the rollout of eq. 3 over the group and V the values of its top layer.

    Differs from the paper: eq. 3's product of maps is a chain of vectors times maps, which gives
    the same numbers, because only the CLS row is wanted.
    The paper leaves open: which rows the maps hold (`block`), whether the group's first layer gets
    an identity too (eq. 3 gives it none, Abnar and Zuidema do), heads (their mean is taken) and
    the norm of V (over all heads side by side).

    Attributes:
        num_keep: Tokens kept of each image.
        group: Layers of the group.
        fusion: "rollout" is eq. 3. The paper's ablations: "single" takes the CLS row of the top
            layer only; "mean", "max" and "multiply" join the CLS rows of the group's layers entry
            by entry.
        block: "visual": maps over the image's tokens and the pseudo-CLS, each row normalised
            again. "prefix": the rows as they are, so that what stands before the image keeps its
            share of the attention.
        identity_first: Add the identity at the group's first layer too; for "rollout".

    Raises:
        PatchsieveError: An option cannot be used.
    """

    name: ClassVar[str] = "ivtp"

    num_keep: int = 64
    group: int = 3
    fusion: str = "rollout"
    block: str = "visual"
    identity_first: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        check_num_keep(self.num_keep)
        for name, known in (("fusion", FUSIONS), ("block", BLOCKS)):
            if getattr(self, name) not in known:
                raise PatchsieveError(
                    f"ivtp does not know this {name}",
                    found=getattr(self, name),
                    expected=", ".join(known),
                    do=f"leave it away for {known[0]!r}, the paper's own",
                )
        if self.group < 1:
            raise PatchsieveError(
                "ivtp needs a group of layers",
                found=self.group,
                expected="at least 1",
                do="give the number of layers that each pruning looks back on (the paper's is 3)",
            )

    @property
    def reads(self) -> tuple[str, ...]:
        """What its decision takes (see `Method.reads`): queries and keys of the whole group."""
        depth = 1 if self.fusion == "single" else self.group
        below = tuple(f"{what}.{k}" for k in range(1, depth) for what in ("query", "key"))
        return ("query", "key", "value", "side_row", *below)

    def decide(self, site: Site, budget: Tensor) -> Decision:
        """Keep the `num_keep` tokens of the highest scores (see `Method.decide`).

        Raises:
            ShapeError: The site lacks values, a side row or the group's lower layers.
        """
        layers = self._layers(site)
        rollout = self._roll_out(site, layers)[:, :-1]  # [B, N], without the CLS itself
        scores = rollout * value_norms(site)  # [B, N]
        total = scores.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        scores = scores / total  # [B, N]
        keep, num_wanted = keep_count(scores, self.num_keep, budget)
        return Decision(keep, scores, num_wanted)

    def _layers(self, site: Site) -> list[tuple[Tensor, Tensor]]:
        """Queries and keys of the group's layers, the top one first."""
        depth = 1 if self.fusion == "single" else self.group
        if site.value is None or site.side_row is None or len(site.lower) < depth - 1:
            raise ShapeError(
                "ivtp does not find what it reads",
                found=f"{1 + len(site.lower)} layers, "
                f"{'no ' if site.side_row is None else ''}side row, "
                f"{'no ' if site.value is None else ''}values",
                expected=f"{depth} layers, a side row and the top layer's values",
                do="feed what `reads` names",
            )
        return [(site.query, site.key), *site.lower[: depth - 1]]

    def _roll_out(self, site: Site, layers: list[tuple[Tensor, Tensor]]) -> Tensor:
        """What the pseudo-CLS gives to each row of [visual; pseudo-CLS], float32 [B, N + 1]."""
        if self.fusion != "rollout":
            return self._fuse([cls_row(site, *layer, self.block) for layer in layers])
        top, *lower = layers
        vector = cls_row(site, *top, self.block)  # [B, N + 1]
        if lower or self.identity_first:
            vector = (vector + _is_cls(vector)) / 2
        for place, layer in enumerate(lower, 1):
            moved = (vector[:, None] @ attention_block(site, *layer, self.block))[:, 0]
            has_identity = place < len(lower) or self.identity_first
            vector = (moved + vector) / 2 if has_identity else moved  # [B, N + 1]
        return vector

    def _fuse(self, rows: list[Tensor]) -> Tensor:
        """Join the CLS rows of the layers, [B, N + 1]."""
        fused = rows[0]
        for row in rows[1:]:
            if self.fusion == "mean":
                fused = fused + row  # the sum: eq. 4 divides by a common factor anyway
            elif self.fusion == "max":
                fused = torch.maximum(fused, row)
            else:  # the length keeps a product over many layers from vanishing; eq. 4 cancels it
                fused = fused * row * row.shape[-1]
        return fused


def attention_block(site: Site, query: Tensor, key: Tensor, block: str) -> Tensor:
    """Attention among [visual; pseudo-CLS], mean over heads (eq. 2), float32 [B, N + 1, N + 1].

    Args:
        site: The image at the site.
        query: Queries of a layer, [B, H, L, D].
        key: Keys of the same layer, [B, G, S, D].
        block: "visual" divides each row by what it gives to the block; "prefix" leaves it.
    """
    assert site.side_row is not None  # `IVTP._layers` has looked
    rows = torch.cat((site.visual_rows, site.side_row))  # [N + 1]
    return _attention(site, query, key, rows, block)


def cls_row(site: Site, query: Tensor, key: Tensor, block: str) -> Tensor:
    """The pseudo-CLS's own row of `attention_block`, without the others, float32 [B, N + 1]."""
    assert site.side_row is not None  # `IVTP._layers` has looked
    return _attention(site, query, key, site.side_row, block)[:, 0]


def value_norms(site: Site) -> Tensor:
    """||V_i|| of each visual token, all heads side by side, float32 [B, N].

    With grouped heads each value counts once; repeating it would scale all norms alike.
    """
    assert site.value is not None  # `IVTP._layers` has looked
    values = site.value.index_select(2, site.visual_rows + site.first_key).float()  # [B, G, N, D]
    return (values * values).sum(dim=(1, 3)).sqrt()


def _attention(site: Site, query: Tensor, key: Tensor, rows: Tensor, block: str) -> Tensor:
    """Rows [R] of the block's map, [B, R, N + 1]; `rows` are ascending, the side row last."""
    assert site.side_row is not None
    visual, side = site.visual_rows + site.first_key, site.side_row + site.first_key
    columns = torch.cat((visual, side))  # [N + 1]
    slots = rows + site.first_key  # [R]
    seen_by_side = visual[-1:]
    # What a row sees besides itself: all before it, and no more than the image's end.
    limit = torch.minimum(slots, seen_by_side)  # [R]
    if block == "visual":
        keys, key_slots = key.index_select(2, columns), columns
    else:
        keys, key_slots = key, torch.arange(key.shape[2], device=key.device)
    seen = (key_slots[None] <= limit[:, None]) | (key_slots[None] == slots[:, None])  # [R, S']
    batch, heads, _, head_dim = query.shape
    kv_heads, num_rows = key.shape[1], rows.shape[0]
    scaled = query.index_select(2, rows).float() * head_dim**-0.5  # [B, H, R, D]
    # The heads that share a KV head become more rows of it, so that K is never repeated.
    grouped = scaled.reshape(batch, kv_heads, heads // kv_heads * num_rows, head_dim)
    logits = grouped @ keys.float().transpose(-1, -2)  # [B, G, H/G*R, S']
    logits = logits.reshape(batch, heads, num_rows, key_slots.shape[0])  # [B, H, R, S']
    attention = torch.softmax(torch.where(seen, logits, HIDDEN_LOGIT), dim=-1)
    attention = mean_over(attention, 1)  # [B, R, S']
    return attention if block == "visual" else attention.index_select(2, columns)  # [B, R, N + 1]


def _is_cls(row: Tensor) -> Tensor:
    """One at the pseudo-CLS, which is last, and zero elsewhere; like `row`, [B, N + 1]."""
    return torch.cat((torch.zeros_like(row[:, 1:]), torch.ones_like(row[:, :1])), dim=1)
