"""What the graph modules need to know of a model, whatever family it comes from."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from patchsieve.contract.model import TextModel, VisionModel
from patchsieve.contract.sizes import TextTower


@dataclass(frozen=True)
class DecoderSpec:
    """A Llama-structured decoder.

    Attributes:
        inv_freq: Rotary frequencies in radians per position, D / 2 of them, scaling included.
        rotary_scale: Factor on cosines and sines (1 but for YaRN).
        max_rows: Longest sequence for which the structure holds: positions, or a sliding window.
        rotary_sections: Frequencies that turn by each axis of a position (see
            `patchsieve.contract.trained`); empty where a position is one number.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    activation: str
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    inv_freq: tuple[float, ...]
    rotary_scale: float
    max_rows: int
    rotary_sections: tuple[int, ...] = ()

    @classmethod
    def of_facts(cls, facts: TextModel) -> DecoderSpec:
        """Read what a manifest says of a decoder."""
        return cls(**{f.name: getattr(facts, f.name) for f in fields(cls)})


@dataclass(frozen=True)
class TowerSpec:
    """A vision transformer.

    Attributes:
        has_cls: A class token comes before the patches.
        has_pre_norm: A layer norm follows the embeddings (CLIP).
        patch_bias: The patch embedding has a bias (SigLIP).
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    norm_eps: float
    activation: str
    has_cls: bool
    has_pre_norm: bool
    patch_bias: bool

    @classmethod
    def of(cls, config: Any, *, has_cls: bool, has_pre_norm: bool, patch_bias: bool) -> TowerSpec:
        """Read a Hugging Face vision config; what it does not say, the family does."""
        return cls(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            norm_eps=config.layer_norm_eps,
            activation=config.hidden_act,
            has_cls=has_cls,
            has_pre_norm=has_pre_norm,
            patch_bias=patch_bias,
        )

    @classmethod
    def of_facts(cls, facts: VisionModel) -> TowerSpec:
        """Read what a manifest says of a tower."""
        return cls(**{f.name: getattr(facts, f.name) for f in fields(cls)})

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and row."""
        side = self.image_size // self.patch_size
        return side, side


@dataclass(frozen=True)
class ProjectorSpec:
    """Two matrices between the tower and the decoder.

    Attributes:
        size_in: Width of what it reads: the rows of all feature layers side by side.
        activation: Between the matrices.
        bias: Both have one.
    """

    size_in: int
    activation: str
    bias: bool

    @classmethod
    def of_facts(cls, facts: VisionModel) -> ProjectorSpec:
        """Read what a manifest says of a projector."""
        size_in = facts.hidden_size * len(facts.feature_layers)
        return cls(size_in, facts.projector_activation, facts.projector_bias)


@dataclass(frozen=True)
class TextSpec:
    """CLIP's text tower.

    Attributes:
        window: Tokens of a window, both marks included.
        width: Of the space that text and image share, E.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    window: int
    width: int
    norm_eps: float
    activation: str

    @property
    def measures(self) -> TextTower:
        """What its bytes depend on."""
        return TextTower(**{f.name: getattr(self, f.name) for f in fields(TextTower)})
