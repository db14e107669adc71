"""Why survivors may be hard to understand, as far as the page itself measures it."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from patchsieve.pruning import catalogue
from patchsieve.show.shown import Asked, Picture, Place

ALIKE = 0.75  # share of the way from chance to all in common above which questions hardly matter
ON_EDGE = 0.6  # share of survivors on the edge, at least twice that of all patches, worth a word


def sentences(asked: Sequence[Asked], pictures: Sequence[Picture]) -> list[str]:
    """Say where patches are chosen without the question, or nearly so, or along the edge.

    Two sentences follow from where and how a plan acts: what goes before the decoder is chosen
    before the question is read, and a method may draw. All else is counted on the survivors: how
    many the questions keep in common at a site, less what chance would have in common, and how many
    lie on the edge of the picture, where attention often goes whatever is there.

    Args:
        asked: Prompts, each with a view of every picture.
        pictures: The pictures.
    """
    different = list({one.prompt: one for one in asked}.values())
    told: list[str] = []
    for number, picture in enumerate(pictures):
        name = f"image {number + 1}: " if len(pictures) > 1 else ""
        views = [one.views[number].places for one in different]
        before: list[int] = [picture.num_patches] * len(views)
        for places in zip(*views, strict=True):
            texts = [*_of_place(places, before), *_on_edge(places, picture.grid)]
            told += [name + text for text in texts]
            before = [len(place.kept) for place in places]
    return told


def _of_place(places: Sequence[Place], before: Sequence[int]) -> list[str]:
    """What there is to say of one place under each of the prompts."""
    first = places[0]
    if first.layer is None:
        if first.num_after == first.num_before:
            return []
        return [
            f"{first.method} acts before the question is read: every question about this image "
            "finds the same tokens after it"
        ]
    if catalogue.draws(first.method):
        return [f"{first.method} draws patches {first.name}: its choice depends on no score"]
    if len(places) < 2:
        return []
    sizes = [len(place.kept) for place in places]
    common = len(set(places[0].kept).intersection(*(place.kept for place in places)))
    alive, least = max(before), min(sizes)
    chance = alive * prod(size / alive for size in sizes)
    if least == alive or least <= chance:
        return []
    number = "both" if len(places) == 2 else f"all {len(places)}"
    if len(set(sizes)) == 1:
        text = f"{common} of {least} patches kept {first.name} are the same for {number} questions"
    else:
        patches = "1 patch" if common == 1 else f"{common} patches"
        every = f"{', '.join(map(str, sizes[:-1]))} and {sizes[-1]}"
        shared = f"{patches} in common {first.name} (of {every})"
        text = f"{number.capitalize()} questions keep {shared}"
    if common - chance < ALIKE * (least - chance):
        return [text]
    return [f"{text}: which of them is asked hardly changes this plan's choice"]


def _on_edge(places: Sequence[Place], grid: tuple[int, int]) -> list[str]:
    """Whether most survivors of a decoder's site lie on the edge of the picture, R x C patches."""
    rows, columns = grid
    edge = {
        patch
        for patch in range(rows * columns)
        if patch // columns in (0, rows - 1) or patch % columns in (0, columns - 1)
    }
    kept = [patch for place in places for patch in place.kept]
    found = sum(patch in edge for patch in kept)
    usual = len(edge) / (rows * columns)
    is_scored = places[0].layer is not None and not catalogue.draws(places[0].method)
    if not is_scored or not kept or found / len(kept) < max(ON_EDGE, 2 * usual):
        return []
    return [
        f"{found} of {len(kept)} patches kept {places[0].name} lie on the picture's edge, where "
        f"{len(edge)} of all {rows * columns} are"
    ]
