"""Images as users have them: every mode and source that is read, every one that is refused."""

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from patchsieve.contract.errors import RequestError
from patchsieve.runtime.inputs import images
from patchsieve.runtime.inputs.images import load_image, to_rgb

# Four corners of different colours show every flip and turn.
CORNERS = np.array([[[250, 10, 20], [30, 240, 40]], [[50, 60, 230], [200, 200, 10]]], np.uint8)


def picture():
    """Build RGB [12, 20, 3] of four blocks."""
    return CORNERS.repeat(6, axis=0).repeat(10, axis=1)


def saved(image, kind, **options):
    """Save to bytes."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def refusal(source, **options):
    """Return the message that refuses this source: one line with all four parts."""
    with pytest.raises(RequestError) as caught:
        load_image(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    parts = message.split(" | ")
    assert len(parts) == 4
    for part, start in zip(parts[1:], ("found: ", "expected: ", "what to do: "), strict=True):
        assert part.startswith(start)
    return message


def png_header(width, height):
    """Build a PNG that claims a size, with hardly any data."""

    def chunk(kind, data):
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF", "TGA"])
def test_every_kind_of_source_gives_the_same_pixels(kind, tmp_path):
    path = tmp_path / "a picture.bin"
    path.write_bytes(saved(Image.fromarray(picture()), kind))
    sources = [path, str(path), path.read_bytes(), bytearray(path.read_bytes()), picture()]
    for source in [*sources, Image.fromarray(picture())]:
        image = load_image(source)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), picture())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_the_exif_orientation_is_applied(kind, orientation):
    stored = picture()
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(stored),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(stored), kind, exif=exif)
    np.testing.assert_array_equal(np.asarray(load_image(data)), upright)
    np.testing.assert_array_equal(np.asarray(load_image(Image.open(io.BytesIO(data)))), upright)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(kind):
    levels = np.array([[0, 128, 129, 257, 32_768, 65_406, 65_407, 65_535]], np.uint16)
    expected = [
        0,
        0,
        1,
        1,
        128,
        254,
        255,
        255,
    ]  # nearest of level / 257; 128 / 257 is just below 0.5
    image = load_image(saved(Image.fromarray(levels), kind))
    for channel in range(3):
        assert np.asarray(image)[0, :, channel].tolist() == expected


def test_sixteen_bit_grey_keeps_its_exif_orientation():
    levels = np.array([[0, 65_535, 32_896]], np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6
    image = load_image(saved(Image.fromarray(levels), "TIFF", exif=exif))
    assert np.asarray(image)[:, 0, 0].tolist() == [0, 255, 128]


def test_the_integer_mode_is_read_as_sixteen_bits_and_refused_beyond():
    within = Image.fromarray(np.array([[0, 65_535]], np.int32))
    assert within.mode == "I"
    assert np.asarray(load_image(within))[0, :, 0].tolist() == [0, 255]
    for values in ([0, 65_536], [-1, 5]):
        assert "16-bit range" in refusal(Image.fromarray(np.array([values], np.int32)))


def test_alpha_is_dropped_and_not_blended():
    rgba = np.dstack([picture(), np.zeros((12, 20), np.uint8)])
    for kind in ("PNG", "TIFF"):
        image = load_image(saved(Image.fromarray(rgba), kind))
        np.testing.assert_array_equal(np.asarray(image), picture())
    grey_alpha = Image.merge("LA", [Image.new("L", (3, 2), 77), Image.new("L", (3, 2), 0)])
    assert load_image(saved(grey_alpha, "PNG")).getcolors() == [(6, (77, 77, 77))]


def test_a_palette_with_transparent_bytes_gives_its_colours_without_a_warning():
    image = Image.fromarray(picture()).quantize(4)
    data = saved(image, "PNG", transparency=bytes([0, 128, 255, 0]))
    held = Image.open(io.BytesIO(data))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(np.asarray(load_image(data)), picture())
        np.testing.assert_array_equal(np.asarray(load_image(held)), picture())
        np.testing.assert_array_equal(np.asarray(to_rgb(held)), picture())
    assert held.mode == "P" and "transparency" in held.info  # the caller's image is left alone


def test_one_bit_grey_and_cmyk_have_the_values_computed_by_hand():
    bits = Image.fromarray(np.array([[True, False, True]]))
    assert np.asarray(load_image(saved(bits, "PNG")))[0, :, 2].tolist() == [255, 0, 255]
    grey = Image.fromarray(np.array([[0, 99, 255]], np.uint8))
    assert np.asarray(load_image(saved(grey, "PNG")))[0, :, 1].tolist() == [0, 99, 255]
    inks = Image.new("CMYK", (2, 2), (255, 0, 0, 0))
    assert load_image(saved(inks, "TIFF")).getcolors() == [(4, (0, 255, 255))]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP"])
def test_an_animated_image_gives_its_first_frame(kind):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **lossless)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert load_image(data).getcolors() == [(48, (255, 0, 0))]


def test_arrays_may_be_grey_or_strided():
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    for channel in range(3):
        np.testing.assert_array_equal(np.asarray(load_image(grey))[..., channel], grey)
    turned = picture()[::-1, ::2]
    np.testing.assert_array_equal(np.asarray(load_image(turned)), turned)


def test_the_result_shares_nothing_with_the_source():
    array = picture()
    image = load_image(array)
    array[:] = 0
    np.testing.assert_array_equal(np.asarray(image), picture())
    source = Image.fromarray(picture())
    image = load_image(source)
    source.paste((0, 0, 0), (0, 0, 20, 12))
    np.testing.assert_array_equal(np.asarray(image), picture())


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "YCbCr", "HSV", "RGBA", "LA", "1"])
def test_pixels_equal_hugging_faces_load_image(mode):
    image_utils = pytest.importorskip("transformers.image_utils", reason="the reference is missing")
    image = Image.fromarray(picture()).convert("L").convert(mode)
    np.testing.assert_array_equal(
        np.asarray(load_image(image)), np.asarray(image_utils.load_image(image))
    )


def test_a_missing_file_a_directory_and_an_empty_file_are_refused(tmp_path):
    assert "does not exist" in refusal(tmp_path / "none.png")
    assert "found: a directory" in refusal(tmp_path)
    (tmp_path / "empty.png").touch()
    assert "is empty" in refusal(tmp_path / "empty.png")
    assert "is empty" in refusal(b"")
    refusal("with a null \0 byte.png")
    assert "cannot be opened" in refusal("n" * 5000)


@pytest.mark.skipif(os.name != "posix", reason="pipes in the file system are POSIX")
def test_a_pipe_is_refused_instead_of_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "a device or a pipe" in refusal(tmp_path / "pipe")


def test_addresses_and_other_objects_are_refused():
    assert "not fetched" in refusal("https://example.com/cat.png")
    assert "not fetched" in refusal("data:image/png;base64," + "A" * 1000)
    assert "type NoneType" in refusal(None)
    assert "type list" in refusal([[0, 0, 0]])


def test_files_that_are_not_pixel_images_are_refused(tmp_path):
    (tmp_path / "notes.png").write_text("this is text")
    assert "not an image in a known format" in refusal(tmp_path / "notes.png")
    drawing = saved(Image.fromarray(picture()), "EPS")  # Pillow would start Ghostscript
    assert "not an image in a known format" in refusal(drawing)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"])
def test_truncated_files_are_refused(kind, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = saved(Image.fromarray(noise), kind)
    path = tmp_path / "cut.bin"
    for kept in (len(data) // 4, len(data) * 3 // 4):
        path.write_bytes(data[:kept])
        refusal(path)
        refusal(data[:kept])
    lazy = Image.open(io.BytesIO(data[: len(data) * 3 // 4])) if kind in ("PNG", "JPEG") else None
    if lazy is not None:
        assert "truncated or damaged" in refusal(lazy)


@pytest.mark.filterwarnings("ignore")  # Pillow's remarks on what it skipped
def test_damaged_bytes_never_escape_as_another_error():
    exif = Image.Exif()
    exif[0x0112] = 6
    rng = np.random.default_rng(1)
    for kind in ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "TGA", "ICO"):
        options = {"exif": exif} if kind in ("PNG", "JPEG", "WEBP") else {}
        data = saved(Image.fromarray(picture()), kind, **options)
        for _ in range(60):
            damaged = bytearray(data)
            for place in rng.integers(0, min(len(data), 120), 3):
                damaged[place] = rng.integers(0, 256)
            try:
                assert load_image(damaged, max_pixels=100_000).mode == "RGB"
            except RequestError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize("width, height", [(60_000, 60_000), (10_000, 9_000), (1 << 21, 1)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused_from_its_header(width, height, monkeypatch):
    def never(self):
        raise AssertionError("the pixels were decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", never)
    message = refusal(png_header(width, height))
    assert "too large" in message
    assert str(images.MAX_IMAGE_PIXELS) in message


def test_the_pixel_limit_holds_for_every_source():
    image = Image.fromarray(picture())
    for source in (picture(), image, saved(image, "PNG")):
        assert load_image(source, max_pixels=240).size == (20, 12)
        assert "20 x 12 = 240 pixels" in refusal(source, max_pixels=239)


@pytest.mark.parametrize("shape", [(0, 4, 3), (4, 0, 3), (0, 0), (0, 5)])
def test_arrays_and_images_without_pixels_are_refused(shape):
    assert "no pixels" in refusal(np.zeros(shape, np.uint8))
    assert "no pixels" in refusal(Image.new("RGB", (shape[1], shape[0])))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint16, np.bool_, object])
def test_arrays_of_other_dtypes_are_refused(dtype):
    message = refusal(np.ones((4, 4, 3), dtype))
    assert f"found: {np.dtype(dtype)} [4, 4, 3]" in message


def test_nan_is_named_in_the_refusal():
    array = np.ones((4, 4, 3), np.float32)
    array[1, 2, 0] = np.nan
    assert "with NaN" in refusal(array)
    assert "NaN" in refusal(Image.fromarray(array[..., 0]))  # mode F


@pytest.mark.parametrize("shape", [(4,), (4, 4, 1), (4, 4, 4), (2, 4, 4, 3)])
def test_arrays_of_other_shapes_are_refused(shape):
    assert "wrong shape" in refusal(np.zeros(shape, np.uint8))


def test_channels_first_arrays_are_told_how_to_turn():
    assert "transpose(1, 2, 0)" in refusal(np.zeros((3, 8, 9), np.uint8))


def test_a_mode_that_pillow_cannot_convert_is_refused():
    with pytest.raises(RequestError, match="mode La"):
        to_rgb(Image.new("La", (2, 2)))


@pytest.mark.parametrize("content", ["good", "truncated", "text", "bomb"])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")
def test_no_file_stays_open(content, tmp_path):
    good = saved(Image.fromarray(picture()), "PNG")
    data = {
        "good": good,
        "truncated": good[:60],
        "text": b"this is text",
        "bomb": png_header(60_000, 60_000),
    }[content]
    path = tmp_path / "image.png"
    path.write_bytes(data)
    before = sorted(os.listdir("/proc/self/fd"))
    kept = None
    if content == "good":
        kept = load_image(path)
    else:
        refusal(path)
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert kept is None or kept.getpixel((0, 0)) == tuple(CORNERS[0, 0])


def test_reading_images_leaves_pillows_settings_alone():
    limit, strict = Image.MAX_IMAGE_PIXELS, TiffImagePlugin.READ_LIBTIFF
    load_image(saved(Image.fromarray(picture()), "TIFF"))
    assert limit == Image.MAX_IMAGE_PIXELS
    assert strict == TiffImagePlugin.READ_LIBTIFF
