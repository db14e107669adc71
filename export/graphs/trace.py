"""Trace a graph module, with no weights in memory, into an ONNX graph that a lowering finishes."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir import convenience
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

from patchsieve.contract.formats import FLOAT, FORMATS
from patchsieve.export.graphs import blocks, ops
from patchsieve.export.graphs.blocks import Kind
from patchsieve.export.weights import INPUT, SCALE, WHOLE, packed

BASE_OPSET = 18  # what torch writes natively; lowerings raise it


@dataclass(frozen=True)
class Input:
    """One input of a graph: its dtype and its shape, with a name for each dynamic axis."""

    dtype: torch.dtype
    shape: tuple[int | str, ...]


@contextlib.contextmanager
def fake_weights() -> Iterator[FakeTensorMode]:
    """Modules built inside take no memory; `trace` accepts them too."""
    with FakeTensorMode() as mode:
        yield mode


def trace(
    module: nn.Module,
    inputs: Any,
    input_names: list[str],
    output_names: list[str],
    mode: FakeTensorMode | None = None,
    sizes: Mapping[str, int] | None = None,
) -> ir.Model:
    """Trace a module into an ONNX graph, the operators of `patchsieve.export.graphs.ops` left open.

    Args:
        module: The graph's module; its parameters become initializers of the same names.
        inputs: The arguments of `forward`, a tuple whose leaves are `Input`.
        input_names: One name per leaf.
        output_names: One name per output.
        mode: The fake tensors' mode in which the module was built, if it was.
        sizes: Example length of each axis, all different, where the module relies on their order.

    Returns:
        The graph, at opset 18, its initializers not yet bound to stored tensors.
    """
    leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Input)]
    with mode or contextlib.nullcontext(), _quiet():
        arguments = pytree.tree_map(_example(leaves, sizes), inputs)
    axes_of = pytree.tree_map(_dynamic, inputs)
    with torch.no_grad(), _quiet(), ops.blocks() as parts:
        program = torch.export.export(module.eval(), arguments, dynamic_shapes=axes_of)
        converted = torch.onnx.export(
            program,
            dynamo=True,
            optimize=False,
            opset_version=BASE_OPSET,
            input_names=input_names,
            output_names=output_names,
        )
    assert converted is not None  # torch returns None only for its old exporter

    def again(part: nn.Module, kinds: list[Kind], ins: list[str], outs: list[str]) -> ir.Model:
        return trace(part, ([Input(*kind) for kind in kinds],), ins, outs, mode)

    blocks.put_in(converted.model, module, parts, again)
    _name_axes(converted.model, leaves)
    return converted.model


def _example(
    leaves: list[Input], sizes: Mapping[str, int] | None
) -> Callable[[Input], torch.Tensor]:
    """Makes the tensor that stands for an input, each axis of a length of its own."""
    axes = sorted({axis for leaf in leaves for axis in leaf.shape if isinstance(axis, str)})
    lengths = sizes or {axis: 7 + 4 * place for place, axis in enumerate(axes)}

    def example(leaf: Input) -> torch.Tensor:
        shape = [lengths[n] if isinstance(n, str) else n for n in leaf.shape]
        return torch.zeros(shape, dtype=leaf.dtype)

    return example


def _dynamic(leaf: Input) -> dict[int, Any]:
    """The axes of an input that may change."""
    # Not a named Dim: an order among axes (an image's rows are rows) contradicts its range.
    free = (i for i, n in enumerate(leaf.shape) if isinstance(n, str))
    return dict.fromkeys(free, torch.export.Dim.DYNAMIC)


def _name_axes(model: ir.Model, leaves: list[Input]) -> None:
    """Give the axes of inputs and outputs our names for torch's symbols; drop all other symbols."""
    named = {
        str(axis): name
        for leaf, value in zip(leaves, model.graph.inputs, strict=True)
        for name, axis in zip(leaf.shape, value.shape or (), strict=True)
        if isinstance(name, str)
    }
    for leaf, value in zip(leaves, model.graph.inputs, strict=True):
        value.shape = ir.Shape([ir.SymbolicDim(n) if isinstance(n, str) else n for n in leaf.shape])
    for value in model.graph.outputs:
        value.shape = ir.Shape([_axis(axis, named) for axis in value.shape or ()])
    for node in model.graph:  # inner shapes carry torch's symbols, which mean nothing here
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None
        node.metadata_props.clear()
    model.metadata_props.clear()


def bind(model: ir.Model, tensors: Mapping[str, ir.TensorProtocol]) -> None:
    """Give each initializer that `tensors` names its stored tensor.

    A matrix that is stored in another format than float leaves the graph. The open node `Linear`
    that reads it reads the parts of that format instead: numbers, scales, and the scale of its
    rows if there is one. Its attribute `format` says which format it is.
    """
    for name, value in list(model.graph.initializers.items()):
        if name in tensors:
            value.const_value = tensors[name]
            value.dtype = tensors[name].dtype
    for node in model.graph:
        if node.domain == ops.DOMAIN and node.op_type == "Linear":
            _bind_packed(model.graph, node, tensors)


def _bind_packed(graph: ir.Graph, node: ir.Node, tensors: Mapping[str, ir.TensorProtocol]) -> None:
    weight = node.inputs[1]
    assert weight is not None and weight.name is not None, node
    name = weight.name
    form = next((form for form in FORMATS if packed(name, form) in tensors), FLOAT)
    if form == FLOAT:
        return
    parts = [packed(name, form), name + SCALE, name + WHOLE, name + INPUT]
    stored = [tensors[part] for part in parts if part in tensors]
    values = [_initializer(graph, tensor) for tensor in stored]
    new = ir.node(
        "Linear", [node.inputs[0], *values], {"format": form}, domain=ops.DOMAIN, version=1
    )
    new.outputs[0].type, new.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
    convenience.replace_nodes_and_values(graph, node, [node], [new], node.outputs, new.outputs)
    if not weight.uses():
        del graph.initializers[name]


def _initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """A stored tensor as an initializer, which several nodes may read."""
    assert tensor.name is not None
    if tensor.name not in graph.initializers:
        shape = ir.Shape([int(size) for size in tensor.shape.numpy()])
        value = ir.Value(name=tensor.name, shape=shape, const_value=tensor)
        value.dtype = tensor.dtype
        graph.register_initializer(value)
    return graph.initializers[tensor.name]


def _axis(axis: int | ir.SymbolicDim, named: Mapping[str, str]) -> int | ir.SymbolicDim:
    return axis if isinstance(axis, int) else ir.SymbolicDim(named.get(str(axis), str(axis)))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's progress lines and its notes on absent optional packages."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            exporter.setLevel(level)
