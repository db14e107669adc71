"""The `decide` graphs, one per site of a plan, and `compact`, which all of them share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir
import torch
from torch import Tensor, nn

from patchsieve.contract import names, reads
from patchsieve.export.families.specs import DecoderSpec
from patchsieve.export.graphs.next_layer import NextLayer, Projections
from patchsieve.export.graphs.trace import Input, bind, fake_weights, trace
from patchsieve.export.sites import layers_read
from patchsieve.export.weights import default_dtype
from patchsieve.pruning.decoder.site import Site
from patchsieve.pruning.table import modules

if TYPE_CHECKING:
    from torch._subclasses import FakeTensorMode

    from patchsieve.pruning.decoder.site import Method


class Decide(nn.Module):
    """A pruning method between the tensors of a stage and the rows of the next.

    Args:
        method: Decides for one image.
        layer: The site.
        spec: The decoder.
        grid: Patch rows and columns of an image.
        num_visual: Visual tokens of an image that enter the decoder.
    """

    def __init__(
        self,
        method: Method,
        layer: int,
        spec: DecoderSpec,
        grid: tuple[int, int],
        num_visual: int,
    ) -> None:
        super().__init__()
        self.method, self.spec, self.grid, self.num_visual = method, spec, grid, num_visual
        self.below = layers_read(method, layer)[1:]
        for name, part in modules(method).items():  # so that their parameters are found
            self.add_module(name, part)
        # Keyed as in the stage, so that the weights are those that the stage stores.
        next_layers = {str(layer): Projections(spec)} if reads.NEXT_LAYER in method.reads else {}
        self.layers = nn.ModuleDict(next_layers)

    def forward(self, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Decide which of one image's rows enter the site's layer.

        Args:
            given: What decisions may read, by the names and in the shapes of
                `patchsieve.contract.reads`. `keep` holds the rows that survive so far: decisions
                on several images are chained.

        Returns:
            keep_out [L], scores [N], num_wanted [1]; of a method that merges also hidden_out
            [1, L, C] and merged_into [N].
        """
        visual_rows, keep = given[names.VISUAL_ROWS], given[names.KEEP]
        site = Site.of(
            given,
            self.below,
            self.spec.head_dim,
            self.grid,
            self.num_visual,
            self._next_layer(given),
        )
        decision = self.method.decide(site, given[names.BUDGET])
        # Integers, because not every runtime scatters booleans.
        mine = torch.ones_like(keep, dtype=torch.int64)
        mine = mine.scatter(0, visual_rows, decision.keep[0].to(torch.int64))  # [L]
        decided = (keep & mine.bool(), decision.scores[0], decision.num_wanted)
        if decision.hidden is None or decision.moved is None:
            return decided
        # Merged rows are added after all others, so that rows are gathered whole.
        rows = torch.cat((given[names.HIDDEN], decision.hidden), dim=1)  # [1, L + N, C]
        merged = torch.arange(visual_rows.shape[0]) + keep.shape[0]  # [N]
        sources = torch.arange(keep.shape[0]).scatter(0, visual_rows, merged)  # [L]
        return (*decided, rows.index_select(1, sources), decision.moved[0])

    def _next_layer(self, given: dict[str, Tensor]) -> NextLayer | None:
        for layer in self.layers.values():
            assert isinstance(layer, Projections)
            return NextLayer(self.spec, layer, *(given[name] for name in reads.NEXT_LAYER_READS))
        return None


class Compact(nn.Module):
    """A mask of rows -> their indices, ascending."""

    def forward(self, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Keep [L] -> keep_indices [L], of which the first num_keep [1] count; the rest are 0."""
        kept = keep.to(torch.int64)
        # In float32, exact up to 2**24 rows: TensorRT 10 documents CumSum for floats only.
        place = torch.cumsum(keep.float(), dim=0).to(torch.int64) - 1
        # Dropped rows write into a place after all others, which is cut off.
        place = torch.where(keep, place, kept.shape[0])
        padded = torch.zeros_like(torch.cat((kept, kept[:1])))  # [L + 1]
        rows = torch.arange(kept.shape[0])
        return padded.scatter(0, place, rows)[:-1], kept.sum().reshape(1)


def decide_graph(
    method: Method,
    layer: int,
    spec: DecoderSpec,
    grid: tuple[int, int],
    num_visual: int,
    dtype: torch.dtype,
) -> ir.Model:
    """Trace the decision of the site at `layer`; weights that it shares with the layer are unbound.

    Args:
        method: Decides for one image.
        layer: The site.
        spec: The decoder.
        grid: Patch rows and columns of an image.
        num_visual: Visual tokens of an image that enter the decoder.
        dtype: Of the decoder's hidden rows and weights.
    """
    mode: FakeTensorMode | None = None
    if reads.NEXT_LAYER in method.reads:
        with fake_weights() as mode, default_dtype(dtype):
            decide = Decide(method, layer, spec, grid, num_visual)
    else:
        decide = Decide(method, layer, spec, grid, num_visual)
    inputs = {
        name: Input(
            dtype if read.dtype == reads.DECODER else getattr(torch, read.dtype),
            read.shape(vars(spec)),
        )
        for name, read in reads.inputs(decide.below).items()
    }
    # The graph's metadata lists what was traced: that of older plans stays as it was.
    if not {names.POSITION_IDS, reads.NEXT_LAYER} & set(method.reads):
        del inputs[names.POSITION_IDS]
    if names.EMBEDDINGS not in method.reads:
        del inputs[names.EMBEDDINGS]
    outputs = [names.KEEP_OUT, names.SCORES, names.NUM_WANTED]
    if method.merges:
        outputs += [names.HIDDEN_OUT, names.MERGED_INTO]
    # An image's rows are some of the rows fed, and those are some of the cache's.
    sizes = {names.AXIS_TEXT: 7, names.AXIS_VISUAL: 11, names.AXIS_ROWS: 23, names.AXIS_SLOTS: 31}
    model = trace(decide, (inputs,), list(inputs), outputs, mode, sizes)
    inv_freq = ir.tensor(torch.tensor(spec.inv_freq, dtype=torch.float32).numpy())
    bind(model, {f"layers.{layer}.inv_freq": inv_freq})
    for value in list(model.graph.inputs):  # what this method does not read, nobody has to feed
        if not value.uses():
            model.graph.inputs.remove(value)
    return model


def compact_graph() -> ir.Model:
    """Trace the one `compact` graph."""
    keep = Input(torch.bool, (names.AXIS_ROWS,))
    outputs = [names.KEEP_INDICES, names.NUM_KEEP]
    return trace(Compact(), (keep,), [names.KEEP], outputs)
