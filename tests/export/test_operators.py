"""Every node of every graph is one that its target's parser documents, where it cannot be built."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from patchsieve.contract import files, manifest, names
from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.targets import TARGETS
from patchsieve.export.graphs.decision import decide_graph
from patchsieve.export.graphs.trace import bind
from patchsieve.export.lowering import lower, lowering
from patchsieve.export.operators import load, problems
from patchsieve.export.writer import GraphWriter
from tests.support.pruning_cases import CASES
from tests.support.target_bundles import BFLOAT16, MIXED
from tests.support.test_only_methods import TEST_ONLY, known, tiny_spec

pytest_plugins = ["tests.support.target_bundles"]

TABLES = sorted(path.stem for path in Path(manifest.__file__).parents[1].glob("export/operators/*"))
TABLES = [name for name in TABLES if not name.startswith("__")]
CHECKED = {name: target for name, target in TARGETS.items() if target.operators}
# No node that "atp" or "atp learned on another grid" lacks.
NOTHING_NEW = ("atp strict", "atp nothing passes", "atp as printed", "atp learned")


def found_in(model: onnx.ModelProto, target: str) -> list[str]:
    table = TARGETS[target].operators
    assert table is not None
    return problems(model, load(table))


def test_every_target_that_cannot_be_tried_here_has_a_table() -> None:
    assert set(TARGETS) - set(CHECKED) == {"cpu", "reference"}


@pytest.mark.slow_rows("cuda", "tensorrt-rtx")
@pytest.mark.parametrize("target", CHECKED)
def test_every_node_of_a_bundle_is_taken(bundle_of, target: str) -> None:
    has_bfloat16 = "bfloat16" in TARGETS[target].precisions
    for precision in (*MIXED, BFLOAT16) if has_bfloat16 else MIXED:
        bundle: Path = bundle_of(precision)
        graphs = files.read(bundle).targets[target]
        seen: Counter[str] = Counter()
        for graph, path in graphs.items():
            model = onnx.load(bundle / path, load_external_data=False)
            assert found_in(model, target) == [], graph
            seen.update(node.op_type for node in model.graph.node)
        assert {names.VISION, names.COMPACT, names.stage(0), names.stage(1)} <= set(graphs)
        assert seen["MatMul"] > 10 and seen["CumSum"] and seen["Conv"]


with known():
    DECISIONS = CASES | {name: kind() for name, kind in TEST_ONLY.items()}


@pytest.mark.parametrize("case", [name for name in DECISIONS if name not in NOTHING_NEW])
def test_every_node_of_a_decision_is_taken(case: str) -> None:
    # A decision widens what it reads at once, so that its other nodes are the same in every type.
    with known():
        traced = decide_graph(DECISIONS[case], 3, tiny_spec(), (6, 6), 36, torch.float16)
    stored = {
        name: ir.tensor(np.zeros(value.shape, np.float16))
        for name, value in traced.graph.initializers.items()
        if name.startswith("layers.") and not name.endswith("inv_freq")
    }
    bind(traced, stored)
    for name in CHECKED:
        model = ir.to_proto(lower(traced, lowering(name), 64))
        assert found_in(model, name) == [], name
        assert len(model.graph.node) > 10


# What a table refuses, planted.


def model_of(
    *nodes: onnx.NodeProto, opset: int = 18, **inputs: tuple[int, list]
) -> onnx.ModelProto:
    """A graph of these nodes; constants may be among them."""
    given = [helper.make_tensor_value_info(n, kind, shape) for n, (kind, shape) in inputs.items()]
    result = onnx.ValueInfoProto(name=nodes[-1].output[0])
    graph = helper.make_graph(list(nodes), "planted", given, [result])
    domains = {node.domain for node in nodes} - {""}
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(name, 1) for name in domains)]
    return helper.make_model(graph, opset_imports=opsets)


def constant(name: str, values: object, dtype: type = np.int64) -> onnx.NodeProto:
    tensor = numpy_helper.from_array(np.array(values, dtype))
    return helper.make_node("Constant", [], [name], value=tensor)


FLOATS = (TensorProto.FLOAT, [4, "n"])
NODE = helper.make_node
ATTENTION = {name: (TensorProto.FLOAT16, [1, 2, "n", 8]) for name in "qkv"}


def planted() -> Iterator[tuple[str, str, onnx.ModelProto, str]]:
    """Name, table, graph, and what must be said of it."""
    ten, eleven = "tensorrt-10.3", "tensorrt-11"
    yield (
        "a length that depends on data",
        ten,
        model_of(NODE("NonZero", ["x"], ["y"]), x=FLOATS),
        r"node 0 \(NonZero -> y\): patchsieve: lengths that depend on data",
    )
    yield (
        "an operator that no version has",
        eleven,
        model_of(NODE("Compress", ["x", "c"], ["y"]), x=FLOATS, c=(TensorProto.BOOL, [4])),
        r"\(Compress -> y\): matrix",
    )
    yield (
        "an operator of another library",
        eleven,
        model_of(NODE("FusedGelu", ["x"], ["y"], domain="com.microsoft"), x=FLOATS),
        r"com\.microsoft::FusedGelu -> y\): not in the table",
    )
    yield (
        "axes that are computed",
        ten,
        model_of(NODE("ReduceMean", ["x", "a"], ["y"]), x=FLOATS, a=(TensorProto.INT64, [1])),
        r"input 1 \(a\) is no constant",
    )
    yield (
        "a sum of integers",
        ten,
        model_of(constant("a", 0), NODE("CumSum", ["x", "a"], ["y"]), x=(TensorProto.INT64, ["n"])),
        r"input 0 \(x\) is int64, taken float, float16, bfloat16",
    )
    yield (
        "doubles",
        ten,
        model_of(NODE("Exp", ["x"], ["y"]), x=(TensorProto.DOUBLE, ["n"])),
        r"input 0 \(x\) is double",
    )
    yield (
        "a K too large",
        ten,
        model_of(constant("k", [3840]), NODE("TopK", ["x", "k"], ["y", "i"]), x=FLOATS),
        "input 1 .k. is 3840, taken below 3840",
    )
    yield (
        "an unsorted TopK",
        ten,
        model_of(constant("k", [2]), NODE("TopK", ["x", "k"], ["y", "i"], sorted=0), x=FLOATS),
        r"attribute sorted is 0, taken \[1\]",
    )
    yield (
        "Attention before it was there",
        ten,
        model_of(NODE("Attention", [*"qkv"], ["y"]), opset=23, **ATTENTION),
        "opset 23, taken 9 to 21;.*not in the table",
    )
    yield (
        "a mask of booleans",
        eleven,
        model_of(
            NODE("Attention", [*"qkvm"], ["y"]),
            opset=24,
            m=(TensorProto.BOOL, [1, 1, "n", "n"]),
            **ATTENTION,
        ),
        r"input 3 \(m\) is bool",
    )
    yield (
        "a precision of softmax",
        eleven,
        model_of(NODE("Attention", [*"qkv"], ["y"], softmax_precision=1), opset=24, **ATTENTION),
        "attribute softmax_precision is set",
    )
    yield (
        "lengths that would be lost",
        eleven,
        model_of(
            NODE("Attention", [*"qkv", "", "", "", "l"], ["y"]),
            opset=24,
            l=(TensorProto.INT64, [1]),
            **ATTENTION,
        ),
        r"input 6 \(l\) is given",
    )
    yield (
        "rows with their heads side by side",
        eleven,
        model_of(
            NODE("RotaryEmbedding", [*"xcs"], ["y"], num_heads=2),
            opset=24,
            x=(TensorProto.FLOAT16, [1, "n", 16]),
            c=(TensorProto.FLOAT16, [1, "n", 4]),
            s=(TensorProto.FLOAT16, [1, "n", 4]),
        ),
        r"input 0 \(x\) has rank 3, taken \[4\]",
    )
    yield (
        "a range of two types",
        ten,
        model_of(
            NODE("Range", [*"abc"], ["y"]),
            a=(TensorProto.INT64, []),
            b=(TensorProto.INT32, []),
            c=(TensorProto.INT64, []),
        ),
        "inputs of several types: int32, int64",
    )
    yield (
        "a type that inference cannot tell",
        eleven,
        model_of(NODE("Nonsense", ["x"], ["u"], domain="a"), NODE("Exp", ["u"], ["y"]), x=FLOATS),
        r"node 1 \(Exp -> y\): input 0 \(u\) is unknown",
    )


@pytest.mark.parametrize("case", list(planted()), ids=lambda case: case[0])
def test_what_a_parser_refuses_is_named(case: tuple[str, str, onnx.ModelProto, str]) -> None:
    _, table, model, message = case
    assert re.search(message, "; ".join(problems(model, load(table))))


def test_export_refuses_a_graph_that_its_target_does_not_take(tmp_path: Path) -> None:
    model = model_of(
        constant("a", 0), NODE("CumSum", ["x", "a"], ["y"]), opset=18, x=(TensorProto.INT64, ["n"])
    )
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.INT64, ["n"]))
    writer = GraphWriter(tmp_path, ("tensorrt10",))
    with pytest.raises(PatchsieveError, match=r"graph compact holds what TensorRT 10\.15 .*CumSum"):
        writer.save(names.COMPACT, ir.from_proto(model))
    assert list(tmp_path.iterdir()) == []


# The tables themselves.


@pytest.mark.parametrize("name", TABLES)
def test_a_table_names_what_onnx_knows_and_where_each_fact_is_from(name: str) -> None:
    table = load(name)
    path = Path(manifest.__file__).parents[1] / "export/operators" / f"{name}.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    sources = set(data["sources"])
    while "extends" in data:
        data = json.loads(path.with_name(f"{data['extends']}.json").read_text(encoding="utf-8"))
        sources |= set(data["sources"])
    assert {"matrix", "opsets"} <= sources
    newest = max(onnx.defs.get_schema("Cast").since_version, table.opsets[1])
    for op, rule in table.operators.items():
        assert not set(rule.source.replace(":", ";").split("; ")).isdisjoint(sources), op
        assert {rule.types, rule.outputs} <= {None, *table.kinds}, op
        domain, _, bare = op.rpartition("::")
        if onnx.defs.has(bare, domain) and not domain:
            schema = onnx.defs.get_schema(bare, newest)
            assert {*rule.attributes, *rule.without} <= set(schema.attributes), op
            places = {*rule.free, *rule.constant, *rule.absent, *map(int, rule.rank)}
            assert all(place < schema.max_input for place in places), op
    for op, why in table.refused.items():
        assert why.split(":")[0] in sources, op
    assert not set(table.refused) & set(table.operators)


def test_later_versions_take_what_earlier_ones_took() -> None:
    old, new, newest = (load(f"tensorrt-{v}") for v in ("10.3", "10.15", "11"))
    assert set(old.operators) < set(new.operators) == set(newest.operators)
    added = {"Attention", "RMSNormalization", "RotaryEmbedding", "TensorScatter"}
    assert added <= set(new.operators) - set(old.operators)
    assert old.opsets[1] < new.opsets[1] <= newest.opsets[1]
