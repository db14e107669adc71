"""What a conversation keeps between its turns: what the cache holds, and its images."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from patchsieve.runtime.inputs.chat_template import Message
from patchsieve.runtime.pipeline import Seen
from patchsieve.runtime.pseudo_cls import VisualCls
from patchsieve.runtime.result import ImageResult, SiteResult


@dataclass(frozen=True)
class State:
    """What the cache holds, in tokens and words.

    Attributes:
        asked: The conversation when its last answer began.
        is_answer_cached: The tokens of that answer are in the cache, but for `pending`.
        pending: Tokens generated but not fed.
        history: All token ids, each image's repeated for its visual tokens, as penalties see them.
        sites: Survivors of each image.
    """

    asked: tuple[Message, ...] = ()
    is_answer_cached: bool = True
    pending: tuple[int, ...] = ()
    history: tuple[int, ...] = ()
    sites: tuple[SiteResult, ...] = ()


@dataclass
class Images:
    """Features of the conversation's images, for a new prefill.

    Attributes:
        features: Visual tokens of each image, [N, C].
        patch_ids: Raster ids of them, [N].
        reduced: What became of its patches, where the plan prunes before the decoder.
        cls: What the tower says of each image as a whole, for plans with a pseudo_cls.
    """

    features: list[np.ndarray] = field(default_factory=list)
    patch_ids: list[np.ndarray] = field(default_factory=list)
    reduced: list[ImageResult] = field(default_factory=list)
    cls: list[VisualCls] = field(default_factory=list)

    def add(self, seen: Seen) -> None:
        """Take what the tower gave of one more image."""
        if seen.sources is not None:
            ids, sources = seen.ids.tolist(), seen.sources.tolist()
            number = len(self.features)
            self.reduced.append(ImageResult(number, ids, sources, seen.num_wanted))
        self.features.append(seen.features)
        self.patch_ids.append(seen.ids)
        if seen.cls is not None:
            self.cls.append(seen.cls)

    def forget(self, count: int) -> None:
        """Keep the first `count` images only."""
        for part in (self.features, self.patch_ids, self.reduced, self.cls):
            del part[count:]
