"""What the tables say of low precision, planted: each type where a library documents it alone."""

from __future__ import annotations

import re

import onnx
import pytest
from onnx import TensorProto, helper

from patchsieve.contract.targets import TARGETS
from patchsieve.export.operators import load, problems
from tests.support.low_precision import Form, spelt

FULL = ("tensorrt-10.3", "tensorrt-10.15", "tensorrt-11")
RTX = "tensorrt-rtx-1.7"
CUDA = "onnxruntime-cuda"
EVERY = (*FULL, RTX, CUDA)


def facts(model: onnx.ModelProto, table: str) -> str:
    return "; ".join(problems(model, load(table)))


def test_every_checked_target_has_one_of_these_tables() -> None:
    assert {row.operators for row in TARGETS.values() if row.operators} == set(EVERY)


@pytest.mark.parametrize("table", EVERY)
@pytest.mark.parametrize("form", ["int8", "int4-64", "int4-128"])
@pytest.mark.parametrize("type_", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_weight_only_integers_are_taken_by_all(table: str, form: str, type_: int) -> None:
    assert facts(spelt(Form(form), type_, opset=21), table) == ""


@pytest.mark.parametrize("table", (*FULL, RTX))
@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_static_activations_are_taken_by_every_tensorrt(table: str, form: str) -> None:
    model = spelt(Form(form, is_static=True), TensorProto.BFLOAT16, opset=21)
    assert facts(model, table) == ""
    assert "QuantizeLinear" in facts(model, CUDA)


@pytest.mark.parametrize(
    ("form", "table", "said"),
    [
        ("int4-32", "tensorrt-10.3", r"block_size is 32, taken \[0, 64, 128\]"),
        ("int4-32", "tensorrt-10.15", "block_size is 32"),
        ("int4-32", "tensorrt-11", "block_size is 32"),
        ("int4-32", RTX, "^$"),
        ("int4-32", CUDA, "^$"),
        ("fp8", CUDA, "is float8e4m3fn, taken int8, int4"),
        ("nvfp4", "tensorrt-10.3", r"opset 23, taken 9 to 21;.*float4e2m1"),
        ("nvfp4", "tensorrt-10.15", "^$"),
        ("nvfp4", "tensorrt-11", "^$"),
        ("nvfp4", RTX, "^$"),
        ("nvfp4", CUDA, "opset 23, taken 18 to 21;.*float4e2m1"),
    ],
)
def test_each_format_is_taken_where_it_is_documented(form: str, table: str, said: str) -> None:
    opset = 23 if form == "nvfp4" else 21
    assert re.search(said, facts(spelt(Form(form), TensorProto.FLOAT16, opset), table))


def changed(model: onnx.ModelProto, op: str, **attributes: int) -> onnx.ModelProto:
    """The model with other attributes at its first node of an operator."""
    node = next(node for node in model.graph.node if node.op_type == op)
    for name, value in attributes.items():
        node.attribute.append(helper.make_attribute(name, value))
    return model


@pytest.mark.parametrize("table", EVERY)
def test_a_zero_point_is_refused(table: str) -> None:
    model = spelt(Form("int8"), TensorProto.FLOAT, opset=21)
    zero = helper.make_tensor("zero", TensorProto.INT8, [8], bytes(8), raw=True)
    model.graph.initializer.append(zero)
    model.graph.node[0].input.append("zero")
    assert "input 2 (zero) is given" in facts(model, table)


@pytest.mark.parametrize("table", (*FULL, RTX))
def test_an_activation_has_one_scale(table: str) -> None:
    model = spelt(Form("int8", is_static=True), TensorProto.FLOAT, opset=21)
    one = next(stored for stored in model.graph.initializer if stored.name == "input")
    one.dims.append(1)
    assert "input 1 (input) has rank 1, taken [0]" in facts(model, table)


def test_dynamic_integers_are_for_a_cpu() -> None:
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("MatMulInteger", ["q", "w", "z"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    w = helper.make_tensor("w", TensorProto.INT8, [4, 2], bytes(8), raw=True)
    y = helper.make_tensor_value_info("y", TensorProto.INT32, ["n", 2])
    graph = helper.make_graph(nodes, "dynamic", [x], [y], [w])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    for table in EVERY:
        said = facts(model, table)
        assert "DynamicQuantizeLinear" in said and "MatMulInteger" in said, table


@pytest.mark.parametrize("table", EVERY)
def test_quantised_numbers_are_not_cast(table: str) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])
    y = helper.make_tensor_value_info("y", TensorProto.INT8, [4])
    node = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.INT8)
    graph = helper.make_graph([node], "cast", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    assert "output 0 (y) is int8" in facts(model, table)
