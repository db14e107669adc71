"""The `scorer` graph: CLIP's text tower, which gives every position and not only the last."""

from __future__ import annotations

from typing import cast

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from patchsieve.contract import names
from patchsieve.export.families.specs import TextSpec
from patchsieve.export.graphs import ops
from patchsieve.export.graphs.layers import Linear, activation
from patchsieve.export.graphs.trace import Input, trace

HIDDEN = -6e4  # added to the products of a pair that may not see each other; fits float16


class TextLayer(nn.Module):
    """One pre-norm layer under a causal mask."""

    def __init__(self, spec: TextSpec) -> None:
        super().__init__()
        self.spec = spec
        size, inner = spec.hidden_size, spec.intermediate_size
        self.num_heads, self.scale = spec.num_heads, (size // spec.num_heads) ** -0.5
        self.layer_norm1 = nn.LayerNorm(size, eps=spec.norm_eps)
        self.self_attn = nn.ModuleDict(
            {
                name: Linear(size, size, bias=True)
                for name in ("q_proj", "k_proj", "v_proj", "out_proj")
            }
        )
        self.layer_norm2 = nn.LayerNorm(size, eps=spec.norm_eps)
        self.mlp = nn.ModuleDict(
            {"fc1": Linear(size, inner, bias=True), "fc2": Linear(inner, size, bias=True)}
        )
        self.activation = activation(spec.activation)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor]:
        """[W, P, C] under an additive mask [1, 1, P, P] -> the same shape."""
        rows, attn = self.layer_norm1(x), self.self_attn
        query, key, value = (attn[name](rows) for name in ("q_proj", "k_proj", "v_proj"))
        mixed = ops.attention(query, key, value, self.num_heads, self.scale, mask)
        x = x + attn["out_proj"](mixed)
        return (x + self.mlp["fc2"](self.activation(self.mlp["fc1"](self.layer_norm2(x)))),)


class TextTower(nn.Module):
    """Embeddings, layers, last norm; names as Hugging Face has them."""

    def __init__(self, spec: TextSpec) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {
                "token_embedding": nn.Embedding(spec.vocab_size, spec.hidden_size),
                "position_embedding": nn.Embedding(spec.window, spec.hidden_size),
            }
        )
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList([TextLayer(spec) for _ in range(spec.num_layers)])
        self.final_layer_norm = nn.LayerNorm(spec.hidden_size, eps=spec.norm_eps)

    def forward(self, text_ids: Tensor, mask: Tensor) -> Tensor:
        """[W, P] -> [W, P, C]."""
        positions = cast(nn.Embedding, self.embeddings["position_embedding"]).weight
        x = self.embeddings["token_embedding"](text_ids) + positions  # [W, P, C]
        for layer in cast(nn.ModuleList, self.encoder.layers):
            (x,) = ops.block(layer.forward, [x], x, mask.to(x.dtype))
        return self.final_layer_norm(x)


class TextScorer(nn.Module):
    """CLIP's text tower and its projection, at every position (IVTP eq. 5).

    The tower is causal: what a window is filled up with after its end changes nothing before it.
    """

    def __init__(self, spec: TextSpec) -> None:
        super().__init__()
        self.text_model = TextTower(spec)
        self.text_projection = Linear(spec.hidden_size, spec.width, bias=False)
        self.window = spec.window

    def forward(self, text_ids: Tensor) -> Tensor:
        """text_ids [W, P] -> text_features [W, P, E], float32."""
        places = torch.arange(self.window)
        is_later = places[None, :] > places[:, None]  # [P, P]
        mask = torch.where(is_later, HIDDEN, 0.0)[None, None]  # [1, 1, P, P]
        return self.text_projection(self.text_model(text_ids, mask)).float()

    def inputs(self) -> tuple[Input]:
        """Dtype and shape of the argument of `forward`."""
        return (Input(torch.int64, (names.AXIS_WINDOWS, self.window)),)


def scorer_graph(module: TextScorer, mode: FakeTensorMode) -> ir.Model:
    """Trace the text tower."""
    return trace(module, module.inputs(), [names.TEXT_IDS], [names.TEXT_FEATURES], mode)
