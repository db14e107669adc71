"""What a request returns."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from patchsieve.runtime.pseudo_cls import Words

SCHEMA_VERSION = 1


def since(start: float) -> float:
    """Milliseconds since a reading of time.perf_counter."""
    return (time.perf_counter() - start) * 1e3


@dataclass(frozen=True)
class ImageResult:
    """What the plan's vision graph made of one image.

    Attributes:
        image: Number of the image in the conversation.
        ids: Raster id of each token that enters the decoder, -1 for one that is no patch.
        sources: For each patch of the grid the token that it went to, -1 if it was dropped.
        num_wanted: Tokens that a method would leave without its bound, where their number depends
            on the image; None where it is fixed.
    """

    image: int
    ids: list[int]
    sources: list[int]
    num_wanted: int | None = None

    @property
    def is_capped(self) -> bool:
        """The bound cut what the method would have kept."""
        return self.num_wanted is not None and self.num_wanted > len(self.ids)

    def sizes(self) -> np.ndarray:
        """Patches that each token stands for, at least 1, float32 [N]."""
        whole = [token for token in self.sources if token >= 0]
        counts = np.bincount(np.array(whole, np.int64), minlength=len(self.ids))
        return np.maximum(counts, 1).astype(np.float32)

    def to_dict(self) -> dict[str, Any]:
        """The image as `run --json` prints it; what was wanted only where it may differ."""
        made = {
            "image": self.image,
            "num_visual": len(self.ids),
            "ids": self.ids,
            "sources": self.sources,
        }
        if self.num_wanted is None:
            return made
        return made | {"num_wanted": self.num_wanted, "capped": self.is_capped}


@dataclass(frozen=True)
class SiteResult:
    """What one decision did to one image.

    Attributes:
        layer: Tokens were dropped at the input of this layer.
        image: Number of the image in the conversation.
        num_visual_before: Its tokens that were alive.
        kept: Raster ids of the survivors, ascending; -1 for each that is no patch.
        num_wanted: Survivors without a budget.
        places: Places of the survivors among the image's tokens that entered the decoder.
        scores: Place and score of each token that was alive, ascending by place; None unless the
            request asked for them.
        merged: Place of each token that merged and that of the survivor it is part of, ascending;
            None where the method does not merge.
    """

    layer: int
    image: int
    num_visual_before: int
    kept: list[int]
    num_wanted: int
    places: list[int] = field(default_factory=list)
    scores: list[tuple[int, float]] | None = None
    merged: list[tuple[int, int]] | None = None

    @property
    def is_capped(self) -> bool:
        """The budget cut what the method would have kept."""
        return self.num_wanted > len(self.kept)

    def to_dict(self) -> dict[str, Any]:
        """The site as `run --json` prints it; scores and merges only where there are any."""
        told = {
            "layer": self.layer,
            "image": self.image,
            "num_visual_before": self.num_visual_before,
            "num_kept": len(self.kept),
            "kept": self.kept,
            "places": self.places,
            "num_wanted": self.num_wanted,
            "capped": self.is_capped,
        }
        further = {"merged": self.merged, "scores": self.scores}
        return told | {name: value for name, value in further.items() if value is not None}


@dataclass
class Result:
    """One answer.

    Attributes:
        text: Without special tokens, cut at a stop string.
        token_ids: All that was generated, an end token included.
        finish_reason: "eos", "stop" (a stop string) or "length".
        prompt_tokens: Rows that this turn fed before the answer, visual ones included.
        visual_tokens: Visual rows among them.
        plan: The plan that was followed.
        selection: What the decoder's sites chose: "picked" in this turn, "kept" from an earlier
            one, "repicked" by a new prefill, or "none" where they pruned nothing.
        images: What the vision graph left of each image, where the plan prunes there.
        sites: Survivors per site and image, of the whole conversation.
        words: The question's words that judged each image of this turn, where a plan has them.
        kv_bytes: Reserved and used, in all and per stage.
        timings_ms: Milliseconds of each part; `ttft` is the time to the first token, `decode_steps`
            lists each token behind it. `device` holds what a GPU took for each graph, by its own
            clock; it is empty on a CPU.
        notes: What the user should know, in sentences.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    prompt_tokens: int = 0
    visual_tokens: int = 0
    plan: str = ""
    selection: str = "none"
    images: list[ImageResult] = field(default_factory=list)
    sites: list[SiteResult] = field(default_factory=list)
    words: list[Words] = field(default_factory=list)
    kv_bytes: dict[str, Any] = field(default_factory=dict)
    timings_ms: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The result as `run --json` prints it."""
        sites = [site.to_dict() for site in self.sites]
        times = {key: value for key, value in self.timings_ms.items() if key != "decode_steps"}
        return {
            "schema_version": SCHEMA_VERSION,
            **vars(self),
            "images": [image.to_dict() for image in self.images],
            "sites": sites,
            "words": [one.to_dict() for one in self.words],
            "timings_ms": times,
        }
