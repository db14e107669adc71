"""Figures as SVG that read on a light page and on a dark one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from examples.demo_model.questions import FINE

Point = tuple[float, float, float, float]  # tokens, accuracy, its interval

_WIDTH, _HEIGHT = 760, 430
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 226, 46, 48
# Okabe and Ito's colours and three more, and a mark of its own for each line.
_COLOURS = (
    *("#e69f00", "#56b4e9", "#009e73", "#d55e00", "#cc79a7"),
    *("#0072b2", "#999999", "#b8a800", "#8a6fd1", "#a0522d"),
)
_MARKS = ("circle", "square", "diamond", "up", "down", "cross", "plus", "bar", "ring", "left")
_STYLE = (
    ":root{color-scheme:light dark}"
    "text{font:12px system-ui,sans-serif;fill:#24292f}.h{font-weight:600;font-size:14px}"
    ".a{stroke:#57606a;stroke-width:1}.g{stroke:#8c959f;stroke-opacity:.3}"
    ".n{stroke:#57606a;stroke-dasharray:5 4}.l{fill:none;stroke-width:2}"
    "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.a,.n{stroke:#9198a1}}"
)


def draw_curves(found: Mapping[str, Any]) -> str:
    """The curves of the table `curves`, as its JSON holds them."""
    first, *parts = found["parts"]
    full = first["rows"][0]["accuracy"]["all"]["mean"]
    lines: dict[str, list[Point]] = {}
    for part in parts:
        for row in (row for row in part["rows"] if "not_run" not in row):
            told = row["accuracy"]["all"]
            point = (row["tokens"]["all"], told["mean"], told["low"], told["high"])
            lines.setdefault(row["label"], []).append(point)
    title = f"Accuracy against visual tokens, {found['questions']} questions"
    return draw(title, {name: sorted(points) for name, points in lines.items()}, full)


def draw_kinds(found: Mapping[str, Any], labels: Sequence[str]) -> str:
    """Tokens that a method keeps by kind of question, as the table `atp-ratios` holds them.

    Args:
        found: The table.
        labels: Rows; the first that was run is drawn, of the part where it comes first.
    """
    run = {}
    for row in (row for part in found["parts"] for row in part["rows"] if "not_run" not in row):
        run.setdefault(row["label"], row)
    label = next(label for label in labels if label in run)
    row = run[label]
    kinds = sorted(row["tokens_by_kind"].items(), key=lambda pair: -pair[1])
    most, step, edge = max(value for _, value in kinds), 24, _LEFT + 40
    height = _TOP + step * len(kinds) + 40
    title = f"{label}: visual tokens by kind of question"
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style>",
        f'<text class="h" x="{_LEFT}" y="24">{escape(title)}</text>',
    ]
    for number, (kind, tokens) in enumerate(kinds):
        at, width = _TOP + step * number, (_WIDTH - edge - 60) * tokens / most
        colour = _COLOURS[3] if kind in FINE else _COLOURS[1]
        out += [
            f'<text x="{edge - 8}" y="{at + 13}" text-anchor="end">{escape(kind)}</text>',
            f'<rect x="{edge}" y="{at}" width="{width:.1f}" height="17" rx="2" fill="{colour}"/>',
            f'<text x="{edge + width + 6:.1f}" y="{at + 13}">{tokens:.1f}</text>',
        ]
    for place, colour, words in ((0, _COLOURS[3], "fine-grained"), (130, _COLOURS[1], "coarse")):
        x, y = edge + place, height - 24
        out.append(f'<rect x="{x}" y="{y}" width="12" height="12" rx="2" fill="{colour}"/>')
        out.append(f'<text x="{x + 18}" y="{y + 10}">{words}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def draw(title: str, lines: Mapping[str, Sequence[Point]], full: float) -> str:
    """Lines over the logarithm of the tokens.

    Args:
        title: Above the figure.
        lines: Points by name, ascending.
        full: Accuracy without pruning, a dashed line.
    """
    points = [point for line in lines.values() for point in line]
    low = math.floor(10 * min(p[2] for p in points)) / 10
    high = math.ceil(10 * max(full, *(p[3] for p in points))) / 10
    left, right = math.log(min(p[0] for p in points) * 0.9), math.log(max(p[0] for p in points))

    def x(tokens: float) -> float:
        share = (math.log(tokens) - left) / max(right - left, 1e-9)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(accuracy: float) -> float:
        share = (accuracy - low) / max(high - low, 1e-9)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style>",
        f'<text class="h" x="{_LEFT}" y="24">{escape(title)}</text>',
        *_axes(x, y, low, high, points, full),
    ]
    ends = _spread([(y(line[-1][1]), name) for name, line in lines.items()])
    for number, (name, line) in enumerate(lines.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        path = " ".join(f"{x(p[0]):.1f},{y(p[1]):.1f}" for p in line)
        out.append(f'<polyline class="l" stroke="{colour}" points="{path}"/>')
        for tokens, accuracy, least, most in line:
            place = f"{x(tokens):.1f}"
            out.append(
                f'<path stroke="{colour}" d="M{place} {y(least):.1f}V{y(most):.1f}"/>'
                + _mark(_MARKS[number % len(_MARKS)], x(tokens), y(accuracy), colour)
            )
        edge = _WIDTH - _RIGHT + 14
        out.append(_mark(_MARKS[number % len(_MARKS)], edge, ends[name], colour))
        out.append(f'<text x="{edge + 10}" y="{ends[name] + 4:.1f}">{escape(name)}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def _axes(
    x: Any, y: Any, low: float, high: float, points: Sequence[Point], full: float
) -> list[str]:
    """Grid, numbers and the line of no pruning."""
    edge, floor = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    out = []
    for step in range(round(low * 10), round(high * 10) + 1):
        at = y(step / 10)
        out.append(f'<path class="g" d="M{_LEFT} {at:.1f}H{edge}"/>')
        out.append(f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{step * 10} %</text>')
    told: list[float] = []  # where most points are first
    for tokens, _ in Counter(round(p[0]) for p in points).most_common():
        at = x(tokens)
        if all(abs(at - other) > 26 for other in told):
            told.append(at)
            words = f'<text x="{at:.1f}" y="{floor + 18}" text-anchor="middle">{tokens}</text>'
            out += [words, f'<path class="a" d="M{at:.1f} {floor}v4"/>']
    middle = (_LEFT + edge) / 2
    out.append(f'<path class="a" d="M{_LEFT} {floor}H{edge}"/>')
    words = "visual tokens, mean over the decoder's layers (log scale)"
    out.append(f'<text x="{middle}" y="{floor + 38}" text-anchor="middle">{words}</text>')
    out.append(f'<path class="n" d="M{_LEFT} {y(full):.1f}H{edge}"/>')
    out.append(f'<text x="{_LEFT + 6}" y="{y(full) - 5:.1f}">no pruning {100 * full:.1f} %</text>')
    return out


def _mark(kind: str, x: float, y: float, colour: str) -> str:
    """A mark of 8 units."""
    shapes = {
        "square": "M-4-4h8v8h-8z",
        "diamond": "M0-5l5 5-5 5-5-5z",
        "up": "M0-5l5 9h-10z",
        "down": "M0 5l5-9h-10z",
        "left": "M-5 0l9 5v-10z",
        "cross": "M-4-4l8 8M4-4l-8 8",
        "plus": "M-5 0h10M0-5v10",
        "bar": "M-5-2h10v4h-10z",
    }
    shapes["circle"] = shapes["ring"] = "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z"
    fill = "none" if kind in ("cross", "plus", "ring") else colour
    style = f'fill="{fill}" stroke="{colour}" stroke-width="1.5"'
    return f'<path transform="translate({x:.1f} {y:.1f})" d="{shapes[kind]}" {style}/>'


def _spread(ends: Sequence[tuple[float, str]], gap: float = 17) -> dict[str, float]:
    """Places for names at the lines' ends, from the top, none over another."""
    out: dict[str, float] = {}
    last = -math.inf
    for at, name in sorted(ends):
        last = max(at, last + gap)
        out[name] = last
    over = max(0.0, last - (_HEIGHT - _BOTTOM))
    return {name: at - over for name, at in out.items()}
