"""A tokenised prompt, with one token per image or with each image's visual tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from patchsieve.contract.errors import RequestError


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


def expand(prompt: Prompt, visual_tokens_per_image: int | Sequence[int]) -> ExpandedPrompt:
    """Repeat each image token, as Hugging Face's processors repeat it before tokenising.

    Args:
        prompt: The prompt, T tokens with M images.
        visual_tokens_per_image: Rows of each image, M numbers or one for all.

    Returns:
        The expanded prompt.

    Raises:
        RequestError: A number of `visual_tokens_per_image` is below 1.
    """
    per_image = np.broadcast_to(visual_tokens_per_image, len(prompt.image_positions))  # [M]
    if np.min(visual_tokens_per_image, initial=1) < 1:
        raise RequestError(
            "bad visual_tokens_per_image",
            found=visual_tokens_per_image,
            expected=">= 1",
            do="keep at least one token of an image",
        )
    counts = np.ones(len(prompt.token_ids), dtype=np.int64)  # [T]
    counts[prompt.image_positions] = per_image
    starts = np.cumsum(counts) - counts  # [T], first row of each token
    owner = np.full(len(prompt.token_ids), -1, dtype=np.int64)
    owner[prompt.image_positions] = np.arange(len(prompt.image_positions))
    firsts = starts[prompt.image_positions]
    spans = [(int(s), int(s + n)) for s, n in zip(firsts, per_image, strict=True)]
    return ExpandedPrompt(
        token_ids=np.repeat(prompt.token_ids, counts),  # [L0]
        image_index=np.repeat(owner, counts),  # [L0]
        instruction_rows=starts[prompt.instruction],
        image_spans=spans,
    )
