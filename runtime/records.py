r"""Conversations about images on disk: LLaVA's JSON or JSONL, or Hugging Face chat messages.

    {"id": "1", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat?"},
                                                    {"from": "gpt", "value": "A cup."}]}
    {"messages": [{"role": "user", "content": [{"type": "image", "path": "a.jpg"},
                                               {"type": "text", "text": "What?"}]},
                  {"role": "assistant", "content": "A cup."}]}

LLaVA's own training moves the one image of a turn before its words, wherever `<image>` is written
in them, and so does this reader; several images stay where they are. In chat messages every part
stays where it is, and the chat template decides. Both kinds may begin with a system turn ("from" or
"role": "system"), or have a field "system", as ShareGPT; it is fed as what `run --system` gives.

A file is indexed once and records are read when they are asked for, so that a million of them need
eight bytes each.
"""

from __future__ import annotations

import json
import mmap
import re
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchsieve.contract.errors import PatchsieveError

PLACEHOLDER = "<image>"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_ROLES |= {"system": "system"}
_MEND = "correct that record, or remove it"
_MARKS = re.compile(rb'[{}\[\]]|"(?:[^"\\]|\\.)*"', re.DOTALL)  # brackets, and strings whole


@dataclass(frozen=True)
class Record:
    """One conversation.

    Attributes:
        where: File and number, for messages.
        messages: `{"role", "content"}` each, content a list of parts, as chat templates take them.
        images: Files of the images in the order of their parts.
        answers: What several people answered, if the record says so.
        category: Kind of the question, if the record says so.
    """

    where: str
    messages: list[dict[str, Any]]
    images: list[Path]
    answers: tuple[str, ...] = ()
    category: str = ""


class Records:
    """The conversations of one file.

    Args:
        path: JSON (one array) or JSONL.
        image_folder: Folder of relative image paths; the file's own folder by default.

    Raises:
        PatchsieveError: The file cannot be read or holds no record.
    """

    def __init__(self, path: Path, image_folder: Path | None = None) -> None:
        self.path, self.image_folder = path, image_folder or path.parent
        try:
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise PatchsieveError(
                f"cannot read the data {path}",
                found=error,
                expected="a JSON or JSONL file",
                do="give another --data",
            ) from error
        self._spans = array("q", (edge for span in _spans(self._bytes) for edge in span))
        if not self._spans:
            raise PatchsieveError(
                f"the data {path} holds no record",
                expected="a JSON array, or one object a line",
                do="give another --data",
            )

    def __len__(self) -> int:
        return len(self._spans) // 2

    def __getitem__(self, index: int) -> Record:
        where = f"{self.path.name} record {index}"
        start, end = self._spans[2 * index : 2 * index + 2]
        try:
            data = json.loads(self._bytes[start:end])
        except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON
            raise PatchsieveError(
                f"{where} is not JSON", found=str(error)[:100], do=_MEND
            ) from error
        return _record(data, where, self.image_folder)


def _spans(data: mmap.mmap) -> Iterator[tuple[int, int]]:
    """First byte of each record and the byte after it: the objects that no other object holds.

    The same walk serves an array and lines: what is between the objects does not matter.

    Raises:
        PatchsieveError: The braces do not match, as in a truncated file: records may be hidden.
    """
    depth, start = 0, 0
    for mark in _MARKS.finditer(data):
        sign = mark.group()[:1]
        if sign == b"{":
            if depth == 0:
                start = mark.start()
            depth += 1
        elif sign == b"}":
            depth -= 1
            if depth == 0:
                yield start, mark.end()
            if depth < 0:
                raise PatchsieveError(
                    "the data closes a record that it did not open",
                    found=f"}} at byte {mark.start()}",
                    do="correct that line, or remove it",
                )
    if depth:
        raise PatchsieveError(
            "the data breaks off inside a record",
            found=f"the one from byte {start} on does not end",
            do="get the whole file again, or remove that record",
        )


def _record(data: Any, where: str, folder: Path) -> Record:
    messages, named = _conversation(data, where)
    files = _files(data, messages, named, where)
    if messages[-1]["role"] != "assistant":
        raise PatchsieveError(
            f"{where} does not end in an answer",
            found=f"a turn of the {messages[-1]['role']}",
            expected="an assistant's turn",
            do="remove the turns after its last answer",
        )
    answers, category = data.get("answers", []), data.get("category", "")
    if not (isinstance(answers, list) and all(isinstance(a, str) for a in [*answers, category])):
        raise PatchsieveError(
            f"{where} has answers or a category of another kind",
            found=repr((answers, category))[:80],
            expected="answers: a list of strings; category: a string",
            do=_MEND,
        )
    return Record(where, messages, [folder / file for file in files], tuple(answers), category)


