"""The runtime's preprocessor against Hugging Face's PIL image processors, number by number."""

import json

import numpy as np
import pytest
from PIL import Image

from patchsieve.contract.errors import BundleError, RequestError, UnsupportedModelError
from patchsieve.export.source.processor import (
    PromptFields,
    preprocessor_from_checkpoint,
    prompt_fields_from_checkpoint,
)
from patchsieve.runtime.inputs.preprocess import Preprocessor
from patchsieve.runtime.inputs.resize import pad_and_resize, resize_and_crop, shortest_edge_size

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]

# (width, height): up and down, odd, equal to the target, wide, tall, one pixel.
SIZES = [
    (56, 56),
    (57, 55),
    (20, 31),
    (333, 211),
    (101, 400),
    (640, 48),
    (3, 200),
    (57, 1),
    (1, 1),
]

# Options of save_pretrained's file; every flag is off at least once, and every crop case occurs.
OPTIONS = {
    "CLIP": ("CLIP", {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}),
    "CLIP, oblong crop": (
        "CLIP",
        {"size": {"shortest_edge": 40}, "crop_size": {"height": 33, "width": 28}},
    ),
    "CLIP, crop beyond the image": (
        "CLIP",
        {"size": {"shortest_edge": 31}, "crop_size": {"height": 56, "width": 43}},
    ),
    "CLIP, no resize": ("CLIP", {"do_resize": False, "crop_size": {"height": 57, "width": 40}}),
    "CLIP, no rescale": (
        "CLIP",
        {"do_rescale": False, "size": {"shortest_edge": 28}, "crop_size": 28},
    ),
    "CLIP, no normalize": (
        "CLIP",
        {"do_normalize": False, "size": {"shortest_edge": 28}, "crop_size": 28},
    ),
    "CLIP, exact size": ("CLIP", {"do_center_crop": False, "size": {"height": 42, "width": 70}}),
    "CLIP, bilinear and another scale": (
        "CLIP",
        {
            "resample": 2,
            "rescale_factor": 1 / 127.5,
            "size": {"shortest_edge": 56},
            "crop_size": 56,
        },
    ),
    "SigLIP": ("Siglip", {"size": {"height": 48, "width": 48}}),
    "SigLIP, Lanczos": ("Siglip", {"size": {"height": 48, "width": 32}, "resample": 1}),
    "LLaVA": ("Llava", {"size": {"shortest_edge": 56}, "crop_size": 56}),
    "LLaVA, pad": ("Llava", {"do_pad": True, "size": {"shortest_edge": 56}, "crop_size": 56}),
    "LLaVA, pad without crop": (
        "Llava",
        {"do_pad": True, "do_center_crop": False, "size": {"height": 45, "width": 56}},
    ),
    "LLaVA, pad without resize": ("Llava", {"do_pad": True, "do_resize": False, "crop_size": 60}),
}


