"""From conversations to samples: what training sees is what a bundle will see.

Prompts, pixels and the rows that judge an image come from the runtime, the patches of an image from
export.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from patchsieve.calibration.samples import Sample
from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.plan import GRID2D
from patchsieve.contract.trained import LAYOUTS, Trained, sections
from patchsieve.export.families import family_of
from patchsieve.export.source.checkpoint import Checkpoint, locate, read_config
from patchsieve.export.source.tokenizer import write_tokenizer
from patchsieve.runtime.inputs.builder import PromptBuilder
from patchsieve.runtime.inputs.images import load_image
from patchsieve.runtime.inputs.preprocess import Preprocessor
from patchsieve.runtime.inputs.prompt import Prompt, expand
from patchsieve.runtime.positions import number_rows
from patchsieve.runtime.records import Record
from patchsieve.runtime.rows import TEXT, Rows


class Encoder:
    """Makes samples of a checkpoint's conversations.

    Args:
        checkpoint: Directory or hub id.
        positions: How rows are to be numbered, where not as the checkpoint was trained: "original"
            or "grid2d".
        layout: Of the sections of "grid2d", if the checkpoint has none
            (`patchsieve.contract.trained`).
        revision: Branch, tag or commit of a hub id; None for its main branch.

    Attributes:
        directory: Where the checkpoint lies.
        config: Its config, as Hugging Face is to load it.
        family: The model's family.
        trained: The positions that samples have.
        heads: The checkpoint's own thresholds; None without.
        patch_ids: Raster index of each visual token, -1 for a class token, [N].
        grid: Patch rows and columns.
    """

    def __init__(
        self,
        checkpoint: str,
        positions: str | None = None,
        layout: str | None = None,
        *,
        revision: str | None = None,
    ) -> None:
        self.directory = locate(checkpoint, revision, check=read_config)
        self.config = config = read_config(self.directory)
        self.family = family = family_of(config)
        Checkpoint(self.directory, family)  # refuses gaps that Hugging Face would fill at random
        head_dim = family.decoder(config).head_dim  # refuses what export would refuse
        found = Trained.of(config)
        self.heads = None if found.heads is None else self.directory / found.heads
        self.trained = _positions(found, head_dim, positions, layout)
        self.tower = tower = family.vision(config)
        self.patch_ids, self.grid = np.array(tower.raster_ids), tower.grid
        self.preprocessor = Preprocessor.from_dict(family.preprocessor(self.directory, tower))
        with tempfile.TemporaryDirectory() as folder:
            made = write_tokenizer(self.directory, Path(folder), image_token=family.image_token)
            self.prompts = PromptBuilder(
                Path(folder) / "tokenizer.json",
                made["chat_template"],
                image_token=made["image_token"],
                image_token_id=config.image_token_id,
                special_tokens=made["special_tokens"],
            )
        self.eos = made["eos_token_ids"][:1]
        if not self.eos:  # generation_config.json may name no end; a learnt answer has one
            named = self.prompts.tokenizer.token_to_id(made["special_tokens"].get("eos_token", ""))
            self.eos = [] if named is None else [named]

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
                f"{record.where} shows an image after its first question",
                found=f"{len(record.images)} images in all, {shown} in the first question",
                expected="every image in the first question: its survivors are chosen there",
                do="move the image to the first question, or divide the record",
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
        length = sum(map(len, ids))
        pixels = [self.preprocessor(load_image(path)) for path in record.images]
        return Sample(
            input_ids=torch.from_numpy(np.concatenate(ids)),
            labels=torch.from_numpy(np.concatenate(labels)),
            visual=[torch.from_numpy(rows) for rows in visual],
            text=[torch.from_numpy(rows) for rows in text],
            pixel_values=torch.from_numpy(np.stack(pixels)) if pixels else None,
            position_ids=self._number(length, rows.image_spans),
        )

    def _number(self, length: int, spans: Sequence[tuple[int, int]]) -> torch.Tensor | None:
        """Positions of all rows as a bundle numbers them, [L, A]; None for their places."""
        rule, parts = self.trained.position_rule, self.trained.rotary_sections
        if not parts:
            return None
        images = [(slice(*span), self.patch_ids) for span in spans]
        return torch.from_numpy(number_rows(length, images, self.tower, rule, len(parts))[:-1])

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


def _positions(found: Trained, head_dim: int, positions: str | None, layout: str | None) -> Trained:
    """What the checkpoint says of positions, or what is asked instead."""
    rule = found.position_rule if positions is None else positions
    if rule != GRID2D:
        return Trained()
    if layout is None and found.rotary_sections:
        return Trained(GRID2D, found.rotary_sections)
    return Trained(GRID2D, sections(head_dim, layout or LAYOUTS[0]))
