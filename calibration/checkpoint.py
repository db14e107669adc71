"""Write a trained model as the checkpoint that it is: what `export` and Hugging Face both read."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from transformers import GenerationConfig

from patchsieve.calibration.encoder import Encoder
from patchsieve.calibration.model import PrunedLlava
from patchsieve.contract.trained import KEY
from patchsieve.export.source.checkpoint import read_config
from patchsieve.pruning.heads import HeadsConfig, save_heads

HEADS = "heads"  # folder of a checkpoint
# Files of a checkpoint that training does not change.
_CARRIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "processor_config.json",
    "preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)


def save_checkpoint(
    folder: Path,
    model: PrunedLlava,
    heads: HeadsConfig,
    tensors: dict[str, torch.Tensor],
    encoder: Encoder,
) -> None:
    """Write a trained model as `save_pretrained` does, its heads inside.

    Weights are float32, as training had them; export rounds. Tokenizer, processor and chat template
    are the files of the checkpoint that training began with.

    Args:
        folder: Which is there.
        model: The trained model.
        heads: What its thresholds were learned with.
        tensors: The thresholds.
        encoder: Of the checkpoint that training began with.
    """
    llava = model.llava
    # Of a chat model it may hold what save_pretrained refuses to write; the file is copied below.
    llava.generation_config = GenerationConfig.from_model_config(llava.config)
    llava.save_pretrained(folder, max_shard_size="5GB")
    config = read_config(encoder.directory)  # training changed the model's own
    if hasattr(config, "transformers_weights"):
        config.transformers_weights = None  # it names a file that is not copied
    setattr(config, KEY, replace(encoder.trained, heads=HEADS).to_dict())
    config.architectures = [type(llava).__name__]
    for part in (config, config.text_config, config.vision_config):
        part.dtype = llava.dtype
    config.save_pretrained(folder)
    for name in _CARRIED:
        if (encoder.directory / name).is_file():
            shutil.copyfile(encoder.directory / name, folder / name)
    save_heads(folder / HEADS, heads, tensors)
