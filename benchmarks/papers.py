"""Print the cost figures of the IVTP and ATP-LLaVA papers beside what patchsieve's model gives.

    python -m benchmarks.papers            # tables, then one line of JSON
    python -m benchmarks.papers --outside  # only what is outside its tolerance

Costs alone, counted from shapes; accuracy needs weights and data. A figure outside its tolerance is
marked and explained in docs/papers.md. The exit code is 1 when one is outside that is not
explained there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise

from patchsieve.cost import (
    ModelShape,
    Schedule,
    after_tower,
    cost,
    in_decoder,
    in_tower,
    ivtp,
    no_pruning,
    resampler,
    shape_of_config,
)
from patchsieve.cost.methods import layerwise
from patchsieve.tables import table

TERA = 1e12
LLAVA_7B = shape_of_config({"model_type": "llava"})
_13B = {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
}
LLAVA_13B = shape_of_config({"model_type": "llava", "text_config": _13B})
MODELS = {"7B": LLAVA_7B, "13B": LLAVA_13B}

ROUNDED = 0.06  # T, of a figure printed with one decimal
TOTAL, TOTAL_13B, VISION, KV = 0.005, 0.01, 0.02, 0.002

# Why a figure cannot be met: section of docs/papers.md.
ROWS_13B, QWEN_VL, TABLE_6 = "13B", "Qwen-VL", "table 6"


@dataclass(frozen=True)
class Figure:
    """One figure of a paper beside ours.

    Attributes:
        paper: As printed.
        ours: As the cost model gives it.
        tolerance: Largest deviation, in the unit where `is_absolute`, else as a part of `paper`.
        why: Section of docs/papers.md that explains it, where it cannot be met.
    """

    table: str
    row: str
    column: str
    paper: float
    ours: float
    unit: str
    tolerance: float
    is_absolute: bool = False
    why: str | None = None

    @property
    def deviation(self) -> float:
        """Ours less the paper's, as a fraction of the paper's."""
        return self.ours / self.paper - 1

    @property
    def is_within(self) -> bool:
        """Within the tolerance."""
        scale = self.paper if self.is_absolute else 1.0
        return abs(self.deviation * scale) <= self.tolerance


def _honeybee(shape: ModelShape, count: int) -> int:
    """Honeybee's C-Abstractor: the 1x1 convolutions of two times three blocks, at both sizes."""
    return 3 * 2 * 2 * shape.vision.hidden_size**2 * (shape.vision.num_patches + count)


def methods(shape: ModelShape, text_tokens: int = 512) -> dict[str, tuple[Schedule, int]]:
    """Schedule of each method of IVTP's tables, and FLOPs that the schedule does not hold."""
    layered = in_tower(shape, layerwise(shape, 64))
    after = after_tower(shape, 64)
    return {
        "LLaVA-1.5": (no_pruning(shape), 0),
        "Random sampling": (layered, 0),
        "TopK": (layered, 0),
        "Spatial pooling": (after, 0),
        "EViT": (layered, 0),
        "ToMe": (layered, 0),
        "Honeybee": (after, _honeybee(shape, 64)),
        "LLaMA-VID": (after_tower(shape, 65), 0),  # 8 x 8 and one context token
        "Qwen-VL": (resampler(shape, 64), 0),
        "IVTP": (ivtp(shape, text_tokens=text_tokens), 0),
    }


def _tera(shape: ModelShape, method: str, text_tokens: int) -> dict[str, float]:
    schedule, more = methods(shape, text_tokens)[method]
    flops = cost(shape, schedule, text_tokens).flops
    parts = {"ViT": flops.vision, "LLM": flops.llm, "extra": flops.scorer + more}
    return {name: part / TERA for name, part in (parts | {"total": flops.total + more}).items()}


