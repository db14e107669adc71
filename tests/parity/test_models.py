"""The tiny models that the other tests stand on: real checkpoints whose answers pruning changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from tests.support.models import TINY, make_checkpoint, save_checkpoint, tiny_llava

PHOTO = Path(__file__).resolve().parents[2] / "examples" / "photo.jpg"


def ask(processor, question: str = "What is on the table?"):
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    return processor(images=Image.open(PHOTO), text=prompt, return_tensors="pt")


@pytest.mark.parametrize("name", TINY)
def test_checkpoint_loads_whole_and_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    model, processor = tiny_llava(name)
    make_checkpoint.save_llava(tmp_path, model, processor)
    loaded, report = LlavaForConditionalGeneration.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    inputs = ask(AutoProcessor.from_pretrained(tmp_path))
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, loaded(**inputs).logits)


@pytest.mark.parametrize("name", TINY)
def test_hiding_half_of_the_visual_tokens_changes_the_logits(name: str) -> None:
    model, processor = tiny_llava(name)
    inputs = ask(processor)
    visual = (inputs.input_ids[0] == model.config.image_token_id).nonzero().flatten()
    assert len(visual) == model.config.image_seq_length
    position_ids = torch.arange(inputs.input_ids.shape[1])[None]
    with torch.no_grad():
        full = model(**inputs, position_ids=position_ids).logits[0, -1]
        inputs.attention_mask[0, visual[::2]] = 0
        half = model(**inputs, position_ids=position_ids).logits[0, -1]
    # A logit's deviation is about 1.3: less than a third of it would prove nothing.
    assert (full - half).abs().max() > 0.4


def test_prompt_follows_the_template_of_llava() -> None:
    _, processor = tiny_llava()
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cup."}]},
        {"role": "user", "content": [{"type": "text", "text": "Where?"}]},
    ]
    assert (
        processor.apply_chat_template(turns, add_generation_prompt=True)
        == "USER: <image>\nWhat is it? ASSISTANT: A cup. USER: Where? ASSISTANT:"
    )


@pytest.mark.parametrize("structure", make_checkpoint.STRUCTURES)
def test_tokenizer_returns_what_it_was_given(structure: str) -> None:
    tokenizer = make_checkpoint.make_tokenizer(structure)
    for text in ("What is on the table?", "24 × 3, naïve 猫 🙂", "two  spaces\nand a line"):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_small_shards_are_listed_in_an_index(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, shard_size="200KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    shards = {path.name for path in tmp_path.glob("*.safetensors")}
    assert len(shards) > 1
    assert set(index["weight_map"].values()) == shards
