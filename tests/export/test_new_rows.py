"""Attention over past and new rows is attention over a cache, however its heads are grouped."""

from __future__ import annotations

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
from tests.support.tolerances import LOWERED_FLOAT32

HEADS, DIM, NEW = 4, 8, 5


class Attend(nn.Module):
    """One cached attention over rows that are computed, as a layer's are."""

    def __init__(self, kv_heads: int) -> None:
        super().__init__()
        self.kv_heads = kv_heads

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slot: Tensor,
        last_key: Tensor,
    ) -> tuple[Tensor, ...]:
        rows = (query, key * 2, value * 2)
        caches = (key_cache, value_cache, slot, last_key)
        return ops.cached_attention(*rows, *caches, HEADS, self.kv_heads, DIM**-0.5)


def traced(kv_heads: int) -> ir.Model:
    rows, width = names.AXIS_ROWS, kv_heads * DIM
    new = [Input(torch.float32, (1, rows, size)) for size in (HEADS * DIM, width, width)]
    cache = [Input(torch.float32, (1, kv_heads, names.AXIS_SLOTS, DIM))] * 2
    integers = [Input(torch.int64, (1,)), Input(torch.int64, (rows,))]
    caches = [names.key_cache(0), names.value_cache(0)]
    inputs = ["query", "new_keys", "new_values", *caches, names.SLOT, names.LAST_KEY]
    outputs = ["mixed", *(name + names.OUT for name in caches)]
    return trace(Attend(kv_heads), (*new, *cache, *integers), inputs, outputs)


@pytest.fixture(scope="module", params=(4, 2, 1), ids="kv_heads={}".format)
def graph(request: pytest.FixtureRequest) -> tuple[int, ir.Model]:
    """All query heads with keys of their own, two with one, four with one."""
    return request.param, traced(request.param)


def run(model: ir.Model, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    proto = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(proto, providers=["CPUExecutionProvider"])
    return dict(
        zip([o.name for o in session.get_outputs()], session.run(None, inputs), strict=True)
    )


@pytest.mark.parametrize("past", (0, 7))
@pytest.mark.parametrize("target", ("cuda", "jetpack6"))
def test_rows_give_what_a_cache_gives(graph: tuple[int, ir.Model], target: str, past: int) -> None:
    kv_heads, model = graph
    rng = np.random.default_rng(past)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    inputs = {
        "query": normal(1, NEW, HEADS * DIM),
        "new_keys": normal(1, NEW, kv_heads * DIM),
        "new_values": normal(1, NEW, kv_heads * DIM),
        names.SLOT: np.array([past]),
        names.LAST_KEY: past + np.array([0, 1, -past, 3, 2]),  # the third and the last look back
    }
    before = {name: normal(1, past, kv_heads, DIM) for name in ("key_cache.0", "value_cache.0")}
    room = np.zeros((1, kv_heads, NEW + 3, DIM), np.float32)
    slots = {k: np.concatenate((v.transpose(0, 2, 1, 3), room), 2) for k, v in before.items()}
    rows = {k: v.reshape(1, past, kv_heads * DIM) for k, v in before.items()}
    expected = run(lower(model, lowering("reference")), inputs | slots)
    found = run(lower(model, lowering(target)), inputs | rows)
    assert set(found) == {"mixed", "key_cache.0.new", "value_cache.0.new"}
    np.testing.assert_allclose(found["mixed"], expected["mixed"], atol=LOWERED_FLOAT32)
    for name, new in (("key_cache.0", "new_keys"), ("value_cache.0", "new_values")):
        assert np.array_equal(found[name + names.NEW], 2 * inputs[new])
        written = expected[name + names.OUT][:, :, past : past + NEW]
        assert np.array_equal(written.transpose(0, 2, 1, 3).reshape(1, NEW, -1), 2 * inputs[new])
