"""The smallest module around a method, and its ONNX graph with dynamic sizes."""

from pathlib import Path

import torch
from torch import nn
from torch.export import Dim

from patchsieve.pruning.site import Site
from patchsieve.pruning.table import modules

INPUTS = ("query", "key", "visual_rows", "text_rows", "patch_ids", "noise", "budget")


class DecisionGraph(nn.Module):
    """One method as a module of plain tensors."""

    def __init__(self, method, grid, num_visual):
        """Register the method's modules, so that their weights become initialisers."""
        super().__init__()
        self.method, self.grid, self.num_visual = method, grid, num_visual
        self.parts = nn.ModuleDict(modules(method))

    def forward(self, query, key, visual_rows, text_rows, patch_ids, noise, budget):
        """Decide; the three outputs of a decision."""
        site = Site(
            query, key, visual_rows, text_rows, patch_ids, self.grid, self.num_visual, noise
        )
        return tuple(self.method.decide(site, budget))


def feeds(site: Site, budget: int) -> dict:
    """Map the names of the graph's inputs to tensors."""
    tensors = {name: getattr(site, name) for name in INPUTS[:-1]}
    return {**tensors, "budget": torch.tensor([budget])}


def export_program(method, site: Site):
    """Trace a method with dynamic rows, keys, tokens and text."""
    graph = DecisionGraph(method, site.grid, site.num_visual)
    dims = {
        "query": {2: Dim.DYNAMIC},
        "key": {2: Dim.DYNAMIC},
        "visual_rows": {0: Dim.DYNAMIC},
        "text_rows": {0: Dim.DYNAMIC},
        "patch_ids": {0: Dim.DYNAMIC},
        "noise": {1: Dim.DYNAMIC},
        "budget": None,
    }
    inputs = feeds(site, 5)
    device = next((p.device for p in graph.parameters()), torch.device("cpu"))
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    with torch.no_grad():
        return torch.export.export(graph, (), inputs, dynamic_shapes=dims)


def export_onnx(method, site: Site, path: Path) -> Path:
    """Write the graph of a method, as the exporter leaves it."""
    program = torch.onnx.export(
        export_program(method, site),
        dynamo=True,
        opset_version=21,
        optimize=False,
        verbose=False,
        output_names=["keep", "scores", "num_wanted"],
    )
    program.save(str(path))
    return path
