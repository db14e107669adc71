"""The `decide` graphs, one per site of a plan, and `compact`, which all of them share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from patchsieve.contract import names
from patchsieve.export.families.specs import HeadShape
from patchsieve.export.graphs.trace import Input, trace
from patchsieve.export.sites import layers_read
from patchsieve.pruning.decoder.site import Site
from patchsieve.pruning.table import modules

if TYPE_CHECKING:
    from patchsieve.pruning.decoder.site import Method


class Decide(nn.Module):
    """A pruning method between the tensors of a stage and the rows of the next.

    Args:
        method: Decides for one image.
        heads: How the decoder's attention divides a row.
        grid: Patch rows and columns of an image.
        num_visual: Visual tokens of an image that enter the decoder.
        below: Layers that it reads besides the one before the site, the nearest first.
    """

    def __init__(
        self,
        method: Method,
        heads: HeadShape,
        grid: tuple[int, int],
        num_visual: int,
        below: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.method, self.heads, self.grid, self.num_visual = method, heads, grid, num_visual
        self.below = below
        for name, part in modules(method).items():  # so that their parameters are found
            self.add_module(name, part)

    def forward(self, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Decide which of one image's rows go on.

        Args:
            given: By their names (contract/names.py), of the layer before the site and, for
                methods that look back further, of the layers below: queries [1, L, H * D], key
                caches and value caches [1, G, S, D]; `slot` [1] of row 0; `visual_rows` [N] and
                their `patch_ids` [N]; `text_rows` [T] of the instruction; `side_row` [1];
                `last_row` [1]; `keep` [L], the rows that survive so far (decisions on several
                images are chained); `budget` [1]; `noise` [1, N]; `hidden` [1, L, C] and
                `sizes` [N].

        Returns:
            keep_out [L], scores [N], num_wanted [1]; of a method that merges also hidden_out
            [1, L, C] and merged_into [N].
        """
        visual_rows, keep = given[names.VISUAL_ROWS], given[names.KEEP]
        site = Site(
            query=self._heads(given[names.QUERY]),
            key=given[names.KEY],
            value=given[names.VALUE],
            lower=tuple(
                (self._heads(given[names.query(layer)]), given[names.key(layer)])
                for layer in self.below
            ),
            slot=given[names.SLOT],
            visual_rows=visual_rows,
            text_rows=given[names.TEXT_ROWS],
            patch_ids=given[names.PATCH_IDS],
            side_row=given[names.SIDE_ROW],
            last_row=given[names.LAST_ROW],
            grid=self.grid,
            num_visual=self.num_visual,
            noise=given[names.NOISE],
            hidden=given[names.HIDDEN],
            sizes=given[names.SIZES][None],
        )
        decision = self.method.decide(site, given[names.BUDGET])
        # Integers, because not every runtime scatters booleans.
        mine = torch.ones_like(keep, dtype=torch.int64)
        mine = mine.scatter(0, visual_rows, decision.keep[0].to(torch.int64))  # [L]
        told = (keep & mine.bool(), decision.scores[0], decision.num_wanted)
        if decision.hidden is None or decision.moved is None:
            return told
        # Merged rows come from behind all others, so that rows are gathered whole.
        rows = torch.cat((given[names.HIDDEN], decision.hidden), dim=1)  # [1, L + N, C]
        merged = torch.arange(visual_rows.shape[0]) + keep.shape[0]  # [N]
        sources = torch.arange(keep.shape[0]).scatter(0, visual_rows, merged)  # [L]
        return (*told, rows.index_select(1, sources), decision.moved[0])

    def _heads(self, query: Tensor) -> Tensor:
        """[1, L, H * D] -> [1, H, L, D]."""
        return query.view(1, -1, self.heads.num_heads, self.heads.head_dim).transpose(1, 2)


class Compact(nn.Module):
    """A mask of rows -> their indices, ascending."""

    def forward(self, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Keep [L] -> keep_indices [L], of which the first num_keep [1] count; the rest are 0."""
        kept = keep.to(torch.int64)
        # In float32, exact up to 2**24 rows: TensorRT 10 documents CumSum for floats only.
        place = torch.cumsum(keep.float(), dim=0).to(torch.int64) - 1
        # Dropped rows write into a place behind all others, which is cut off.
        place = torch.where(keep, place, kept.shape[0])
        padded = torch.zeros_like(torch.cat((kept, kept[:1])))  # [L + 1]
        rows = torch.arange(kept.shape[0])
        return padded.scatter(0, place, rows)[:-1], kept.sum().reshape(1)


def decide_graph(
    method: Method,
    layer: int,
    heads: HeadShape,
    grid: tuple[int, int],
    num_visual: int,
    size: int,
    dtype: torch.dtype,
) -> ir.Model:
    """Trace the decision of the site at `layer`, in a decoder of width `size`."""
    rows, visual = names.AXIS_ROWS, names.AXIS_VISUAL
    int64 = torch.int64
    query = Input(dtype, (1, rows, heads.num_heads * heads.head_dim))
    cache = Input(dtype, (1, heads.num_kv_heads, names.AXIS_SLOTS, heads.head_dim))
    below = layers_read(method, layer)[1:]
    inputs: dict[str, Any] = {names.QUERY: query, names.KEY: cache, names.VALUE: cache}
    inputs |= {names.query(k): query for k in below} | {names.key(k): cache for k in below}
    inputs |= {
        names.SLOT: Input(int64, (1,)),
        names.VISUAL_ROWS: Input(int64, (visual,)),
        names.TEXT_ROWS: Input(int64, (names.AXIS_TEXT,)),
        names.PATCH_IDS: Input(int64, (visual,)),
        names.SIDE_ROW: Input(int64, (1,)),
        names.LAST_ROW: Input(int64, (1,)),
        names.KEEP: Input(torch.bool, (rows,)),
        names.BUDGET: Input(int64, (1,)),
        names.NOISE: Input(torch.float32, (1, visual)),
        names.HIDDEN: Input(dtype, (1, rows, size)),
        names.SIZES: Input(torch.float32, (visual,)),
    }
    outputs = [names.KEEP_OUT, names.SCORES, names.NUM_WANTED]
    if names.HIDDEN in method.reads:
        outputs += [names.HIDDEN_OUT, names.MERGED_INTO]
    # An image's rows are some of the rows fed, and those are some of the cache's.
    sizes = {names.AXIS_TEXT: 7, visual: 11, rows: 23, names.AXIS_SLOTS: 31}
    model = trace(
        Decide(method, heads, grid, num_visual, below),
        (inputs,),
        list(inputs),
        outputs,
        sizes=sizes,
    )
    for value in list(model.graph.inputs):  # what this method does not read, nobody has to feed
        if not value.uses():
            model.graph.inputs.remove(value)
    return model


def compact_graph() -> ir.Model:
    """Trace the one `compact` graph."""
    keep = Input(torch.bool, (names.AXIS_ROWS,))
    outputs = [names.KEEP_INDICES, names.NUM_KEEP]
    return trace(Compact(), (keep,), [names.KEEP], outputs)
