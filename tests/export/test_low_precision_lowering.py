"""Each target's spelling of a product, in the numbers that it gives."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from patchsieve.contract.formats import FORMATS
from patchsieve.contract.targets import TARGETS
from patchsieve.contract.weights import WeightsFile
from patchsieve.export.graphs.layers import Linear
from patchsieve.export.graphs.trace import Input, bind, fake_weights, trace
from patchsieve.export.lowering import lower, lowering
from patchsieve.export.operators import load, problems
from patchsieve.export.quantise.hints import Hints
from patchsieve.export.weights import DTYPES, Weight, default_dtype, write

SIZE_IN, SIZE_OUT, ROWS = 256, 12, 7
MATRICES = ("query", "key", "value")  # that multiply the same rows
STATIC = [target for target in TARGETS if TARGETS[target].compiler]  # targets with such a form
LARGEST = {"query": 4.0, "key": 4.0, "value": 3.0}  # of the rows, as statistics may say


class Products(nn.Module):
    """Three matrices that multiply the same rows."""

    def __init__(self) -> None:
        super().__init__()
        for name in MATRICES:
            self.add_module(name, Linear(SIZE_IN, SIZE_OUT, bias=False))

    def forward(self, rows: Tensor) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name)(rows) for name in MATRICES)


class Matrices:
    """A checkpoint of random matrices, [out, in]."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.held = {name: rng.standard_normal((SIZE_OUT, SIZE_IN)) * 0.1 for name in MATRICES}

    def read(self, name: str) -> Tensor:
        return torch.from_numpy(self.held[name.removesuffix(".weight")]).float()


def hints(name: str) -> Hints:
    return Hints(input_scale=LARGEST[name.removesuffix(".weight")] / 127)


@functools.cache
def products(kind: str) -> ir.Model:
    """The traced products, not yet bound to numbers."""
    with fake_weights() as mode, default_dtype(DTYPES[kind][0]):
        module = Products()
    rows = Input(DTYPES[kind][0], (1, "rows", SIZE_IN))
    return trace(module, (rows,), ["rows"], list(MATRICES), mode)


def graph(
    folder: Path, target: str, form: str, kind: str = "float32", has_input: bool = False
) -> onnx.ModelProto:
    """A target's graph of the products, its weights in a file beside it."""
    (folder / "weights").mkdir(exist_ok=True)
    weights = [
        Weight(f"{n}.weight", f"{n}.weight", (SIZE_IN, SIZE_OUT), True, form, has_input)
        for n in MATRICES
    ]
    entry = WeightsFile("layer", 0, kind, form)
    path = folder / "weights" / "layers.0.safetensors"
    stored = write(path, entry, weights, Matrices(), lambda _: None, hints)
    traced = products(kind).clone()
    bind(traced, stored)
    model = ir.to_proto(lower(traced, lowering(target)))
    onnx.save(model, folder / "products.onnx")
    return model


# What a file holds, read here without the code that wrote it.


