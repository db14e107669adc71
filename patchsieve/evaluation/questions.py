"""Questions with known answers: conversations as calibration reads them, each question on its own.

A record may hold `answers`, what each of several people said (VQAv2's ten), and `category`, by
which the report is divided.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from patchsieve.contract.errors import PatchsieveError
from patchsieve.runtime.inputs.chat_template import Content
from patchsieve.runtime.records import Record, Records


@dataclass(frozen=True)
class Question:
    """One question about the images of a record.

    Attributes:
        key: Which record and which of its questions: "12" or "12.1".
        prompt: The user's words, for people: a placeholder for each image that is not in front.
        images: Files.
        references: Right answers.
        is_vote: The references are what several people said.
        category: Where the report counts it.
        parts: The words and images as calibration has them; empty if the prompt says it all.
        system: The parts of the record's system turn; None without.
    """

    key: str
    prompt: str
    images: list[Path]
    references: tuple[str, ...]
    is_vote: bool
    category: str
    parts: tuple[Mapping[str, str], ...] = ()
    system: tuple[Mapping[str, str], ...] | None = None

    @property
    def content(self) -> Content:
        """What `Model.generate` is asked: the prompt that calibration makes of the record."""
        return self.parts or self.prompt

    @property
    def subject(self) -> str:
        """What it is about: the same for questions about the same images."""
        return "\n".join(map(str, self.images)) or self.key


def questions_of(records: Records, image_token: str, limit: int | None = None) -> list[Question]:
    """Every question of the records, in order; the first `limit` of them.

    Args:
        records: The conversations.
        image_token: What the bundle's prompts write for an image.
        limit: How many questions at most.

    Raises:
        PatchsieveError: An image is missing, or a record is not well formed.
    """
    found: list[Question] = []
    for index in range(len(records)):
        if limit is not None and len(found) >= limit:
            break
        record = records[index]
        for path in record.images:
            if not path.is_file():
                raise PatchsieveError(
                    f"{record.where} names an image that is not there",
                    found=path,
                    do="correct --image-folder",
                )
        found += _questions(record, index, image_token)
    return found[:limit]


def _questions(record: Record, index: int, image_token: str) -> list[Question]:
    messages = list(record.messages)
    system = None
    if messages[0]["role"] == "system":
        system = tuple(messages.pop(0)["content"])
    roles = [message["role"] for message in messages]
    if roles != ["user", "assistant"] * (len(roles) // 2):
        raise PatchsieveError(
            f"{record.where} is not questions and answers in turn",
            found=", ".join(roles)[:80],
            expected="user, assistant, user, assistant ..., after at most one system turn",
            do="correct that record, or remove it",
        )
    if sum(part["type"] == "image" for part in messages[0]["content"]) != len(record.images):
        raise PatchsieveError(
            f"{record.where} shows an image after its first question",
            found=f"{len(record.images)} images in all",
            expected="every image in the first question: its survivors are chosen there",
            do="move the image to the first question, or divide the record",
        )
    answered = range(1, len(roles), 2)
    out = []
    for number, place in enumerate(answered):
        parts = list(messages[place - 1]["content"])
        if number:
            # Each question is asked on its own, about all images of the record, which come first.
            parts = [{"type": "image"}] * len(record.images) + _texts(parts)
        out.append(
            Question(
                key=str(index) if len(answered) == 1 else f"{index}.{number}",
                prompt=_prompt(parts, image_token),
                images=record.images,
                references=record.answers or ("\n".join(_words(messages[place]["content"])),),
                is_vote=len(record.answers) > 1,
                category=record.category,
                parts=tuple(parts),
                system=system,
            )
        )
    return out


def _prompt(parts: Sequence[Mapping[str, str]], image_token: str) -> str:
    """The same in one string: images in front need no placeholder, as in `run`."""
    texts, images = _texts(parts), len(parts) - len(_texts(parts))
    if list(parts[images:]) == texts:
        return "\n".join(_words(parts))
    return "".join(image_token if p["type"] == "image" else p["text"] for p in parts)


def _texts(parts: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    return [part for part in parts if part["type"] == "text"]


def _words(parts: Sequence[Mapping[str, str]]) -> list[str]:
    return [part["text"] for part in _texts(parts)]
