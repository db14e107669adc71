"""The demo model's parts: a CLIP with both towers, and a LLaVA that takes CLIP's vision tower."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, LlavaConfig, LlavaForConditionalGeneration

from examples.make_checkpoint import make_config, make_processor

from .scenes import PATCH, SIDE, Scene, render
from .tokens import VOCABULARY, clip_tokenizer, language_tokenizer

# Of CLIP, as LLaVA's image processor applies them.
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)

WIDTH, JOINT = 128, 64  # of every tower; of the space that image and text share
VISION_LAYERS = 7  # LLaVA reads the output of the sixth; the seventh serves the CLS row alone
TEXT_LAYERS = 4
LAYERS = 12
WINDOW = 40  # tokens of a caption, marks included


def make_clip() -> tuple[CLIPModel, Any]:
    """A CLIP, not trained yet, and its tokenizer."""
    tokenizer = clip_tokenizer()
    text = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": TEXT_LAYERS,
        "num_attention_heads": WIDTH // 32,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": WINDOW,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
        "projection_dim": JOINT,
    }
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": VISION_LAYERS,
        "num_attention_heads": WIDTH // 32,
        "image_size": SIDE,
        "patch_size": PATCH,
        "projection_dim": JOINT,
    }
    config = CLIPConfig(
        text_config=text,
        vision_config=vision,
        projection_dim=JOINT,
        attn_implementation="eager",  # a compiled backward pass of SDPA is slower on CPUs
    )
    torch.manual_seed(0)
    return CLIPModel(config), tokenizer


def make_llava(clip: CLIPModel) -> tuple[LlavaForConditionalGeneration, Any]:
    """A LLaVA-1.5-structured model on a CLIP's vision tower, and its processor."""
    tokenizer = language_tokenizer()
    config: LlavaConfig = make_config(
        "llama",
        "clip",
        layers=LAYERS,
        hidden=WIDTH,
        heads=WIDTH // 32,
        kv_heads=WIDTH // 32,
        vision_layers=VISION_LAYERS,
        vision_hidden=WIDTH,
        image_size=SIDE,
        patch_size=PATCH,
        vocab_size=len(tokenizer),
        image_token_id=VOCABULARY,
        text={
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
    )
    config.vision_config.projection_dim = JOINT
    torch.manual_seed(1)
    model = LlavaForConditionalGeneration(config)
    tower = getattr(model.model.vision_tower, "vision_model", model.model.vision_tower)
    tower.load_state_dict(clip.vision_model.state_dict())
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model, make_processor(config, tokenizer)


def pixels(scene: Scene) -> Tensor:
    """What the image processor makes of a scene of the tower's own size, [3, SIDE, SIDE]."""
    image = torch.from_numpy(np.asarray(render(scene)).copy()).permute(2, 0, 1) / 255
    return (image - MEAN) / STD
