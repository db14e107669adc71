"""Draw a page: one file that holds all it needs, and runs no script but its own."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from importlib.resources import files
from itertools import groupby
from typing import Any

import jinja2

from patchsieve import __version__
from patchsieve.show import colours, shapes
from patchsieve.show.shown import Answer, Asked, Picture, Place, Shown
from patchsieve.tables import size

_DIGITS = 4  # of a score that a reader points at


def render(shown: Shown) -> str:
    """The page as HTML.

    Every text goes through the template's escaping, and the page's policy allows the style and the
    script of this package alone, by their hashes.
    """
    style, script = _file("page.css"), _file("page.js")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_file("page.html.jinja")).render(
        shown=shown,
        version=__version__,
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
        stops=[colours.css(colours.scale(step / 9)) for step in range(10)],
        route=_route(shown.places),
        ticks=["all", *("decoder" if p.layer is None else p.layer for p in shown.places)],
        prompts=[_prompt(shown, asked, number) for number, asked in enumerate(shown.asked)],
        data=_data(shown),
    )


def _file(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"


def _route(places: tuple[Place, ...]) -> str:
    """Methods and layers in words: "tome before the decoder, fastv before layers 2 and 8"."""
    parts = []
    for (method, is_early), same in groupby(places, lambda p: (p.method, p.layer is None)):
        layers = [str(place.layer) for place in same]
        joined = " and ".join(filter(None, (", ".join(layers[:-1]), layers[-1])))
        where = f"before layer{'s' if len(layers) > 1 else ''} {joined}"
        parts.append(f"{method} {'before the decoder' if is_early else where}")
    return ", ".join(parts)


def _prompt(shown: Shown, asked: Asked, number: int) -> dict[str, Any]:
    views = zip(shown.pictures, asked.views, strict=True)
    return {
        "id": number,
        "text": asked.prompt,
        "marked": asked.views[0].words if len(asked.views) == 1 else (),
        "answers": _answers(asked),
        "facts": _facts(asked),
        "timing": shown.timing,
        "views": [
            {
                "id": f"{number}-{index}",
                "picture": index,
                "name": picture.name,
                "grid": picture.grid,
                "words": view.words,
                "told": view.told,
                "overview": _overview(picture, view.places),
                "places": [_place(place, picture, shown.num_visual) for place in view.places],
            }
            for index, (picture, view) in enumerate(views)
        ],
    }


def _answers(asked: Asked) -> list[tuple[str, str]]:
    """Title and text of each answer."""
    mine = (f"Plan {asked.answer.plan}", asked.answer.text)
    return [mine] if asked.unpruned is None else [mine, ("Unpruned", asked.unpruned.text)]


def _facts(asked: Asked) -> list[tuple[str, list[str]]]:
    """Name of each number, and the number with the plan, without pruning, and their ratio."""
    answers = [asked.answer, *([asked.unpruned] if asked.unpruned else [])]

    def row(
        name: str, text: Callable[[float], str], value: Callable[[Answer], float | None]
    ) -> Any:
        values = [number for answer in answers if (number := value(answer)) is not None]
        ratio = [f"{values[0] / values[1] * 100:.0f}\xa0%"] if len(values) > 1 else []
        return name, [text(number) for number in values] + ratio

    times = [
        row("time to first token", _milliseconds, lambda answer: answer.ttft_ms),
        row("whole answer", _milliseconds, lambda answer: answer.total_ms),
    ]
    return [
        row("KV cache", size, lambda answer: answer.kv_used),
        *(times if asked.answer.ttft_ms is not None else ()),
        ("new tokens", [str(answer.num_tokens) for answer in answers]),
    ]


def _milliseconds(value: float) -> str:
    return f"{value:.0f}\xa0ms"


def _overview(picture: Picture, places: tuple[Place, ...]) -> dict[str, Any]:
    """The whole picture, and how deep each patch comes."""
    columns = picture.grid[1]
    depths = colours.depths(places, picture.num_patches)
    return {
        "layers": [(colours.css(c), shapes.squares(patches, columns)) for _, c, patches in depths],
        "legend": [
            (colours.css(c), words, len(patches)) for words, c, patches in depths if patches
        ],
    }


def _place(place: Place, picture: Picture, num_visual: int) -> dict[str, Any]:
    columns, everything = picture.grid[1], range(picture.num_patches)
    kept = set(place.kept)
    scores = place.scores or ()
    has_scores = colours.quantiles(scores) is not None
    groups = place.groups
    return {
        "name": place.name,
        "method": place.method,
        "before": place.num_before,
        "after": place.num_after,
        "share": place.num_after / num_visual,
        "num_visual": num_visual,
        "wanted": place.num_wanted if place.is_capped else None,
        "unscored": shapes.squares(_unscored(place), columns),
        "dropped": shapes.squares((p for p in everything if p not in kept), columns),
        "border": _border([patch in kept for patch in everything], columns),
        "heat": [(colours.css(c), shapes.squares(p, columns)) for c, p in _levels(place)],
        "range": [f"{v:.3g}" for v in colours.quantiles(scores) or ()] if has_scores else None,
        "tints": [(colours.css(c), shapes.squares(p, columns)) for c, p in _tints(place, columns)],
        "group_border": "" if groups is None else _border(groups, columns),
        "num_groups": None if groups is None else len(set(groups) - {-1}),
    }


def _unscored(place: Place) -> list[int]:
    return [patch for patch, rank in enumerate(colours.ranks(place.scores or ())) if rank is None]


def _border(labels: Any, columns: int) -> str:
    return shapes.path(shapes.borders(labels, columns))


def _levels(place: Place) -> list[tuple[colours.Colour, list[int]]]:
    return list(colours.levels(place.scores).items()) if place.scores else []


def _tints(place: Place, columns: int) -> list[tuple[colours.Colour, list[int]]]:
    return list(colours.tints(place.groups, columns).items()) if place.groups else []


def _data(shown: Shown) -> dict[str, Any]:
    """What the script says about a patch that the reader points at."""
    return {
        "places": [place.name for place in shown.places],
        "grids": [picture.grid for picture in shown.pictures],
        "views": [
            [[_patches(place) for place in view.places] for view in asked.views]
            for asked in shown.asked
        ],
    }


def _patches(place: Place) -> dict[str, Any]:
    scores = place.scores
    return {
        "kept": place.kept,
        "groups": place.groups,
        "scores": scores and [None if s is None else float(f"{s:.{_DIGITS}g}") for s in scores],
        "ranks": None if scores is None else _places_in_order(scores),
    }


def _places_in_order(scores: Any) -> list[int | None]:
    """Number of each patch by falling score, 1 for the largest; ties to the lower patch."""
    found = [patch for patch, score in enumerate(scores) if score is not None]
    order = sorted(found, key=lambda patch: -scores[patch])
    ranks: list[int | None] = [None] * len(scores)
    for number, patch in enumerate(order, 1):
        ranks[patch] = number
    return ranks
