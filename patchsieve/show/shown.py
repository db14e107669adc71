"""What a page shows, as plain data: no model, no markup.

Patches are numbered along the rows of a grid of R x C patches (raster ids).
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from patchsieve.contract.errors import ShapeError


@dataclass(frozen=True)
class Picture:
    """An image as the model saw it.

    Attributes:
        name: What to call it.
        png: Its pixels, resized, padded and cropped to whole patches.
        grid: Rows R and columns C of patches.
    """

    name: str
    png: bytes
    grid: tuple[int, int]

    @property
    def num_patches(self) -> int:
        """R x C."""
        return self.grid[0] * self.grid[1]

    @property
    def data_uri(self) -> str:
        """The pixels as a page holds them."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


@dataclass(frozen=True)
class Place:
    """One place where an image's tokens are dropped or merged.

    Attributes:
        layer: Tokens go at the input of this decoder layer; None for the vision tower and
            what follows it.
        method: Name of the method.
        num_before: Tokens that were alive. More than patches where a CLS token counts.
        num_after: Tokens that are kept.
        num_wanted: Tokens that would be kept without a budget.
        kept: Raster ids of the patches that are kept, in a token of their own or merged, ascending.
        scores: What the decision compared, per patch, [R * C]; None for a patch without a score;
            None in all where the method has none.
        groups: Token that each patch is part of, [R * C], -1 for none; None if nothing merges.
    """

    layer: int | None
    method: str
    num_before: int
    num_after: int
    num_wanted: int
    kept: tuple[int, ...]
    scores: tuple[float | None, ...] | None = None
    groups: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """Where it is, in words."""
        return f"before {'the decoder' if self.layer is None else f'layer {self.layer}'}"

    @property
    def is_capped(self) -> bool:
        """A budget cut what the method would have kept."""
        return self.num_wanted > self.num_after

    def check(self, num_patches: int) -> None:
        """Refuse data of another grid.

        Raises:
            ShapeError: An id lies outside the grid, or a list is not one entry per patch.
        """
        lengths = {len(part) for part in (self.scores, self.groups) if part is not None}
        is_inside = not self.kept or (min(self.kept) >= 0 and max(self.kept) < num_patches)
        if lengths - {num_patches} or not is_inside or list(self.kept) != sorted(set(self.kept)):
            raise ShapeError(
                f"what was kept {self.name} does not fit the image's patches",
                found=f"ids {self.kept[:3]}..., lists of {sorted(lengths)}",
                expected=f"ascending ids below {num_patches}, lists of {num_patches}",
                do="give views and pictures of one bundle",
            )


@dataclass(frozen=True)
class Word:
    """A piece of the instruction, with the space around it.

    Attributes:
        text: The pieces of an instruction, joined, are its text.
        weight: How much it says of the image, in the method's own measure; None if unknown.
        is_selected: The method let it judge the image.
    """

    text: str
    weight: float | None
    is_selected: bool


@dataclass(frozen=True)
class View:
    """One picture under one prompt: its places in their order, and the words that judged it."""

    places: tuple[Place, ...]
    words: tuple[Word, ...] = ()

    @property
    def told(self) -> str:
        """What the marks on the words mean; nothing where there are no words."""
        if not self.words:
            return ""
        if any(word.is_selected for word in self.words):
            return "Marked words judged this image."
        return "No word passed the threshold: the image's class token judged it."


@dataclass(frozen=True)
class Answer:
    """What the model said, and what that took; no times if none were measured."""

    plan: str
    text: str
    num_tokens: int
    prompt_tokens: int
    kv_used: int  # bytes
    kv_reserved: int  # bytes
    ttft_ms: float | None
    total_ms: float | None


@dataclass(frozen=True)
class Asked:
    """One prompt: its answer with the plan, that without pruning, and a view of each picture.

    `unpruned` is None if the plan prunes nothing, or if it could not run (see the notes).
    """

    prompt: str
    answer: Answer
    unpruned: Answer | None
    views: tuple[View, ...]


@dataclass(frozen=True)
class Shown:
    """All that a page shows.

    Attributes:
        bundle: Name of the bundle.
        checkpoint: What it was made from.
        machine: Target, precision, library and device, for people.
        plan: Name of the plan.
        num_visual: Tokens of an image before any pruning.
        pictures: The images of every prompt.
        asked: The prompts, all of them about all pictures and through the same places.
        notes: What the reader should know, in sentences.
        timed_runs: Runs of each prompt and plan whose median the times are; 0 without times.
    """

    bundle: str
    checkpoint: str
    machine: str
    plan: str
    num_visual: int
    pictures: tuple[Picture, ...]
    asked: tuple[Asked, ...]
    notes: tuple[str, ...] = ()
    timed_runs: int = 0

    def __post_init__(self) -> None:
        """Check that every view belongs to its picture."""
        for asked in self.asked:
            if len(asked.views) != len(self.pictures):
                raise ShapeError(
                    "a prompt does not show every picture",
                    found=len(asked.views),
                    expected=len(self.pictures),
                    do="give each prompt a view of each picture",
                )
            for picture, view in zip(self.pictures, asked.views, strict=True):
                if [place.name for place in view.places] != [p.name for p in self.places]:
                    raise ShapeError(
                        "the views of a page go through different places",
                        do="give views of one plan",
                    )
                for place in view.places:
                    place.check(picture.num_patches)

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """The places of the first view; all views have the same, with other survivors."""
        views = [view for asked in self.asked for view in asked.views]
        return views[0].places if views else ()

    @property
    def timing(self) -> str:
        """How times were measured; nothing where none were."""
        if not self.timed_runs:
            return ""
        runs = "one run" if self.timed_runs == 1 else f"median of {self.timed_runs} runs"
        turns = "" if all(one.unpruned is None for one in self.asked) else ", both plans in turn"
        return f"Times: {runs}{turns}, after an untimed run of each."

    def summary(self) -> dict[str, Any]:
        """The page's numbers and texts, without pixels and scores."""
        return {
            "bundle": self.bundle,
            "checkpoint": self.checkpoint,
            "plan": self.plan,
            "num_visual": self.num_visual,
            "images": [{"name": one.name, "grid": list(one.grid)} for one in self.pictures],
            "prompts": [_asked(asked) for asked in self.asked],
            "notes": list(self.notes),
            "timed_runs": self.timed_runs,
        }


def _asked(asked: Asked) -> dict[str, Any]:
    return {
        "prompt": asked.prompt,
        "answer": vars(asked.answer),
        "unpruned": None if asked.unpruned is None else vars(asked.unpruned),
        "images": [
            {
                "places": [_place(place) for place in view.places],
                "words": [vars(word) for word in view.words],
            }
            for view in asked.views
        ],
    }


def _place(place: Place) -> dict[str, Any]:
    told = {f.name: getattr(place, f.name) for f in fields(place) if f.name != "scores"}
    return told | {"kept": list(place.kept), "capped": place.is_capped}
