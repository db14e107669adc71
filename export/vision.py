"""The `vision` graph: pixels -> projected features of each visual token, with its raster index."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from patchsieve.errors import UnsupportedModelError
from patchsieve.export import ops
from patchsieve.export.families.specs import TowerSpec
from patchsieve.export.layers import Linear, activation


class TowerLayer(nn.Module):
    """One pre-norm transformer layer of a vision tower."""

    def __init__(self, spec: TowerSpec) -> None:
        super().__init__()
        size = spec.hidden_size
        self.num_heads = spec.num_heads
        self.scale = (size // spec.num_heads) ** -0.5
        self.layer_norm1 = nn.LayerNorm(size, eps=spec.norm_eps)
        self.self_attn = nn.ModuleDict(
            {name: Linear(size, size, bias=True) for name in ("q_proj", "k_proj", "v_proj")}
            | {"out_proj": Linear(size, size, bias=True)}
        )
        self.layer_norm2 = nn.LayerNorm(size, eps=spec.norm_eps)
        self.mlp = nn.ModuleDict(
            {
                "fc1": Linear(size, spec.intermediate_size, bias=True),
                "fc2": Linear(spec.intermediate_size, size, bias=True),
            }
        )
        self.activation = activation(spec.activation)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        rows, attn = self.layer_norm1(x), self.self_attn
        mixed = ops.attention(
            attn["q_proj"](rows),
            attn["k_proj"](rows),
            attn["v_proj"](rows),
            self.num_heads,
            self.scale,
        )
        x = x + attn["out_proj"](mixed)
        return x + self.mlp["fc2"](self.activation(self.mlp["fc1"](self.layer_norm2(x))))


class Embeddings(nn.Module):
    """Patches, class token and learned positions."""

    def __init__(self, spec: TowerSpec) -> None:
        super().__init__()
        rows, columns = spec.grid
        self.patch_embedding = nn.Conv2d(
            3, spec.hidden_size, spec.patch_size, spec.patch_size, bias=spec.patch_bias
        )
        self.class_embedding = nn.Parameter(torch.empty(spec.hidden_size)) if spec.has_cls else None
        self.position_embedding = nn.Embedding(rows * columns + spec.has_cls, spec.hidden_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, h, w] -> [B, N, C], the class token first where there is one."""
        x = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)  # [B, N, C]
        if self.class_embedding is not None:
            cls = self.class_embedding.expand(x.shape[0], 1, -1)
            x = torch.cat((cls, x), dim=1)  # [B, 1 + N, C]
        return x + self.position_embedding.weight


class VisionTower(nn.Module):
    """The tower up to the last layer whose features the projector reads."""

    def __init__(self, spec: TowerSpec, feature_layers: list[int]) -> None:
        super().__init__()
        self.embeddings = Embeddings(spec)
        self.pre_layrnorm = (
            nn.LayerNorm(spec.hidden_size, eps=spec.norm_eps) if spec.has_pre_norm else None
        )
        self.feature_layers = feature_layers
        layers = [TowerLayer(spec) for _ in range(max(feature_layers))]
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(layers)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, h, w] -> features of the chosen layers side by side, [B, N, F * C]."""
        x = self.embeddings(pixel_values)
        if self.pre_layrnorm is not None:
            x = self.pre_layrnorm(x)
        states = [x]
        for index, layer in enumerate(cast(nn.ModuleList, self.encoder.layers)):
            x = ops.mark(layer(x), f"vision.layers.{index}.output")
            states.append(x)
        return torch.cat([states[index] for index in self.feature_layers], dim=-1)


class Vision(nn.Module):
    """Tower and projector.

    Args:
        spec: The tower.
        config: A LLaVA config.
        out_dtype: Of the features, that of the decoder; by default the tower's own.

    Attributes:
        num_visual: Visual tokens of one image.
    """

    def __init__(self, spec: TowerSpec, config: Any, out_dtype: torch.dtype | None = None) -> None:
        """Build the modules."""
        super().__init__()
        self.out_dtype = out_dtype or torch.get_default_dtype()
        chosen = config.vision_feature_layer
        chosen = [chosen] if isinstance(chosen, int) else list(chosen)
        layers = [index if index >= 0 else spec.num_layers + 1 + index for index in chosen]
        if not layers or not all(0 <= index <= spec.num_layers for index in layers):
            raise UnsupportedModelError(
                "vision_feature_layer lies outside the tower",
                found=chosen,
                expected=f"{-spec.num_layers - 1} to {spec.num_layers}",
                do="correct config.json",
            )
        self.vision_tower = VisionTower(spec, layers)
        size = config.text_config.hidden_size
        bias = config.multimodal_projector_bias
        self.multi_modal_projector = nn.ModuleDict(
            {
                "linear_1": Linear(spec.hidden_size * len(layers), size, bias),
                "linear_2": Linear(size, size, bias),
            }
        )
        self.activation = activation(config.projector_hidden_act)
        self.dropped = 1 if config.vision_feature_select_strategy == "default" else 0
        rows, columns = spec.grid
        first = -1 if spec.has_cls else 0  # the class token lies on no patch
        self.patch_ids = np.arange(first, rows * columns)[self.dropped :]
        self.ids = nn.Buffer(torch.from_numpy(self.patch_ids))
        self.num_visual = rows * columns + spec.has_cls - self.dropped

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, h, w] -> image_features [B, N, C], image_ids [B, N]."""
        projector = self.multi_modal_projector
        pixel_values = pixel_values.to(cast(Linear, projector["linear_1"]).weight.dtype)
        features = self.vision_tower(pixel_values)[:, self.dropped :]  # [B, N, F * C]
        features = projector["linear_2"](self.activation(projector["linear_1"](features)))
        return features.to(self.out_dtype), self.ids.expand(pixel_values.shape[0], -1)
