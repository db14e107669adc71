"""Where the user's question is in a rendered conversation."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from patchsieve.contract.errors import RequestError
from patchsieve.runtime.inputs.chat_template import ChatTemplate, Message

_LOG = logging.getLogger(__name__)
# Private-use characters that mark the instruction in a second render
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"


def instruction_spans(
    template: ChatTemplate, messages: Sequence[Message], text: str, image_token: str
) -> list[tuple[int, int]]:
    """Find the text of the last user message in a rendered conversation.

    A second render with marks around the text finds it exactly, even if the text is a letter that
    the role markers hold too. Where the marks change the result (a template that looks into its
    messages), the text is searched from the right.

    Args:
        template: The template that rendered `text`.
        messages: The conversation.
        text: `template.render(messages)`.
        image_token: The placeholder of an image, which is no part of the instruction.

    Returns:
        Spans of characters, ascending; none if the message has no text or the template rewrites
        it beyond recognition.
    """
    number = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    if number < 0:
        return []
    pieces = message_texts(messages[number], image_token)
    marked = [*messages[:number], _mark(messages[number], image_token), *messages[number + 1 :]]
    if pieces and not (_OPEN in text or _CLOSE in text):
        try:
            spans, plain = _read_marks(template.render(marked))
        except RequestError:
            spans, plain = [], ""
        if plain == text and len(spans) == len(pieces):
            return spans
    spans, end = [], len(text)
    for piece in reversed(pieces):
        start = text.rfind(piece, 0, end)
        if start < 0:
            _LOG.warning("the chat template rewrites the question: its place is not exact")
            return []
        spans.append((start, start + len(piece)))
        end = start
    return spans[::-1]


def message_texts(message: Message, image_token: str) -> list[str]:
    """Return the text between placeholders, stripped, without empty pieces."""
    content = message["content"]
    texts = [content] if isinstance(content, str) else [p["text"] for p in content if "text" in p]
    pieces = (piece.strip() for text in texts for piece in text.split(image_token))
    return [piece for piece in pieces if piece]


def _mark(message: Message, image_token: str) -> Message:
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": _mark_text(content, image_token)}
    parts = [
        {**part, "text": _mark_text(part["text"], image_token)} if "text" in part else part
        for part in content
    ]
    return {**message, "content": parts}


def _mark_text(text: str, image_token: str) -> str:
    """Marks around what is neither outer space nor a placeholder, so that trimming still works."""
    pieces = []
    for piece in text.split(image_token):
        core = piece.strip()
        start = piece.find(core)
        end = start + len(core)
        marked = f"{piece[:start]}{_OPEN}{core}{_CLOSE}{piece[end:]}"
        pieces.append(marked if core else piece)
    return image_token.join(pieces)


def _read_marks(marked: str) -> tuple[list[tuple[int, int]], str]:
    """Spans between marks, and the text without them; no spans where a mark was moved."""
    plain, *chunks = marked.split(_OPEN)
    spans: list[tuple[int, int]] = []
    for chunk in chunks:
        inside, _, rest = chunk.partition(_CLOSE)
        spans.append((len(plain), len(plain) + len(inside)))
        plain += inside + rest
    is_paired = all(chunk.count(_CLOSE) == 1 for chunk in chunks)
    return (spans if is_paired and _CLOSE not in plain else []), plain
