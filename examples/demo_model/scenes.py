"""Synthetic scenes: shapes of many colours, sizes and textures on cluttered backgrounds.

A scene is drawn from a seed, so that a split is a range of seeds and no picture need be stored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIDE = 96  # pixels
PATCH = 8  # pixels; 12 x 12 patches
GRID = SIDE // PATCH

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond")
COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (246, 222, 60),
    "green": (48, 160, 70),
    "blue": (45, 95, 215),
    "purple": (140, 60, 180),
    "pink": (250, 150, 195),
    "white": (248, 248, 248),
}
SIZES = {"small": (13.5, 16), "medium": (20, 23), "large": (28, 32)}  # pixels across
TEXTURES = ("plain", "striped", "dotted")
GROUNDS = {
    "grey": (120, 122, 125),
    "brown": (112, 84, 62),
    "black": (26, 26, 30),
    "teal": (36, 100, 104),
    "beige": (205, 190, 160),
}
PATTERNS = ("plain", "striped", "checked", "dotted")

SCALE = 2  # drawn this much larger, then averaged down
MOST = 8  # objects in a scene
# First seed of each. Choices are made on `validation`; `held-out` is for figures that are told.
SPLITS = {"train": 1 << 40, "held-out": 2 << 40, "calibration": 3 << 40, "validation": 4 << 40}


@dataclass(frozen=True)
class Thing:
    """One object. Centre `x, y` and `across` are in pixels."""

    shape: str
    colour: str
    size: str
    texture: str
    x: float
    y: float
    across: float
    turn: float

    @property
    def name(self) -> str:
        """How a question speaks of it."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Objects on a ground; `seed` draws the rest (clutter, phases, brightness)."""

    seed: int
    things: tuple[Thing, ...]
    ground: str
    pattern: str


def make_scene(split: str, index: int) -> Scene:
    """The scene of a number in a split, one of SPLITS."""
    seed = SPLITS[split] + index
    random = np.random.default_rng(seed)
    count = int(random.integers(2, MOST + 1))
    # Few colours and shapes in a scene make counts above one and names that are not unique.
    colours = _some(random, tuple(COLOURS), int(random.integers(2, 6)))
    shapes = _some(random, SHAPES, int(random.integers(2, 6)))
    things: list[Thing] = []
    for _ in range(count * 12):
        if len(things) == count:
            break
        size = str(random.choice(list(SIZES), p=(0.4, 0.38, 0.22)))
        across = float(random.uniform(*SIZES[size]))
        low, high = across / 2 + 2, SIDE - across / 2 - 2
        thing = Thing(
            shape=str(random.choice(shapes)),
            colour=str(random.choice(colours)),
            size=size,
            texture=str(random.choice(TEXTURES)),
            x=float(random.uniform(low, high)),
            y=float(random.uniform(low, high)),
            across=across,
            turn=float(random.uniform(-0.25, 0.25)),
        )
        if all(_apart(thing, other) for other in things):
            things.append(thing)
    ground, pattern = str(random.choice(list(GROUNDS))), str(random.choice(PATTERNS))
    return Scene(seed, tuple(things), ground, pattern)


