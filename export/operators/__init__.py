"""What a target's parser takes, by tables that lie beside this file, each fact with its source.

A table says of each operator: the opset version since which it is taken (`since`), the types of its
inputs and outputs (`types`, `outputs`, by the kinds of the table), inputs that have types of their
own (`inputs`) or any (`free`), inputs that must be constants (`constant`), have a certain rank
(`rank`), lie `below` a number where constant, or may not be given (`absent`), values of attributes
(`attributes`), attributes that may not be set (`without`), inputs of one type (`same_types`), and
the most outputs. `refused` names operators that are not allowed, and who says so. A table that
`extends` another changes what it names. An operator of another domain is called "domain::Name".
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper, shape_inference

MOST_DIMENSIONS = 8  # of a tensor in TensorRT


@dataclass(frozen=True)
class Rule:
    """What one operator may look like; see the module."""

    since: int = 1
    types: str | None = None
    outputs: str | None = None
    inputs: dict[str, str] = field(default_factory=dict)
    free: tuple[int, ...] = ()
    constant: tuple[int, ...] = ()
    rank: dict[str, list[int]] = field(default_factory=dict)
    below: dict[str, int] = field(default_factory=dict)
    absent: tuple[int, ...] = ()
    attributes: dict[str, list[Any]] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    same_types: bool = False
    max_outputs: int | None = None
    source: str = "matrix"


@dataclass(frozen=True)
class OperatorTable:
    """The operators of one library.

    Attributes:
        library: Its name and version.
        opsets: Least and most opset that it reads.
        kinds: Types, as ONNX spells them, of each kind.
        operators: The rule of each operator.
        refused: Operators that are not allowed, and who says so.
    """

    library: str
    opsets: tuple[int, int]
    kinds: dict[str, list[str]]
    operators: dict[str, Rule]
    refused: dict[str, str]


@cache
def load(name: str) -> OperatorTable:
    """Read a table, such as "tensorrt-10.3", with what it extends."""
    data = json.loads(files(__package__).joinpath(f"{name}.json").read_text(encoding="utf-8"))
    rules = {op: Rule(**rule) for op, rule in data.get("operators", {}).items()}
    refused = data.get("refused", {})
    kinds = data.get("kinds", {})
    if "extends" in data:
        base = load(data["extends"])
        known = {op: rule for op, rule in base.operators.items() if op not in refused}
        before = {op: why for op, why in base.refused.items() if op not in rules}
        rules, refused, kinds = known | rules, before | refused, base.kinds | kinds
    return OperatorTable(data["library"], tuple(data["opsets"]), kinds, rules, refused)


def problems(model: onnx.ModelProto, table: OperatorTable) -> list[str]:
    """Everything in a graph that a table does not take; each names node, operator and fact.

    Args:
        model: The graph; its weights may lie elsewhere.
        table: What is taken.
    """
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    least, most = table.opsets
    found = []
    if not least <= opset <= most:
        found.append(f"opset {opset}, taken {least} to {most}")
    graph = _Graph(shape_inference.infer_shapes(model, data_prop=True).graph, opset)
    for number, node in enumerate(graph.nodes):
        op = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        rule = table.operators.get(op)
        if rule is None or op in table.refused:
            facts = [table.refused.get(op, "not in the table")]
        else:
            facts = list(_misfits(graph, node, rule, table))
        where = f"node {number} ({op} -> {node.output[0] if node.output else 'nothing'})"
        found += [f"{where}: {fact}" for fact in facts]
    return found


class _Graph:
    """Types, ranks and constants of a graph's values."""

    def __init__(self, graph: onnx.GraphProto, opset: int) -> None:
        self.nodes, self.opset = graph.node, opset
        self.types: dict[str, str] = {}
        self.ranks: dict[str, int] = {}
        self.constants: dict[str, onnx.TensorProto | None] = {}
        for value in (*graph.input, *graph.value_info, *graph.output):
            tensor = value.type.tensor_type
            self.types[value.name] = _type_name(tensor.elem_type)
            if tensor.HasField("shape"):
                self.ranks[value.name] = len(tensor.shape.dim)
        for stored in graph.initializer:
            self.types[stored.name] = _type_name(stored.data_type)
            self.ranks[stored.name] = len(stored.dims)
            self.constants[stored.name] = stored
        for node in graph.node:
            if node.op_type == "Constant":
                value = next((a.t for a in node.attribute if a.name == "value"), None)
                self.constants[node.output[0]] = value

    def largest(self, name: str) -> float | None:
        """The largest element of a constant that lies in the graph; None for any other value."""
        stored = self.constants.get(name)
        if stored is None or stored.data_location == onnx.TensorProto.EXTERNAL:
            return None
        return float(np.max(numpy_helper.to_array(stored)))


def _misfits(
    graph: _Graph, node: onnx.NodeProto, rule: Rule, table: OperatorTable
) -> Iterator[str]:
    schema = onnx.defs.has(node.op_type, node.domain)
    if schema:
        version = onnx.defs.get_schema(node.op_type, graph.opset, node.domain).since_version
        if version < rule.since:
            yield f"its version {version}, taken since {rule.since}"
    inputs = {place: name for place, name in enumerate(node.input) if name}
    typed = {place: name for place, name in inputs.items() if place not in rule.free}
    for place, name in typed.items():
        kind = rule.inputs.get(str(place), rule.types)
        yield from _wrong_types(graph, "input", {place: name}, kind, table)
    yield from _wrong_types(graph, "output", dict(enumerate(node.output)), rule.outputs, table)
    types = {graph.types.get(name) for name in typed.values()}
    if rule.same_types and len(types) > 1:
        yield f"inputs of several types: {', '.join(sorted(map(str, types)))}"
    for place, name in inputs.items():
        rank, ranks = graph.ranks.get(name), rule.rank.get(str(place))
        if place in rule.absent:
            yield f"input {place} ({name}) is given"
        if place in rule.constant and name not in graph.constants:
            yield f"input {place} ({name}) is no constant"
        if (ranks and rank not in ranks) or (rank or 0) > MOST_DIMENSIONS:
            yield f"input {place} ({name}) has rank {rank}, taken {ranks or MOST_DIMENSIONS}"
        limit, largest = rule.below.get(str(place)), graph.largest(name)
        if limit is not None and largest is not None and largest >= limit:
            yield f"input {place} ({name}) is {largest:g}, taken below {limit}"
    for attribute in node.attribute:
        value = helper.get_attribute_value(attribute)
        value = value.decode() if isinstance(value, bytes) else value
        if attribute.name in rule.without:
            yield f"attribute {attribute.name} is set"
        elif value not in rule.attributes.get(attribute.name, [value]):
            taken = rule.attributes[attribute.name]
            yield f"attribute {attribute.name} is {value}, taken {taken}"
    outputs = sum(bool(name) for name in node.output)
    if rule.max_outputs is not None and outputs > rule.max_outputs:
        yield f"{outputs} outputs, taken {rule.max_outputs}"


def _wrong_types(
    graph: _Graph, side: str, values: dict[int, str], kind: str | None, table: OperatorTable
) -> Iterator[str]:
    if kind is None:
        return
    for place, name in values.items():
        found = graph.types.get(name, "unknown")
        if found not in table.kinds[kind]:
            yield f"{side} {place} ({name}) is {found}, taken {', '.join(table.kinds[kind])}"


def _type_name(number: int) -> str:
    return onnx.TensorProto.DataType.Name(number).lower()
