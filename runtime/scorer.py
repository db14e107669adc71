"""CLIP's text tower over a question of any length: every token in the space of the image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from patchsieve.contract import names
from patchsieve.contract.model import Scorer


class TextScorer:
    """Tokeniser and windows of a bundle's scorer.

    Differs from open_clip: its tokeniser also repairs broken encodings and HTML escapes before it
    lower-cases and collapses spaces. Here the text stays what the user wrote, so that each token
    keeps its characters' places.

    Args:
        facts: What the manifest says of the scorer.
        tokenizer_file: The bundle's tokenizer of the scorer.
        run: Runs the scorer's graph: `text_ids` [W, P] -> `text_features` [W, P, E].
    """

    def __init__(
        self, facts: Scorer, tokenizer_file: Path, run: Callable[[np.ndarray], np.ndarray]
    ) -> None:
        self.facts, self._run = facts, run
        self._tokenizer = Tokenizer.from_file(str(tokenizer_file))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def __call__(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Each token of a text in the joint space (eq. 5).

        The paper leaves open: texts longer than CLIP takes. They are cut into windows, each with
        its own marks of beginning and end.

        Args:
            text: Any text; of empty text there are no tokens.

        Returns:
            Features [K, E] of its K tokens, marks left out, and their spans of characters [K, 2].
        """
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        spans = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
        ids = np.asarray(encoding.ids, np.int64)
        if not len(ids):
            return np.zeros((0, self.facts.width), np.float32), spans
        windows, is_content = self._windows(ids)
        most = names.MOST_WINDOWS
        parts = range(0, len(windows), most)
        features = [self._run(windows[first : first + most]) for first in parts]
        return np.concatenate(features)[is_content], spans

    def _windows(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Windows of tokens with marks, [W, P], and which places hold the text's own, bool."""
        size = self.facts.window - 2
        count = -(-len(ids) // size)
        windows = np.full((count, self.facts.window), self.facts.eos_id)  # [W, P]
        windows[:, 0] = self.facts.bos_id
        is_content = np.zeros(windows.shape, bool)
        is_content[:, 1 : 1 + size] = (np.arange(count * size) < len(ids)).reshape(count, size)
        windows[is_content] = ids
        return windows, is_content
