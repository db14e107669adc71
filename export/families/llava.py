"""LLaVA-1.5: a CLIP or SigLIP tower, two matrices, a Llama-structured decoder.

An image is one picture of fixed size, whose patches lie on one grid.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from patchsieve.contract.errors import UnsupportedModelError
from patchsieve.contract.model import VisionModel
from patchsieve.export.families.family import TEXT, VISION, Family, Parts
from patchsieve.export.families.structures import tower_spec
from patchsieve.export.source.processor import preprocessor_from_checkpoint

_CLASS_TOKEN = {"default": 1, "full": 0}  # rows dropped, by vision_feature_select_strategy


class Llava(Family):
    """LLaVA-1.5, and what was trained as it was on other decoders and towers."""

    model_type = "llava"
    model_class = "LlavaForConditionalGeneration"
    image_token = "<image>"
    defaults = {
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    default_types = {TEXT: "llama", VISION: "clip_vision_model"}
    # CLIP-L/336. A vision_config that is there but empty is CLIP's own default, ViT-B/32.
    default_parts = {
        VISION: {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
        }
    }

    def canonical(self, name: str) -> str:
        """One spelling for the three in which LLaVA's tensors are stored.

        In memory (`model.language_model.layers...`), as `save_pretrained` of transformers 5 writes
        (`language_model.model.layers...`), and in older files (`vision_tower.vision_model...`).
        """
        name = re.sub(r"^model\.(?=language_model|vision_tower|multi_modal_projector)", "", name)
        name = re.sub(r"^language_model\.lm_head\.", "lm_head.", name)
        name = re.sub(r"^language_model\.(model\.)?", "", name)
        return re.sub(r"^vision_tower\.vision_model\.", "vision_tower.", name)

    def vision(self, config: Any) -> VisionModel:
        """The measures of a LLaVA config's tower and projector.

        Raises:
            UnsupportedModelError: The tower is not known, or has no such feature layer.
        """
        spec = tower_spec(config.vision_config)
        layers = _feature_layers(config.vision_feature_layer, spec.num_layers)
        rows, columns = spec.grid
        strategy = config.vision_feature_select_strategy
        if strategy not in _CLASS_TOKEN:
            raise UnsupportedModelError(
                "the config's vision_feature_select_strategy is not known",
                found=repr(strategy)[:80],
                expected=" or ".join(_CLASS_TOKEN),
                do="correct config.json",
            )
        num_dropped = _CLASS_TOKEN[strategy]
        return VisionModel(
            model_type=config.vision_config.model_type,
            hidden_size=spec.hidden_size,
            intermediate_size=spec.intermediate_size,
            num_layers=spec.num_layers,
            num_layers_run=max(layers),
            num_heads=spec.num_heads,
            image_size=spec.image_size,
            patch_size=spec.patch_size,
            grid=spec.grid,
            num_visual=rows * columns + spec.has_cls - num_dropped,
            num_dropped=num_dropped,
            has_cls=spec.has_cls,
            has_pre_norm=spec.has_pre_norm,
            patch_bias=spec.patch_bias,
            norm_eps=spec.norm_eps,
            activation=spec.activation,
            feature_layers=layers,
            projector_activation=config.projector_hidden_act,
            projector_bias=config.multimodal_projector_bias,
        )

    def is_tied(self, config: Any) -> bool:
        """Either config's flag ties (transformers 5.23, `LlavaConfig.__post_init__`)."""
        both = (config, config.text_config)
        return any(getattr(each, "tie_word_embeddings", False) for each in both)

    def preprocessor(self, directory: Path, vision: VisionModel) -> dict[str, Any]:
        """Read a preprocessor that gives every picture the size of the tower.

        Raises:
            UnsupportedModelError: There is none, or it gives another size.
        """
        made: dict[str, Any] = preprocessor_from_checkpoint(directory)
        side = made["shortest_edge"]
        crop = made["crop_size"] if made["do_center_crop"] else None
        found = list(crop or made["resize_to"] or (side, side))
        expected = [vision.image_size] * 2
        if found != expected:
            raise UnsupportedModelError(
                "the image processor does not yield the size that the tower takes",
                found=found,
                expected=expected,
                do="correct preprocessor_config.json, or the image_size of config.json",
            )
        return made

    def processor(self, directory: Path, config: Any) -> Any:
        """Hugging Face's processor; older files leave two of its entries to the model's config."""
        import transformers

        made = transformers.AutoProcessor.from_pretrained(directory, backend="pil")
        if made.patch_size is None:
            made.patch_size = config.vision_config.patch_size
        if made.vision_feature_select_strategy is None:
            made.vision_feature_select_strategy = config.vision_feature_select_strategy
        return made

    def parts(self, model: Any) -> Parts:
        """The modules of a `LlavaForConditionalGeneration`."""
        inner = model.model
        return Parts(
            tower=inner.vision_tower,
            projector=inner.multi_modal_projector,
            decoder=inner.language_model,
            head=model.lm_head,
        )


def _feature_layers(given: Any, num_layers: int) -> tuple[int, ...]:
    """The layers whose rows the projector reads, counted from 0, the embeddings."""
    chosen = list(given) if isinstance(given, (list, tuple)) else [given]
    if all(type(index) is int for index in chosen):
        layers = [index if index >= 0 else num_layers + 1 + index for index in chosen]
        if layers and all(0 <= index <= num_layers for index in layers):
            return tuple(layers)
    raise UnsupportedModelError(
        "vision_feature_layer lies outside the tower",
        found=chosen,
        expected=f"{-num_layers - 1} to {num_layers}",
        do="correct config.json",
    )
