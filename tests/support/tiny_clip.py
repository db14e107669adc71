"""A tiny CLIP as a Hugging Face directory, whose image tower is that of a tiny LLaVA."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel

from examples.demo_model.tokens import clip_tokenizer
from tests.support.models import make_checkpoint

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
    """CLIP's kind of tokenizer, on the sentences that the tiny LLaVA's knows."""
    return clip_tokenizer(make_checkpoint.SENTENCES.strip().splitlines(), 900)


@torch.no_grad()
def text_features(clip: CLIPModel, ids: torch.Tensor) -> torch.Tensor:
    """Every position in the joint space by Hugging Face's own layers, [W, P, E]."""
    return clip.text_projection(clip.text_model(input_ids=ids).last_hidden_state)
