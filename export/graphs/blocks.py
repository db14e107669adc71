"""Layers that a graph holds many times: traced once, and put where each of them belongs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import onnx_ir as ir
import torch
from onnx_ir import convenience
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor, nn

from patchsieve.export.graphs import ops

Kind = tuple[torch.dtype, tuple[int | str, ...]]  # type and shape of an input
Trace = Callable[[nn.Module, list[Kind], list[str], list[str]], ir.Model]

_MOST = 32  # parts of which graphs are kept
_traced: dict[Hashable, ir.Model] = {}


class Alone(nn.Module):
    """A part by itself, so that it can be traced."""

    def __init__(self, part: ops.Part) -> None:
        super().__init__()
        self.module, self.part = ops.module_of(part), part

    def forward(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """The part, with its inputs as one list."""
        return self.part(*inputs)


def put_in(model: ir.Model, root: nn.Module, parts: Sequence[ops.Part], trace: Trace) -> None:
    """Replace each node of a part by the part's own nodes.

    Args:
        model: The graph, with one node for each part.
        root: The module that was traced.
        parts: What `ops.blocks` collected.
        trace: Traces `Alone`, given the types and shapes of its inputs.
    """
    paths = {module: path for path, module in root.named_modules()}
    for node in list(model.graph):
        if node.domain == ops.DOMAIN and node.op_type == ops.BLOCK:
            part = parts[node.attributes["number"].as_int()]
            path = paths[ops.module_of(part)]
            _inline(model.graph, node, _graph_of(node, part, trace), path, part)


def _graph_of(node: ir.Node, part: ops.Part, trace: Trace) -> ir.Model:
    """The graph of a part, traced for the first node whose inputs are of its kind."""
    axes: dict[str, str] = {}  # torch's name of a dynamic axis -> ours
    inputs = [_kind(value, axes) for value in node.inputs if value is not None]
    module = ops.module_of(part)
    types = tuple(parameter.dtype for parameter in module.parameters())
    name, spec = part.__name__, module.spec  # type: ignore[attr-defined]
    key = (type(module), name, spec, types, tuple(inputs))
    if key not in _traced:
        if len(_traced) >= _MOST:
            del _traced[next(iter(_traced))]
        names = [f"in.{number}" for number in range(len(inputs))]
        outputs = [f"out.{number}" for number in range(len(node.outputs))]
        _traced[key] = trace(Alone(part), inputs, names, outputs)
    return _traced[key]


def _kind(value: ir.Value, axes: dict[str, str]) -> Kind:
    """Type and shape of an input."""
    assert value.shape is not None and value.dtype is not None, value
    sizes = (
        axis if isinstance(axis, int) else axes.setdefault(str(axis), f"axis_{len(axes)}")
        for axis in value.shape
    )
    return getattr(torch, value.dtype.numpy().name), tuple(sizes)


def _inline(graph: ir.Graph, node: ir.Node, model: ir.Model, path: str, part: ops.Part) -> None:
    """Put a part's nodes where its node is, named by the path of its module.

    The graph may have been traced for another module: parameters are those of this one.
    """
    inner = model.clone().graph
    for value, outer in zip(inner.inputs, node.inputs, strict=True):
        assert outer is not None, node
        convenience.replace_all_uses_with(value, outer)
    parameters = dict(Alone(part).named_parameters())
    for name, value in list(inner.initializers.items()):
        own = parameters.get(name)
        full = f"{path}.{part.__name__}.{name}" if own is None else name.replace("module", path, 1)
        known = graph.initializers.get(full)
        if known is None:
            known = ir.Value(name=full, type=value.type, shape=value.shape)
            known.const_value = value.const_value if own is None else TorchTensor(own, name=full)
            graph.register_initializer(known)
        convenience.replace_all_uses_with(value, known)
    made = list(inner.outputs)
    inner.outputs.clear()
    nodes = list(inner)
    inner.remove(nodes)
    for each in nodes:
        each.name = f"{path}.{part.__name__}.{each.name}"
        for value in each.outputs:
            value.name = f"{path}.{part.__name__}.{value.name}"
    convenience.replace_nodes_and_values(graph, node, [node], nodes, node.outputs, made)
