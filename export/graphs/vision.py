"""The `vision` graph: pixels -> projected features of each visual token, with its raster index."""

from __future__ import annotations

from typing import cast

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from patchsieve.contract import names
from patchsieve.contract.errors import UnsupportedModelError
from patchsieve.contract.model import VisionModel
from patchsieve.export.families.specs import ProjectorSpec, TowerSpec
from patchsieve.export.graphs import ops
from patchsieve.export.graphs.layers import Linear, activation
from patchsieve.export.graphs.trace import Input, trace
from patchsieve.pruning.counts import Pruned, left_by_chain
from patchsieve.pruning.encoder.walk import NOWHERE, Tower, TowerMethod, Walk
from patchsieve.pruning.projector.pooling import Pooling
from patchsieve.pruning.rollout import Layer


class TowerLayer(nn.Module):
    """One pre-norm transformer layer of a vision tower."""

    def __init__(self, spec: TowerSpec) -> None:
        super().__init__()
        self.spec, size = spec, spec.hidden_size
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

    def forward(self, x: Tensor, index: int, walk: Walk) -> Tensor:
        """[B, n, C] -> [B, n', C], pruned on the way where `walk` says so for layer `index`."""
        bias = walk.bias()
        given = (x,) if bias is None else (x, bias.to(x.dtype))
        x, *states = ops.block(self.attend, [x, x, x, x], *given)
        if walk.methods:
            query, key, value = map(self._split, states)
            walk.remember(Layer(query, key, self.scale, value=value))
        x = walk.prune(index, x, is_inside=True)
        (x,) = ops.block(self.widen, [x], x)
        return walk.prune(index, x, is_inside=False)

    def attend(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
        """The layer's first half, [B, n, C] -> the same, and its queries, keys and values."""
        rows, attn = self.layer_norm1(x), self.self_attn
        query, key, value = (attn[name](rows) for name in ("q_proj", "k_proj", "v_proj"))
        mixed = ops.attention(query, key, value, self.num_heads, self.scale, bias)
        return x + attn["out_proj"](mixed), query, key, value

    def widen(self, x: Tensor) -> tuple[Tensor]:
        """The layer's second half, [B, n, C] -> the same."""
        return (x + self.mlp["fc2"](self.activation(self.mlp["fc1"](self.layer_norm2(x)))),)

    def _split(self, states: Tensor) -> Tensor:
        """[B, n, H * D] -> [B, H, n, D]."""
        return states.view(*states.shape[:2], self.num_heads, -1).transpose(1, 2)


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

    def forward(self, pixel_values: Tensor, walk: Walk) -> Tensor:
        """[B, 3, h, w] -> features of the chosen layers side by side, [B, n, F * C]."""
        x = self.embeddings(pixel_values)
        if self.pre_layrnorm is not None:
            x = self.pre_layrnorm(x)
        if 0 in self.feature_layers:
            walk.carried[0] = x
        for index, layer in enumerate(cast(nn.ModuleList, self.encoder.layers)):
            x = ops.mark(layer(x, index, walk), f"vision.layers.{index}.output")
            if index + 1 in self.feature_layers:
                walk.carried[index + 1] = x
        return torch.cat([walk.carried[index] for index in self.feature_layers], dim=-1)


class Projector(nn.Module):
    """From the tower's width to the decoder's, C."""

    def __init__(self, spec: ProjectorSpec, size: int) -> None:
        super().__init__()
        self.linear_1 = Linear(spec.size_in, size, spec.bias)
        self.linear_2 = Linear(size, size, spec.bias)
        self.activation = activation(spec.activation)

    def forward(self, features: Tensor) -> Tensor:
        """[..., F * C] -> [..., C]."""
        return self.linear_2(self.activation(self.linear_1(features)))


class Vision(nn.Module):
    """Tower and projector, and what prunes in them.

    Args:
        facts: The tower's measures.
        size: Width of the decoder, C.
        encoder: What prunes inside the tower.
        projector: What prunes or pools between the tower and the decoder.
        out_dtype: Of the features, that of the decoder; by default the tower's own.
        has_cls_outputs: Also give the class token, as a pseudo-CLS wants it.
        joint: Makes the class token's counterpart in the space of a text tower.

    Attributes:
        num_visual: Visual tokens of one image that enter the decoder, at most where `adapts`.
        reads_noise: A method draws.
        adapts: How many tokens are left depends on the image.
    """

    def __init__(
        self,
        facts: VisionModel,
        size: int,
        encoder: TowerMethod | None = None,
        projector: TowerMethod | Pooling | None = None,
        *,
        out_dtype: torch.dtype | None = None,
        has_cls_outputs: bool = False,
        joint: nn.Module | None = None,
    ) -> None:
        """Build the modules."""
        super().__init__()
        self.has_cls_outputs, self.joint = has_cls_outputs, joint
        self.out_dtype = out_dtype or torch.get_default_dtype()
        spec = TowerSpec.of_facts(facts)
        self.facts = facts
        self.vision_tower = VisionTower(spec, list(facts.feature_layers))
        self.multi_modal_projector = Projector(ProjectorSpec.of_facts(facts), size)
        self.tower = Tower(facts.grid, facts.num_layers_run, facts.has_cls)
        self.pooling = projector if isinstance(projector, Pooling) else None
        chosen = [m for m in (encoder, projector) if m is not None and m is not self.pooling]
        self.methods = cast(tuple[TowerMethod, ...], tuple(chosen))
        self.reads_noise = any("noise" in method.reads for method in self.methods)
        self.adapts = any(method.adapts for method in self.methods)
        self.num_visual = tokens_left(facts, self.methods, self.pooling)

    @property
    def is_plain(self) -> bool:
        """Nothing prunes."""
        return not self.methods and self.pooling is None

    def forward(self, pixel_values: Tensor, noise: Tensor | None = None) -> tuple[Tensor, ...]:
        """Pixels to visual tokens.

        Args:
            pixel_values: [B, 3, h, w].
            noise: Uniform numbers, one for each patch, [B, patches], where a method draws.

        Returns:
            image_features [B, N, C], image_ids [B, N]; where something prunes, image_sources
            [B, patches]; where the count adapts, num_wanted [B], of which N is the bound: further
            rows are padding; where they are asked for, cls_features [B, C] and cls_joint [B, E].
        """
        weight = self.multi_modal_projector.linear_1.weight
        walk = Walk(self.tower, self.methods, noise)
        rows = self.vision_tower(pixel_values.to(weight.dtype), walk)  # [B, n, F * C]
        return (*self._visual(rows, walk), *self._cls(rows, walk))

    def _visual(self, rows: Tensor, walk: Walk) -> tuple[Tensor, ...]:
        """The visual tokens of rows [B, n, F * C]."""
        first = self.facts.num_dropped
        # Row 0 is the class token, where the tower has one: here it is still at hand.
        if self.pooling is not None:
            return self._pooled(self.pooling, rows[:, first:])
        if self.is_plain:
            ids = torch.arange(self.facts.raster_ids.start, self.facts.raster_ids.stop)
            return self._project(rows[:, first:]), ids.expand(rows.shape[0], -1)
        if walk.is_projected:
            features = self._project(rows[:, first:])
            if first:  # the model drops the class token: zeros keep its place
                cls = torch.zeros_like(features[:, :first])
                features = torch.cat((cls, features), dim=1)
            rows = walk.prune_projected(features)
        tokens = walk.finish(rows)
        sources = torch.where(tokens.sources < 0, NOWHERE, tokens.sources - first)
        features = tokens.rows[:, first:]
        features = features if walk.is_projected else self._project(features)
        made = features, tokens.ids[:, first:], sources
        if tokens.num_wanted is None:
            return made
        return (*made, tokens.num_wanted + (int(self.facts.has_cls) - first))

    def _cls(self, rows: Tensor, walk: Walk) -> tuple[Tensor, ...]:
        """The class token of rows [B, n, F * C], projected, and in the joint space.

        A tower without one (SigLIP) gives the mean of its rows.
        """
        if not self.has_cls_outputs:
            return ()
        cls = rows[:, 0] if self.facts.has_cls else walk.mean(rows)  # [B, F * C]
        features = (self._project(cls),)
        if self.joint is None:
            return features
        return (*features, self.joint(walk.carried[self.facts.num_layers_run], walk))

    def _pooled(self, pooling: Pooling, features: Tensor) -> tuple[Tensor, ...]:
        """Pool the patches before or after the projector; a class token stays what it is."""
        first = int(self.facts.has_cls) - self.facts.num_dropped  # class tokens among the features
        is_before = pooling.place == "before"
        features = features if is_before else self._project(features)
        pooled = pooling.pool(features[:, first:], self.facts.grid)
        features = torch.cat((features[:, :first], pooled), dim=1) if first else pooled
        features = self._project(features) if is_before else features
        places = torch.tensor(pooling.sources(self.facts.grid)) + first
        batch = features.shape[0]
        ids = torch.full((1, features.shape[1]), NOWHERE).to(features.device)
        return features, ids.expand(batch, -1), places.to(features.device).expand(batch, -1)

    def _project(self, features: Tensor) -> Tensor:
        """[B, N, F * C] -> [B, N, C], in the decoder's type."""
        return self.multi_modal_projector(features).to(self.out_dtype)


def tokens_left(
    facts: VisionModel, methods: tuple[TowerMethod, ...], pooling: Pooling | None
) -> int:
    """Visual tokens of an image that leave the vision graph.

    Raises:
        PatchsieveError: The methods cannot follow one another, or do not fit the tower.
    """
    if (methods or pooling) and facts.num_dropped > facts.has_cls:
        raise UnsupportedModelError(
            "this model drops the first patch of a tower without a class token",
            expected='vision_feature_select_strategy "full" where something prunes the patches',
            do="remove --encoder and --projector, or correct config.json",
        )
    last = facts.num_layers_run - 1
    chain = [Pruned(m.entry, m.places(facts.num_patches, last + 1)) for m in methods]
    if pooling is not None:
        chain.append(Pruned(pooling.entry, {last: pooling.side(facts.grid) ** 2}))
    return left_by_chain(chain, facts.num_patches) + facts.has_cls - facts.num_dropped


def vision_graph(vision: Vision, mode: FakeTensorMode | None = None) -> ir.Model:
    """Trace a vision graph whose weights are not yet bound."""
    facts = vision.facts
    side = facts.image_size
    images = names.AXIS_IMAGES
    inputs = {names.PIXEL_VALUES: Input(torch.float32, (images, 3, side, side))}
    if vision.reads_noise:
        inputs[names.NOISE] = Input(torch.float32, (images, facts.num_patches))
    outputs = [names.IMAGE_FEATURES, names.IMAGE_IDS]
    if not vision.is_plain:
        outputs.append(names.IMAGE_SOURCES)
    if vision.adapts:
        outputs.append(names.NUM_WANTED)
    if vision.has_cls_outputs:
        outputs.append(names.CLS_FEATURES)
    if vision.joint is not None:
        outputs.append(names.CLS_JOINT)
    return trace(vision, tuple(inputs.values()), list(inputs), outputs, mode)
