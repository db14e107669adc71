"""The smallest module around a method, and its ONNX graph with dynamic sizes."""

from pathlib import Path

import torch
from torch import nn
from torch.export import Dim

from patchsieve.contract import names, reads
from patchsieve.pruning.decoder.site import Site
from patchsieve.pruning.table import modules

BELOW = (1, 2)  # how many layers below the one before the site
# What a site of `make_site` holds: it ends with the rows present, and no image was judged before.
ABSENT = (names.SLOT, names.KEEP, names.POSITION_IDS)
INPUTS = {name: read for name, read in reads.inputs(BELOW).items() if name not in ABSENT}
OUTPUTS = ["keep", "scores", "num_wanted", "hidden_out", "moved"]


class DecisionGraph(nn.Module):
    """One method as a module of plain tensors."""

    def __init__(self, method, site: Site):
        """Register the method's modules, so that their weights become initialisers."""
        super().__init__()
        self.method, self.site = method, (site.query.shape[-1], site.grid, site.num_visual)
        self.parts = nn.ModuleDict(modules(method))

    def forward(self, given):
        """Decide; the outputs of a decision, five of a method that merges."""
        decision = self.method.decide(Site.of(given, BELOW, *self.site), given[names.BUDGET])
        return tuple(part for part in decision if part is not None)


def feeds(site: Site, budget: int) -> dict:
    """Map the names of the graph's inputs to tensors, for a site of one image."""

    def side_by_side(heads):
        return heads.transpose(1, 2).flatten(2)  # [1, H, L, D] -> [1, L, H * D]

    given = {names.QUERY: side_by_side(site.query), names.BUDGET: torch.tensor([budget])}
    for depth, (query, key) in zip(BELOW, site.lower, strict=True):
        given |= {names.query(depth): side_by_side(query), names.key(depth): key}
    given |= {name: getattr(site, name) for name in INPUTS if name not in given}
    return {name: given[name] for name in INPUTS} | {names.SIZES: site.sizes[0]}


def export_program(method, site: Site):
    """Trace a method with dynamic rows, keys, tokens and text."""
    graph, inputs = DecisionGraph(method, site), feeds(site, 5)
    dynamic = (names.AXIS_ROWS, names.AXIS_SLOTS, names.AXIS_VISUAL, names.AXIS_TEXT)
    dims = {
        name: {i: Dim.DYNAMIC for i, axis in enumerate(read.axes) if axis in dynamic}
        for name, read in INPUTS.items()
    }
    device = next((p.device for p in graph.parameters()), torch.device("cpu"))
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    with torch.no_grad():
        return torch.export.export(graph, (inputs,), dynamic_shapes=(dims,))


def export_onnx(method, site: Site, path: Path) -> Path:
    """Write the graph of a method, as the exporter leaves it."""
    program = torch.onnx.export(
        export_program(method, site),
        dynamo=True,
        opset_version=21,
        optimize=False,
        verbose=False,
        input_names=list(INPUTS),
        output_names=OUTPUTS[: 5 if method.merges else 3],
    )
    for value in list(program.model.graph.inputs):  # as export does: nobody feeds what is not read
        if not value.uses():
            program.model.graph.inputs.remove(value)
    program.save(str(path))
    return path
