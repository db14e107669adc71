"""Attention with an additive bias means one thing in torch and in every lowering."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from patchsieve.export import ops
from patchsieve.export.lowering import lower, lowering
from patchsieve.export.trace import Input, trace
from patchsieve.runtime.building.compile import build_engine
from patchsieve.runtime.gpu.tensorrt import parse_network
from tests.references.attention import softmax

HEADS, WIDTH, ROWS = 4, 32, 9
# Axes that a bias leaves to broadcasting: sizes of keys, one for each head, one for each pair.
SHAPES = {"keys": (1, 1, ROWS), "heads": (HEADS, 1, ROWS), "pairs": (HEADS, ROWS, ROWS)}
# Rows of float32 in another order of summation; float16 rounds each operator to 5e-4.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}


class Biased(nn.Module):
    """One attention and nothing else."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """[B, L, H * D] -> [B, L, H * D]."""
        return ops.attention(query, key, value, HEADS, WIDTH**-0.5, bias)


def lowered(path: Path, target: str, shape: str, dtype: torch.dtype) -> Path:
    """The graph of one target."""
    rows = [Input(dtype, ("images", ROWS, HEADS * WIDTH))] * 3
    names = ["query", "key", "value", "bias"]
    inputs = (*rows, Input(dtype, ("images", *SHAPES[shape])))
    model = lower(trace(Biased(), inputs, names, ["mixed"]), lowering(target))
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
    for target in ("cpu", "reference"):
        path = lowered(tmp_path / f"{target}.onnx", target, shape, dtype)
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {name: value.numpy() for name, value in fed.items()})
        np.testing.assert_allclose(found, want, atol=TOLERANCE[dtype], err_msg=target)
        alone = {name: value[1:2].numpy() for name, value in fed.items()}
        (one,) = session.run(None, alone)
        np.testing.assert_allclose(one, found[1:2], atol=TOLERANCE[dtype], err_msg=target)


@pytest.mark.tensorrt
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_bias_reaches_the_network_of_tensorrt_rtx(tmp_path, dtype) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    path = lowered(tmp_path / "rtx.onnx", "tensorrt-rtx", "keys", dtype)
    network = parse_network(path)
    if dtype == torch.float16:
        (attention,) = network.attentions
        assert attention.has_mask
    assert any("bias" in layer.inputs for layer in network.layers)
    rows = tuple((b, ROWS, HEADS * WIDTH) for b in (1, 1, 3))
    profile = dict.fromkeys(("query", "key", "value"), rows)
    profile["bias"] = tuple((b, 1, 1, ROWS) for b in (1, 1, 3))
    report = build_engine(path, tmp_path / "e", [profile], target="tensorrt-rtx")
    assert report.engine_bytes and not report.warnings
