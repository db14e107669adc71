"""The measures of a model that its cost depends on, from a config.json or a bundle's manifest."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from patchsieve.contract.errors import BundleError, PatchsieveError, UnsupportedModelError
from patchsieve.contract.manifest import Manifest
from patchsieve.contract.weights import SCORER
from patchsieve.export.source.original import refuse_original

_LARGEST_HEADER = 1 << 22  # bytes of a scorer's list of tensors
_SCORER_MLP = ".mlp.fc1.weight"  # one in each of its layers

# Hugging Face's defaults for entries that a config.json leaves away, by model_type.
_DECODERS: dict[str, dict[str, int]] = {
    "llama": {"vocab_size": 32000, "intermediate_size": 11008, "num_key_value_heads": 0},
    "mistral": {"vocab_size": 32000, "intermediate_size": 14336, "num_key_value_heads": 8},
    "qwen2": {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32},
}
_DECODER = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
_TOWERS: dict[str, dict[str, int]] = {
    "clip_vision_model": {"image_size": 224, "patch_size": 32},
    "siglip_vision_model": {"image_size": 224, "patch_size": 16},
}
_TOWER = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
# LLaVA's own tower, where a config.json names none: CLIP-L/336.
_LLAVA_TOWER = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "image_size": 336,
    "patch_size": 14,
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
            )


@dataclass(frozen=True)
class TowerShape:
    """A vision transformer: width d, MLP width m.

    Attributes:
        num_layers: Layers that it has.
        num_layers_run: Layers up to the one whose output LLaVA takes; 23 of CLIP-L's 24.
        has_cls: A class token stands before the patches.
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
            )
        if self.patch_size > self.image_size:
            raise PatchsieveError(
                "a patch is larger than the image",
                found=self.patch_size,
                expected=f"at most {self.image_size}",
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
                "a window holds no text", found=self.window, expected="at least 3"
            )

    def windows(self, text_tokens: int) -> int:
        """Windows that the text of this many decoder tokens fills.

        IVTP's 512 Llama tokens are taken to be 450 CLIP tokens: with that ratio its table 9 comes
        out (6 windows). Measure your own text where it matters.
        """
        return max(1, -(-text_tokens * 450 // (512 * (self.window - 2))))


@dataclass(frozen=True)
class ModelShape:
    """A LLaVA model.

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


def read_shape(path: Path) -> ModelShape:
    """Read the shape of a LLaVA model from its config.json, or from the directory that holds it."""
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise PatchsieveError(
            f"cannot read {path}", found=error, expected="the config.json of a LLaVA checkpoint"
        ) from error
    return shape_of_config(config)


def shape_of_config(config: Any) -> ModelShape:
    """Read the shape out of a LLaVA config; what it leaves away has Hugging Face's default.

    Raises:
        UnsupportedModelError: It is not LLaVA, or of a decoder or tower that is not known.
        PatchsieveError: A measure in it cannot be.
    """
    if isinstance(config, dict):
        refuse_original(config)
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if model_type != "llava":
        raise UnsupportedModelError(
            "this is not the config of a LLaVA model",
            found=f"model_type {model_type}",
            expected="model_type llava",
        )
    feature_layer = config.get("vision_feature_layer", -2)
    vision, taken = _tower(_part(config, "vision_config"), feature_layer)
    is_full = config.get("vision_feature_select_strategy", "default") == "full"
    return ModelShape(
        vision=vision,
        text=_decoder(_part(config, "text_config")),
        num_visual=vision.num_patches + (1 if is_full and vision.has_cls else 0),
        projector_in=vision.hidden_size * taken,
    )


def from_bundle(bundle: Path, manifest: Manifest) -> ModelShape:
    """Read the shape out of a bundle: its manifest, and the measures of its text scorer.

    Raises:
        BundleError: The scorer's weights are not there or not readable.
    """
    shape = from_manifest(manifest)
    if manifest.scorer is None:
        return shape
    path = bundle / SCORER.path()
    return replace(shape, scorer=_scorer(path, manifest.scorer.window, manifest.scorer.width))


def _scorer(path: Path, window: int, width: int) -> ScorerShape:
    """The measures of a text tower, from the names and shapes that its weights file begins with."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, _LARGEST_HEADER)))
        layers = [each["shape"] for name, each in header.items() if name.endswith(_SCORER_MLP)]
        hidden, inner = layers[0]  # stored [in, out]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(
            f"cannot read the measures of the text scorer in {path}",
            found=error,
            expected="the weights of CLIP's text tower (safetensors)",
            do="copy or export the bundle again",
        ) from error
    return ScorerShape(hidden, inner, len(layers), window, width)


def from_manifest(manifest: Manifest) -> ModelShape:
    """Read the shape out of a bundle's manifest; the text scorer's is CLIP-L's there."""
    text, vision = manifest.text, manifest.vision
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
        text=DecoderShape(
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_layers=text.num_layers,
            num_heads=text.num_heads,
            num_kv_heads=text.num_kv_heads,
            head_dim=text.head_dim,
        ),
        num_visual=vision.num_visual,
        projector_in=vision.hidden_size * len(vision.feature_layers),
    )


