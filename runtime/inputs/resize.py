"""Resize, pad and crop as Hugging Face does, without building what is thrown away.

Each function takes a Pillow image of mode "RGB". Sizes are (height, width) as in Hugging Face;
Pillow's own (width, height) appears only where Pillow is called.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

# Larger intermediate images are never built (Pillow takes 4 bytes a pixel: 128 MiB).
MAX_INTERMEDIATE_PIXELS = 1 << 25

# Reach of Pillow's filters in source pixels when enlarging; it grows with the scale when reducing.
_SUPPORT = {
    Image.Resampling.NEAREST: 1.0,
    Image.Resampling.BOX: 0.5,
    Image.Resampling.BILINEAR: 1.0,
    Image.Resampling.HAMMING: 1.0,
    Image.Resampling.BICUBIC: 2.0,
    Image.Resampling.LANCZOS: 3.0,
}


def shortest_edge_size(height: int, width: int, shortest_edge: int) -> tuple[int, int]:
    """Size (height, width) with a short side of `shortest_edge`; the long side rounds down."""
    short, long = min(height, width), max(height, width)
    new_long = int(shortest_edge * long / short)
    return (new_long, shortest_edge) if width <= height else (shortest_edge, new_long)


def resize_and_crop(
    image: Image.Image,
    size: tuple[int, int],
    crop: tuple[int, int] | None,
    resample: int,
    max_pixels: int = MAX_INTERMEDIATE_PIXELS,
) -> Image.Image:
    """Resize to `size`, then keep the centre of at most `crop`.

    Beyond `max_pixels` only the kept region is resized. Pillow's filters see the same source pixels
    either way, and both agree to 1 grey level: Pillow stores the region's corners in 32-bit floats.
    NEAREST and BOX, which jump, may take the neighbouring source pixel where two are equally near.

    Args:
        image: RGB, any size.
        size: Height and width of the whole resized image.
        crop: Height and width to keep, or None to keep all.
        resample: One of `PIL.Image.Resampling`.
        max_pixels: The largest whole resized image to build.

    Returns:
        RGB of min(size, crop) per side.
    """
    top, bottom = _centre(size[0], crop[0] if crop else size[0])
    left, right = _centre(size[1], crop[1] if crop else size[1])
    if size[0] * size[1] <= max_pixels:
        resized = image.resize((size[1], size[0]), resample)
        return resized.crop((left, top, right, bottom))
    x0, x1, box_left, box_right = _source_span(image.width, size[1], left, right, resample)
    y0, y1, box_top, box_bottom = _source_span(image.height, size[0], top, bottom, resample)
    # Cutting first keeps the box's 32-bit numbers small, so exact enough.
    return image.crop((x0, y0, x1, y1)).resize(
        (right - left, bottom - top), resample, box=(box_left, box_top, box_right, box_bottom)
    )


def pad_and_resize(
    image: Image.Image,
    size: tuple[int, int],
    colour: tuple[int, int, int],
    resample: int,
    max_pixels: int = MAX_INTERMEDIATE_PIXELS,
) -> Image.Image:
    """Pad the image with `colour` to a centred square, then resize the square to `size`.

    Beyond `max_pixels` the square is not built: the long axis is resized first, without the
    padding, then the short axis on a band of padding as high as the filter reaches. Agrees to 1
    grey level, with the same exception for NEAREST and BOX as in `resize_and_crop`.

    Args:
        image: RGB, any size.
        size: Height and width of the result.
        colour: RGB of the padding, 0 to 255.
        resample: One of `PIL.Image.Resampling`.
        max_pixels: The largest square to build.

    Returns:
        RGB of `size`.
    """
    side = max(image.size)
    if side * side <= max_pixels or image.width == image.height:
        return pad_and_crop(image, (side, side), colour).resize((size[1], size[0]), resample)
    is_tall = image.height > image.width
    along, across = size if is_tall else (size[1], size[0])
    short = min(image.size)
    strip = image.resize((short, along) if is_tall else (along, short), resample)
    if is_tall:  # from here on the strip lies: along is the width
        strip = strip.transpose(Image.Transpose.TRANSPOSE)
    top = (side - short) // 2
    scale = side / across
    reach = math.ceil(_SUPPORT[Image.Resampling(resample)] * max(scale, 1.0)) + 1
    first = max(0, math.floor((top - reach) / scale))  # rows first..last - 1 can see the strip
    last = min(across, math.ceil((top + short + reach) / scale))
    y0, y1, box_top, box_bottom = _source_span(side, across, first, last, resample)
    band = Image.new("RGB", (along, y1 - y0), colour)
    band.paste(strip, (0, top - y0))
    box = (0, box_top, along, box_bottom)
    result = Image.new("RGB", (along, across), colour)
    result.paste(band.resize((along, last - first), resample, box=box), (0, first))
    return result.transpose(Image.Transpose.TRANSPOSE) if is_tall else result


def pad_and_crop(
    image: Image.Image, crop: tuple[int, int], colour: tuple[int, int, int]
) -> Image.Image:
    """Centre the image on a square of `colour`, and keep the square's centre of at most `crop`."""
    side = max(image.size)
    top, bottom = _centre(side, crop[0])
    left, right = _centre(side, crop[1])
    canvas = Image.new("RGB", (right - left, bottom - top), colour)
    canvas.paste(image, ((side - image.width) // 2 - left, (side - image.height) // 2 - top))
    return canvas


def centre_crop(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Keep the centre of `pixels` [h, w, 3]; short sides get zeros, the odd one before.

    Returns:
        Pixels, [size[0], size[1], 3].
    """
    height, width = pixels.shape[:2]
    if (height, width) == size:
        return pixels
    top, bottom = _centre(height, size[0])
    left, right = _centre(width, size[1])
    y, x = (
        math.ceil(max(0, want - have) / 2) for want, have in zip(size, (height, width), strict=True)
    )
    cropped = np.zeros((*size, 3), pixels.dtype)
    cropped[y : y + bottom - top, x : x + right - left] = pixels[top:bottom, left:right]
    return cropped


def _centre(length: int, keep: int) -> tuple[int, int]:
    """First and last + 1 of the centre `keep` of `length` (all, if there are fewer)."""
    start = max(0, (length - keep) // 2)
    return start, min(length, start + keep)


def _source_span(
    source: int, target: int, first: int, last: int, resample: int
) -> tuple[int, int, float, float]:
    """Pixels of a side of `source` that targets first..last-1 of a side of `target` read.

    Returns:
        First source pixel, last + 1, and the box of the targets, counted from that first pixel.
    """
    reach = _SUPPORT[Image.Resampling(resample)] * max(source / target, 1.0) + 1.0
    box_start, box_end = first * source / target, last * source / target
    start = max(0, math.floor(box_start - reach))
    end = min(source, math.ceil(box_end + reach))
    return start, end, box_start - start, min(box_end, end) - start
