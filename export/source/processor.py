"""Read a checkpoint's image processor, without transformers, into the fields of the runtime's one.

What transformers 5 does when it loads these files is followed: `image_processor` inside
processor_config.json goes before preprocessor_config.json, an absent key means the class's default
and a null switches its step off, and the spellings of older files (an int for a size,
"CLIPFeatureExtractor", the suffix "Fast") still count.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchsieve.contract.errors import UnsupportedModelError

_CLIP = {
    "do_convert_rgb": True,
    "do_pad": False,
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "default_to_square": False,
}
_SIGLIP = {
    **_CLIP,
    "size": {"height": 224, "width": 224},
    "do_center_crop": False,
    "crop_size": None,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
# Defaults of each class; only LLaVA's pads to a square.
_DEFAULTS = {
    "CLIPImageProcessor": _CLIP,
    "SiglipImageProcessor": _SIGLIP,
    "LlavaImageProcessor": _CLIP,
}
# What takes the place of a null in a step that is off; the padding's colour is then black.
_UNUSED = (
    ("do_resize", "resample", 3),
    ("do_rescale", "rescale_factor", 1 / 255),
    ("do_normalize", "image_mean", 0.0),
    ("do_normalize", "image_std", 1.0),
)
_SQUARE_PAD = "LlavaImageProcessor"


@dataclass(frozen=True)
class PromptFields:
    """What the processor says about the image's place in the prompt; None if it says nothing.

    Attributes:
        patch_size: Side of a patch, pixels.
        vision_feature_select_strategy: "default" drops the CLS token, "full" keeps it.
        num_additional_image_tokens: Tokens of the tower that are no patches (1 with a CLS token).
        image_token: Text that stands for an image. transformers lets a tokenizer's own
            `image_token` go before it.
    """

    patch_size: int | None
    vision_feature_select_strategy: str | None
    num_additional_image_tokens: int | None
    image_token: str | None


def preprocessor_from_checkpoint(directory: Path) -> dict[str, object]:
    """Read the fields of `patchsieve.runtime.inputs.preprocess.Preprocessor` from a checkpoint.

    Args:
        directory: A Hugging Face model directory.

    Returns:
        All fields, as JSON has them.

    Raises:
        UnsupportedModelError: There is no image processor, it is damaged, it is of another type, or
            its options give images of varying size or anything else the runtime does not do.
    """
    config, where = _image_processor_config(Path(directory))
    kind = _kind(config, where)
    if config.get("image_grid_pinpoints"):
        raise _refuse(where, "image_grid_pinpoints (LLaVA-NeXT tiles)", "one tile per image")
    if config.get("use_square_size"):
        raise _refuse(where, "use_square_size", "size with height and width")
    given = _given(config, _DEFAULTS[kind], where)
    if given["do_pad"] and kind != _SQUARE_PAD:
        raise _refuse(where, f"do_pad in a {kind}", f"do_pad only in {_SQUARE_PAD}")
    resize = _resize_fields(given, where)
    crop_size = None
    if given["do_center_crop"]:
        crop_size = _size(given["crop_size"], True, "crop_size", where)
        if not isinstance(crop_size, list):
            raise _refuse(
                where, f"crop_size = {given['crop_size']!r}", "crop_size height and width"
            )
    is_fixed = resize["resize_to"] is not None or (given["do_pad"] and given["do_resize"])
    if crop_size is None and not is_fixed:
        raise _refuse(
            where,
            "a size of pixel_values that depends on the image",
            "a centre crop, or a resize to a fixed height and width",
        )
    return {
        **resize,
        "crop_size": crop_size,
        **_value_fields(given, where),
        **{key: value for key, value in given.items() if key.startswith("do_")},
    }


def prompt_fields_from_checkpoint(directory: Path) -> PromptFields:
    """Read what processor_config.json says about image tokens; None if it says nothing.

    Raises:
        UnsupportedModelError: The file is damaged or a field has the wrong type.
    """
    path = Path(directory) / "processor_config.json"
    config: dict[str, Any] = _read_json(path) if path.is_file() else {}
    types = {
        "patch_size": int,
        "vision_feature_select_strategy": str,
        "num_additional_image_tokens": int,
        "image_token": str,
    }
    for name, kind in types.items():
        if config.get(name) is not None and type(config[name]) is not kind:
            raise _refuse(path, f"{name} = {config[name]!r}", f"{name} of type {kind.__name__}")
    return PromptFields(**{name: config.get(name) for name in types})


def _image_processor_config(directory: Path) -> tuple[dict[str, object], Path]:
    nested, plain = directory / "processor_config.json", directory / "preprocessor_config.json"
    if nested.is_file():
        config = _read_json(nested).get("image_processor")
        if isinstance(config, dict):
            return config, nested
    if plain.is_file():
        return _read_json(plain), plain
    raise UnsupportedModelError(
        "the checkpoint has no image processor",
        found=f"no preprocessor_config.json in {directory}",
        expected="preprocessor_config.json, or processor_config.json with image_processor",
        do="save the model's processor there with save_pretrained",
    )


def _read_json(path: Path) -> dict[str, object]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8 or not JSON
        raise UnsupportedModelError(
            f"{path} cannot be read", found=str(error), expected="JSON", do="download it again"
        ) from error
    if not isinstance(config, dict):
        raise UnsupportedModelError(
            f"{path} cannot be used",
            found=type(config).__name__,
            expected="a JSON object",
            do="download it again",
        )
    return config


def _kind(config: dict[str, object], where: Path) -> str:
    name = config.get("image_processor_type")
    if name is None:
        name = str(config.get("feature_extractor_type") or "no image_processor_type")
        name = name.replace("FeatureExtractor", "ImageProcessor")
    kind = str(name).removesuffix("Fast").removesuffix("Pil")
    if kind not in _DEFAULTS:
        raise _refuse(where, str(name), ", ".join(_DEFAULTS))
    return kind


def _given(
    config: dict[str, object], defaults: dict[str, object], where: Path
) -> dict[str, object]:
    """Fill in what the file leaves out; every flag becomes true or false."""
    given = {key: config.get(key, default) for key, default in defaults.items()}
    for flag in (key for key in given if key.startswith("do_")):
        if given[flag] is not None and not isinstance(given[flag], bool):
            raise _refuse(where, f"{flag} = {given[flag]!r}", "true or false")
        given[flag] = bool(given[flag])
    for flag, key, unused in _UNUSED:
        if given[key] is None and not given[flag]:
            given[key] = unused
    return given


def _resize_fields(given: dict[str, object], where: Path) -> dict[str, object]:
    resample = given["resample"]
    if type(resample) is not int or not 0 <= resample <= 5:
        raise _refuse(where, f"resample = {resample!r}", "a number of PIL.Image.Resampling, 0 to 5")
    fields: dict[str, object] = {"shortest_edge": None, "resize_to": None, "resample": resample}
    if given["do_resize"]:
        size = _size(given["size"], bool(given["default_to_square"]), "size", where)
        fields["resize_to" if isinstance(size, list) else "shortest_edge"] = size
    return fields


def _value_fields(given: dict[str, object], where: Path) -> dict[str, object]:
    mean = _channels(given["image_mean"], "image_mean", where)
    std = _channels(given["image_std"], "image_std", where)
    scale = _number(given["rescale_factor"], "rescale_factor", where)
    if min(*std, scale) <= 0:
        raise _refuse(where, f"image_std {std}, rescale_factor {scale}", "numbers above 0")
    if given["do_pad"] and not all(0 <= channel <= 1 for channel in mean):
        raise _refuse(where, f"do_pad with image_mean {mean}", "image_mean 0 to 1, a colour")
    return {"image_mean": mean, "image_std": std, "rescale_factor": scale}


def _size(value: object, is_square: bool, name: str, where: Path) -> int | list[int]:
    """[height, width], or an int for the shortest edge."""
    size = value
    if type(size) is int:
        size = {"height": size, "width": size} if is_square else {"shortest_edge": size}
    elif isinstance(size, list) and len(size) == 2:
        size = {"height": size[0], "width": size[1]}
    if isinstance(size, dict):
        lengths = {key: length for key, length in size.items() if length is not None}
        if all(type(length) is int and length >= 1 for length in lengths.values()):
            if set(lengths) == {"height", "width"}:
                return [lengths["height"], lengths["width"]]
            if set(lengths) == {"shortest_edge"}:
                return lengths["shortest_edge"]
    raise _refuse(where, f"{name} = {value!r}", f"{name} with height and width, or shortest_edge")


def _channels(value: object, name: str, where: Path) -> list[float]:
    channels = value if isinstance(value, list) else [value] * 3
    if len(channels) != 3:
        raise _refuse(where, f"{name} = {value!r}", "one number, or one for each of 3 channels")
    return [_number(channel, name, where) for channel in channels]


def _number(value: object, name: str, where: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise _refuse(where, f"{name} = {value!r}", "finite numbers")
    return float(value)


def _refuse(where: Path, found: str, expected: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the image processor in {where} cannot be reproduced",
        found=found,
        expected=expected,
        do="use a checkpoint with such a processor, or edit this file",
    )
