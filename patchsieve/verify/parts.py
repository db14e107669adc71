"""One comparison of `verify`, and the rules by which a bundle departs from its checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from patchsieve.contract.manifest import Manifest

# Largest error of a row's entries over the row's largest entry. float32: sums in another order,
# which grow through the layers. float16: each operator rounds to 5e-4, the reference does not.
# bfloat16 has three bits fewer. Where matrices are stored in int8 or int4, the own error of a part
# counts instead, and what its formats allow (`patchsieve.verify.allowed`).
TOLERANCE = {"float32": 1e-4, "float16": 3e-2, "bfloat16": 8 * 3e-2}
PIXEL_TOLERANCE = 1e-6  # the preprocessor computes in float32 whatever the graphs do
SMALL_ROW = 1e-3  # of the usual length of a row: a shorter one counts as this long
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
        mean_error: Length of a row's error over the row's length, mean over the rows.
        own_error: The same, against what the checkpoint makes of the bundle's rows before this
            part; None if nothing is rounded to int8 or int4.
        tolerance: Of the own error if there is one, else of the relative error.
        departs: The bundle is not what the checkpoint is.
        is_product: It is what a single matrix made of its rows.
        in_common: Share of survivors or of next tokens that both sides chose.
        note: For people.
    """

    plan: str
    name: str
    layer: int | None = None
    max_error: float | None = None
    relative_error: float | None = None
    mean_error: float | None = None
    own_error: float | None = None
    tolerance: float | None = None
    departs: bool = False
    is_product: bool = False
    in_common: float | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The part as JSON prints it."""
        return asdict(self)


def allowed_error(facts: Manifest) -> float:
    """The tolerance of a bundle's floating-point parts: that of its coarsest type."""
    return max(TOLERANCE[kind] for kind in facts.precision.kinds)


@dataclass(frozen=True)
class Alone:
    """What the checkpoint makes of the bundle's rows before a part.

    Attributes:
        rows: What it makes, as the part gives it.
        tolerance: Of the part's own error.
        before: The rows that it adds to, where the part is a residual layer: its error is measured
            by what it adds.
    """

    rows: np.ndarray
    tolerance: float
    before: np.ndarray | None = None


def compare(
    plan: str,
    name: str,
    ours: np.ndarray,
    theirs: np.ndarray,
    tolerance: float,
    layer: int | None = None,
    note: str = "",
    alone: Alone | None = None,
) -> Part:
    """Compare rows, the error of an entry measured by the largest of its row.

    Args:
        plan: The plan that was followed.
        name: What is compared.
        ours: The bundle's rows, [..., C].
        theirs: The checkpoint's.
        tolerance: Of the relative error.
        layer: The decoder layer that made them, if one did.
        note: For people.
        alone: What counts instead in a bundle that is rounded to int8 or int4.
    """
    tolerance = tolerance if alone is None else alone.tolerance
    part = Part(plan, name, layer, tolerance=tolerance, note=note)
    for other in (theirs,) if alone is None else (theirs, alone.rows):
        if ours.shape != other.shape:
            wrong = f"shape {list(ours.shape)}, not {list(other.shape)}"
            return replace(part, departs=True, note=wrong)
    error = np.abs(ours.astype(np.float64) - theirs)
    size = np.abs(theirs).max(axis=-1, keepdims=True)
    if not np.isfinite(error).all():
        return replace(part, departs=True, note="not finite")
    relative = float((error / np.maximum(size, 1e-12)).max(initial=0.0))
    own = None if alone is None else own_error(ours, alone)
    return replace(
        part,
        max_error=float(error.max(initial=0.0)),
        relative_error=relative,
        mean_error=_mean(row_errors(ours, theirs)),
        own_error=own,
        departs=(relative if own is None else own) > tolerance,
    )


def compare_alone(
    plan: str, name: str, ours: np.ndarray, alone: Alone, layer: int | None = None, note: str = ""
) -> Part:
    """Compare what is only compared with what the checkpoint makes of the bundle's own rows."""
    part = Part(plan, name, layer, tolerance=alone.tolerance, note=note)
    if ours.shape != alone.rows.shape:
        wrong = f"shape {list(ours.shape)}, not {list(alone.rows.shape)}"
        return replace(part, departs=True, note=wrong)
    error = own_error(ours, alone)
    if not np.isfinite(error):
        return replace(part, departs=True, note="not finite")
    return replace(part, own_error=error, departs=error > alone.tolerance)


def own_error(ours: np.ndarray, alone: Alone) -> float:
    """Mean over rows of an error's length, relative to what the checkpoint makes of the rows."""
    return _mean(row_errors(ours, alone.rows, alone.before))


def row_errors(
    ours: np.ndarray, theirs: np.ndarray, before: np.ndarray | None = None
) -> np.ndarray:
    """Length of each row's error over the row's own length, [...].

    Args:
        ours: [..., C].
        theirs: The same.
        before: What a residual layer adds to: a row is then as long as what is added.
    """
    error = np.linalg.norm(ours.astype(np.float64) - theirs, axis=-1)
    added = theirs.astype(np.float64) - (0.0 if before is None else before)
    size: np.ndarray = np.linalg.norm(added, axis=-1)
    usual = float(np.sqrt((size**2).mean())) if size.size else 0.0
    return np.asarray(error / np.maximum(size, max(SMALL_ROW * usual, 1e-12)))


def _mean(errors: np.ndarray) -> float:
    return float(errors.mean()) if errors.size else 0.0


def compare_survivors(
    plan: str,
    layer: int,
    ours: np.ndarray,
    theirs: np.ndarray,
    scores: np.ndarray,
    closest: float,
    image: int | None = None,
    carried: np.ndarray | None = None,
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
        carried: What the checkpoint keeps by its own rows, where `theirs` is what it keeps by the
            bundle's.
    """
    common, differ = int((ours & theirs).sum()), ours != theirs
    edge = float(scores[theirs].min()) if theirs.any() else 0.0
    closest = max(SCORE_TIE, closest * abs(edge))
    is_tie = bool((abs(scores[differ] - edge) < closest).all())
    note = f"{common} in common of {int(ours.sum())} and {int(theirs.sum())}"
    if differ.any() and is_tie:
        note += ", the others tie"
    share = common / max(int(theirs.sum()), 1)
    if carried is not None:
        share = int((ours & carried).sum()) / max(int(carried.sum()), 1)
        note = f"{share:.1%} in common; by the same rows {note}"
    name = f"survivors at layer {layer}" + ("" if image is None else f" of image {image}")
    return Part(plan, name, layer, departs=not is_tie, in_common=share, note=note)


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


def compare_next(
    plan: str, said: list[int], chosen: list[int], logits: np.ndarray, by: str
) -> Part:
    """Compare next tokens after the same text, which rounding may change.

    Args:
        plan: The plan that was followed.
        said: The bundle's tokens.
        chosen: Tokens of largest logit in the bundle's own logits, as far as these were kept.
        logits: The checkpoint's, after the bundle's tokens before each, [T, V].
        by: How they were made.
    """
    same = int((logits.argmax(axis=-1) == np.array(said)).sum())
    note = f"{same} of {len(said)} next tokens agree, {by}"
    departs = said[: len(chosen)] != chosen[: len(said)]
    if departs:
        note += "; the bundle's tokens are not those of its own logits"
    return Part(plan, "greedy tokens", departs=departs, in_common=same / len(said), note=note)
