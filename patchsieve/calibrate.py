"""From a checkpoint and conversations to heads: what training sees is what a bundle will see.

Prompts, pixels and the rows that judge an image come from the runtime, the model and its patches
from export, the rest from calibration.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from patchsieve.calibration.records import Record
from patchsieve.calibration.samples import Sample
from patchsieve.errors import PatchsieveError
from patchsieve.export.checkpoint import locate, read_config
from patchsieve.export.processor import preprocessor_from_checkpoint
from patchsieve.export.tokenizer import write_tokenizer
from patchsieve.export.vision import vision_model
from patchsieve.runtime.images import load_image
from patchsieve.runtime.preprocess import Preprocessor
from patchsieve.runtime.prompt import Prompt, PromptBuilder, expand
from patchsieve.runtime.rows import TEXT, Rows


class Encoder:
    """Makes samples of a checkpoint's conversations.

    Args:
        checkpoint: Directory or hub id.

    Attributes:
        directory: Where the checkpoint lies.
        patch_ids: Raster index of each visual token, -1 for a class token, [N].
        grid: Patch rows and columns.
    """

    def __init__(self, checkpoint: str) -> None:
        self.directory = locate(checkpoint)
        config: Any = read_config(self.directory)
        tower = vision_model(config)
        self.patch_ids, self.grid = np.array(tower.raster_ids), tower.grid
        self.preprocessor = Preprocessor.from_dict(_plain(self.directory))
        with tempfile.TemporaryDirectory() as folder:
            made = write_tokenizer(self.directory, Path(folder))
            self.prompts = PromptBuilder(
                Path(folder) / "tokenizer.json",
                made["chat_template"],
                image_token=made["image_token"],
                image_token_id=config.image_token_id,
                special_tokens=made["special_tokens"],
            )
        self.eos = made["eos_token_ids"][:1]

    def __call__(self, record: Record) -> Sample:
        """Encode a conversation.

        Raises:
            PatchsieveError: It has images behind the first question, or its template renders
                earlier turns anew.
        """
        first = [number for number, m in enumerate(record.messages) if m["role"] == "assistant"]
        asked = record.messages[: first[0]]
        shown = sum(part["type"] == "image" for m in asked for part in m["content"])
        if shown != len(record.images):
            raise PatchsieveError(
                f"{record.where} shows an image behind its first question",
                expected="every image in the first turn: its survivors are chosen there",
            )
        prompt = self.prompts.build(asked, len(record.images))
        rows = expand(prompt, len(self.patch_ids))
        is_instruction = np.zeros(len(rows.token_ids), bool)
        is_instruction[rows.instruction_rows] = True
        where = np.arange(len(rows.token_ids))
        none, one = np.full_like(where, -1), np.ones(len(where), np.float32)
        facts = Rows(where, rows.image_index, none, none, is_instruction, one, none, len(where))
        assert TEXT == -1  # as `expand` marks text
        visual = [facts.of_image(image) for image in facts.images()]
        text = [facts.text_for(image) for image in facts.images()]
        ids, labels = [rows.token_ids], [np.full(len(rows.token_ids), -100)]
        for end in first:
            if end != first[0]:
                suffix = self._question(record, end)
                ids.append(suffix.token_ids)
                labels.append(np.full(len(suffix.token_ids), -100))
            answer = self._answer(record.messages[end])
            ids.append(answer)
            labels.append(answer)
        pixels = [self.preprocessor(load_image(path)) for path in record.images]
        return Sample(
            input_ids=torch.from_numpy(np.concatenate(ids)),
            labels=torch.from_numpy(np.concatenate(labels)),
            visual=[torch.from_numpy(rows) for rows in visual],
            text=[torch.from_numpy(rows) for rows in text],
            pixel_values=torch.from_numpy(np.stack(pixels)) if pixels else None,
        )

    def _question(self, record: Record, end: int) -> Prompt:
        """The tokens of a later question, as the next turn of a chat feeds them."""
        before = next(
            number
            for number in range(end - 1, -1, -1)
            if record.messages[number]["role"] == "assistant"
        )
        asked = record.messages[:end]
        text = self.prompts.continuation(record.messages[:before], asked, is_answer_cached=True)
        if text is None:
            raise PatchsieveError(
                f"{record.where} has several turns, which the chat template renders anew each time",
                do="give conversations of one turn",
            )
        return self.prompts.tokenize_suffix(text, asked)

    def _answer(self, message: Mapping[str, Any]) -> np.ndarray:
        """The tokens of an answer and the end of it, [T]."""
        text = "".join(part["text"] for part in message["content"] if "text" in part).strip()
        said = self.prompts.tokenize_suffix(f" {text}" if text else " ").token_ids
        return np.concatenate((said, self.eos)).astype(np.int64)


def _plain(directory: Path) -> dict[str, Any]:
    return dict(preprocessor_from_checkpoint(directory))
