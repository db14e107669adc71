"""From a chat or a raw text to token ids, with one token per image and the instruction's place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Encoding, Tokenizer

from patchsieve.contract.errors import BundleError, RequestError
from patchsieve.runtime.inputs.chat_template import ChatTemplate, Message, is_part
from patchsieve.runtime.inputs.instruction import instruction_spans, message_texts

_ANSWER = "\ue0f2"  # a private-use character that stands for an answer
_SYSTEM = "\ue0f3"  # and one for a system prompt
_ANCHORS = (".", "\n", "a")  # what may stand before a suffix, so that it does not begin a text


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt in which each image is still one token.

    Attributes:
        text: The rendered prompt.
        token_ids: int64 [T].
        image_positions: Indices in `token_ids` of the M image tokens, int64 [M].
        instruction: Indices in `token_ids` of the tokens that hold the last user message's text,
            without role markers and image tokens, int64.
        offsets: First character of each token in `text`, and the one behind its last, int64 [T, 2].
        has_question: The instruction is the user's words; else it is what stands in for them.
    """

    text: str
    token_ids: np.ndarray
    image_positions: np.ndarray
    instruction: np.ndarray
    offsets: np.ndarray
    has_question: bool

    @property
    def num_text(self) -> int:
        """Tokens that are no images."""
        return len(self.token_ids) - len(self.image_positions)

    def question(self) -> tuple[str, np.ndarray]:
        """The instruction alone: its text, and each of its tokens' places in it, [T', 2].

        What stands between its parts, an image say, is blank, so that the places fit.
        """
        spans = self.offsets[self.instruction]
        first, last = int(spans[:, 0].min()), int(spans[:, 1].max())
        own = np.zeros(last - first, bool)
        for start, stop in spans - first:
            own[start:stop] = True
        text = self.text[first:last]
        return "".join(c if keep else " " for c, keep in zip(text, own, strict=True)), spans - first


@dataclass(frozen=True)
class ExpandedPrompt:
    """A prompt in which each image has as many tokens as the LLM is fed.

    Attributes:
        token_ids: int64 [L0].
        image_index: Number of the image that a row belongs to, -1 for text, int64 [L0].
        instruction_rows: Rows of the instruction's tokens, int64.
        image_spans: First row and the row after the last, per image.
    """

    token_ids: np.ndarray
    image_index: np.ndarray
    instruction_rows: np.ndarray
    image_spans: list[tuple[int, int]]


def expand(prompt: Prompt, visual_tokens_per_image: int) -> ExpandedPrompt:
    """Repeat each image token, as LlavaProcessor repeats the placeholder before tokenising.

    Args:
        prompt: The prompt, T tokens with M images.
        visual_tokens_per_image: Rows N of one image, so L0 = T + M (N - 1).

    Returns:
        The expanded prompt.

    Raises:
        RequestError: `visual_tokens_per_image` is below 1.
    """
    if visual_tokens_per_image < 1:
        raise RequestError(
            "bad visual_tokens_per_image", found=visual_tokens_per_image, expected=">= 1"
        )
    counts = np.ones(len(prompt.token_ids), dtype=np.int64)  # [T]
    counts[prompt.image_positions] = visual_tokens_per_image
    starts = np.cumsum(counts) - counts  # [T], first row of each token
    owner = np.full(len(prompt.token_ids), -1, dtype=np.int64)
    owner[prompt.image_positions] = np.arange(len(prompt.image_positions))
    spans = [(int(s), int(s) + visual_tokens_per_image) for s in starts[prompt.image_positions]]
    return ExpandedPrompt(
        token_ids=np.repeat(prompt.token_ids, counts),  # [L0]
        image_index=np.repeat(owner, counts),  # [L0]
        instruction_rows=starts[prompt.instruction],
        image_spans=spans,
    )


# What a turn says: its words, or the parts of a message.
Content = str | Sequence[Mapping[str, str]]


