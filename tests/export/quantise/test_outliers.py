"""The checkpoints with outliers are the same function in float, and have the outliers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

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
