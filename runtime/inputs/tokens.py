"""From a prompt's text to token ids, with one token per image and the instruction's place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from patchsieve.contract.errors import BundleError, RequestError
from patchsieve.runtime.inputs.prompt import Prompt

_ANCHORS = (".", "\n", "a")  # put before a suffix, so that it does not begin a text


class PromptTokenizer:
    """A bundle's tokenizer, which knows the placeholder of an image.

    Args:
        file: The bundle's tokenizer.json. Its post-processor decides about BOS.
        image_token: The placeholder of an image.
        image_token_id: Its id.
        bos_token: The token that begins a text; None or empty if the model has none.

    Raises:
        BundleError: The tokenizer is missing or does not know the image token.
    """

    def __init__(
        self, file: Path, image_token: str, image_token_id: int, bos_token: str | None
    ) -> None:
        if not file.is_file():
            raise BundleError(
                "the bundle has no tokenizer", found=f"no {file}", do="export it again"
            )
        self.tokenizer = Tokenizer.from_file(str(file))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.image_token, self.image_token_id = image_token, image_token_id
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
        self._bos_token = bos_token

    def encode(self, text: str, spans: list[tuple[int, int]]) -> Prompt:
        """Tokenise a whole text.

        BOS is added as the tokenizer's post-processor does, unless the text begins with it.

        Args:
            text: The text.
            spans: Characters of it that are the instruction.

        Raises:
            RequestError: The tokenizer does not see every image, or nothing follows the last one.
        """
        has_bos = bool(self._bos_token) and text.startswith(str(self._bos_token))
        encoding = self.tokenizer.encode(text, add_special_tokens=not has_bos)
        return self._prompt(text, spans, encoding.ids, encoding.offsets)

    def encode_suffix(self, text: str, spans: list[tuple[int, int]]) -> Prompt:
        """Tokenise the continuation of a text: no BOS, and no space of a text's beginning.

        A tokenizer sees that a text begins, so the suffix is tokenised after an anchor, which is
        then cut off. A token may begin with the anchor's trailing space, which offsets do not
        always show: the first anchor that no token reaches across is taken.

        Args:
            text: The suffix.
            spans: Characters of it that are the instruction.

        Raises:
            RequestError: As for `encode`.
        """
        for anchor in _ANCHORS:
            encoding = self.tokenizer.encode(anchor + text, add_special_tokens=False)
            offsets = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
            inside = offsets[:, 1] > len(anchor)
            if inside.any() and (offsets[inside, 0] >= len(anchor)).all():
                first = int(np.argmax(inside))
                return self._prompt(
                    text, spans, encoding.ids[first:], offsets[first:] - len(anchor)
                )
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        return self._prompt(text, spans, encoding.ids, encoding.offsets)

    def _prompt(
        self, text: str, spans: list[tuple[int, int]], token_ids: list[int], places: object
    ) -> Prompt:
        """Put a prompt together: T ids, and the characters of `text` that each holds, [T, 2]."""
        ids = np.asarray(token_ids, dtype=np.int64)
        offsets = np.asarray(places, dtype=np.int64).reshape(-1, 2)
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
        if not has_question:  # what follows the last image stands in for it
            last = int(images[-1]) if len(images) else -1
            chosen = np.arange(len(ids)) > last
            if not chosen.any():
                raise RequestError(
                    "the prompt has no token after its last image",
                    found=repr(text[-40:]),
                    do="add a question after the image",
                )
        return Prompt(text, ids, images, np.flatnonzero(chosen), offsets, has_question)
