"""The measures of a model that its cost depends on, from a config.json or a bundle's manifest."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from patchsieve.contract import stored
from patchsieve.contract.errors import BundleError, PatchsieveError, UnsupportedModelError
from patchsieve.contract.manifest import Manifest
from patchsieve.contract.model import TextModel, VisionModel
from patchsieve.contract.sizes import TextTower
from patchsieve.contract.weights import SCORER
from patchsieve.export.families import check_structure
from patchsieve.export.source.original import refuse_original

_SCORER_BIAS = ".mlp.fc1.bias"  # one in each of its layers
_SCORER_TABLE = "text_model.embeddings.token_embedding.weight"

# Checkpoints by name, as far as their config.json departs from Hugging Face's defaults.
_VICUNA = {"model_type": "llama", "vocab_size": 32064}
_13B = {"hidden_size": 5120, "intermediate_size": 13824}
_13B |= {"num_hidden_layers": 40, "num_attention_heads": 40}
MODELS: dict[str, dict[str, Any]] = {
    "llava-1.5-7b": {"model_type": "llava", "text_config": _VICUNA},
    "llava-1.5-13b": {"model_type": "llava", "text_config": _VICUNA | _13B},
}


def _check_sizes(shape: Any) -> None:
    """Refuse measures that are not positive whole numbers."""
    for field in fields(shape):
        value = getattr(shape, field.name)
        if field.type == "int" and (type(value) is not int or value < 1):
            raise PatchsieveError(
                f"a model cannot have this {field.name}",
                found=repr(value),
                expected="a whole number of at least 1",
                do="correct config.json",
            )


@dataclass(frozen=True)
class TowerShape:
    """A vision transformer: width d, MLP width m.

    Attributes:
        num_layers: Layers that it has.
        num_layers_run: Layers up to the last whose output the projector takes; 23 of CLIP-L's 24.
        has_cls: A class token comes before the patches.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_layers_run: int
    image_size: int
    patch_size: int
    has_cls: bool = True
    num_channels: int = 3

    def __post_init__(self) -> None:
        _check_sizes(self)
        if self.num_layers_run > self.num_layers:
            raise PatchsieveError(
                "the tower runs more layers than it has",
                found=self.num_layers_run,
                expected=f"at most {self.num_layers}",
                do="correct config.json",
            )
        if self.patch_size > self.image_size:
            raise PatchsieveError(
                "a patch is larger than the image",
                found=self.patch_size,
                expected=f"at most {self.image_size}",
                do="correct config.json",
            )

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class DecoderShape:
    """A Llama-structured decoder: C hidden size, H query heads, G KV heads, D head dim, V words."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        _check_sizes(self)
        if self.num_heads % self.num_kv_heads:
            raise PatchsieveError(
                "query heads do not divide among the KV heads",
                found=f"{self.num_heads} and {self.num_kv_heads}",
                expected="a multiple",
                do="correct config.json",
            )


@dataclass(frozen=True)
class ScorerShape:
    """A CLIP text tower, fed in windows; the defaults are CLIP-L's.

    Attributes:
        window: Positions of one window, the two markers included.
        width: Width of the space that text and image share.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 12
    window: int = 77
    width: int = 768

    def __post_init__(self) -> None:
        _check_sizes(self)
        if self.window < 3:
            raise PatchsieveError(
                "a window holds no text",
                found=self.window,
                expected="at least 3",
                do="correct the config.json of the CLIP",
            )

    def windows(self, text_tokens: int) -> int:
        """Windows that the text of this many decoder tokens fills.

        IVTP's 512 Llama tokens are taken to be 450 CLIP tokens: with that ratio its table 9 comes
        out (6 windows). Measure your own text where it matters.
        """
        return max(1, -(-text_tokens * 450 // (512 * (self.window - 2))))


@dataclass(frozen=True)
class ModelShape:
    """A model: tower, projector, decoder.

    Attributes:
        num_visual: Tokens that enter the decoder for one image when nothing is pruned.
        projector_in: Width of the features that the two-layer projector takes.
        scorer: The text tower of plans that compare the question with an image.
    """

    vision: TowerShape
    text: DecoderShape
    num_visual: int
    projector_in: int
    scorer: ScorerShape = ScorerShape()

    def __post_init__(self) -> None:
        _check_sizes(self)


@dataclass(frozen=True)
class Measures:
    """All that the bytes of a model depend on; its shape follows.

    Attributes:
        is_tied: The output matrix is the table of embeddings.
    """

    text: TextModel
    vision: VisionModel
    is_tied: bool

    @property
    def shape(self) -> ModelShape:
        """What the FLOPs depend on."""
        sizes = {field.name: getattr(self.text, field.name) for field in fields(DecoderShape)}
        return _shape(DecoderShape(**sizes), self.vision)


def read_shape(path: Path) -> ModelShape:
    """Read a model's shape from its config.json, or from the directory that holds it."""
    return read_measures(path).shape


def read_measures(path: Path) -> Measures:
    """Read a model's measures from its config.json, or from the directory that holds it."""
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise PatchsieveError(
            f"cannot read {path}",
            found=error,
            expected="the config.json of a checkpoint that export takes",
            do="give --config such a file, or the directory that holds it",
        ) from error
    return measures_of_config(config)


def shape_of_config(config: Any) -> ModelShape:
    """Read the shape out of a config.json's content, as the model's family reads it for export."""
    return measures_of_config(config).shape


def measures_of_config(config: Any) -> Measures:
    """Read the measures out of a config.json's content.

    Raises:
        UnsupportedModelError: It is of a structure that export does not know.
        PatchsieveError: A measure in it cannot be.
    """
    if not isinstance(config, dict):
        raise UnsupportedModelError(
            "the config of a model is a JSON object",
            found=type(config).__name__,
            do="give --config the config.json of a checkpoint",
        )
    refuse_original(config)
    family = check_structure(config)
    model = family.plain(config)
    sizes: dict[str, Any] = family.decoder_sizes(model)
    DecoderShape(**sizes)  # refuses what no decoder can have
    sizes |= family.decoder_biases(model) | {"model_type": model.text_config.model_type}
    text = TextModel(**sizes)
    return Measures(text, family.vision(model), family.is_tied(model))


def from_bundle(bundle: Path, manifest: Manifest) -> ModelShape:
    """Read the shape out of a bundle: its manifest, and the measures of its text scorer.

    Raises:
        BundleError: The scorer's weights are not there or not readable.
    """
    shape, tower = from_manifest(manifest), scorer_of(bundle, manifest)
    if tower is None:
        return shape
    sizes = {field.name: getattr(tower, field.name) for field in fields(ScorerShape)}
    return replace(shape, scorer=ScorerShape(**sizes))


def scorer_of(bundle: Path, manifest: Manifest) -> TextTower | None:
    """The measures of a bundle's text scorer; None without one.

    They are read from the names and shapes that its weights file begins with.

    Raises:
        BundleError: The scorer's weights are not there or not readable.
    """
    if manifest.scorer is None:
        return None
    path = bundle / SCORER.path()
    try:
        found = stored.header(path)
        inner = [each["shape"][0] for name, each in found.items() if name.endswith(_SCORER_BIAS)]
        vocab, hidden = found[_SCORER_TABLE]["shape"]
        return TextTower(
            vocab, hidden, inner[0], len(inner), manifest.scorer.window, manifest.scorer.width
        )
    except (BundleError, ValueError, LookupError, TypeError) as error:
        raise BundleError(
            f"cannot read the measures of the text scorer in {path}",
            found=error,
            expected="the weights of CLIP's text tower (safetensors)",
            do="copy or export the bundle again",
        ) from error


def from_manifest(manifest: Manifest) -> ModelShape:
    """Read the shape out of a bundle's manifest; the text scorer's is CLIP-L's there."""
    sizes = {field.name: getattr(manifest.text, field.name) for field in fields(DecoderShape)}
    return _shape(DecoderShape(**sizes), manifest.vision)


def _shape(text: DecoderShape, vision: VisionModel) -> ModelShape:
    return ModelShape(
        vision=TowerShape(
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            num_layers=vision.num_layers,
            num_layers_run=vision.num_layers_run,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            has_cls=vision.has_cls,
        ),
        text=text,
        num_visual=vision.num_visual,
        projector_in=vision.hidden_size * len(vision.feature_layers),
    )
