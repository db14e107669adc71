"""The pseudo-CLS of IVTP (Huang et al., 2024, eqs. 6-8): the question's words that name the image.

Two tokenisers cut the question. CLIP's text tower says of each of its tokens how like the image it
is; by the characters that they share this passes to the language model's tokens; the mean of those
that pass a threshold is the pseudo-CLS.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

NO_OVERLAP = -np.inf  # relevance of a token that shares no character with any of CLIP's


@dataclass(frozen=True)
class VisualCls:
    """What the tower says of one image as a whole.

    Attributes:
        features: Class token through the projector, [C].
        joint: Class token in the space of the text tower, [E]; None if no plan compares.
    """

    features: np.ndarray
    joint: np.ndarray | None


@dataclass(frozen=True)
class Words:
    """Which of the question's tokens stand for it where an image is judged.

    Attributes:
        image: Number of the image in the conversation.
        tokens: The question's tokens as text.
        relevance: C_i of each token (eq. 7), -inf for none, [T]; None if nothing was compared.
        selected: The tokens whose mean is the pseudo-CLS, bool [T]; where there is none, the
            projected visual CLS is.
    """

    image: int
    tokens: tuple[str, ...]
    relevance: np.ndarray | None
    selected: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        """The words as `run --json` prints them; a relevance of -inf is null."""
        found = [None] * len(self.tokens) if self.relevance is None else self.relevance.tolist()
        return {
            "image": self.image,
            "is_visual_cls": not self.selected.any(),
            "tokens": [
                {
                    "text": text,
                    "relevance": None if c is None or not np.isfinite(c) else round(c, 6),
                    "selected": bool(chosen),
                }
                for text, c, chosen in zip(self.tokens, found, self.selected, strict=True)
            ],
        }


def cosines(cls: np.ndarray, text: np.ndarray) -> np.ndarray:
    """c_k: cosine of the visual CLS with each text token (eq. 6), float64 [K].

    Args:
        cls: Visual CLS in the joint space, [E].
        text: Text tokens in the same space, [K, E].
    """
    cls, text = as_numbers(cls), as_numbers(text)
    lengths = np.linalg.norm(cls) * np.linalg.norm(text, axis=-1)  # [K]
    return (text @ cls) / np.maximum(lengths, np.finfo(np.float64).tiny)


def to_other_tokens(c: np.ndarray, spans: np.ndarray, other: np.ndarray) -> np.ndarray:
    """C_i: relevance of another tokeniser's tokens, by the characters that they share (eq. 7).

    The paper leaves open: what "the string of one token" is where spaces and case differ; here its
    span in the one original text. A token inside one of CLIP's takes that one's value; one that
    lies over several, their mean; one that shares no character with any, -inf.

    Args:
        c: Relevance of CLIP's tokens, [K].
        spans: Their first characters and those after their last, [K, 2].
        other: The same of the other tokens, [T, 2].

    Returns:
        float64 [T].
    """
    starts = np.maximum(spans[None, :, 0], other[:, None, 0])  # [T, K]
    ends = np.minimum(spans[None, :, 1], other[:, None, 1])
    overlaps = ends > starts  # [T, K]
    counts = overlaps.sum(-1)  # [T]
    means = (overlaps * c).sum(-1) / np.maximum(counts, 1)
    return np.where(counts > 0, means, NO_OVERLAP)


def pool(embeddings: np.ndarray, selected: np.ndarray, visual_cls: np.ndarray) -> np.ndarray:
    """The pseudo-CLS (eq. 8), of the embeddings' dtype, [C].

    Args:
        embeddings: Input embeddings of the question's tokens, [T, C].
        selected: Which of them pass the threshold, bool [T].
        visual_cls: Projected visual CLS, which takes the part where none does, [C].
    """
    if not selected.any():
        return as_stored(as_numbers(visual_cls), embeddings.dtype)
    return as_stored(as_numbers(embeddings[selected]).mean(axis=0), embeddings.dtype)


def as_numbers(stored: np.ndarray) -> np.ndarray:
    """What a tensor holds, as float64; bfloat16, which NumPy lacks, is bits in uint16."""
    if stored.dtype == np.uint16:
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float64)


def as_stored(numbers: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Numbers in the type of the decoder's tensors; bfloat16 rounds to nearest, ties to even."""
    if dtype != np.uint16:
        return numbers.astype(dtype)
    bits = numbers.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
