"""Attention with an additive bias means one thing in torch and in every lowering."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from patchsieve.contract import names
from patchsieve.export.graphs import ops
from patchsieve.export.graphs.trace import Input, trace
from patchsieve.export.lowering import lower, lowering
from patchsieve.runtime.building.compile import build_engine
from tests.references.attention import softmax
from tests.support.networks import parse_network

HEADS, WIDTH, ROWS = 4, 32, 9
# Axes that a bias leaves to broadcasting: sizes of keys, one for each head, one for each pair.
SHAPES = {"keys": (1, 1, ROWS), "heads": (HEADS, 1, ROWS), "pairs": (HEADS, ROWS, ROWS)}
# Rows of float32 in another order of summation; float16 rounds each operator to 5e-4.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}


class Biased(nn.Module):
    """One attention and nothing else."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """[B, L, H * D] -> [B, L, H * D]."""
        return ops.attention(query, key, value, HEADS, WIDTH**-0.5, bias)


@functools.cache
def traced(dtype: torch.dtype, shape: str | None) -> ir.Model:
    """The graph that all targets are lowered from, with a bias of a shape or without one."""
    inputs = [Input(dtype, ("images", ROWS, HEADS * WIDTH))] * 3
    if shape is not None:
        inputs.append(Input(dtype, ("images", *SHAPES[shape])))
    names_in = ["query", "key", "value", "bias"][: len(inputs)]
    return trace(Biased(), tuple(inputs), names_in, ["mixed"])


def lowered(
    path: Path, target: str, shape: str, dtype: torch.dtype, form: str = names.DECOMPOSED
) -> Path:
    """The graph of one target."""
    model = lower(traced(dtype, shape), lowering(target), attention=form)
    path.write_bytes(ir.to_proto(model).SerializeToString())
    return path


def feeds(shape: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Three different images."""
    generator = torch.Generator().manual_seed(0)
    rows = {
        name: torch.randn(3, ROWS, HEADS * WIDTH, generator=generator)
        for name in ("query", "key", "value")
    }
    rows["bias"] = torch.randn(3, *SHAPES[shape], generator=generator)
    return {name: value.to(dtype) for name, value in rows.items()}


def expected(fed: dict[str, Tensor]) -> np.ndarray:
    """The same in float64."""
    wide = {name: value.double().numpy() for name, value in fed.items()}
    query, key, value = (
        wide[name].reshape(3, ROWS, HEADS, WIDTH).transpose(0, 2, 1, 3)
        for name in ("query", "key", "value")
    )
    logits = query @ key.transpose(0, 1, 3, 2) * WIDTH**-0.5 + wide["bias"]
    mixed = softmax(logits) @ value
    return mixed.transpose(0, 2, 1, 3).reshape(3, ROWS, HEADS * WIDTH)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_bias_is_added_to_the_products_of_each_image(tmp_path, shape, dtype) -> None:
    fed = feeds(shape, dtype)
    want = expected(fed)
    np.testing.assert_allclose(Biased()(**fed).double(), want, atol=TOLERANCE[dtype])
    forms = [("cpu", names.DECOMPOSED), ("reference", names.DECOMPOSED)]
    forms += [("tensorrt", form) for form in names.ATTENTION_FORMS]
    for target, form in forms:
        path = lowered(tmp_path / f"{target}.{form}.onnx", target, shape, dtype, form)
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {name: value.numpy() for name, value in fed.items()})
        np.testing.assert_allclose(found, want, atol=TOLERANCE[dtype], err_msg=target)
        alone = {name: value[1:2].numpy() for name, value in fed.items()}
        (one,) = session.run(None, alone)
        np.testing.assert_allclose(one, found[1:2], atol=TOLERANCE[dtype], err_msg=target)


@pytest.mark.parametrize(
    ("form", "fused"),
    [
        (names.DECOMPOSED, set()),
        (names.FUSED_TOWER, {"float16", "bfloat16"}),
        (names.FUSED, {"float16", "bfloat16", "masked float16", "masked bfloat16"}),
    ],
)
def test_an_attention_is_one_operator_only_where_it_was_asked_for(form: str, fused: set) -> None:
    found = set()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for mask in ("masked ", ""):
            model = traced(dtype, "keys" if mask else None)
            for target in ("tensorrt", "tensorrt10", "tensorrt-rtx"):
                graph = lower(model, lowering(target), attention=form).graph
                if any(node.op_type == "Attention" for node in graph):
                    found.add(f"{mask}{str(dtype).removeprefix('torch.')}")
                else:
                    assert any(node.op_type == "Softmax" for node in graph)
    assert found == fused


@pytest.mark.tensorrt
@pytest.mark.parametrize(
    ("dtype", "form"),
    [(torch.float32, names.FUSED), (torch.float16, names.DECOMPOSED), (torch.float16, names.FUSED)],
    ids=str,
)
def test_a_bias_reaches_the_network_of_tensorrt_rtx(tmp_path, dtype, form) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    path = lowered(tmp_path / "rtx.onnx", "tensorrt-rtx", "keys", dtype, form)
    network = parse_network(path)
    is_fused = dtype == torch.float16 and form == names.FUSED
    assert [one.has_mask for one in network.attentions] == [True] * is_fused
    assert any("bias" in layer.inputs for layer in network.layers)
    rows = tuple((b, ROWS, HEADS * WIDTH) for b in (1, 1, 3))
    profile = dict.fromkeys(("query", "key", "value"), rows)
    profile["bias"] = tuple((b, 1, 1, ROWS) for b in (1, 1, 3))
    report = build_engine(path, tmp_path / "e", [profile], target="tensorrt-rtx")
    assert report.engine_bytes and not report.warnings
