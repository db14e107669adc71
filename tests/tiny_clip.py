"""A tiny CLIP as a Hugging Face directory, whose image tower is that of a tiny LLaVA."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPModel

from tests.models import make_checkpoint

WIDTH, WINDOW = 24, 12  # of the joint space; of a window of text, marks included


def save_clip(path: Path, llava: Any, *, seed: int = 7, std: float = 0.16) -> Path:
    """Save a CLIP that a LLaVA's tower could have been taken from."""
    tokenizer = make_tokenizer()
    vision = llava.config.vision_config.to_dict()
    config = CLIPConfig(
        text_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": WINDOW,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.eos_token_id,
            "projection_dim": WIDTH,
        },
        vision_config=vision | {"projection_dim": WIDTH},
        projection_dim=WIDTH,
    )
    model = CLIPModel(config).eval()
    make_checkpoint.set_random_weights(model, seed, std)
    tower = getattr(llava.model.vision_tower, "vision_model", llava.model.vision_tower)
    model.vision_model.load_state_dict(tower.state_dict())
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@cache
def make_tokenizer() -> Any:
    """CLIP's kind of tokenizer: lower case, byte-level pieces that know where a word ends.

    The trainer numbers its alphabet otherwise each time, hence the cache.
    """
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    learner.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(make_checkpoint.SENTENCES.strip().splitlines(), trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=learner,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )


@torch.no_grad()
def text_features(clip: CLIPModel, ids: torch.Tensor) -> torch.Tensor:
    """Every position in the joint space by Hugging Face's own layers, [W, P, E]."""
    return clip.text_projection(clip.text_model(input_ids=ids).last_hidden_state)
