"""Renders a chat template as transformers does, without transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import jinja2.utils
from jinja2 import TemplateError, nodes
from jinja2.parser import Parser

from patchsieve.contract.errors import BundleError, RequestError

# What a template's own code can raise on messages that it was not written for
_RENDER_ERRORS = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError)
_PROBE_LEFT, _PROBE_RIGHT = "qleftq", "qrightq"

Message = Mapping[str, Any]
# What a turn says: its words, or the parts of a message.
Content = str | Sequence[Mapping[str, str]]


class ChatTemplate:
    """One compiled template and the form of message content that it can read.

    Templates differ: LLaVA's read a list of parts and silently drop a plain string, those of
    text-only models read a string and fail on a list. Three renders of a probe find out which.

    Attributes:
        reads_parts: A list of parts renders with its images and texts.
        reads_text: A plain string renders.
        keeps_order: Images and texts of a list appear in the list's order.
    """

    def __init__(
        self, source: str, *, image_token: str, special_tokens: Mapping[str, str] | None = None
    ) -> None:
        """Compile and probe a template.

        Args:
            source: The Jinja text.
            image_token: What the template writes for an image.
            special_tokens: Variables of the template, such as `bos_token`.

        Raises:
            BundleError: The source is not a Jinja template.
        """
        self._special_tokens = dict(special_tokens or {})
        self._image_token = image_token
        try:
            self._template = _environment().from_string(source)
        except TemplateError as error:
            raise BundleError(
                "the bundle's chat template does not compile",
                found=str(error),
                do="export again from a checkpoint with a working template",
            ) from error
        self._probe()

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Write out a conversation.

        Args:
            messages: `role` and `content`; content is a string or a list of
                `{"type": "image"}` and `{"type": "text", "text": ...}`. Passed on as it is where
                the template reads that form; else a string becomes a list of one part, or a list a
                string with one image token and a newline per leading image.
            add_generation_prompt: End with the opening of the assistant's turn.

        Returns:
            The text to tokenise.

        Raises:
            RequestError: The messages have another form, or the template refuses them.
        """
        _check_messages(messages)
        try:
            return self._render([self._adapt(m) for m in messages], add_generation_prompt)
        except _RENDER_ERRORS as error:
            raise RequestError(
                "the chat template refuses these messages",
                found=f"{type(error).__name__}: {error}",
                do="check roles and their order, or use a raw prompt",
            ) from error

    def _render(self, messages: list[Message], add_generation_prompt: bool) -> str:
        return self._template.render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self._special_tokens,
        )

    def _probe(self) -> None:
        left = {"type": "text", "text": _PROBE_LEFT}
        right = {"type": "text", "text": _PROBE_RIGHT}
        parts = self._try([left, {"type": "image"}, right])
        places = [parts.find(mark) for mark in (_PROBE_LEFT, self._image_token, _PROBE_RIGHT)]
        # A template that prints the list itself would show its Python form
        self.reads_parts = min(places) >= 0 and "'type'" not in parts
        self.keeps_order = self.reads_parts and places == sorted(places)
        self.reads_text = _PROBE_LEFT in self._try(_PROBE_LEFT)
        # Some templates read a system turn in another form than a user's
        asked = {"role": "user", "content": [right] if self.reads_parts else _PROBE_RIGHT}
        forms: list[Any] = [[left], _PROBE_LEFT]
        written = [self._try(form, role="system", then=[asked]) for form in forms]
        self._system_forms = [_PROBE_LEFT in text and "'type'" not in text for text in written]

    def _try(
        self,
        content: str | list[dict[str, str]],
        *,
        role: str = "user",
        then: Sequence[Message] = (),
    ) -> str:
        try:
            return self._render([{"role": role, "content": content}, *then], True)
        except _RENDER_ERRORS:
            return ""

    def _adapt(self, message: Message) -> Message:
        content = message["content"]
        reads_parts, reads_text = self.reads_parts, self.reads_text
        if message["role"] == "system":
            reads_parts, reads_text = self._system_forms
        if isinstance(content, str):
            if reads_parts and not reads_text:
                return {**message, "content": [{"type": "text", "text": content}]}
        elif reads_text and not reads_parts:
            return {**message, "content": parts_as_text(content, self._image_token)}
        return message


def parts_as_text(parts: Sequence[Mapping[str, str]], image_token: str) -> str:
    """Parts as one string: an image is its token, and a newline where it leads the message."""
    text = ""
    for part in parts:
        if part["type"] != "image":
            text += part["text"]
        elif text.replace(image_token, "").strip():
            text += image_token
        else:
            text += image_token + "\n"
    return text


def _check_messages(messages: Sequence[Message]) -> None:
    if not messages:
        raise RequestError("the conversation is empty", do="add a user message")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(
                "bad message",
                found=repr(message)[:80],
                expected="role and content",
                do='write {"role": "user", "content": "..."}',
            )
        content = message.get("content")
        if isinstance(content, str):
            continue
        if not isinstance(content, (list, tuple)) or not all(map(is_part, content)):
            raise RequestError(
                "bad message content",
                found=repr(content)[:80],
                expected='a string or a list of {"type": "image"} and {"type": "text", "text": ..}',
                do="write the content as one of them",
            )


def is_part(part: object) -> bool:
    """Whether an object is a text or an image of a message."""
    if not isinstance(part, Mapping):
        return False
    if part.get("type") == "text":
        return isinstance(part.get("text"), str)
    return part.get("type") == "image"


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here it only passes them on."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)  # a scope, as the call block of transformers is


class _Namespace(jinja2.utils.Namespace):
    """Takes no names that begin with an underscore, as in transformers: they reach into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # As in Jinja's, so that a template may set an attribute named self
        self, args = args[0], args[1:]
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _check_attribute(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.sandbox.SecurityError(f"a namespace cannot hold the attribute {name!r}")


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _Namespace
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: Jinja's own filter escapes HTML characters."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