def photo(width, height, seed=0):
    """Smooth colours with noise on top, RGB: shows shifts as well as wrong filters."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(x / 17 + y / 29), np.cos(x / 7), np.sin(y / 11 - x / 23)], axis=-1)
    pixels = 128 + 80 * waves + rng.normal(0, 20, (height, width, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def hugging_face_processor(family, options):
    """Build the PIL image processor of transformers."""
    pytest.importorskip("transformers", reason="transformers is the reference, not installed")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    classes = {
        "CLIP": CLIPImageProcessorPil,
        "Siglip": SiglipImageProcessorPil,
        "Llava": LlavaImageProcessorPil,
    }
    return classes[family](**options)


def clip(**changes):
    """Build a small CLIP preprocessor."""
    fields = {
        "shortest_edge": 28,
        "resize_to": None,
        "crop_size": [28, 28],
        "image_mean": MEAN,
        "image_std": STD,
    }
    return Preprocessor(**{**fields, **changes})


def assert_within_a_grey_level(expected, actual, resample):
    """Compare two images; the filters that jump may take another source pixel at 1 % of places."""
    assert actual.size == expected.size
    difference = np.abs(np.asarray(expected).astype(int) - np.asarray(actual))
    if resample in (Image.Resampling.NEAREST, Image.Resampling.BOX):
        assert (difference <= 1).all(axis=-1).mean() >= 0.99
    else:
        assert difference.max() <= 1


def write_json(path, values):
    path.write_text(json.dumps(values), encoding="utf-8")


@pytest.mark.parametrize("name", OPTIONS)
def test_pixel_values_equal_hugging_faces_pil_processor(name, tmp_path):
    processor = hugging_face_processor(*OPTIONS[name])
    processor.save_pretrained(tmp_path)
    ours = Preprocessor.from_dict(preprocessor_from_checkpoint(tmp_path))
    for width, height in SIZES:
        image = photo(width, height)
        expected = np.asarray(processor(image)["pixel_values"][0])
        actual = ours(image)
        assert actual.dtype == np.float32
        assert actual.shape == (3, *ours.size)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6, err_msg=f"{width, height}")


def test_a_grey_image_equals_hugging_faces_pil_processor():
    family, options = OPTIONS["CLIP"]
    processor = hugging_face_processor(family, options)
    ours = clip(shortest_edge=56, crop_size=[56, 56])
    grey = photo(90, 61).convert("L")
    expected = np.asarray(processor(grey)["pixel_values"][0])
    np.testing.assert_allclose(ours(grey), expected, rtol=0, atol=1e-6)


def test_one_colour_gives_the_number_computed_by_hand():
    values = clip()(Image.new("RGB", (40, 90), (255, 0, 51)))
    for channel, level in enumerate((1.0, 0.0, 0.2)):
        by_hand = (level - MEAN[channel]) / STD[channel]
        np.testing.assert_allclose(values[channel], by_hand, rtol=0, atol=1e-6)


def test_padding_has_the_mean_colour_and_the_odd_row_below():
    ours = clip(do_pad=True, do_normalize=False, do_resize=False, shortest_edge=None)
    ours = Preprocessor(**{**ours.to_dict(), "crop_size": [7, 7]})
    values = ours(Image.new("RGB", (7, 4), (255, 255, 255))) * 255
    colour = [int(channel * 255) for channel in MEAN]
    white_rows = [row for row in range(7) if (values[:, row] == 255).all()]
    assert white_rows == [1, 2, 3, 4]
    for row in (0, 5, 6):
        np.testing.assert_allclose(values[:, row], np.repeat(colour, 7).reshape(3, 7), atol=1e-4)


@pytest.mark.parametrize("resample", range(6))
@pytest.mark.parametrize("width, height, edge", [(40, 700, 56), (700, 43, 28), (31, 200, 336)])
def test_resizing_only_the_kept_region_equals_resizing_all(resample, width, height, edge):
    image = photo(width, height)
    size = shortest_edge_size(height, width, edge)
    whole = resize_and_crop(image, size, (edge, edge), resample)
    part = resize_and_crop(image, size, (edge, edge), resample, max_pixels=1)
    assert_within_a_grey_level(whole, part, resample)


@pytest.mark.parametrize("resample", range(6))
@pytest.mark.parametrize("width, height", [(900, 31), (900, 640), (30, 901), (641, 900), (2, 50)])
def test_padding_without_the_square_equals_padding_with_it(resample, width, height):
    image, colour = photo(width, height), (122, 116, 104)
    whole = pad_and_resize(image, (56, 48), colour, resample)
    banded = pad_and_resize(image, (56, 48), colour, resample, max_pixels=1)
    assert_within_a_grey_level(whole, banded, resample)


@pytest.fixture
def built(monkeypatch):
    """Record the pixels of every image that Pillow resizes to or makes."""
    pixels = []
    resize, new = Image.Image.resize, Image.new

    def spy_resize(self, size, *args, **kwargs):
        pixels.append(size[0] * size[1])
        return resize(self, size, *args, **kwargs)

    def spy_new(mode, size, *args, **kwargs):
        pixels.append(size[0] * size[1])
        return new(mode, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", spy_resize)
    monkeypatch.setattr(Image, "new", spy_new)
    return pixels


@pytest.mark.parametrize("width, height", [(1, 1), (1, 4000), (4000, 1), (1, 90_000), (300_000, 2)])
def test_extreme_shapes_keep_their_colour_in_a_small_intermediate(width, height, built):
    image = Image.new("RGB", (width, height), (255, 0, 0))
    built.clear()
    values = clip(shortest_edge=336, crop_size=[336, 336], do_normalize=False)(image)
    assert built == [336 * 336]  # the whole would have up to 17 billion pixels
    red = np.array([1, 0, 0], np.float32)[:, None, None]
    np.testing.assert_array_equal(values, np.broadcast_to(red, (3, 336, 336)))


@pytest.mark.parametrize("width, height", [(1, 9000), (9000, 1), (1, 90_000), (300_000, 2)])
def test_extreme_shapes_are_padded_without_their_square(width, height, built):
    image = Image.new("RGB", (width, height), (255, 0, 0))
    built.clear()
    ours = clip(shortest_edge=336, crop_size=[336, 336], do_pad=True, do_normalize=False)
    values = ours(image) * 255
    assert max(built) <= 1 << 23  # the square would have 81 million to 90 billion pixels
    colour = [int(channel * 255) for channel in MEAN]
    along = values if width > height else values.transpose(0, 2, 1)  # [3, across, along]
    padding = np.delete(along, slice(160, 176), axis=1)
    expected = np.broadcast_to(np.array(colour)[:, None, None], padding.shape)
    np.testing.assert_allclose(padding, expected, atol=1e-3)
    # What the line adds: its area times its distance from the padding, spread over a few rows.
    thickness = min(width, height) * 336 / max(width, height)
    added = (along - np.array(colour)[:, None, None]).sum(axis=1).mean(axis=1)
    by_hand = thickness * (np.array([255, 0, 0]) - colour)
    np.testing.assert_allclose(added, by_hand, atol=4)  # 8-bit rounding of up to 8 rows


def test_the_kept_region_of_an_extreme_shape_is_its_middle():
    column = np.zeros((4000, 1, 3), np.uint8)
    column[1999:2001] = 255  # the two middle pixels: all that the crop can see
    values = clip(shortest_edge=336, crop_size=[336, 336], do_normalize=False)(
        Image.fromarray(column)
    )
    assert values[:, 100:236].min() == 1.0


def test_the_dictionary_survives_json_and_gives_the_same_preprocessor():
    ours = clip(do_pad=True, resample=2)
    assert Preprocessor.from_dict(json.loads(json.dumps(ours.to_dict()))) == ours


@pytest.mark.parametrize(
    "changes, size",
    [
        ({}, (28, 28)),
        ({"crop_size": [30, 14]}, (30, 14)),
        ({"do_center_crop": False, "shortest_edge": None, "resize_to": [21, 35]}, (21, 35)),
        ({"do_center_crop": False, "do_pad": True}, (28, 28)),
    ],
)
def test_the_output_size_is_known_before_any_image(changes, size):
    ours = clip(**changes)
    assert ours.size == size
    assert ours(photo(50, 37)).shape == (3, *size)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"shortest_edge": None}, "shortest_edge"),
        ({"resize_to": [28, 28]}, "exactly one"),
        ({"shortest_edge": 0}, "shortest_edge"),
        ({"crop_size": None}, "crop_size"),
        ({"crop_size": [28]}, "crop_size"),
        ({"crop_size": "ab"}, "crop_size"),
        ({"do_center_crop": False}, "depends on the image"),
        ({"image_mean": [0.5, 0.5]}, "image_mean"),
        ({"image_mean": [0.5, 0.5, float("nan")]}, "image_mean"),
        ({"image_std": [0.5, 0.5, 0.0]}, "image_std"),
        ({"rescale_factor": 0}, "rescale_factor"),
        ({"resample": 6}, "resample"),
        ({"do_resize": 1}, "do_resize"),
        ({"do_pad": True, "image_mean": [123.0, 117.0, 104.0]}, "image_mean"),
    ],
)
def test_a_field_out_of_range_is_refused_by_name(changes, named):
    with pytest.raises(BundleError, match=named):
        clip(**changes)


def test_a_missing_or_unknown_field_is_refused_by_name():
    values = clip().to_dict()
    with pytest.raises(BundleError, match="tiles unknown"):
        Preprocessor.from_dict({**values, "tiles": 4})
    del values["resample"]
    with pytest.raises(BundleError, match="resample missing"):
        Preprocessor.from_dict(values)


def test_other_modes_are_refused_when_the_model_does_not_convert():
    with pytest.raises(RequestError, match="mode L"):
        clip(do_convert_rgb=False)(Image.new("L", (4, 4)))
    with pytest.raises(RequestError, match="no pixels"):
        clip()(Image.new("RGB", (0, 4)))


def test_the_nested_file_of_transformers_5_goes_first(tmp_path):
    nested = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 30, "width": 20}}
    write_json(tmp_path / "processor_config.json", {"image_processor": nested})
    write_json(
        tmp_path / "preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor"}
    )
    fields = preprocessor_from_checkpoint(tmp_path)
    assert Preprocessor.from_dict(fields).size == (30, 20)
    assert fields["image_mean"] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    "config",
    [
        {"feature_extractor_type": "CLIPFeatureExtractor", "size": 30, "crop_size": 26},
        {"image_processor_type": "CLIPImageProcessorFast", "size": {"shortest_edge": 30}},
        {"image_processor_type": "LlavaImageProcessor", "do_rescale": None, "do_pad": None},
        {
            "image_processor_type": "LlavaImageProcessor",
            "do_normalize": None,
            "image_mean": None,
            "image_std": None,
            "do_pad": True,
        },
        {"image_processor_type": "SiglipImageProcessor", "size": [20, 36], "image_mean": 0.4},
        {"image_processor_type": "CLIPImageProcessor", "size": 30, "default_to_square": True},
    ],
)
def test_older_spellings_mean_what_transformers_makes_of_them(config, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is the reference")
    write_json(tmp_path / "preprocessor_config.json", config)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    image = photo(70, 41)
    ours = Preprocessor.from_dict(preprocessor_from_checkpoint(tmp_path))
    expected = np.asarray(processor(image)["pixel_values"][0])
    np.testing.assert_allclose(ours(image), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"image_processor_type": "LlavaNextImageProcessor"}, "LlavaNextImageProcessor"),
        ({"image_processor_type": None}, "no image_processor_type"),
        ({"image_grid_pinpoints": [[336, 672]]}, "image_grid_pinpoints"),
        ({"use_square_size": True}, "use_square_size"),
        ({"size": {"shortest_edge": 30, "longest_edge": 60}}, "longest_edge"),
        ({"size": {"longest_edge": 60}}, "longest_edge"),
        ({"size": {"shortest_edge": 0}}, "size"),
        ({"crop_size": {"shortest_edge": 60}}, "crop_size"),
        ({"do_center_crop": False}, "depends on the image"),
        ({"do_pad": True}, "do_pad in a CLIPImageProcessor"),
        ({"do_resize": "yes"}, "do_resize"),
        ({"resample": "bicubic"}, "resample"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std"),
        ({"image_mean": [0.5, 0.5]}, "image_mean"),
        ({"rescale_factor": "1/255"}, "rescale_factor"),
        ({"image_mean": None}, "image_mean"),
    ],
)
def test_a_processor_that_cannot_be_reproduced_is_refused_by_name(changes, named, tmp_path):
    config = {"image_processor_type": "CLIPImageProcessor", **changes}
    write_json(tmp_path / "preprocessor_config.json", config)
    with pytest.raises(UnsupportedModelError, match=named) as caught:
        preprocessor_from_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_or_damaged_processor_file_is_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match="no image processor"):
        preprocessor_from_checkpoint(tmp_path)
    for text in ("{", "[]", "\udcff"):
        (tmp_path / "preprocessor_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(UnsupportedModelError, match="preprocessor_config.json cannot"):
            preprocessor_from_checkpoint(tmp_path)


def test_the_prompts_fields_come_from_the_processor_file(tmp_path):
    assert prompt_fields_from_checkpoint(tmp_path) == PromptFields(None, None, None, None)
    config = {
        "processor_class": "LlavaProcessor",
        "patch_size": 14,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
        "image_token": "<image>",
    }
    write_json(tmp_path / "processor_config.json", config)
    assert prompt_fields_from_checkpoint(tmp_path) == PromptFields(14, "default", 1, "<image>")
    write_json(tmp_path / "processor_config.json", {**config, "patch_size": "14"})
    with pytest.raises(UnsupportedModelError, match="patch_size"):
        prompt_fields_from_checkpoint(tmp_path)
