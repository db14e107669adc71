"""Without pruning a bundle answers as Hugging Face's `generate` does, token by token."""

from __future__ import annotations

import pytest
import torch

from tests.references.masked_llava import answer_message, user_message
from tests.support.models import TINY
from tests.support.tiny_bundles import REFERENCE_ROWS, largest_error, pictures, recorded_logits
from tests.support.tolerances import LOGITS_FLOAT32

COUNT = 64
PROMPTS = {  # question, images
    "text-only": ("What is on the table?", 0),
    "one-image": ("What is on the table?", 1),
    "two-images": ("How many people are there?", 2),
    "three-images": ("Where was this taken? Explain why.", 3),
    "images-within-the-text": ("Is the cat in <image> or in <image> and why not in both?", 2),
    "image-behind-the-text": ("Describe this photo. <image>", 1),
}


def check(bundle, target: str, question: str, num_images: int) -> None:
    reference, model = bundle.hugging_face, bundle.model(target=target)
    images = pictures(num_images)
    text = reference.prompt([user_message(question, num_images)])
    expected, expected_logits = reference.generate(text, images, COUNT)
    logits = recorded_logits(model)
    result = model.generate(images, question, max_new_tokens=COUNT)
    assert result.token_ids == expected
    assert len(expected) == COUNT or result.finish_reason == "eos"
    error = largest_error(logits, expected_logits)
    assert error < LOGITS_FLOAT32
    assert not result.sites and result.selection == "none"
    assert result.visual_tokens == num_images * reference.num_visual
    print(f"largest error of a logit: {error:.1e}")


@pytest.mark.slow_rows(
    "llama-biases",
    "llama-wide-heads",
    "clip-two-layers",
    "qwen2-siglip-two-layers",
    "llama-llama3-rope",
    "llama",
)
@pytest.mark.parametrize("row", TINY)
def test_one_image_gets_the_tokens_that_generate_gives(tiny, row: str) -> None:
    check(tiny(row), "cpu", *PROMPTS["one-image"])


@pytest.mark.parametrize("prompt", [name for name in PROMPTS if name != "one-image"])
@pytest.mark.parametrize("row", ("llama-gqa-tied-linear-rope", "qwen2", "siglip", "clip-full"))
def test_prompts_of_every_kind_get_the_tokens_that_generate_gives(
    tiny, row: str, prompt: str
) -> None:
    check(tiny(row), "cpu", *PROMPTS[prompt])


@pytest.mark.parametrize("prompt", ("text-only", "one-image", "images-within-the-text"))
@pytest.mark.parametrize("row", REFERENCE_ROWS)
def test_reference_graphs_get_the_tokens_that_generate_gives(tiny, row: str, prompt: str) -> None:
    check(tiny(row), "reference", *PROMPTS[prompt])


@pytest.mark.parametrize("row", ("llama-gqa-tied-linear-rope", "qwen2"))
def test_raw_prompt_gets_the_tokens_that_generate_gives(tiny, row: str) -> None:
    bundle, text = tiny(row), "<image> and a second one, <image>, show the"
    expected, _ = bundle.hugging_face.generate(text, pictures(2), COUNT)
    result = bundle.model().generate(pictures(2), text, raw=True, max_new_tokens=COUNT)
    assert result.token_ids == expected


@pytest.mark.parametrize("row", ("llama-gqa-tied-linear-rope", "qwen2"))
def test_second_turn_gets_the_tokens_of_one_long_prompt(tiny, row: str) -> None:
    """What the cache holds, fed to `generate` at once."""
    bundle = tiny(row)
    reference, image = bundle.hugging_face, pictures(1)
    chat = bundle.model().chat()
    first = chat.ask("What is on the table?", image, max_new_tokens=20)
    second = chat.ask("Explain why.", max_new_tokens=COUNT)
    chat.close()
    assert second.visual_tokens == 0  # it continued
    reference.start()
    messages = [user_message("What is on the table?", 1)]
    inputs = reference.hugging_face_inputs(reference.prompt(messages), image)
    messages += [answer_message(), user_message("Explain why.", 0)]
    suffix = reference.prompt(messages).rpartition(answer_message()["content"][0]["text"])[2]
    tokenizer = reference.processor.tokenizer
    behind = tokenizer("." + suffix, add_special_tokens=False).input_ids
    behind = behind[len(tokenizer(".", add_special_tokens=False).input_ids) :]
    said = first.token_ids[:-1] if first.finish_reason == "eos" else first.token_ids
    ids = [*inputs.input_ids[0].tolist(), *said, *behind]
    out = reference.model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),  # an answer may hold <pad>
        pixel_values=inputs.pixel_values,
        max_new_tokens=COUNT,
        do_sample=False,
    )
    assert second.token_ids == out[0, len(ids) :].tolist()