# IVTP, tables 1 (7B) and 2 (13B): TFLOPs at 512 text tokens, by method.
TOTALS = {
    "LLaVA-1.5": (15.4, 29.4),
    "Random sampling": (8.0, 15.4),
    "TopK": (8.0, 15.4),
    "Spatial pooling": (8.1, 15.6),
    "EViT": (8.0, 15.4),
    "ToMe": (8.0, 15.4),
    "Honeybee": (8.1, 15.4),
    "LLaMA-VID": (8.2, 15.5),
    "Qwen-VL": (8.1, 15.4),
    "IVTP": (8.2, 15.6),
}
# IVTP, table 3: TFLOPs (7B) by text tokens.
TEXT_TOKENS = (128, 256, 512, 1024)
BY_TEXT = {
    "LLaVA-1.5": (9.9, 11.7, 15.4, 22.9),
    "TopK": (2.7, 4.5, 8.0, 15.2),
    "ToMe": (2.7, 4.5, 8.0, 15.2),
    "Honeybee": (2.9, 4.6, 8.1, 15.4),
    "Qwen-VL": (2.9, 4.6, 8.1, 15.3),
    "IVTP": (3.0, 4.7, 8.2, 15.5),
}
# IVTP, table 9: TFLOPs (7B) by part; None if the paper has a dash.
BY_PART: dict[str, tuple[float, float, float | None, float]] = {
    "LLaVA-1.5": (0.361, 15.003, None, 15.364),
    "TopK": (0.190, 7.772, None, 7.962),
    "ToMe": (0.190, 7.772, None, 7.962),
    "Qwen-VL": (0.360, 7.772, 0.003, 8.135),
    "IVTP": (0.202, 7.946, 0.080, 8.228),
}
# ATP-LLaVA, table 2: sites, tokens after each, and the mean over 32 layers as printed.
RETAINED: dict[str, tuple[tuple[int, ...], tuple[int, ...], int]] = {
    "ratio 3/4": ((1,), (130,), 144),
    "ratio 2/3": ((4, 14, 24), (162, 54, 18), 144),
    "ratio 1/2": ((4, 14, 24), (136, 68, 34), 144),
    "ATP 144": ((4, 14, 24), (126, 88, 20), 144),
    "ATP 88": ((1, 13, 25), (98, 79, 16), 88),
}
# ATP-LLaVA, table 6: mean tokens, and decimal MB of keys and values.
STORAGE = {
    "Upper bound": (576, 302.4),
    "FastV": (144, 75.6),
    "ATP 144": (144, 75.6),
    "ATP 88": (88, 46.2),
}
# ATP-LLaVA, table 6: TFLOPs and the fraction saved, by several text lengths: none is given.
UPPER_BOUND = 9.6
SAVED = {"ATP 144": (2.1, 0.781), "ATP 88": (1.5, 0.844)}
TEXT_TRIED = (0, 40, 64, 128)


def layer_macs(tokens: int, shape: ModelShape = LLAVA_7B) -> int:
    """Eq. 15 of ATP-LLaVA: 4 L d^2 + 2 L^2 d + 2 L d m: multiply-accumulates, a two-matrix MLP."""
    d, m = shape.text.hidden_size, shape.text.intermediate_size
    return 4 * tokens * d**2 + 2 * tokens**2 * d + 2 * tokens * d * m


def reduction(
    sites: tuple[int, ...], counts: tuple[int, ...], text_tokens: int, shape: ModelShape = LLAVA_7B
) -> tuple[float, float]:
    """Eq. 16: T of the unpruned decoder, and the fraction that pruning saves.

    i_N, where the last sum ends, is the number of layers: with the last layer's index one would be
    lost.
    """
    num_layers = shape.text.num_layers
    whole = layer_macs(shape.num_visual + text_tokens, shape)
    saved = sum(
        (end - start) * (whole - layer_macs(count + text_tokens, shape))
        for (start, end), count in zip(pairwise((*sites, num_layers)), counts, strict=True)
    )
    return num_layers * whole / TERA, saved / (num_layers * whole)


def totals() -> Iterator[Figure]:
    """IVTP's tables 1 and 2."""
    for place, (size, shape) in enumerate(MODELS.items()):
        for method, printed in TOTALS.items():
            ours = _tera(shape, method, 512)["total"]
            make = partial(Figure, f"IVTP table {place + 1}", method, f"total, {size}")
            if size == "7B":
                yield make(printed[0], ours, "T", ROUNDED, is_absolute=True)
            else:
                why = ROWS_13B if method == "Spatial pooling" else None
                yield make(printed[1], ours, "T", TOTAL_13B, why=why)


def by_text() -> Iterator[Figure]:
    """IVTP's table 3."""
    for method, printed in BY_TEXT.items():
        for text_tokens, figure in zip(TEXT_TOKENS, printed, strict=True):
            ours = _tera(LLAVA_7B, method, text_tokens)["total"]
            column = f"{text_tokens} text tokens"
            why = QWEN_VL if (method, text_tokens) == ("Qwen-VL", 1024) else None
            yield Figure(
                "IVTP table 3",
                method,
                column,
                figure,
                ours,
                "T",
                ROUNDED,
                is_absolute=True,
                why=why,
            )


