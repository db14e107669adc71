"""Trace a graph module, with no weights in memory, into an ONNX graph that a lowering finishes."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

from patchsieve import names

BASE_OPSET = 18  # what torch writes natively; lowerings raise it
_LARGEST = 1 << 20  # no axis is longer
# Each axis its own length, and rows enough for what lies among them: methods subtract them.
_EXAMPLES = {
    names.AXIS_TEXT: 7,
    names.AXIS_VISUAL: 11,
    names.AXIS_ROWS: 29,
    names.AXIS_ROWS_IN: 37,
    names.AXIS_SLOTS: 53,
}


@dataclass(frozen=True)
class Input:
    """One input of a graph: its dtype and its shape, with a name for each dynamic axis."""

    dtype: torch.dtype
    shape: tuple[int | str, ...]


@contextlib.contextmanager
def fake_weights() -> Iterator[FakeTensorMode]:
    """Modules built inside hold no memory; `trace` takes them all the same."""
    with FakeTensorMode() as mode:
        yield mode


def trace(
    module: nn.Module,
    inputs: Any,
    input_names: list[str],
    output_names: list[str],
    mode: FakeTensorMode | None = None,
) -> ir.Model:
    """Trace a module into an ONNX graph with the operators of `patchsieve.export.ops` left open.

    Args:
        module: The graph's module; its parameters become initializers of the same names.
        inputs: The arguments of `forward`, a tuple whose leaves are `Input`.
        input_names: One name per leaf.
        output_names: One name per output.
        mode: The fake tensors' mode in which the module was built, if it was.

    Returns:
        The graph, at opset 18, its initializers not yet bound to stored tensors.
    """
    leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Input)]
    axes = sorted({axis for leaf in leaves for axis in leaf.shape if isinstance(axis, str)})
    sizes = {axis: _EXAMPLES.get(axis, 59 + 2 * place) for place, axis in enumerate(axes)}
    # An image's tokens lie among the rows, with text in front and behind.
    among = names.AXIS_VISUAL in axes
    least = {names.AXIS_ROWS: 3} if among else {}
    most = {names.AXIS_VISUAL: _LARGEST - 1}
    dims = {
        axis: torch.export.Dim(axis, min=least.get(axis, 1), max=most.get(axis, _LARGEST))
        for axis in axes
    }

    def example(leaf: Input) -> torch.Tensor:
        return torch.zeros([sizes.get(n, n) for n in leaf.shape], dtype=leaf.dtype)

    def dynamic(leaf: Input) -> dict[int, Any]:
        return {i: dims[n] for i, n in enumerate(leaf.shape) if isinstance(n, str)}

    with mode or contextlib.nullcontext(), _quiet():
        arguments = pytree.tree_map(example, inputs)
    with torch.no_grad(), _quiet():
        program = torch.export.export(
            module.eval(), arguments, dynamic_shapes=pytree.tree_map(dynamic, inputs)
        )
        model = torch.onnx.export(
            program,
            dynamo=True,
            optimize=False,
            opset_version=BASE_OPSET,
            input_names=input_names,
            output_names=output_names,
        ).model
    named = {axis.value: name for leaf, value in zip(leaves, model.graph.inputs, strict=True)
             for name, axis in zip(leaf.shape, value.shape, strict=True)
             if isinstance(name, str)}  # fmt: skip
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = ir.Shape([_axis(axis, named) for axis in value.shape])
    for node in model.graph:  # inner shapes carry torch's symbols, which mean nothing here
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None
        node.metadata_props.clear()
    model.metadata_props.clear()
    return model


def bind(model: ir.Model, tensors: Mapping[str, ir.TensorProtocol]) -> None:
    """Give each initializer that stands in `tensors` its stored tensor."""
    for name, value in model.graph.initializers.items():
        if name in tensors:
            value.const_value = tensors[name]
            value.dtype = tensors[name].dtype


def _axis(axis: int | ir.SymbolicDim, named: Mapping[Any, str]) -> int | ir.SymbolicDim:
    if isinstance(axis, int):
        return axis
    return ir.SymbolicDim(named.get(axis.value, axis.value))


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
