"""The table of low precision as text that Markdown renders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.precision.asking import ALL
from benchmarks.precision.bundles import BARS, FLOAT32, LEAST_IN_COMMON

_COLUMNS = ("plan", "precision", "MB", "right", "lost", "same answers", "survivors in common")
_SPEED = (
    "plan",
    "precision",
    "vision",
    "prefill",
    "decisions",
    "first token",
    "ms a token",
    "MB",
    "peak MB",
)
_PLANS = {"none": "none", "ivtp": "IVTP to 64", "atp": "ATP's scores, fixed numbers"}


def to_text(found: Mapping[str, Any]) -> str:
    """Both tables for people, as far as they were measured."""
    blocks = ["# Low precision", "Made by `python -m benchmarks.precision`."]
    if "accuracy" in found:
        blocks += _accuracy(found["accuracy"])
    if "outliers" in found:
        blocks += _outliers(found["outliers"])
    if "speed" in found:
        blocks += _speed(found["speed"])
    return "\n\n".join(blocks) + "\n"


def _accuracy(found: Mapping[str, Any]) -> list[str]:
    text = (
        f"Asked on {found['date'][:10]}: {found['questions']} held-out questions, the same in "
        "every row. *Lost* is in points against float32 of the same plan, with its bootstrap "
        "interval of 95 %; pictures are drawn. *Survivors in common* is the share of the tokens "
        "that survive in float32 too, in per cent, in all and by the place where others are "
        "dropped."
    )
    return ["## Answers", text, grid(_COLUMNS, [_row(row) for row in found["rows"]])]


def _row(row: Mapping[str, Any]) -> list[str]:
    cells = [row["plan"], row["precision"], f"{row['bytes'] / 1e6:.1f}"]
    cells.append(f"{100 * row['accuracy']['mean']:.1f}")
    if row["precision"] == FLOAT32:
        return [*cells, "", "", ""]
    shares = row["survivors_in_common"]
    common = ", ".join(f"{_place(place)} {100 * share:.1f}" for place, share in shares.items())
    if len(shares) == 2:  # one place, which is all
        common = f"{100 * shares[ALL]:.1f}"
    same = f"{100 * row['answers_in_common']:.1f} %"
    return [*cells, _interval(row["lost"]), same, common]


def _outliers(found: Mapping[str, Any]) -> list[str]:
    text = (
        f"Asked on {found['date'][:10]}: {found['questions']} held-out questions. The model is the "
        "same function, but some of its channels are large."
    )
    rows = [
        [row["outliers"], "yes" if row["smoothed"] else "no", *_row(row)]
        for row in found["rows"]
        if row["precision"] != FLOAT32
    ]
    return ["## Outlier channels", text, grid(("outliers", "made equal", *_COLUMNS), rows)]


def _speed(found: Mapping[str, Any]) -> list[str]:
    shape, machine = found["shape"], found["machine"]
    patches = (shape["image_size"] // shape["patch_size"]) ** 2
    model, tower = (f"{shape[key]} layers" for key in ("layers", "vision_layers"))
    text = (
        f"Measured on {found['date'][:10]}, random weights: a tower of {tower}, "
        f"{shape['vision_hidden']} wide, a decoder of {model}, {shape['hidden']} wide. "
        f"{patches} visual and {found['text_tokens']} text tokens, a random picture each round, "
        f"medians of {found['rounds']} rounds in ms, 2 threads, {machine['cpu']['model']}. Bundles "
        "take turns run by run. *Decisions* include IVTP's text tower. *Peak* is the memory of a "
        "process that answers under every plan."
    )
    return ["## Speed", text, grid(_SPEED, [_times(row) for row in found["rows"]])]


def _times(row: Mapping[str, Any]) -> list[str]:
    ms = row["ms"]
    times = [ms["vision"], ms["prefill"], ms["scorer"] + ms["decide"], ms["ttft"]]
    cells = [_PLANS[row["plan"]], row["precision"], *(f"{each:.0f}" for each in times)]
    sizes = (f"{row[key] / 1e6:.0f}" for key in ("bytes", "peak_bytes"))
    return [*cells, f"{ms['decode_per_token']:.1f}", *sizes]


def into_page(page: str, found: Mapping[str, Any]) -> str:
    """A page with new tables between marks such as `<!-- answers -->` and `<!-- end -->`."""
    tables = {
        "accuracy": ("answers", _accuracy),
        "outliers": ("outliers", _outliers),
        "speed": ("speed", _speed),
    }
    for key, (mark, blocks) in tables.items():
        if key in found:
            start = page.index(f"<!-- {mark} -->") + len(f"<!-- {mark} -->\n")
            end = page.index("<!-- end -->", start)
            page = f"{page[:start]}{blocks(found[key])[-1]}\n{page[end:]}"
    return page


def misses(found: Mapping[str, Any]) -> list[str]:
    """A line for each bar that a preset misses."""
    lines = []
    for row in found["rows"]:
        bar, lost = BARS.get(row["precision"]), 100 * row["lost"]["mean"]
        who = f"{row['precision']}, {row['plan']}"
        if bar is not None and lost > bar:
            lines.append(f"{who}: {lost:.2f} points lost, at most {bar}")
        share = row["survivors_in_common"].get(ALL, 1.0)
        if share < LEAST_IN_COMMON:
            lines.append(f"{who}: {100 * share:.1f} % of the survivors in common")
    return lines


def _place(place: str) -> str:
    return f"layer {place}" if place.isdigit() else place


def _interval(found: Mapping[str, float]) -> str:
    mean, low, high = (round(100 * found[key], 2) + 0.0 for key in ("mean", "low", "high"))
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
