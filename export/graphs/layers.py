"""Small layers that the graph modules share. Weights lie [in, out], so that no graph transposes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from patchsieve.contract.errors import UnsupportedModelError
from patchsieve.export.families.specs import DecoderSpec
from patchsieve.export.graphs import ops
from patchsieve.pruning.rotary import angles

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_pytorch_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": nn.functional.relu,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """Find an activation by its Hugging Face name."""
    if name not in ACTIVATIONS:
        raise UnsupportedModelError(
            "this activation is not supported",
            found=name,
            expected=", ".join(ACTIVATIONS),
            do="choose a checkpoint with one of these, or add it to export/graphs/layers.py",
        )
    return ACTIVATIONS[name]


class Linear(nn.Module):
    """`x @ weight + bias` with weight [in, out]: a checkpoint's matrix, transposed when stored."""

    def __init__(
        self, size_in: int, size_out: int, bias: bool, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size_in, size_out, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(size_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        x = ops.linear(x, self.weight)
        return x if self.bias is None else x + self.bias


class RMSNorm(nn.Module):
    """Root-mean-square norm; the target chooses how it is spelt."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[1, L, C] -> [1, L, C]."""
        return ops.rms_norm(x, self.weight, self.eps)


def rotary_tables(
    position_ids: Tensor, inv_freq: Tensor, spec: DecoderSpec, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rows' angles, [1, L, D / 2] each.

    Args:
        position_ids: int64 [L]; with A rotary sections [L, A].
        inv_freq: Radians per position, float32 [D / 2].
        spec: The decoder.
        dtype: Of the rows.
    """
    turn = angles(position_ids, inv_freq, spec.rotary_sections)  # [L, D / 2]
    cos = (turn.cos() * spec.rotary_scale).to(dtype).unsqueeze(0)
    sin = (turn.sin() * spec.rotary_scale).to(dtype).unsqueeze(0)
    return cos, sin