def _conversation(
    data: Mapping[str, Any], where: str
) -> tuple[list[dict[str, Any]], list[str | None]]:
    """The turns as chat templates take them, and the file of each image, None if unnamed."""
    messages: list[dict[str, Any]] = []
    files: list[str | None] = []
    for turn in _turns(data, where):
        said = turn.get("role", turn.get("from"))
        role = _ROLES.get(said) if isinstance(said, str) else None
        if role is None:
            raise PatchsieveError(
                f"{where} has a turn of nobody",
                found=repr(said)[:60],
                expected=", ".join(_ROLES),
                do="correct its role",
            )
        is_llava = "role" not in turn and "content" not in turn
        parts, own = _parts(turn.get("content", turn.get("value")), where, is_llava)
        if role == "system" and own:
            raise PatchsieveError(
                f"{where} has an image in its system turn",
                expected="text only",
                do="move the image to the first question",
            )
        messages.append({"role": role, "content": parts})
        files += own
    return messages, files


def _turns(data: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The turns as the record has them; ShareGPT's `system` comes first, as a turn."""
    turns = data.get("messages", data.get("conversations"))
    if not isinstance(turns, list) or not turns or not all(isinstance(t, dict) for t in turns):
        raise PatchsieveError(
            f"{where} holds no conversation",
            found=", ".join(data)[:80],
            expected="messages or conversations, a list of objects",
            do=_MEND,
        )
    system = data.get("system") or ""
    if not isinstance(system, str):
        raise PatchsieveError(
            f"{where} has a system prompt that is no text",
            found=repr(system)[:60],
            expected="a string",
            do="write it as a string, or as a turn of the role system",
        )
    if not system.strip():
        return turns
    if any("system" in (turn.get("role"), turn.get("from")) for turn in turns):
        raise PatchsieveError(
            f"{where} has two system prompts",
            found="the field system, and a turn",
            do="remove one of them",
        )
    return [{"role": "system", "content": system}, *turns]


def _files(
    data: Mapping[str, Any], messages: list[dict[str, Any]], found: list[str | None], where: str
) -> list[str]:
    """The file of each image: named in the parts, or by the record for all of them.

    If the record names images and the turns show none, the images come before the first question.

    Args:
        data: The record.
        messages: Its turns, changed in that case.
        found: The file of each image part, None if unnamed.
        where: File and number, for messages.
    """
    listed = data.get("images", data.get("image", []))
    files: list[Any] = list(listed) if isinstance(listed, list) else [listed]
    named = [file for file in found if file is not None]
    if named and files:
        raise PatchsieveError(
            f"{where} names its images twice",
            found="paths in the parts, and in the field image or images",
            expected="one of them",
            do="remove one of them",
        )
    shown = len(found)
    if not found and files:
        first = next((m for m in messages if m["role"] == "user"), messages[0])
        first["content"] = [*[{"type": "image"}] * len(files), *first["content"]]
        shown = len(files)
    files = named or files
    if len(files) != shown or not all(isinstance(file, str) and file for file in files):
        raise PatchsieveError(
            f"{where} has other images than placeholders",
            found=f"{len(files)} images, {shown} placeholders",
            expected=f"a path for each {PLACEHOLDER} or image part",
            do=_MEND,
        )
    return files


def _parts(
    content: Any, where: str, is_llava: bool = False
) -> tuple[list[dict[str, Any]], list[str | None]]:
    """A turn's content as parts, and the file of each image part, None if unnamed."""
    if is_llava and isinstance(content, str) and content.count(PLACEHOLDER) == 1:
        text = content.replace(PLACEHOLDER, "").strip()  # as LLaVA's preprocess_multimodal
        return [{"type": "image"}, *([{"type": "text", "text": text}] if text else [])], [None]
    if isinstance(content, str):
        pieces = content.split(PLACEHOLDER)
        parts: list[dict[str, Any]] = []
        for number, piece in enumerate(pieces):
            parts += [{"type": "image"}] if number else []
            text = piece.strip("\n") if len(pieces) > 1 else piece
            parts += [{"type": "text", "text": text}] if text else []
        return parts, [None] * (len(pieces) - 1)
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise PatchsieveError(
            f"{where} has a turn without content",
            found=repr(content)[:60],
            expected="a string, or a list of parts",
            do=_MEND,
        )
    parts, files = [], []
    for part in content:
        if part.get("type") == "image":
            parts.append({"type": "image"})
            files.append(part.get("path", part.get("image")))
        elif part.get("type") == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        else:
            raise PatchsieveError(
                f"{where} has a part that is neither text nor an image",
                found=repr(part)[:60],
                expected='"type": "text" or "image"',
                do=_MEND,
            )
    return parts, files