def by_part() -> Iterator[Figure]:
    """IVTP's table 9."""
    for method, printed in BY_PART.items():
        ours = _tera(LLAVA_7B, method, 512)
        for (column, value), figure in zip(ours.items(), printed, strict=True):
            if figure is None:
                continue
            make = partial(Figure, "IVTP table 9", method, column, figure, value, "T")
            if column == "extra":  # three decimals are printed
                yield make(0.0005, is_absolute=True)
            else:
                yield make(VISION if column == "ViT" else TOTAL)


def retained() -> Iterator[Figure]:
    """ATP-LLaVA's table 2: the mean over all layers, of which the paper prints the whole part."""
    for row, (sites, counts, printed) in RETAINED.items():
        ours = cost(LLAVA_7B, in_decoder(LLAVA_7B, counts, sites), 0).average_tokens
        column = "mean tokens"
        yield Figure("ATP table 2", row, column, printed, ours, "", 0.5, is_absolute=True)


def storage() -> Iterator[Figure]:
    """ATP-LLaVA's table 6: KV memory of that many visual tokens in every layer, no text."""
    for row, (tokens, megabytes) in STORAGE.items():
        kv_bytes = cost(LLAVA_7B, after_tower(LLAVA_7B, tokens), 0).kv_bytes
        yield Figure("ATP table 6", row, "KV memory", megabytes, kv_bytes / 1e6, "MB", KV)


def equations() -> Iterator[Figure]:
    """ATP-LLaVA's table 6: its TFLOPs beside eqs. 15 and 16, then beside the standard count."""
    for count in ("eqs. 15 and 16", "standard count"):
        for text_tokens in TEXT_TRIED:
            make = partial(Figure, f"ATP table 6 by {count}")
            title = f"{text_tokens} text tokens"
            for row, (printed, share) in SAVED.items():
                sites, counts, _ = RETAINED[row]
                if count == "standard count":
                    whole, saved = _standard(sites, counts, text_tokens)
                else:
                    whole, saved = reduction(sites, counts, text_tokens)
                if row == "ATP 144":
                    yield make(
                        f"Upper bound, {title}",
                        "FLOPs",
                        UPPER_BOUND,
                        whole,
                        "T",
                        ROUNDED,
                        True,
                        TABLE_6,
                    )
                left = whole * (1 - saved)
                yield make(f"{row}, {title}", "FLOPs", printed, left, "T", ROUNDED, True, TABLE_6)
                yield make(f"{row}, {title}", "saved", share, saved, "", 0.001, True, TABLE_6)


def _standard(
    sites: tuple[int, ...], counts: tuple[int, ...], text_tokens: int
) -> tuple[float, float]:
    """The decoder's T by this project's count, and the fraction that pruning saves."""
    whole, pruned = (
        cost(LLAVA_7B, schedule, text_tokens).flops.llm
        for schedule in (no_pruning(LLAVA_7B), in_decoder(LLAVA_7B, counts, sites))
    )
    return whole / TERA, 1 - pruned / whole


TABLES: tuple[Callable[[], Iterator[Figure]], ...] = (
    totals,
    by_text,
    by_part,
    retained,
    storage,
    equations,
)


def figures() -> list[Figure]:
    """Every figure of every table."""
    return [figure for make in TABLES for figure in make()]


def _mark(figure: Figure) -> str:
    if figure.is_within:
        return ""
    return f"outside: {figure.why}" if figure.why else "OUTSIDE, unexplained"


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--outside", action="store_true", help="only what is outside its tolerance")
    args = parser.parse_args()
    every = figures()
    for name in dict.fromkeys(figure.table for figure in every):
        shown = [f for f in every if f.table == name and not (args.outside and f.is_within)]
        if shown:
            print(f"\n{name}")
            rows = [
                (
                    f"{f.row}, {f.column}" + (f" ({f.unit})" if f.unit else ""),
                    f"{f.paper:g}",
                    f"{f.ours:.4f}",
                    f"{100 * f.deviation:+.2f} %",
                    _mark(f),
                )
                for f in shown
            ]
            print(table(("", "paper", "patchsieve", "deviation", ""), rows))
    unexplained = [f for f in every if not f.is_within and f.why is None]
    outside = [f for f in every if not f.is_within]
    print(
        f"\n{len(every)} figures, {len(outside)} outside, {len(unexplained)} unexplained "
        "(docs/papers.md)"
    )
    extra = [asdict(f) | {"deviation": f.deviation, "is_within": f.is_within} for f in every]
    print(json.dumps({"schema_version": 1, "unexplained": len(unexplained), "figures": extra}))
    return 1 if unexplained else 0


if __name__ == "__main__":
    raise SystemExit(main())