class PromptBuilder:
    """Renders and tokenises prompts for one bundle.

    The image token's literal text is a placeholder wherever it stands, also in a user's text. The
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
            chat_template: Jinja text, or None where the checkpoint has none.
            image_token: The placeholder of an image.
            image_token_id: Its id.
            special_tokens: `bos_token`, `eos_token` ..., passed to the template by these names.

        Raises:
            BundleError: The tokenizer is missing, does not know the image token, or the template
                does not compile.
        """
        if not Path(tokenizer_file).is_file():
            raise BundleError(
                "the bundle has no tokenizer", found=f"no {tokenizer_file}", do="export it again"
            )
        self.tokenizer = Tokenizer.from_file(str(tokenizer_file))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.image_token = image_token
        self.image_token_id = image_token_id
        ids = self.tokenizer.encode(image_token, add_special_tokens=False).ids
        if ids != [image_token_id]:
            raise BundleError(
                f"the tokenizer does not know the image token {image_token!r}",
                found=f"ids {ids}",
                expected=f"[{image_token_id}]",
                do="add it to the checkpoint's tokenizer as a special token and export again",
            )
        added = self.tokenizer.get_added_tokens_decoder()
        self._special_ids = [token for token, entry in added.items() if entry.special]
        special_tokens = dict(special_tokens or {})
        self._bos_token = special_tokens.get("bos_token") or None
        self._template = None
        if chat_template is not None:
            self._template = ChatTemplate(
                chat_template, image_token=image_token, special_tokens=special_tokens
            )

    @property
    def has_chat_template(self) -> bool:
        """Whether `build` works; without a template only `build_raw` does."""
        return self._template is not None

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
        encoding = self._encode(text)
        return self._prompt(text, encoding, spans)

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
        encoding = self._encode(text)
        after = text.rfind(self.image_token) + len(self.image_token) if num_images else 0
        spans = [(after, len(text))] if text[after:].strip() else [(0, len(text))]
        return self._prompt(text, encoding, spans)

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
            The suffix for `tokenize_suffix`, or None where the template renders earlier turns
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

    def tokenize_suffix(self, text: str, messages: Sequence[Message] | None = None) -> Prompt:
        """Tokenise the continuation of a text: no BOS, and no space of a text's beginning.

        Args:
            text: The suffix from `continuation`.
            messages: The conversation; with it the instruction is found as in `build`, else as in
                `build_raw`.

        Returns:
            A prompt whose indices count from the suffix's first token.

        Raises:
            RequestError: The suffix is empty.
        """
        if not text:
            raise _nothing_to_send()
        after = text.rfind(self.image_token)
        after = after + len(self.image_token) if after >= 0 else 0
        spans = [(after, len(text))]
        if messages is not None:
            template = self._required_template()
            whole = template.render(messages)
            start = len(whole) - len(text)
            found = instruction_spans(template, messages, whole, self.image_token)
            found = [(begin - start, end - start) for begin, end in found]
            spans = [span for span in found if span[0] >= 0] or spans
        # A token may begin with the anchor's trailing space, which offsets do not always tell
        for anchor in _ANCHORS:
            encoding = self.tokenizer.encode(anchor + text, add_special_tokens=False)
            offsets = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
            inside = offsets[:, 1] > len(anchor)
            if inside.any() and (offsets[inside, 0] >= len(anchor)).all():
                first = int(np.argmax(inside))
                offsets = offsets[first:] - len(anchor)
                ids = np.asarray(encoding.ids[first:], dtype=np.int64)
                return self._assemble(text, ids, offsets, spans)
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        return self._prompt(text, encoding, spans)

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

    def _encode(self, text: str) -> Encoding:
        has_bos = self._bos_token is not None and text.startswith(self._bos_token)
        return self.tokenizer.encode(text, add_special_tokens=not has_bos)

    def _prompt(self, text: str, encoding: Encoding, spans: list[tuple[int, int]]) -> Prompt:
        offsets = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        return self._assemble(text, np.asarray(encoding.ids, dtype=np.int64), offsets, spans)

    def _assemble(
        self, text: str, ids: np.ndarray, offsets: np.ndarray, spans: list[tuple[int, int]]
    ) -> Prompt:
        """Put a prompt together; ids [T], offsets [T, 2] in characters of `text`."""
        is_image = ids == self.image_token_id  # [T]
        images = np.flatnonzero(is_image)
        if len(images) != text.count(self.image_token):
            raise RequestError(
                "the tokenizer does not see every image placeholder",
                found=f"{len(images)} image tokens",
                expected=text.count(self.image_token),
                do=f"put spaces around {self.image_token}",
            )
        chosen = np.zeros(len(ids), dtype=bool)
        for start, stop in spans:
            chosen |= (offsets[:, 0] < stop) & (offsets[:, 1] > np.maximum(offsets[:, 0], start))
        chosen &= ~(is_image | np.isin(ids, self._special_ids))
        has_question = bool(chosen.any())
        if not has_question:
            last = int(images[-1]) if len(images) else -1
            chosen = np.arange(len(ids)) > last
            if not chosen.any():
                raise RequestError(
                    "the prompt has no token after its last image",
                    found=repr(text[-40:]),
                    do="add a question after the image",
                )
        return Prompt(text, ids, images, np.flatnonzero(chosen), offsets, has_question)


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
        raise RequestError(f"the {what} is not valid Unicode", found=error.reason) from error
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
