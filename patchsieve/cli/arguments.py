"""Types of arguments that several commands take."""

from __future__ import annotations

import argparse
import math
import re

# Help of --precision: what export and cost take.
PRECISION = (
    "how numbers are stored and computed: a type (float32, float16, bfloat16), or a preset. int8; "
    "int4: decoder int4, tower int8; mixed: int8, and a copy of the decoder in int4 that feeds "
    "single rows (ONNX Runtime alone); fp8 and nvfp4, for GPUs that have them. After a comma by "
    "part: tower=, projector=, scorer=, decoder=, decisions= (its layers before the last site), "
    "step= (that copy), head=, or a matrix's name, with a type or a format: float, int8, "
    "int8-weights, int4, int4-32, int4-64, int4-128, fp8, nvfp4; a type after a colon. Example: "
    "int4:float16,head=float16,layers.0=float"
)


def add_target(
    parser: argparse.ArgumentParser,
    default: str = "the only one, else the one with engines for this GPU, else the only one that "
    "runs here",
) -> None:
    """Declare --target, whose default the bundle and the machine decide."""
    parser.add_argument(
        "--target",
        default="auto",
        metavar="T",
        help=f"which of the bundle's targets (default: auto, {default})",
    )


def integers(text: str) -> list[int]:
    """Read whole numbers with commas between them: 4,14,24."""
    return [int(part) for part in parts(text, r"\d{1,9}", "whole numbers such as 4,14,24")]


def count(text: str) -> int:
    """Read a whole number of at least 1."""
    if not re.fullmatch(r"0*[1-9]\d{0,8}", text):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number of at least 1")
    return int(text)


def whole(text: str) -> int:
    """Read a whole number of at least 0."""
    if not re.fullmatch(r"\d{1,9}", text):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number of at least 0")
    return int(text)


def numbers(text: str) -> list[float]:
    """Read numbers with commas between them: 0.5,0.25."""
    return [float(part) for part in parts(text, r"\d*\.?\d+", "numbers such as 0.5,0.25")]


def gigabytes(text: str) -> int:
    """Read a size in gigabytes, such as 1.5, as bytes."""
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < math.inf:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected gigabytes above 0, such as 1.5")
    return int(size * 1e9)


def parts(text: str, pattern: str, expected: str) -> list[str]:
    """Split at commas; each part must match."""
    found = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(pattern, part) for part in found):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected {expected}")
    return found
