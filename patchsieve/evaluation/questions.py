"""Questions with known answers: conversations as calibration reads them, each question on its own.

A record may hold `answers`, what each of several people said (VQAv2's ten), and `category`, by
which the report is divided.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from patchsieve.calibration.records import Record, Records
from patchsieve.errors import PatchsieveError


@dataclass(frozen=True)
class Question:
    """One question about the images of a record.

    Attributes:
        key: Which record and which of its questions: "12" or "12.1".
        prompt: The user's words, a placeholder for each image.
        images: Files.
        references: Right answers.
        is_vote: The references are what several people said.
        category: Where the report counts it.
    """

    key: str
    prompt: str
    images: list[Path]
    references: tuple[str, ...]
    is_vote: bool
    category: str

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
    roles = [message["role"] for message in record.messages]
    if roles != ["user", "assistant"] * (len(roles) // 2):
        raise PatchsieveError(
            f"{record.where} is not questions and answers in turn",
            found=", ".join(roles)[:80],
            expected="user, assistant, user, assistant ...",
        )
    answered = range(1, len(roles), 2)
    out = []
    for number, place in enumerate(answered):
        # A later question has no image of its own: the record's come first, as `run` puts them.
        prompt = _text(record.messages[place - 1], image_token if number == 0 else None)
        out.append(
            Question(
                key=str(index) if len(answered) == 1 else f"{index}.{number}",
                prompt=prompt,
                images=record.images,
                references=record.answers or (_text(record.messages[place]),),
                is_vote=len(record.answers) > 1,
                category=record.category,
            )
        )
    return out


def _text(message: dict[str, object], image_token: str | None = None) -> str:
    """The words of a message, with a token for each image where one is given."""
    parts = message["content"]
    assert isinstance(parts, list)  # as `Records` makes them
    pieces = [part["text"] if part["type"] == "text" else image_token for part in parts]
    return "\n".join(piece for piece in pieces if piece is not None)
