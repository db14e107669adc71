"""The smallest module around a method, and its ONNX graph with dynamic sizes."""

from pathlib import Path

import torch
from torch import nn
from torch.export import Dim

from patchsieve.pruning.decoder.site import Site
from patchsieve.pruning.table import modules

INPUTS = (
    "query",
    "key",
    "value",
    "visual_rows",
    "text_rows",
    "patch_ids",
    "noise",
    "side_row",
    "last_row",
    "hidden",
    "sizes",
)
OUTPUTS = ["keep", "scores", "num_wanted", "hidden_out", "moved"]
LOWER = ("query_1", "key_1", "query_2", "key_2")


class DecisionGraph(nn.Module):
    """One method as a module of plain tensors."""

    def __init__(self, method, grid, num_visual):
        """Register the method's modules, so that their weights become initialisers."""
        super().__init__()
        self.method, self.grid, self.num_visual = method, grid, num_visual
        self.parts = nn.ModuleDict(modules(method))

    def forward(self, given):
        """Decide; the outputs of a decision, five of a method that merges."""
        lower = tuple((given[LOWER[i]], given[LOWER[i + 1]]) for i in (0, 2))
        named = {name: given[name] for name in INPUTS}
        site = Site(**named, lower=lower, grid=self.grid, num_visual=self.num_visual)
        decision = self.method.decide(site, given["budget"])
        return tuple(part for part in decision if part is not None)


def feeds(site: Site, budget: int) -> dict:
    """Map the names of the graph's inputs to tensors."""
    tensors = {name: getattr(site, name) for name in INPUTS}
    lower = dict(zip(LOWER, (t for pair in site.lower for t in pair), strict=True))
    return {**tensors, **lower, "budget": torch.tensor([budget])}


def export_program(method, site: Site):
    """Trace a method with dynamic rows, keys, tokens and text."""
    graph = DecisionGraph(method, site.grid, site.num_visual)
    axes = {"visual_rows": 0, "text_rows": 0, "patch_ids": 0, "noise": 1, "hidden": 1, "sizes": 1}
    axes |= dict.fromkeys(("query", "key", "value", *LOWER), 2)
    inputs = feeds(site, 5)
    dims = {n: {axes[n]: Dim.DYNAMIC} if n in axes else None for n in inputs}
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
        input_names=list(feeds(site, 1)),
        output_names=OUTPUTS[: 5 if "hidden" in method.reads else 3],
    )
    for value in list(program.model.graph.inputs):  # as export does: nobody feeds what is not read
        if not value.uses():
            program.model.graph.inputs.remove(value)
    program.save(str(path))
    return path
