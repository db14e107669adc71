"""A layer is traced once, and every graph has its own parameters."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from patchsieve.export.graphs import ops
from patchsieve.export.graphs.trace import Input, trace


class Layer(nn.Module):
    """Two parts that share a parameter."""

    def __init__(self, spec: str) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.randn(3))

    def scale(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Times the weight and a constant."""
        return (x * self.weight * torch.tensor([1.0, 2.0, 3.0]),)

    def move(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Plus the weight and another constant."""
        return (x + self.weight + torch.tensor([5.0, 6.0, 7.0]),)


class Layers(nn.Module):
    """Some of them in a row."""

    def __init__(self, count: int, spec: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(spec) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, 3] -> [n, 3]."""
        for layer in self.layers:
            (x,) = ops.block(layer.scale, [x], x)
            (x,) = ops.block(layer.move, [x], x)
        return x


def run(module: nn.Module, x: np.ndarray) -> np.ndarray:
    """What the traced graph gives."""
    import onnx_ir as ir
    import onnxruntime as ort

    graph = trace(module, (Input(torch.float32, ("n", 3)),), ["x"], ["y"])
    graph.ir_version = 10
    session = ort.InferenceSession(ir.to_proto(graph).SerializeToString())
    return session.run(None, {"x": x})[0]


def test_modules_of_one_description_keep_their_own_parameters() -> None:
    x = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    for count in (3, 2):
        module = Layers(count, "own parameters")
        expected = module(torch.from_numpy(x)).detach().numpy()
        np.testing.assert_allclose(run(module, x), expected, rtol=1e-5)


def test_a_part_is_traced_once_for_a_description_and_a_shape(monkeypatch) -> None:
    from patchsieve.export.graphs import blocks

    made = []
    real = blocks.Alone.forward
    monkeypatch.setattr(
        blocks.Alone, "forward", lambda self, inputs: made.append(1) or real(self, inputs)
    )
    for count in (4, 2):
        trace(Layers(count, "once"), (Input(torch.float32, ("n", 3)),), ["x"], ["y"])
    assert len(made) == 2  # scale and move
