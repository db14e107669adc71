"""Turn whatever a user hands over as an image into an 8-bit RGB Pillow image.

Pixels follow `transformers.image_utils.load_image`: the EXIF orientation is applied, then
`convert("RGB")`. That drops an alpha channel, so hidden colours under transparent pixels show;
nothing is blended with a background. One difference: 16-bit grey is scaled to 8 bits, where
`convert` alone saturates everything above 255.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from patchsieve.contract.errors import RequestError

# Pillow's own warning threshold. Pillow holds RGB in 4 bytes, so this is 358 MB, the most a small
# board can spare.
MAX_IMAGE_PIXELS = 89_478_485
# Pillow's resampling table takes 32 to 48 bytes per pixel of a side, whatever the other side is.
MAX_IMAGE_SIDE = 1 << 20

# What Pillow's readers raise on damaged files (seen when flipping and cutting bytes of each).
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    KeyError,
    IndexError,
    TypeError,
    OverflowError,
    RuntimeError,
    struct.error,
    zlib.error,
)
# Only pixel formats: Pillow would run Ghostscript for EPS, and its rarer readers are less hardened.
# HEIF counts where a plugin registered it.
_FORMATS = (
    *("PNG", "JPEG", "MPO", "WEBP", "TIFF", "BMP", "GIF"),
    *("PPM", "JPEG2000", "AVIF", "HEIF", "ICO", "TGA"),
)
_GREY_16_MODES = frozenset({"I;16", "I;16L", "I;16B", "I;16N", "I"})
_ACCEPTED = (
    "a path, the bytes of an image file, a Pillow image, or a uint8 array [h, w, 3] or [h, w]"
)


def load_image(
    source: str | os.PathLike[str] | bytes | bytearray | Image.Image | np.ndarray,
    *,
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> Image.Image:
    """Read one image as 8-bit RGB, upright.

    Args:
        source: A path, the bytes of an image file, a Pillow image (left as it is; an animated one
            gives its current frame), or a uint8 array [h, w, 3] (RGB) or [h, w] (grey). Animated
            files give their first frame.
        max_pixels: Images with more pixels are refused from their header, before anything is
            allocated.

    Returns:
        A new image of mode "RGB" that holds no file open.

    Raises:
        RequestError: There is no such file, it is not an image, it is damaged or too large, or the
            array's shape or dtype is not one of the above.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, max_pixels)
    if isinstance(source, Image.Image):
        return _decoded(source, "the Pillow image", max_pixels)
    if isinstance(source, (bytes, bytearray)):
        name = f"the image of {len(source)} bytes"
        return _from_stream(io.BytesIO(source), len(source), name, max_pixels)
    if isinstance(source, (str, os.PathLike)):
        return _from_path(source, max_pixels)
    raise RequestError(
        "cannot read an image from this object",
        found=f"an object of type {type(source).__name__}",
        expected=_ACCEPTED,
        do="pass one of these",
    )


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow mode to RGB; alpha is dropped, 16-bit grey is scaled.

    Raises:
        RequestError: The mode has no defined 8-bit range (float), or Pillow cannot convert it.
    """
    if image.mode in _GREY_16_MODES:
        return _grey_16_to_rgb(image)
    if image.mode == "F":
        raise RequestError(
            "an image with floating-point pixels has no defined range",
            found="mode F",
            expected="8-bit or 16-bit pixels, without NaN",
            do="scale it to 0..255 and save it with 8 bits",
        )
    if isinstance(image.info.get("transparency"), bytes):
        # Pillow would warn that this transparency gets lost; losing it is what we document.
        image = image.copy()
        del image.info["transparency"]
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise RequestError(
            "an image cannot be converted to RGB",
            found=f"mode {image.mode} ({error})",
            expected="RGB, grey, palette, CMYK, YCbCr or HSV pixels",
            do="save it as RGB",
        ) from error


def _from_path(source: str | os.PathLike[str], max_pixels: int) -> Image.Image:
    name = f"the image {os.fspath(source)!r}"
    if isinstance(source, str) and source.startswith(("http://", "https://", "data:")):
        raise RequestError(
            "images are not fetched from addresses",
            found=source if len(source) <= 80 else source[:80] + "...",
            expected=_ACCEPTED,
            do="download it and pass the path or its bytes",
        )
    try:
        path = Path(source)
        if not path.exists():
            raise RequestError(
                f"{name} does not exist",
                found="no such file",
                expected="a readable image file",
                do="correct the path",
            )
        if not path.is_file():
            raise RequestError(
                f"{name} is not a file",
                found="a directory" if path.is_dir() else "a device or a pipe",
                expected="a readable image file",
                do="name one image file",
            )
        with path.open("rb") as stream:
            return _from_stream(stream, path.stat().st_size, name, max_pixels)
    except (OSError, ValueError, TypeError) as error:  # permissions, over-long names, null bytes
        raise RequestError(
            f"{name} cannot be opened",
            found=str(error),
            expected="a readable image file",
            do="check the path and its permissions",
        ) from error


def _from_stream(stream: BinaryIO, size: int, name: str, max_pixels: int) -> Image.Image:
    if size == 0:
        raise RequestError(
            f"{name} is empty",
            found="0 bytes",
            expected="an image file",
            do="save or copy it again",
        )
    Image.init()  # registers every reader; Image.open would raise KeyError for one that is missing
    try:
        image = Image.open(stream, formats=[name for name in _FORMATS if name in Image.OPEN])
    except UnidentifiedImageError as error:
        raise RequestError(
            f"{name} is not an image in a known format",
            found=f"{size} bytes of an unknown or damaged format",
            expected="PNG, JPEG, WebP, TIFF, BMP, GIF, PPM, JPEG 2000, AVIF, ICO or TGA",
            do="convert it to PNG or JPEG",
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name, str(error), max_pixels) from error
    except _DAMAGE as error:
        raise _damaged(name, error) from error
    with image:
        return _decoded(image, name, max_pixels)


def _decoded(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    width, height = image.size
    _check_size(height, width, name, max_pixels)
    try:
        image.load()
        upright = ImageOps.exif_transpose(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name, str(error), max_pixels) from error
    except _DAMAGE as error:
        raise _damaged(name, error) from error
    return upright if upright.mode == "RGB" else to_rgb(upright)  # exif_transpose copied already


def _from_array(array: np.ndarray, max_pixels: int) -> Image.Image:
    name = "the image array"
    found = f"{array.dtype} [{', '.join(map(str, array.shape))}]"
    if array.dtype != np.uint8:
        if np.issubdtype(array.dtype, np.floating) and np.isnan(array).any():
            found += " with NaN"
        raise RequestError(
            f"{name} has the wrong dtype",
            found=found,
            expected="uint8, 0 to 255",
            do="scale the values to 0..255 and call .astype(numpy.uint8)",
        )
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] == 3):
        is_channels_first = array.ndim == 3 and array.shape[0] == 3
        raise RequestError(
            f"{name} has the wrong shape",
            found=found,
            expected="[h, w, 3] or [h, w]",
            do="pass array.transpose(1, 2, 0)" if is_channels_first else "pass one RGB image",
        )
    _check_size(array.shape[0], array.shape[1], name, max_pixels)
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")


def _check_size(height: int, width: int, name: str, max_pixels: int) -> None:
    if height < 1 or width < 1:
        raise RequestError(
            f"{name} has no pixels",
            found=f"{width} x {height}",
            expected="at least 1 x 1",
            do="pass another image",
        )
    if height * width > max_pixels or max(height, width) > MAX_IMAGE_SIDE:
        raise _too_large(name, f"{width} x {height} = {height * width} pixels", max_pixels)


def _too_large(name: str, found: str, max_pixels: int) -> RequestError:
    return RequestError(
        f"{name} is too large",
        found=found,
        expected=f"at most {max_pixels} pixels and {MAX_IMAGE_SIDE} a side",
        do="scale it down; the model sees only a few hundred pixels a side",
    )


def _damaged(name: str, error: BaseException) -> RequestError:
    return RequestError(
        f"{name} is truncated or damaged",
        found=f"{type(error).__name__}: {error}",
        expected="a complete image file",
        do="save or copy it again",
    )


def _grey_16_to_rgb(image: Image.Image) -> Image.Image:
    grey = np.asarray(image).astype(np.int64)  # [h, w]; int64 holds every 16- and 32-bit pixel
    low, high = int(grey.min()), int(grey.max())
    if low < 0 or high > 65_535:
        raise RequestError(
            "an integer image is outside the 16-bit range",
            found=f"values {low} to {high} (mode {image.mode})",
            expected="0 to 65535",
            do="scale it to 0..255 and save it with 8 bits",
        )
    return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
