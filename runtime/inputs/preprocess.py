"""From an RGB image to `pixel_values`, equal to Hugging Face's PIL image processors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
from PIL import Image

from patchsieve.contract.errors import BundleError, RequestError
from patchsieve.runtime.inputs.images import to_rgb
from patchsieve.runtime.inputs.resize import (
    centre_crop,
    pad_and_crop,
    pad_and_resize,
    resize_and_crop,
    shortest_edge_size,
)


@dataclass(frozen=True)
class Preprocessor:
    """Pad, resize, crop, rescale and normalise, in this order; each step has Hugging Face's flag.

    The same numbers as CLIPImageProcessor, SiglipImageProcessor and LlavaImageProcessor with the
    PIL backend of transformers 5. Images within `MAX_INTERMEDIATE_PIXELS` come out bit for bit the
    same; see `resize` for the rest.

    Attributes:
        shortest_edge: Length of the short side after resizing, pixels. Exactly one of this and
            `resize_to` if `do_resize`.
        resize_to: Height and width after resizing, pixels.
        crop_size: Height and width of the centre crop, pixels; sides that are too short get zeros.
        image_mean: Per channel, on the rescaled range.
        image_std: Per channel, on the rescaled range.
        resample: A number of `PIL.Image.Resampling`; 3 is bicubic.
        rescale_factor: Multiplies the 0..255 pixels.
        do_pad: Centre the image on a square of the mean colour first (LLaVA's `pad_to_square`).
        do_resize: Resize to `shortest_edge` or `resize_to`.
        do_center_crop: Crop to `crop_size`.
        do_rescale: Multiply by `rescale_factor`.
        do_normalize: Subtract `image_mean`, divide by `image_std`.
        do_convert_rgb: Convert other modes to RGB; if false they are refused.
    """

    shortest_edge: int | None
    resize_to: tuple[int, int] | None
    crop_size: tuple[int, int] | None
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    resample: int = 3
    rescale_factor: float = 1 / 255
    do_pad: bool = False
    do_resize: bool = True
    do_center_crop: bool = True
    do_rescale: bool = True
    do_normalize: bool = True
    do_convert_rgb: bool = True

    def __post_init__(self) -> None:
        """Check every field and turn the lists of JSON into tuples."""
        for name in (field.name for field in fields(self) if field.name.startswith("do_")):
            _check(
                isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false"
            )
        if self.shortest_edge is not None:
            _check(
                _is_length(self.shortest_edge), "shortest_edge", self.shortest_edge, "an int >= 1"
            )
        for name in ("resize_to", "crop_size"):
            size = getattr(self, name)
            if size is not None:
                is_pair = isinstance(size, Sequence) and len(size) == 2
                _check(
                    is_pair and all(map(_is_length, size)), name, size, "[height, width], ints >= 1"
                )
                object.__setattr__(self, name, tuple(size))
        for name in ("image_mean", "image_std"):
            channels = getattr(self, name)
            is_triple = isinstance(channels, Sequence) and len(channels) == 3
            _check(is_triple and all(map(_is_number, channels)), name, channels, "3 finite numbers")
            object.__setattr__(self, name, tuple(float(channel) for channel in channels))
        _check(min(self.image_std) > 0, "image_std", self.image_std, "numbers above 0")
        is_scale = _is_number(self.rescale_factor) and self.rescale_factor > 0
        _check(is_scale, "rescale_factor", self.rescale_factor, "a number above 0")
        is_filter = type(self.resample) is int and 0 <= self.resample <= 5
        _check(is_filter, "resample", self.resample, "a number of PIL.Image.Resampling, 0 to 5")
        self._check_steps()

    def _check_steps(self) -> None:
        if self.do_resize:
            sizes = (self.shortest_edge, self.resize_to)
            _check(
                sizes.count(None) == 1, "shortest_edge, resize_to", sizes, "exactly one of the two"
            )
        if self.do_center_crop:
            _check(self.crop_size is not None, "crop_size", None, "[height, width] to crop to")
        is_fixed = self.do_resize and (self.resize_to is not None or self.do_pad)
        _check(
            self.do_center_crop or is_fixed,
            "output size",
            "depends on the image",
            "a centre crop, a resize to a fixed height and width, or a pad to square with a resize",
        )
        if self.do_pad:
            is_colour = all(0 <= channel <= 1 for channel in self.image_mean)
            _check(
                is_colour, "image_mean", self.image_mean, "0 to 1, as it is the padding's colour"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Preprocessor:
        """Read what `to_dict` wrote; every field must be there, so that no default slips in.

        Raises:
            BundleError: A field is missing, unknown or out of range.
        """
        names = [field.name for field in fields(cls)]
        _check(isinstance(values, Mapping), "content", type(values).__name__, "an object of fields")
        missing, unknown = sorted(set(names) - set(values)), sorted(set(values) - set(names))
        _check(not missing, "fields", f"{', '.join(missing)} missing", ", ".join(names))
        _check(not unknown, "fields", f"{', '.join(unknown)} unknown", ", ".join(names))
        return cls(**values)  # type: ignore[arg-type]  # __post_init__ checks the types

    def to_dict(self) -> dict[str, object]:
        """All fields as JSON has them: numbers, booleans, null and lists."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of `pixel_values`, pixels; the same for every image."""
        if self.do_center_crop and self.crop_size is not None:
            return self.crop_size
        if self.resize_to is not None:
            return self.resize_to
        return self._edge, self._edge  # a padded square, resized

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Preprocess one image.

        Args:
            image: RGB, any size; `images.load_image` makes one.

        Returns:
            `pixel_values`, [3, h, w] float32 with (h, w) = `size`.

        Raises:
            RequestError: The image has no pixels, or is not RGB and `do_convert_rgb` is off.
        """
        if min(image.size) < 1:
            raise RequestError(
                "the image has no pixels",
                found=f"{image.width} x {image.height}",
                expected="at least 1 x 1",
                do="pass another image",
            )
        if image.mode != "RGB":
            if not self.do_convert_rgb:
                raise RequestError(
                    "the image is not RGB and this model's preprocessor does not convert",
                    found=f"mode {image.mode}",
                    expected="mode RGB",
                    do="pass it through patchsieve.runtime.inputs.images.load_image",
                )
            image = to_rgb(image)
        pixels = np.asarray(self._geometry(image))  # [h', w', 3], uint8
        if self.do_center_crop:
            pixels = centre_crop(pixels, self.size)  # [h, w, 3]
        table = self._table()
        return np.stack([table[c][pixels[..., c]] for c in range(3)])  # [3, h, w]

    def to_image(self, pixel_values: np.ndarray) -> Image.Image:
        """The picture of `pixel_values`: resized, padded and cropped, as the model sees it.

        Args:
            pixel_values: What `__call__` returned, [3, h, w].

        Returns:
            RGB, h x w, every pixel the grey level that it was before it was normalised.
        """
        middles = (self._table()[:, 1:] + self._table()[:, :-1]) / 2  # [3, 255], ascending
        levels = [np.searchsorted(middles[c], pixel_values[c]) for c in range(3)]
        return Image.fromarray(np.stack(levels, axis=-1).astype(np.uint8))  # [h, w, 3]

    @property
    def _edge(self) -> int:
        assert self.shortest_edge is not None  # _check_steps: one of it and resize_to
        return self.shortest_edge

    def _geometry(self, image: Image.Image) -> Image.Image:
        """Pad and resize; what the crop drops may be gone already, zeros are not yet there."""
        crop = self.crop_size if self.do_center_crop else None
        if self.do_pad:
            red, green, blue = (int(channel * 255) for channel in self.image_mean)
            colour = (red, green, blue)
            if not self.do_resize:
                return pad_and_crop(image, self.size, colour)
            size = self.resize_to or (self._edge, self._edge)
            return pad_and_resize(image, size, colour, self.resample)
        if not self.do_resize:
            return image
        size = self.resize_to or shortest_edge_size(image.height, image.width, self._edge)
        return resize_and_crop(image, size, crop, self.resample)

    def _table(self) -> np.ndarray:
        """`pixel_values` of each grey level, [3, 256] float32, rounded as in Hugging Face."""
        levels = np.arange(256, dtype=np.float64)
        if self.do_rescale:
            levels = levels * self.rescale_factor
        table = np.repeat(levels.astype(np.float32)[None], 3, axis=0)  # [3, 256]
        if self.do_normalize:
            mean, std = (
                np.array(v, np.float32)[:, None] for v in (self.image_mean, self.image_std)
            )
            table = (table - mean) / std
        return table


def _check(is_good: bool, name: str, found: object, expected: str) -> None:
    if not is_good:
        raise BundleError(
            f"the image preprocessor's {name} cannot be used",
            found=found if found is not None else "nothing",
            expected=expected,
            do="export the bundle again",
        )


def _is_length(value: object) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