def _part(config: dict[str, Any], name: str) -> dict[str, Any] | None:
    part = config.get(name)
    if part is not None and not isinstance(part, dict):
        raise PatchsieveError(f"the config's {name} is no object", found=type(part).__name__)
    return part


def _decoder(config: dict[str, Any] | None) -> DecoderShape:
    given = config or {}
    kind = given.get("model_type", "llama")
    if kind not in _DECODERS:
        raise UnsupportedModelError(
            "the cost of this decoder is not known", found=kind, expected=", ".join(_DECODERS)
        )
    sizes = _DECODER | _DECODERS[kind] | _present(given)
    heads = sizes["num_attention_heads"]
    if type(heads) is not int or heads < 1 or type(sizes["hidden_size"]) is not int:
        raise PatchsieveError("the config's attention heads cannot be", found=repr(heads))
    return DecoderShape(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_layers=sizes["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=sizes["num_key_value_heads"] or heads,
        head_dim=sizes.get("head_dim") or sizes["hidden_size"] // heads,
    )


def _tower(config: dict[str, Any] | None, feature_layer: Any) -> tuple[TowerShape, int]:
    """The tower, and how many of its layers' outputs are laid side by side."""
    given = config or {}
    kind = given.get("model_type", "clip_vision_model")
    if kind not in _TOWERS:
        raise UnsupportedModelError(
            "the cost of this vision tower is not known", found=kind, expected=", ".join(_TOWERS)
        )
    sizes = _LLAVA_TOWER if config is None else _TOWER | _TOWERS[kind] | _present(given)
    num_layers = sizes["num_hidden_layers"]
    taken = feature_layer if isinstance(feature_layer, list) else [feature_layer]
    is_whole = taken and all(type(i) is int for i in [*taken, num_layers])
    # hidden_states[0] is the embeddings, so hidden_states[-2] is what num_layers - 1 layers give.
    run = [i if i >= 0 else num_layers + 1 + i for i in taken] if is_whole else []
    if not run or not all(0 <= i <= num_layers for i in run) or max(run) == 0:
        raise PatchsieveError(
            "the config's vision_feature_layer is no layer of the tower",
            found=repr(feature_layer),
            expected=f"a layer of {num_layers}, or a list of them",
        )
    tower = TowerShape(
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_layers=num_layers,
        num_layers_run=max(run),
        image_size=sizes["image_size"],
        patch_size=sizes["patch_size"],
        has_cls=kind.startswith("clip"),
        num_channels=sizes.get("num_channels", 3),
    )
    return tower, len(run)


def _present(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if value is not None}
