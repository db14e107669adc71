"""From a chat or a raw text to a prompt: the template's text, and where the instruction is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from patchsieve.contract.errors import RequestError
from patchsieve.runtime.inputs.chat_template import ChatTemplate, Content, Message, is_part
from patchsieve.runtime.inputs.instruction import instruction_spans, message_texts
from patchsieve.runtime.inputs.prompt import Prompt
from patchsieve.runtime.inputs.tokens import PromptTokenizer

_ANSWER = "\ue0f2"  # a private-use character that stands for an answer
_SYSTEM = "\ue0f3"  # and one for a system prompt


class PromptBuilder:
    """Renders and tokenises prompts for one bundle.

    The image token's literal text is a placeholder everywhere, also in a user's text. The
    tokenizer's other special tokens keep their meaning there too, as in Hugging Face.
    """

    def __init__(
        self,
        tokenizer_file: str | Path,
        chat_template: str | None,
        *,
        image_token: str,
        image_token_id: int,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        """Load the tokenizer and compile the template.

        Args:
            tokenizer_file: The bundle's tokenizer.json. Its post-processor decides about BOS.
            chat_template: Jinja text, or None if the checkpoint has none.
            image_token: The placeholder of an image.
            image_token_id: Its id.
            special_tokens: `bos_token`, `eos_token` ..., passed to the template by these names.

        Raises:
            BundleError: The tokenizer is missing, does not know the image token, or the template
                does not compile.
        """
        given = dict(special_tokens or {})
        self._tokens = PromptTokenizer(
            Path(tokenizer_file), image_token, image_token_id, given.get("bos_token")
        )
        self.tokenizer, self.image_token = self._tokens.tokenizer, image_token
        self._template = None
        if chat_template is not None:
            self._template = ChatTemplate(
                chat_template, image_token=image_token, special_tokens=given
            )

    def system_message(self, text: Content) -> Message:
        """A system turn.

        Args:
            text: Its words, or the text parts of a message; empty words are a turn of their own,
                which some templates write instead of their usual system prompt.

        Returns:
            A message, for `build`.

        Raises:
            RequestError: The text is no text or places an image, or the template has no place for
                a system prompt.
        """
        if not _is_parts(text):
            _check_text(text, "system prompt")
            text = [{"type": "text", "text": str(text)}]
        parts: list[Mapping[str, str]] = [dict(part) for part in text if isinstance(part, Mapping)]
        if any(self.image_token in part.get("text", self.image_token) for part in parts):
            raise RequestError(
                "the system prompt cannot hold an image",
                found=self.image_token,
                expected="text only",
                do=f"put {self.image_token} into the prompt",
            )
        message = {"role": "system", "content": parts}
        asked = {"role": "user", "content": _text_parts("a")}
        _check_system(self._required_template(), [message, asked])
        return message

    def user_message(self, text: Content, num_images: int) -> Message:
        """A user's turn from a text and a number of images.

        Args:
            text: The words. Image placeholders in them are used in place; without any, the images
                come first. Empty text is allowed beside an image, if the template puts at least one
                token after the image (`build` checks it). Or the parts of a message, one for each
                image, which stay as they are.
            num_images: How many images the request has.

        Returns:
            A message with a list of parts, for `build`.

        Raises:
            RequestError: Placeholders and images do not match, the text is no text, or there is
                nothing to send.
        """
        if _is_parts(text):
            parts = [dict(part) for part in text if isinstance(part, Mapping)]
            self._check_count(sum(part["type"] == "image" for part in parts), num_images)
            return {"role": "user", "content": parts}
        text = _check_text(text)
        placeholders = text.count(self.image_token)
        if placeholders:
            self._check_count(placeholders, num_images)
        if not text.strip() and num_images == 0:
            raise _nothing_to_send()
        if not placeholders:
            content = [{"type": "image"}] * num_images
            return {"role": "user", "content": content + _text_parts(text)}
        template = self._template
        if template is not None and template.reads_parts and template.keeps_order:
            content = _text_parts(text[: text.index(self.image_token)])
            for piece in text.split(self.image_token)[1:]:
                content += [{"type": "image"}, *_text_parts(piece)]
            return {"role": "user", "content": content}
        # A template that gathers the images in front would move them: leave them in the text
        return {"role": "user", "content": _text_parts(text)}

    def build(self, messages: Sequence[Message], num_images: int) -> Prompt:
        """Render and tokenise a chat, ending with the opening of the assistant's turn.

        BOS is added as the tokenizer's post-processor does, unless the template already wrote it.
        Where the last user message has no text, or the template rewrites it beyond recognition, the
        instruction is every token after the last image.

        Args:
            messages: `{"role", "content"}` each; content is a string or a list of parts.
            num_images: How many images the request has, over all turns.

        Returns:
            The prompt, image tokens not expanded.

        Raises:
            RequestError: No template, bad messages, a system turn that the template leaves out, or
                images and placeholders that do not match.
        """
        template = self._required_template()
        _check_system(template, messages)
        text = template.render(messages)
        self._check_count(text.count(self.image_token), num_images)
        if num_images == 0 and not message_texts(messages[-1], self.image_token):
            raise _nothing_to_send()
        spans = instruction_spans(template, messages, text, self.image_token)
        return self._tokens.encode(text, spans)

    def build_raw(self, text: Content, num_images: int) -> Prompt:
        """Tokenise a text as it is, without a template.

        BOS is added as the tokenizer's post-processor does, unless the text begins with it. Role
        markers cannot be told apart here: the instruction is every token after the last image, or
        all but the special tokens where nothing follows it.

        Args:
            text: The whole prompt, with a placeholder per image.
            num_images: How many images the request has.

        Returns:
            The prompt, image tokens not expanded.

        Raises:
            RequestError: Images and placeholders do not match, or the text is empty or no text.
        """
        text = _check_text(text)
        if not text.strip():
            raise _nothing_to_send()
        self._check_count(text.count(self.image_token), num_images)
        after = text.rfind(self.image_token) + len(self.image_token) if num_images else 0
        spans = [(after, len(text))] if text[after:].strip() else [(0, len(text))]
        return self._tokens.encode(text, spans)

    def continuation(
        self, before: Sequence[Message], messages: Sequence[Message], *, is_answer_cached: bool
    ) -> str | None:
        """The text to feed for the next turn on a cache that holds the earlier ones.

        A cache holds the tokens that the model said, which are more than their text: so answers
        are compared by place, not by their words.

        Args:
            before: The conversation as it stood when the last answer began.
            messages: The conversation now: `before`, the answer, the new question.
            is_answer_cached: The cache holds the last answer; else the text begins with it.

        Returns:
            The suffix for `tokenize_suffix`, or None if the template renders earlier turns
            otherwise than before: then prefill from the start.

        Raises:
            RequestError: No template, or bad messages.
        """
        template = self._required_template()
        if is_answer_cached:
            before, messages = ([_hide_answer(m) for m in given] for given in (before, messages))
        head, whole = template.render(before), template.render(messages)
        if not whole.startswith(head):
            return None
        rest = whole[len(head) :]
        if is_answer_cached:
            rest = rest.lstrip()
            if not rest.startswith(_ANSWER):
                return None
            rest = rest[len(_ANSWER) :]
        return rest or None

    def tokenize_suffix(self, text: str, messages: Sequence[Message] = ()) -> Prompt:
        """Tokenise the continuation of a conversation.

        Args:
            text: The suffix from `continuation`.
            messages: The conversation, in which the instruction is found as in `build`; without it
                the instruction is found as in `build_raw`.

        Returns:
            A prompt whose indices count from the suffix's first token.

        Raises:
            RequestError: The suffix is empty.
        """
        if not text:
            raise _nothing_to_send()
        spans: list[tuple[int, int]] = []
        if messages:
            template = self._required_template()
            whole = template.render(messages)
            start = len(whole) - len(text)
            found = instruction_spans(template, messages, whole, self.image_token)
            spans = [(begin - start, end - start) for begin, end in found if begin >= start]
        if not spans:
            after = text.rfind(self.image_token)
            spans = [(after + len(self.image_token) if after >= 0 else 0, len(text))]
        return self._tokens.encode_suffix(text, spans)

    def _required_template(self) -> ChatTemplate:
        if self._template is None:
            raise RequestError(
                "the bundle has no chat template", do="give the whole prompt as raw text (--raw)"
            )
        return self._template

    def _check_count(self, placeholders: int, num_images: int) -> None:
        if placeholders == num_images:
            return
        if num_images == 0:
            what, do = "the prompt has an image placeholder but no image was given", "give an image"
        elif placeholders > num_images:
            what, do = "the prompt has more placeholders than images", "give one image for each"
        else:
            what, do = "the prompt has fewer placeholders than images", "write one for each image"
        raise RequestError(
            what,
            found=f"{placeholders} x {self.image_token}, images: {num_images}",
            do=f"{do} (the text {self.image_token} is always a placeholder)",
        )


def _text_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}] if text else []


def _nothing_to_send() -> RequestError:
    return RequestError("the prompt is empty", do="give a question, an image or both")


def _is_parts(content: object) -> bool:
    """Whether a turn is given as the parts of a message."""
    return isinstance(content, (list, tuple)) and bool(content) and all(map(is_part, content))


def _check_text(text: object, what: str = "prompt") -> str:
    """Bytes that are no text reach a program as half characters, which no tokenizer takes."""
    if not isinstance(text, str):
        raise RequestError(
            f"the {what} is not text",
            found=f"an object of type {type(text).__name__}",
            expected="a string",
            do="pass the question as a string" if what == "prompt" else "pass a string",
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the {what} is not valid Unicode",
            found=error.reason,
            do="give text in UTF-8",
        ) from error
    return text


def _check_system(template: ChatTemplate, messages: Sequence[Message]) -> None:
    """Refuse a system turn that the template raises on, or leaves out without a word."""
    others = [m for m in messages if not (isinstance(m, Mapping) and m.get("role") == "system")]
    count = len(messages) - len(others)
    if not count:
        return
    marks = {"role": "system", "content": [{"type": "text", "text": _SYSTEM}]}
    found = "it leaves the text out"
    try:
        text = template.render([m if m in others else marks for m in messages])
        if text.count(_SYSTEM) >= count:
            return
    except RequestError as error:
        template.render(others)  # if this fails too, the system turn is not what is wrong
        found = str(error.__cause__ or error)
    raise RequestError(
        "the chat template has no place for a system prompt",
        found=found,
        do="write it at the beginning of the first prompt",
    )


def _hide_answer(message: Message) -> Message:
    if message["role"] != "assistant":
        return message
    return {"role": "assistant", "content": [{"type": "text", "text": _ANSWER}]}
