"""The checkpoints with outliers are the same function in float, and have the outliers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from patchsieve.contract.manifest import Limits
from patchsieve.export.exporter import ExportOptions, write_weights
from patchsieve.export.job import plan_export
from patchsieve.export.source.checkpoint import read_config
from tests.support import outliers
from tests.support.models import make_checkpoint, tiny_llava

MAKERS = {
    "scaled": outliers.scaled_channels,
    "massive": outliers.massive_channels,
    "units": outliers.massive_units,
}
CLOSE = 2e-4  # of the largest entry: differences of numbers a hundred times as large


@pytest.fixture(scope="module", params=["qwen2-tied", "siglip"])
def checkpoint(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("outliers") / "plain"
    return make_checkpoint.save_llava(path, *tiny_llava(request.param), None)


def run(checkpoint: Path) -> tuple[list[Tensor], dict[str, float]]:
    """Rows of all layers and logits; and the largest input of each matrix over its median."""
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    config = model.config
    generator = torch.Generator().manual_seed(0)
    side = config.vision_config.image_size
    image = torch.full((1, config.image_seq_length), config.image_token_id)
    words = torch.randint(3, 90, (1, 8), generator=generator)
    peaks: dict[str, float] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):

            def hook(_: Any, given: Any, name: str = name) -> None:
                peaks[name] = float(given[0].abs().max() / given[0].abs().median())

            module.register_forward_pre_hook(hook)
    pixels = torch.randn(1, 3, side, side, generator=generator)
    with torch.no_grad():
        out = model(
            input_ids=torch.cat((image, words), 1), pixel_values=pixels, output_hidden_states=True
        )
    # The last of the hidden states has been through the last norm, which is scaled too.
    return [*out.hidden_states[:-1], *out.image_hidden_states, out.logits], peaks


@pytest.mark.parametrize("maker", MAKERS)
def test_the_copy_is_the_same_function_and_has_outliers(
    checkpoint: Path, tmp_path: Path, maker: str
) -> None:
    copy = MAKERS[maker](checkpoint, tmp_path / "copy")
    (expected, before), (found, after) = run(checkpoint), run(copy)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() < CLOSE * other.abs().max()
    places = {
        "scaled": ("q_proj", "gate_proj", "fc1"),
        "massive": ("layers.1.self_attn.q_proj", "fc1"),
        "units": ("layers.1.mlp.fc2",),
    }
    chosen = [name for name in after if name.endswith(places[maker])]
    chosen = [name for name in chosen if maker == "scaled" or "vision_tower" in name]
    assert chosen
    for name in chosen:
        assert after[name] > 4 * before[name], name


def numbers(checkpoint: Path, out: Path) -> dict[str, Tensor]:
    """The whole numbers of the matrices that an export in int8 stores."""
    options = ExportOptions(precision="int8,head=float32", limits=Limits(32, 8, 1))
    job = plan_export(checkpoint, read_config(checkpoint), options)
    write_weights(job, out, lambda *_: None)
    found: dict[str, Tensor] = {}
    for file in out.rglob("*.safetensors"):
        tensors = load_file(file)
        found |= {name: t.int() for name, t in tensors.items() if name.endswith(".int8")}
    return found


def test_an_export_of_scaled_channels_stores_the_numbers_of_the_plain_checkpoint(
    checkpoint: Path, tmp_path: Path
) -> None:
    copy = outliers.scaled_channels(checkpoint, tmp_path / "copy")
    expected, found = (numbers(each, tmp_path / f"{each.name}.out") for each in (checkpoint, copy))
    assert len(expected) == len(found) >= 40
    for name, tensor in expected.items():
        differ = (found[name] - tensor).abs()
        assert differ.max() <= 1, name
        assert differ.float().mean() < 0.001, name
