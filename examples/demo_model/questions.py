"""Questions about scenes, answered in a word or a sentence, balanced so that guesses pay little."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .scenes import COLOURS, SHAPES, SIDE, Scene, Thing

NUMBERS = ("zero", "one", "two", "three", "four")
SHORT = " Answer in one word."

# Fine-grained questions need a few patches exactly; coarse ones the picture as a whole.
FINE = ("count", "colour", "shape", "smallest", "largest", "relation", "position", "texture")
COARSE = ("presence", "ground", "pattern", "common", "amount")
KINDS = FINE + COARSE


@dataclass(frozen=True)
class Question:
    """One question: `word` is the answer in short, `sentence` the same in full."""

    kind: str
    text: str
    word: str
    sentence: str


class Asker:
    """Chooses questions so that the answers to each text, and of each kind, stay level.

    It remembers what was answered: ask scenes in order with one asker to get the same questions.
    """

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._told: Counter[tuple[str, str]] = Counter()

    def ask(self, scene: Scene, count: int, kinds: tuple[str, ...] = KINDS) -> list[Question]:
        """Questions of all kinds in turn that a scene can answer, `count` of them at most."""
        order = [str(kind) for kind in self._random.permutation(kinds)]
        offers = {kind: self._offers(kind, scene) for kind in order}
        chosen: list[Question] = []
        seen: set[str] = set()
        while len(chosen) < count and any(offers.values()):
            for kind in order:
                if len(chosen) == count or not offers[kind]:
                    continue
                question = min(offers[kind], key=self._worn)
                offers[kind].remove(question)
                if question.text in seen:
                    continue
                seen.add(question.text)
                chosen.append(question)
                for key in _keys(question):
                    self._told[key] += 1
        return chosen

    def _offers(self, kind: str, scene: Scene) -> list[Question]:
        offers = list(_OFFERS[kind](scene, self._random))
        self._random.shuffle(offers)  # type: ignore[arg-type]
        return offers

    def _worn(self, question: Question) -> int:
        """How much more often than it should this answer has been the right one."""
        return sum(self._told[key] for key in _keys(question))


def _keys(question: Question) -> tuple[tuple[str, str], ...]:
    return (question.kind, question.word), (question.text, question.word)


def as_prompt(question: Question, is_short: bool) -> tuple[str, str]:
    """The words to the model and the answer that is expected."""
    if is_short:
        return question.text + SHORT, question.word
    return question.text, question.sentence


def _one_of(random: np.random.Generator, *texts: str) -> str:
    return texts[int(random.integers(len(texts)))]


def _unique(scene: Scene) -> list[tuple[str, Thing]]:
    """Objects with a name that no other bears: "star", "red thing" or "red star"."""
    found = []
    for thing in scene.things:
        others = [other for other in scene.things if other is not thing]
        if all(other.name != thing.name for other in others):
            found.append((thing.name, thing))
        if all(other.shape != thing.shape for other in others):
            found.append((thing.shape, thing))
    return found


def _count(scene: Scene, random: np.random.Generator) -> Iterator[Question]:
    names = [(c, [t.colour == c for t in scene.things], "shapes") for c in COLOURS]
    names += [("", [t.shape == s for t in scene.things], f"{s}s") for s in SHAPES]
    for colour, hits, noun in names:
        number = sum(hits)
        if number >= len(NUMBERS):
            continue
        name = f"{colour} {noun}".strip().replace("crosss", "crosses")
        text = _one_of(random, f"How many {name} are there?", f"How many {name} can you see?")
        one = name.replace("crosses", "cross") if "crosses" in name else name[:-1]
        told = f"There is one {one}." if number == 1 else f"There are {NUMBERS[number]} {name}."
        yield Question("count", text, NUMBERS[number], told)


def _colour(scene: Scene, random: np.random.Generator) -> Iterator[Question]:
    for name, thing in _unique(scene):
        if name == thing.shape:
            text = _one_of(random, f"What colour is the {name}?", f"Which colour has the {name}?")
            yield Question("colour", text, thing.colour, f"The {name} is {thing.colour}.")


def _shape(scene: Scene, random: np.random.Generator) -> Iterator[Question]:
    colours = Counter(thing.colour for thing in scene.things)
    for thing in scene.things:
        if colours[thing.colour] == 1:
            name = f"{thing.colour} thing"
            text = _one_of(random, f"What shape is the {name}?", f"What is the {name}?")
            yield Question("shape", text, thing.shape, f"The {name} is a {thing.shape}.")


def _extreme(scene: Scene, random: np.random.Generator, is_largest: bool) -> Iterator[Question]:
    ranked = sorted(scene.things, key=lambda thing: -thing.across if is_largest else thing.across)
    kind = "largest" if is_largest else "smallest"
    if len(ranked) > 1 and abs(ranked[0].across - ranked[1].across) < 3.5:
        return
    words = ("largest", "biggest") if is_largest else ("smallest", "tiniest")
    word = _one_of(random, *words)
    thing = ranked[0]
    yield Question(
        kind,
        f"What colour is the {word} shape?",
        thing.colour,
        f"The {word} shape is {thing.colour}.",
    )
    yield Question(
        kind, f"What is the {word} shape?", thing.shape, f"The {word} shape is a {thing.shape}."
    )


def _relation(scene: Scene, random: np.random.Generator) -> Iterator[Question]:
    unique = _unique(scene)
    for name, thing in unique:
        for other_name, other in unique:
            across, down = other.x - thing.x, other.y - thing.y
            if thing is other or max(abs(across), abs(down)) < 10:
                continue
            if abs(across) >= 10:
                yield from _relate(random, name, other_name, across > 0, "left of", "right of")
            if abs(down) >= 10:
                yield from _relate(random, name, other_name, down > 0, "above", "below")


def _relate(
    random: np.random.Generator, name: str, other: str, is_first: bool, first: str, second: str
) -> Iterator[Question]:
    relation, is_so = _one_of(random, first, second), is_first
    if relation == second:
        is_so = not is_first
    text = f"Is the {name} {relation} the {other}?"
    yield Question(
        "relation", text, "yes" if is_so else "no", "Yes, it is." if is_so else "No, it is not."
    )


def _position(scene: Scene, random: np.random.Generator) -> Iterator[Question]:
    middle, margin = SIDE / 2, 7
    for name, thing in _unique(scene):
        if abs(thing.x - middle) < margin or abs(thing.y - middle) < margin:
            continue
        rows, columns = ("top", "bottom")[thing.y > middle], ("left", "right")[thing.x > middle]
        text = _one_of(random, f"Where is the {name}?", f"In which corner is the {name}?")
        yield Question(
            "position", text, f"{rows} {columns}", f"The {name} is at the {rows} {columns}."
        )


def _texture(scene: Scene, random: np.random.Generator) -> Iterator[Question]:
    for name, thing in _unique(scene):
        text = _one_of(
            random,
            f"What texture is the {name}?",
            f"Which texture has the {name}?",
            f"Is the {name} plain, striped or dotted?",
        )
        yield Question("texture", text, thing.texture, f"The {name} is {thing.texture}.")


def _presence(scene: Scene, random: np.random.Generator) -> Iterator[Question]:
    names = {thing.name for thing in scene.things}
    kinds = [(s, any(t.shape == s for t in scene.things)) for s in SHAPES]
    kinds += [(f"{c} shape", any(t.colour == c for t in scene.things)) for c in COLOURS]
    for _ in range(3):  # absent pairs of what is there make "no" as hard as "yes"
        thing, other = (scene.things[int(k)] for k in random.integers(0, len(scene.things), 2))
        pair = f"{thing.colour} {other.shape}"
        kinds.append((pair, pair in names))
    for name, is_there in kinds:
        article = "an" if name[0] in "aeiou" else "a"
        text = _one_of(random, f"Is there {article} {name}?", f"Can you see {article} {name}?")
        told = f"Yes, there is {article} {name}." if is_there else f"No, there is no {name}."
        yield Question("presence", text, "yes" if is_there else "no", told)


def _ground(scene: Scene, random: np.random.Generator) -> Iterator[Question]:
    text = _one_of(random, "What colour is the background?", "Which colour is behind the shapes?")
    yield Question("ground", text, scene.ground, f"The background is {scene.ground}.")


def _pattern(scene: Scene, random: np.random.Generator) -> Iterator[Question]:
    text = _one_of(random, "What pattern has the background?", "How is the background painted?")
    yield Question("pattern", text, scene.pattern, f"The background is {scene.pattern}.")


def _common(scene: Scene, random: np.random.Generator) -> Iterator[Question]:
    for name, values in (
        ("colour", [thing.colour for thing in scene.things]),
        ("shape", [thing.shape for thing in scene.things]),
    ):
        ranked = Counter(values).most_common(2)
        if ranked[0][1] == 1 or len(ranked) == 2 and ranked[1][1] == ranked[0][1]:
            continue
        text = _one_of(
            random, f"What is the most common {name}?", f"Which {name} is seen most often?"
        )
        yield Question("common", text, ranked[0][0], f"The most common {name} is {ranked[0][0]}.")


def _amount(scene: Scene, random: np.random.Generator) -> Iterator[Question]:
    number = len(scene.things)
    if number in (4, 5):
        return
    text = _one_of(
        random, "Are there many shapes or few?", "Is the picture crowded or are there few shapes?"
    )
    word = "many" if number > 5 else "few"
    yield Question("amount", text, word, f"There are {word} shapes.")


_OFFERS = {
    "count": _count,
    "colour": _colour,
    "shape": _shape,
    "smallest": lambda scene, random: _extreme(scene, random, is_largest=False),
    "largest": lambda scene, random: _extreme(scene, random, is_largest=True),
    "relation": _relation,
    "position": _position,
    "texture": _texture,
    "presence": _presence,
    "ground": _ground,
    "pattern": _pattern,
    "common": _common,
    "amount": _amount,
}
