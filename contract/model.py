"""The measures of a model, as far as its graphs, its prompts and its cost depend on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from patchsieve.contract.plan import GRID2D, TRAINED_RULES


@dataclass(frozen=True)
class TextModel:
    """The decoder: all that its graphs depend on, apart from weights.

    H query heads, G KV heads, D head dim, C hidden, V vocabulary.

    Attributes:
        norm_eps: Of the layers' norms. This and what follows it is empty in bundles of schemas 1
            to 3, whose decisions hold nothing of the decoder.
        inv_freq: Rotary frequencies in radians per position, D / 2 of them, scaling included.
        rotary_scale: Factor on cosines and sines (1 but for YaRN).
        max_rows: Longest sequence for which the structure holds: positions, or a sliding window.
        rotary_sections: Rotary frequencies that turn by each axis of a position, where the decoder
            was trained with the position rule "grid2d"; empty otherwise.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_sections: tuple[int, ...] = ()
    norm_eps: float = 0.0
    activation: str = ""
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    inv_freq: tuple[float, ...] = ()
    rotary_scale: float = 1.0
    max_rows: int = 0

    @property
    def trained_rule(self) -> str:
        """The position rule that the decoder was trained with."""
        return GRID2D if self.rotary_sections else TRAINED_RULES[0]


@dataclass(frozen=True)
class VisionModel:
    """The tower and the projector: all that their graphs depend on, apart from weights.

    Attributes:
        num_layers_run: Layers up to the last whose rows the projector reads.
        num_visual: Tokens that enter the decoder for each image where nothing prunes before it.
        num_dropped: Rows that the model drops from the front of the tower's, before the projector:
            the class token, usually.
        has_cls: A class token comes before the patches.
        has_pre_norm: A layer norm follows the embeddings.
        patch_bias: The patch embedding has a bias.
        feature_layers: Layers whose rows the projector reads side by side, 0 for the embeddings.
    """

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_layers_run: int
    num_heads: int
    image_size: int
    patch_size: int
    grid: tuple[int, int]
    num_visual: int
    num_dropped: int
    has_cls: bool
    has_pre_norm: bool
    patch_bias: bool
    norm_eps: float
    activation: str
    feature_layers: tuple[int, ...]
    projector_activation: str
    projector_bias: bool

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def raster_ids(self) -> range:
        """Raster index of each token where nothing prunes before the decoder, -1 for CLS."""
        return range(self.num_dropped - self.has_cls, self.num_patches)


@dataclass(frozen=True)
class Embeddings:
    """The embedding table [V, C] inside a weights file, gathered outside the graphs."""

    file: str
    offset: int
    dtype: str
    shape: tuple[int, int]


@dataclass(frozen=True)
class Tokens:
    """What the runtime needs to turn a chat into token ids and back."""

    tokenizer: str
    chat_template: str | None
    image_token: str
    image_token_id: int
    eos_token_ids: tuple[int, ...]
    special_tokens: dict[str, str]


@dataclass(frozen=True)
class Generation:
    """What the checkpoint's generation_config.json asks of every answer; a request may override it.

    Attributes:
        stop: `stop_strings` there; the others have their names of there, and its meaning.
        not_followed: Its entries that change answers in transformers but not here, "name = value".
    """

    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    min_length: int = 0
    min_new_tokens: int = 0
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    stop: tuple[str, ...] = ()
    not_followed: tuple[str, ...] = ()

    def options(self) -> dict[str, Any]:
        """Options of a request that say the same, those that change something."""
        plain = Generation(not_followed=self.not_followed)
        return {key: value for key, value in vars(self).items() if value != getattr(plain, key)}


@dataclass(frozen=True)
class Scorer:
    """The text tower that compares the question's words with an image.

    Attributes:
        source: Where it came from.
        tokenizer: Its tokenizer's file.
        bos_id: Begins each window of text.
        eos_id: Ends it, and fills the rest.
        window: Tokens of a window, both marks included.
        width: Of the space that text and image share, E.
    """

    source: str
    tokenizer: str
    bos_id: int
    eos_id: int
    window: int
    width: int
