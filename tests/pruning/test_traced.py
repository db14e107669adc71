"""Every method as an ONNX graph: one export for all sizes, in ONNX Runtime and TensorRT-RTX."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from patchsieve.pruning.decoder.atp import ATP
from patchsieve.pruning.decoder.thresholds import Thresholds
from tests.support.pruning_cases import CASES, assert_same_choice
from tests.support.pruning_graph import DecisionGraph, export_onnx, export_program, feeds
from tests.support.pruning_sites import make_site

EXPORTED = [
    "random",
    "fastv last",
    "fastv mean",
    "fastv all",
    "atp",
    "atp causal",
    "atp rank",
    "atp softmax",
    "atp learned",
    "atp learned on another grid",
    "ivtp",
    "ivtp prefix",
    "ivtp multiply",
    "topk cls",
    "tome",
    "sparsevlm",
    "sparsevlm all heads",
]
SORTS = {"atp rank": 5, "sparsevlm": 2}  # 1 in all others
# Sizes that the graph was not traced with; grid and heads are part of a graph.
SIZES = {
    "as traced": {},
    "one token": {"tokens": 1},
    "one text row": {"text": 1, "after": 0},
    "one of each": {"tokens": 1, "text": 1, "after": 0, "system": 0},
    "whole grid": {"tokens": 36, "text": 9},
    "cached rows": {"cached": 11},
    "another image": {"other_image": 13, "tokens": 30},
    "class row": {"with_cls": True},
    "all equal": {"values": "zero"},
    "ties": {"values": "small"},
}
FORBIDDEN = {"NonZero", "Compress", "Unique", "Loop", "Scan", "If"}
TOPK_LIMIT = 3839  # TensorRT's TopK takes K < 3840


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """Paths of the exported graphs by case, each exported once when first asked for."""
    folder, paths = tmp_path_factory.mktemp("decisions"), {}

    def graph(case):
        if case not in paths:
            path = folder / f"{case.replace(' ', '_')}.onnx"
            paths[case] = export_onnx(CASES[case], make_site(100), path)
        return paths[case]

    return graph


@pytest.mark.parametrize("case", EXPORTED)
def test_one_graph_decides_at_every_size(graphs, case):
    method = CASES[case]
    session = onnxruntime.InferenceSession(graphs(case), providers=["CPUExecutionProvider"])
    for label, options in SIZES.items():
        has_ties = options.get("values") == "small"
        if has_ties and case == "atp rank":
            continue  # a near-tie that rounds differently moves whole ranks
        for budget in (1, 7, 999):
            site = make_site(11, **options)
            read = {value.name for value in session.get_inputs()}
            inputs = {n: v.numpy() for n, v in feeds(site, budget).items() if n in read}
            keep, scores, num_wanted, *merged = session.run(None, inputs)
            with torch.no_grad():
                made = method.decide(site, torch.tensor(budget))
            expected = [t.numpy() for t in made if t is not None]
            if merged and not has_ties:
                np.testing.assert_allclose(merged[0], expected[3], atol=1e-5, err_msg=label)
                np.testing.assert_array_equal(merged[1], expected[4], err_msg=label)
            np.testing.assert_allclose(scores, expected[1], atol=1e-6, err_msg=label)
            if has_ties:
                assert_same_choice(keep, expected[0], expected[1])
            else:
                np.testing.assert_array_equal(keep, expected[0], err_msg=label)
                np.testing.assert_array_equal(num_wanted, expected[2], err_msg=label)


@pytest.mark.parametrize("case", EXPORTED)
def test_graphs_hold_no_operator_of_data_dependent_shape(graphs, case):
    model = onnx.load(graphs(case))
    onnx.checker.check_model(model)
    kinds = {node.op_type for node in model.graph.node}
    assert not kinds & FORBIDDEN
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert model.opset_import[0].version == 21


def test_thresholds_on_the_meta_device_trace_without_their_weights():
    with torch.device("meta"):
        method = ATP(Thresholds())
    program = torch.onnx.export(
        export_program(method, make_site(1)), dynamo=True, optimize=False, verbose=False
    )
    weights = program.model.graph.initializers
    assert tuple(weights["parts.thresholds.trunk.weight"].shape) == (64, 1152)
    constants = [v.const_value for name, v in weights.items() if not name.startswith("parts.")]
    assert any(np.allclose(c.numpy().max(), 1 - 3 / 36) for c in constants)  # eq. 5, one patch


def test_fake_weights_trace():
    with FakeTensorMode():
        graph = DecisionGraph(ATP(Thresholds()), make_site(1))
        program = torch.export.export(graph, (feeds(make_site(1), 5),))
    assert "parts.thresholds.trunk.weight" in program.state_dict


@pytest.mark.tensorrt
@pytest.mark.parametrize("case", EXPORTED)
def test_graphs_build_in_tensorrt_rtx(graphs, case):
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(typed)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(graphs(case))), [
        parser.get_error(i).desc() for i in range(parser.num_errors)
    ]
    sizes = {
        **dict.fromkeys(("query", "query.1", "query.2"), (3, 700, 4000)),
        **dict.fromkeys(("key", "value", "key.1", "key.2"), (3, 700, 4500)),
        "visual_rows": (1, 576, TOPK_LIMIT),
        "text_rows": (1, 40, 500),
        "patch_ids": (1, 576, TOPK_LIMIT),
        "noise": (1, 576, TOPK_LIMIT),
        **dict.fromkeys(("hidden", "embeddings"), (3, 700, 4000)),
        "sizes": (1, 576, TOPK_LIMIT),
    }
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        assert not tensor.is_shape_tensor  # nothing has to come to the host
        if -1 in tensor.shape:
            profile.set_shape(
                tensor.name,
                *([size if d == -1 else d for d in tensor.shape] for size in sizes[tensor.name]),
            )
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    kinds = [layer.type for layer in layers]
    assert kinds.count(trt.LayerType.TOPK) == SORTS.get(case, 1)
    assert trt.LayerType.NON_ZERO not in kinds
    outputs = {
        network.get_output(i).name: network.get_output(i) for i in range(network.num_outputs)
    }
    assert outputs["keep"].dtype == trt.DataType.BOOL
    assert outputs["scores"].dtype == trt.DataType.FLOAT
    assert outputs["num_wanted"].dtype == trt.DataType.INT64
    assert builder.build_serialized_network(network, config) is not None
