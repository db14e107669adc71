"""Write a trained model as the checkpoint that it is: what `export` and Hugging Face both read."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
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
CARD = "README.md"
# Files of a checkpoint that training does not change, as patterns.
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
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
)
_FRONT_MATTER = re.compile(rb"---[ \t]*\r?\n.*?^---[ \t]*\r?\n", re.DOTALL | re.MULTILINE)
_NOTE = """\
> Trained by `patchsieve calibrate` from the checkpoint that the rest of this card describes, with
> visual tokens pruned before layer {sites} by ATP. Its weights differ, and so do its answers.

"""


def save_checkpoint(
    folder: Path,
    model: PrunedLlava,
    heads: HeadsConfig,
    tensors: dict[str, torch.Tensor],
    encoder: Encoder,
) -> None:
    """Write a trained model as `save_pretrained` does, its heads inside.

    Weights are float32, as training had them; export rounds. Tokenizer, processor, chat template
    and licence are the files of the checkpoint that training began with, and its card follows a
    note.

    Args:
        folder: An existing folder.
        model: The trained model.
        heads: Sites and options of the thresholds.
        tensors: The thresholds.
        encoder: Encoder of the checkpoint that training began with.
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
    for pattern in _CARRIED:
        for path in encoder.directory.glob(pattern):
            if path.is_file():
                copy = folder / path.relative_to(encoder.directory)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, copy)
    if (encoder.directory / CARD).is_file():
        card = (encoder.directory / CARD).read_bytes()
        (folder / CARD).write_bytes(_with_note(card, heads.sites))
    save_heads(folder / HEADS, heads, tensors)


def _with_note(card: bytes, sites: Sequence[int]) -> bytes:
    """A card that says first how its checkpoint was changed; the hub reads its front matter."""
    match = _FRONT_MATTER.match(card)
    start = match.end() if match else 0
    note = _NOTE.format(sites=", ".join(map(str, sites))).encode()
    return card[:start] + note + card[start:].lstrip()
