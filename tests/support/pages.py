"""Pages of constructed data: every kind of place, hostile texts, no model."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from patchsieve.show import colours
from patchsieve.show.shown import Answer, Asked, Picture, Place, Shown, View, Word

# What must be text on the page, whatever it says.
HOSTILE = (
    '</script><script>alert("1")</script>',
    "<img src=x onerror=alert(1)> & \"double\" 'single' `${1}` {{ 7 * 7 }}",
    "]]> --> <!-- \u2028 ☕🙂 \u202eשלום مرحبا  x" + "y" * 60,
)


def picture(name: str = "photo.jpg", grid: tuple[int, int] = (6, 8), seed: int = 0) -> Picture:
    """Smooth colours, 8 pixels a patch."""
    rows, columns = grid
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    file = io.BytesIO()
    small.resize((columns * 8, rows * 8), Image.Resampling.BICUBIC).save(file, "PNG")
    return Picture(name, file.getvalue(), grid)


def view(picture: Picture, seed: int = 0, words: Sequence[Word] = ()) -> View:
    """A tower that merges, then a site without and one with scores, the last of them capped."""
    rng = np.random.default_rng(seed)
    rows, columns = picture.grid
    blocks = np.arange(rows)[:, None] // 2 * columns + np.arange(columns)[None] // 2  # [R, C]
    groups = blocks.reshape(-1).copy()
    groups[::5] = groups.max() + 1 + np.arange(len(groups[::5]))  # alone
    groups[3] = -1
    alive = np.flatnonzero(groups >= 0)
    tower = Place(None, "tome", len(groups), len(set(groups[alive])), len(set(groups[alive])),
                  tuple(alive.tolist()), groups=tuple(groups.tolist()))  # fmt: skip
    half = np.sort(rng.permutation(alive)[: len(alive) // 2])
    count = len(set(groups[half]))
    first = Place(2, "random", tower.num_after, count, count, tuple(half.tolist()))
    scores: list[float | None] = [None] * len(groups)
    for patch in half.tolist():
        scores[patch] = float(rng.standard_exponential() ** 3 / 50)
    kept = sorted(half.tolist(), key=lambda patch: -(scores[patch] or 0))[:8]
    last = Place(14, "atp", count, 6, 9, tuple(sorted(kept)), tuple(scores))
    return View((tower, first, last), tuple(words))


def answer(text: str, plan: str = "half", scale: int = 1) -> Answer:
    """An answer with plausible numbers."""
    return Answer(plan, text, 12, 600, 1_234_567 * scale, 2_345_678 * scale, 123.4 * scale, 456.7)


def words(text: str) -> list[Word]:
    """A text in pieces, of which those of more than four letters are selected."""
    return [Word(part + " ", len(part) / 30, len(part) > 4) for part in text.split(" ")]


def shown(
    prompts: Sequence[str] = ("What is on the table?",),
    pictures: int = 1,
    answers: Sequence[str] = ("A cup of coffee.", "A cup of coffee on a saucer."),
) -> Shown:
    """A page of some prompts about some pictures."""
    images = tuple(
        picture(f"photo {i}.jpg", ((6, 8), (8, 8), (5, 3))[i % 3], i) for i in range(pictures)
    )
    asked = tuple(
        Asked(
            prompt,
            answer(answers[0]),
            answer(answers[1], "none", 2),
            tuple(view(one, 10 * n + i, words(prompt)) for i, one in enumerate(images)),
        )
        for n, prompt in enumerate(prompts)
    )
    return Shown(
        "bundle",
        "llava",
        "cpu, float32",
        "half",
        48,
        images,
        asked,
        ("a budget capped image 0",),
        timed_runs=3,
    )


def unpruned() -> Shown:
    """A page of a plan that prunes nothing."""
    one = picture()
    asked = Asked("What is it?", answer("A cup.", "none"), None, (View(()),))
    base = shown()
    return replace(base, plan="none", pictures=(one,), asked=(asked,), notes=("nothing pruned",))


def ranks(place: Place) -> list[np.ndarray | None]:
    """Colour of each patch's score as a page draws it, [3]; None where it has no score."""
    out: list[np.ndarray | None] = [None] * len(place.scores or ())
    for colour, patches in colours.levels(place.scores or ()).items():
        for patch in patches:
            out[patch] = np.array(colour)
    return out
