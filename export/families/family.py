"""What is asked of a model family: all that differs between the model classes of Hugging Face.

A family is one file here. The board runs no code of it: what a bundle needs to know is in its
manifest and graphs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from patchsieve.contract.errors import UnsupportedModelError
from patchsieve.contract.model import VisionModel
from patchsieve.export.families.specs import DecoderSpec
from patchsieve.export.families.structures import (
    DECODERS,
    TOWERS,
    decoder_biases,
    decoder_sizes,
    decoder_spec,
    with_defaults,
)

TEXT, VISION = "text_config", "vision_config"


@dataclass(frozen=True)
class Parts:
    """The modules of a loaded Hugging Face model, each a `torch.nn.Module`.

    Attributes:
        tower: From pixels to rows of patches.
        projector: From the tower's width to the decoder's.
        decoder: From embeddings to normed rows.
        head: From those to logits.
    """

    tower: Any
    projector: Any
    decoder: Any
    head: Any


class Family(ABC):
    """A model class of Hugging Face: how its files are read and what its parts measure.

    A config is Hugging Face's own, or the one that `plain` makes of a config.json. What reads sizes
    (`decoder_sizes`, `vision`) takes either and imports neither torch nor transformers, because
    `cost` runs without them.

    Attributes:
        model_type: The family's name in config.json.
        model_class: Its class in transformers.
        image_token: Text that stands for an image if the checkpoint's files name none.
        defaults: Hugging Face's defaults of the config's own entries.
        default_types: The `model_type` of each part of the config that names none.
        default_parts: What an absent part holds, where that is not nothing.
        known_parts: The structures that each part may have.
    """

    model_type: ClassVar[str]
    model_class: ClassVar[str]
    image_token: ClassVar[str]
    defaults: ClassVar[Mapping[str, Any]]
    default_types: ClassVar[Mapping[str, str]]
    default_parts: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    known_parts: ClassVar[Mapping[str, Mapping[str, Any]]] = {TEXT: DECODERS, VISION: TOWERS}

    def __str__(self) -> str:
        """The structures that the family covers, for an error's list of them."""
        return (
            f"{self.model_class} (model_type {self.model_type}) with a decoder of type "
            f"{', '.join(sorted(DECODERS))} and a tower of type {', '.join(sorted(TOWERS))}"
        )

    def plain(self, raw: Mapping[str, Any]) -> Any:
        """A config.json's content as an object, with Hugging Face's defaults for absent entries.

        Raises:
            UnsupportedModelError: An entry has a value of another type.
        """
        parts = {
            name: with_defaults(raw.get(name, self.default_parts.get(name, {})), kind)
            for name, kind in self.default_types.items()
        }
        return SimpleNamespace(**{**self.defaults, **raw, **parts})

    def decoder(self, config: Any) -> DecoderSpec:
        """The decoder of Hugging Face's config. Reads rotary frequencies, so it needs torch."""
        return decoder_spec(config.text_config)

    def decoder_sizes(self, config: Any) -> dict[str, Any]:
        """The sizes among `decoder`'s entries: from `vocab_size` to `head_dim`."""
        return decoder_sizes(config.text_config)

    def decoder_biases(self, config: Any) -> dict[str, Any]:
        """The biases among `decoder`'s entries: from `qkv_bias` to `mlp_bias`."""
        return decoder_biases(config.text_config)

    @abstractmethod
    def canonical(self, name: str) -> str:
        """The one spelling, that of the graph modules, of a tensor's stored name."""

    @abstractmethod
    def vision(self, config: Any) -> VisionModel:
        """The measures of the tower and the projector, and where an image's tokens lie.

        Raises:
            UnsupportedModelError: The tower is not known, or the config contradicts itself.
        """

    @abstractmethod
    def is_tied(self, config: Any) -> bool:
        """Whether a checkpoint without an output matrix means the table of embeddings."""

    @abstractmethod
    def preprocessor(self, directory: Path, vision: VisionModel) -> dict[str, Any]:
        """Read the fields of the runtime's `Preprocessor` from a checkpoint's files.

        Raises:
            UnsupportedModelError: There are none, or they give something other than the tower
                takes.
        """

    @abstractmethod
    def processor(self, directory: Path, config: Any) -> Any:
        """Hugging Face's processor, on PIL, whose pixels the runtime reproduces."""

    @abstractmethod
    def parts(self, model: Any) -> Parts:
        """The modules of a model that `load` gave."""

    def load(
        self, directory: Path, config: Any, tensors: dict[str, Any] | None, **options: Any
    ) -> Any:
        """Hugging Face's model of a checkpoint.

        Args:
            directory: The checkpoint.
            config: Its config.
            tensors: What `Checkpoint.dequantised` gives, which replaces the files' tensors.
            **options: Those of `from_pretrained`.
        """
        import transformers

        model_class = getattr(transformers, self.model_class)
        place = directory if tensors is None else None
        return model_class.from_pretrained(place, config=config, state_dict=tensors, **options)

    def config(self, raw: dict[str, Any], path: Path) -> Any:
        """Hugging Face's config of a config.json's content.

        Raises:
            UnsupportedModelError: transformers refuses it.
        """
        from huggingface_hub.errors import StrictDataclassError
        from transformers import CONFIG_MAPPING

        try:
            return CONFIG_MAPPING[self.model_type].from_dict(raw)
        except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UnsupportedModelError(
                f"transformers does not accept {path}",
                found=str(error)[:300],
                expected=str(self),
                do="correct that file",
            ) from error