def held(folder: Path, name: str, form: str) -> np.ndarray:
    """A matrix [in, out] as its format says it, float64."""
    tensors = {}
    content = (folder / "weights" / "layers.0.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for key, entry in header.items():
        start, stop = (8 + length + place for place in entry["data_offsets"])
        tensors[key] = (content[start:stop], entry["shape"])

    def read(key: str, dtype: object) -> np.ndarray:
        data, shape = tensors[f"{name}.weight{key}"]
        return np.frombuffer(data, dtype).reshape(shape).astype(np.float64)

    row = FORMATS[form]
    scale = read(".scale", ml_dtypes.float8_e4m3fn if form == "nvfp4" else np.float32)
    if row.block:
        scale = scale.repeat(row.block, axis=0)
    if form == "nvfp4":
        scale = scale * read(".whole", np.float32)
    if row.bits == 8:
        kind = ml_dtypes.float8_e4m3fn if form == "fp8" else np.int8
        return read(f".{form}", kind) * scale
    data, _ = tensors[f"{name}.weight.{form}"]
    codes = np.frombuffer(data, np.uint8)
    halves = np.stack([codes & 15, codes >> 4], -1).reshape(SIZE_IN, SIZE_OUT)
    if form == "nvfp4":
        return halves.view(ml_dtypes.float4_e2m1fn).astype(np.float64) * scale
    return ((halves.astype(np.int8) ^ 8) - 8) * scale


def given() -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.standard_normal((1, ROWS, SIZE_IN)).astype(np.float32)


def rounded(rows: np.ndarray, largest: float, form: str) -> np.ndarray:
    """Rows as a static scale leaves them."""
    if form == "fp8":
        scale = np.float32(largest / 448)
        return (np.clip(rows / scale, -448, 448)).astype(ml_dtypes.float8_e4m3fn) * scale
    scale = np.float32(largest / 127)
    return np.clip(np.rint(rows / scale), -128, 127) * scale


def given_by(folder: Path, model: onnx.ModelProto, form: str) -> list[np.ndarray]:
    """What a runtime makes of the graph."""
    if FORMATS[form].is_float:  # the newest ONNX Runtime has no kernel for FP4
        whole = onnx.load(folder / "products.onnx")
        return ReferenceEvaluator(whole).run(None, {"rows": given()})
    session = ort.InferenceSession(folder / "products.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {"rows": given()})


LOW = [name for name, row in FORMATS.items() if row.bits]
PAIRS = [(t, form) for t, row in TARGETS.items() for form in LOW if form in row.formats]


@pytest.mark.parametrize(
    ("target", "form"), [pair for pair in PAIRS if pair != ("cpu", "int8")], ids=str
)
def test_a_stored_matrix_multiplies_as_what_it_holds(
    target: str, form: str, tmp_path: Path
) -> None:
    model = graph(tmp_path, target, form)
    assert all(node.op_type != "QuantizeLinear" for node in model.graph.node)
    for name, found in zip(MATRICES, given_by(tmp_path, model, form), strict=True):
        expected = given().astype(np.float64) @ held(tmp_path, name, form)
        assert np.abs(found - expected).max() < 1e-2 * np.abs(expected).max(), name


@pytest.mark.parametrize("form", ["int8", "fp8"])
@pytest.mark.parametrize("target", STATIC)
def test_rows_are_rounded_by_a_stored_scale(target: str, form: str, tmp_path: Path) -> None:
    model = graph(tmp_path, target, form, has_input=True)
    for name, found in zip(MATRICES, given_by(tmp_path, model, form), strict=True):
        rows = rounded(given(), LARGEST[name], form).astype(np.float64)
        expected = rows @ held(tmp_path, name, form)
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max(), name
    # Query and key have the same scale, so that they read the same rows.
    count = [node.op_type for node in model.graph.node]
    assert count.count("QuantizeLinear") == 2
    assert count.count("DequantizeLinear") == 2 + len(MATRICES)


@pytest.mark.parametrize("target", [t for t in TARGETS if t not in STATIC and t != "cpu"])
def test_onnx_runtime_has_no_use_for_a_static_scale(target: str, tmp_path: Path) -> None:
    model = graph(tmp_path, target, "int8", has_input=True)
    assert {node.op_type for node in model.graph.node} == {"DequantizeLinear", "MatMul"}


@pytest.mark.parametrize("form", LOW)
@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_each_table_takes_what_its_target_may_hold(kind: str, form: str, tmp_path: Path) -> None:
    for target, row in TARGETS.items():
        if row.operators and form in row.formats and kind in row.precisions:
            has_input = target in STATIC and form in ("int8", "fp8")
            model = graph(tmp_path, target, form, kind, has_input)
            assert problems(model, load(row.operators)) == [], target


def test_only_a_graph_that_holds_quantised_numbers_has_the_higher_opset(tmp_path: Path) -> None:
    def opset(target: str, form: str) -> int:
        return graph(tmp_path, target, form).opset_import[0].version

    for target in ("jetpack6", "cuda"):
        assert opset(target, "float") == TARGETS[target].opset == 18
        assert opset(target, "int8") == opset(target, "int4-64") == 21
    assert opset("tensorrt10", "int8") == opset("tensorrt10", "nvfp4") == 24
