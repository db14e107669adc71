"""The `decide` graphs, one per site of a plan, and `compact`, which all of them share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from patchsieve import names
from patchsieve.export.families.specs import HeadShape
from patchsieve.export.trace import Input, trace
from patchsieve.pruning.site import Site
from patchsieve.pruning.table import modules

if TYPE_CHECKING:
    from patchsieve.pruning.site import Method


class Decide(nn.Module):
    """A pruning method between the tensors of a stage and the rows of the next.

    Args:
        method: Decides for one image.
        heads: How the decoder's attention divides a row.
        grid: Patch rows and columns of an image.
        num_visual: Visual tokens of an image that enter the decoder.
    """

    def __init__(
        self, method: Method, heads: HeadShape, grid: tuple[int, int], num_visual: int
    ) -> None:
        super().__init__()
        self.method, self.heads, self.grid, self.num_visual = method, heads, grid, num_visual
        for name, part in modules(method).items():  # so that their parameters are found
            self.add_module(name, part)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        slot: Tensor,
        visual_rows: Tensor,
        text_rows: Tensor,
        patch_ids: Tensor,
        keep: Tensor,
        budget: Tensor,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Decide which of one image's rows go on.

        Args:
            query: Rotated queries of the layer before the site, [1, L, H * D].
            key: Its key cache, [1, G, S, D].
            slot: Cache slot of row 0, [1].
            visual_rows: Rows of this image's tokens, [N].
            text_rows: Rows of the instruction behind the image, [T].
            patch_ids: Raster index of each visual row, [N].
            keep: Rows that survive so far, [L]; decisions on several images are chained.
            budget: Most tokens that may be kept, [1].
            noise: Uniform numbers, [1, N], where the method asks for them.

        Returns:
            keep_out [L], scores [N], num_wanted [1].
        """
        shape = (1, -1, self.heads.num_heads, self.heads.head_dim)
        site = Site(
            query=query.view(shape).transpose(1, 2),  # [1, H, L, D]
            key=key,
            slot=slot,
            visual_rows=visual_rows,
            text_rows=text_rows,
            patch_ids=patch_ids,
            grid=self.grid,
            num_visual=self.num_visual,
            noise=noise,
        )
        decision = self.method.decide(site, budget)
        # Integers, because not every runtime scatters booleans.
        mine = torch.ones_like(keep, dtype=torch.int64)
        mine = mine.scatter(0, visual_rows, decision.keep[0].to(torch.int64))  # [L]
        return keep & mine.bool(), decision.scores[0], decision.num_wanted


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
    heads: HeadShape,
    grid: tuple[int, int],
    num_visual: int,
    dtype: torch.dtype,
) -> ir.Model:
    """Trace the decision of one site."""
    rows, visual = names.AXIS_ROWS, names.AXIS_VISUAL
    int64 = torch.int64
    inputs: dict[str, Any] = {
        names.QUERY: Input(dtype, (1, rows, heads.num_heads * heads.head_dim)),
        names.KEY: Input(dtype, (1, heads.num_kv_heads, names.AXIS_SLOTS, heads.head_dim)),
        names.SLOT: Input(int64, (1,)),
        names.VISUAL_ROWS: Input(int64, (visual,)),
        names.TEXT_ROWS: Input(int64, (names.AXIS_TEXT,)),
        names.PATCH_IDS: Input(int64, (visual,)),
        names.KEEP: Input(torch.bool, (rows,)),
        names.BUDGET: Input(int64, (1,)),
    }
    if "noise" in method.reads:
        inputs[names.NOISE] = Input(torch.float32, (1, visual))
    # An image's rows are some of the rows fed, and those are some of the cache's.
    sizes = {names.AXIS_TEXT: 7, visual: 11, rows: 23, names.AXIS_SLOTS: 31}
    model = trace(
        Decide(method, heads, grid, num_visual),
        tuple(inputs.values()),
        list(inputs),
        [names.KEEP_OUT, names.SCORES, names.NUM_WANTED],
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
