"""One comparison of `verify`, and the rules by which a bundle departs from its checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from patchsieve.contract.formats import FORMATS
from patchsieve.contract.manifest import Manifest

# Largest error of a row's entries over the row's largest entry. float32: sums in another order,
# which grow through the layers. float16: each operator rounds to 5e-4, the reference does not.
# bfloat16 has three bits fewer.
TOLERANCE = {"float32": 1e-4, "float16": 3e-2, "bfloat16": 8 * 3e-2}
PIXEL_TOLERANCE = 1e-6  # the preprocessor computes in float32 whatever the graphs do
SCORE_TIE = 1e-6  # closer scores may fall either way; in float16, closer than its tolerance


@dataclass(frozen=True)
class Part:
    """One comparison.

    Attributes:
        plan: The plan that was followed.
        name: What was compared.
        layer: The decoder layer that made it, if one did.
        max_error: Largest absolute error; None for what is compared exactly or is not finite.
        relative_error: Largest error of an entry over the largest entry of its row.
        tolerance: Of the relative error.
        departs: The bundle is not what the checkpoint is.
        note: For people.
    """

    plan: str
    name: str
    layer: int | None = None
    max_error: float | None = None
    relative_error: float | None = None
    tolerance: float | None = None
    departs: bool = False
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The part as JSON prints it."""
        return asdict(self)


def allowed_error(facts: Manifest) -> float:
    """The tolerance of a bundle: that of its coarsest type or weights format."""
    formats = {entry.format for entry in facts.weights.values()}
    types = (TOLERANCE[kind] for kind in facts.precision.kinds)
    return max((*types, *(FORMATS[name].error for name in formats)))


def compare(
    plan: str,
    name: str,
    ours: np.ndarray,
    theirs: np.ndarray,
    tolerance: float,
    layer: int | None = None,
    note: str = "",
) -> Part:
    """Compare rows, the error of an entry measured by the largest of its row."""
    if ours.shape != theirs.shape:
        note = f"shape {list(ours.shape)}, not {list(theirs.shape)}"
        return Part(plan, name, layer, tolerance=tolerance, departs=True, note=note)
    error = np.abs(ours.astype(np.float64) - theirs)
    size = np.abs(theirs).max(axis=-1, keepdims=True)
    if not np.isfinite(error).all():
        return Part(plan, name, layer, tolerance=tolerance, departs=True, note="not finite")
    relative = float((error / np.maximum(size, 1e-12)).max(initial=0.0))
    largest = float(error.max(initial=0.0))
    return Part(plan, name, layer, largest, relative, tolerance, relative > tolerance, note)


def compare_survivors(
    plan: str,
    layer: int,
    ours: np.ndarray,
    theirs: np.ndarray,
    scores: np.ndarray,
    closest: float,
    image: int | None = None,
) -> Part:
    """Compare what a site kept of an image, bool [N] each.

    Args:
        plan: The plan.
        layer: The site.
        ours: The bundle's survivors.
        theirs: The checkpoint's.
        scores: Its scores, [N].
        closest: Scores may differ by this share and fall either way; at least SCORE_TIE.
        image: Number of the image, where there are several.
    """
    common, differ = int((ours & theirs).sum()), ours != theirs
    edge = float(scores[theirs].min()) if theirs.any() else 0.0
    closest = max(SCORE_TIE, closest * abs(edge))
    is_tie = bool((abs(scores[differ] - edge) < closest).all())
    note = f"{common} in common of {int(ours.sum())} and {int(theirs.sum())}"
    if differ.any() and is_tie:
        note += ", the others tie"
    of_image = "" if image is None else f" of image {image}"
    return Part(plan, f"survivors at layer {layer}{of_image}", layer, departs=not is_tie, note=note)


def compare_tokens(
    plan: str, ours: list[int], logits: np.ndarray, by: str, tolerance: float
) -> Part:
    """Compare greedy tokens with Hugging Face's logits [T, V].

    At the first that differs the two logits may be as good as equal; after it the two sides read
    different texts.
    """
    theirs = logits.argmax(axis=-1).tolist()
    pairs = zip(ours, theirs, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    note = f"{same} equal of {len(ours)} and {len(theirs)}, {by}"
    departs = ours != theirs
    if departs and same < min(len(ours), len(theirs)):
        row = logits[same]
        gap = float((row.max() - row[ours[same]]) / np.abs(row).max())
        departs = gap > tolerance
        note += f"; their logits differ by {gap:.1e}" + ("" if departs else ", a tie")
    return Part(plan, "greedy tokens", departs=departs, note=note)