def render(scene: Scene) -> Image.Image:
    """Draw a scene, SIDE x SIDE RGB."""
    random = np.random.default_rng(scene.seed ^ 0x5EED)
    side = SIDE * SCALE
    canvas = Image.new("RGB", (side, side), _near(random, GROUNDS[scene.ground], 8))
    draw = ImageDraw.Draw(canvas)
    contrast = 2.4 if scene.ground == "black" else 0.72
    _paint_pattern(draw, scene.pattern, _shade(GROUNDS[scene.ground], contrast), random)
    for _ in range(int(random.integers(4, 12))):  # clutter: thin lines and specks
        x, y, angle = *random.uniform(0, side, 2), random.uniform(0, math.pi)
        reach = random.uniform(2, 14) * SCALE
        end = (x + reach * math.cos(angle), y + reach * math.sin(angle))
        tint = _near(random, _shade(GROUNDS[scene.ground], random.uniform(0.6, 1.4)), 20)
        draw.line([(x, y), end], fill=tint, width=int(random.integers(1, SCALE + 1)))
    for thing in scene.things:
        _paint_thing(canvas, thing, random)
    small = np.asarray(canvas.reduce(SCALE), dtype=np.float32)  # [SIDE, SIDE, 3]
    noisy = small * random.uniform(0.9, 1.08) + random.normal(0, 4, small.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def owner_map(scene: Scene) -> np.ndarray:
    """Which object each patch belongs to, [GRID, GRID]; -1 is the ground.

    A patch belongs to the object whose box covers most of it, where that is a quarter or more.
    """
    owners = np.full((GRID, GRID), -1)
    best = np.full((GRID, GRID), 0.25)
    edges = np.arange(GRID) * PATCH
    for index, thing in enumerate(scene.things):
        half = thing.across / 2
        wide = np.clip(
            np.minimum(edges + PATCH, thing.x + half) - np.maximum(edges, thing.x - half), 0, None
        )
        high = np.clip(
            np.minimum(edges + PATCH, thing.y + half) - np.maximum(edges, thing.y - half), 0, None
        )
        cover = high[:, None] * wide[None, :] / PATCH**2
        owners = np.where(cover >= best, index, owners)
        best = np.maximum(best, cover)
    return owners


def _some(random: np.random.Generator, names: tuple[str, ...], count: int) -> list[str]:
    return [str(name) for name in random.choice(names, count, replace=False)]


def _apart(a: Thing, b: Thing) -> bool:
    gap = (a.across + b.across) / 2 + 2
    return abs(a.x - b.x) > gap or abs(a.y - b.y) > gap


def _near(random: np.random.Generator, colour: tuple[int, ...], by: float) -> tuple[int, ...]:
    return tuple(int(np.clip(c + random.uniform(-by, by), 0, 255)) for c in colour)


def _shade(colour: tuple[int, ...], factor: float) -> tuple[int, ...]:
    return tuple(int(min(255, c * factor)) for c in colour)


def _paint_pattern(
    draw: ImageDraw.ImageDraw, pattern: str, tint: tuple[int, ...], random: np.random.Generator
) -> None:
    side, step = SIDE * SCALE, 12 * SCALE
    phase = int(random.integers(0, step))
    places = range(-step + phase, side + step, step)
    for x in places:
        if pattern == "striped":
            draw.line([(x, 0), (x + side // 3, side)], fill=tint, width=3 * SCALE)
            draw.line([(x - side // 3, 0), (x, side)], fill=tint, width=3 * SCALE)
        for y in places if pattern in ("checked", "dotted") else ():
            if pattern == "checked":
                draw.rectangle([x, y, x + step // 2, y + step // 2], fill=tint)
                draw.rectangle([x + step // 2, y + step // 2, x + step, y + step], fill=tint)
            else:
                draw.ellipse([x, y, x + step // 3, y + step // 3], fill=tint)


def _paint_thing(canvas: Image.Image, thing: Thing, random: np.random.Generator) -> None:
    size = int(thing.across * SCALE)
    colour = _near(random, COLOURS[thing.colour], 10)
    fill = Image.new("RGB", (size, size), colour)
    draw, dark, step = ImageDraw.Draw(fill), _shade(colour, 0.5), 4 * SCALE
    if thing.texture == "striped":
        for y in range(SCALE, size, step):
            draw.rectangle([0, y, size, y + int(1.6 * SCALE)], fill=dark)
    elif thing.texture == "dotted":
        for y in range(SCALE, size, step):
            for x in range(SCALE, size, step):
                draw.ellipse([x, y, x + 2 * SCALE, y + 2 * SCALE], fill=dark)
    mask = Image.new("L", (size, size), 0)
    _outline(ImageDraw.Draw(mask), thing, size)
    corner = int(thing.x * SCALE - size / 2), int(thing.y * SCALE - size / 2)
    canvas.paste(fill, corner, mask)


def _outline(draw: ImageDraw.ImageDraw, thing: Thing, size: int) -> None:
    """Fill a mask with the object's shape."""
    middle, radius = size / 2, size / 2 - 1
    if thing.shape in ("circle", "ring"):
        draw.ellipse([1, 1, size - 2, size - 2], fill=255)
        if thing.shape == "ring":
            inner = size * 0.27
            draw.ellipse([inner, inner, size - inner, size - inner], fill=0)
        return
    if thing.shape == "cross":
        third = radius / 3
        arms = [(-third, -radius), (third, -radius), (third, -third), (radius, -third)]
        points = [
            (x * c - y * s, x * s + y * c)
            for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))
            for x, y in arms[:3]
        ]
    elif thing.shape == "star":
        angles = [math.pi * k / 5 - math.pi / 2 for k in range(10)]
        reach = [radius, radius * 0.42] * 5
        points = [(r * math.cos(a), r * math.sin(a)) for r, a in zip(reach, angles, strict=True)]
    else:
        sides, start = {
            "square": (4, math.pi / 4),
            "diamond": (4, 0.0),
            "triangle": (3, -math.pi / 2),
        }[thing.shape]
        angles = [start + 2 * math.pi * k / sides for k in range(sides)]
        points = [(radius * math.cos(a), radius * math.sin(a)) for a in angles]
    c, s = math.cos(thing.turn), math.sin(thing.turn)
    draw.polygon([(middle + x * c - y * s, middle + x * s + y * c) for x, y in points], fill=255)
