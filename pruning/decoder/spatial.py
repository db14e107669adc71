"""Uniform spatial sampling of ATP-LLaVA (section 3.3.1, eq. 5)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from patchsieve.contract.errors import PatchsieveError


def check_granularities(granularities: Sequence[int], spatial_lambda: float) -> None:
    """Refuse strides whose sets are not nested or whose scores leave (0, 1].

    Raises:
        PatchsieveError: A stride does not divide the next, or 1 - lambda / s^2 is not in (0, 1].
    """
    steps = list(zip(granularities, granularities[1:], strict=False))
    if not granularities or any(b <= a or b % a for a, b in steps):
        raise PatchsieveError(
            "the spatial granularities are not nested",
            found=tuple(granularities),
            expected="ascending strides, each a divisor of the next, such as (2, 4, 8)",
            do="choose strides that divide one another",
        )
    for s in granularities:
        if not (s >= 1 and 0 < 1 - spatial_lambda / s**2 <= 1):
            raise PatchsieveError(
                "a spatial score leaves the range (0, 1]",
                found=f"stride {s} with spatial_lambda {spatial_lambda}",
                expected="0 < 1 - spatial_lambda / stride^2 <= 1",
                do="raise the smallest stride or lower spatial_lambda (the paper's is 3)",
            )


def spatial_scores(
    grid: tuple[int, int],
    granularities: Sequence[int] = (2, 4, 8),
    spatial_lambda: float = 3.0,
) -> Tensor:
    """Score of each patch of the original grid: 1 - R^s lambda_sample for v_n in V_s (eq. 5).

    V_s holds every s-th patch of both axes, R^s is its share of the patches. A patch in several
    sets takes its highest score, that of its coarsest set; a patch in none scores 0. So lowering
    theta_s on a 24 x 24 grid reveals 9, then 36, then 144 patches.

    Differs from the paper: its prose gives tokens of *higher* rates the higher scores, which
    contradicts eq. 5; the equation is followed.
    The paper leaves open: the strides and where each set starts. All start at offsets congruent to
    that of the coarsest, (s_max / 2 - 1) mod s, which nests them and centres the coarsest.

    Args:
        grid: Height h and width w, in patches.
        granularities: Strides s, ascending.
        spatial_lambda: lambda_sample.

    Returns:
        S_spatial in raster order, float32 [h*w], on the CPU.
    """
    height, width = grid
    start = max(granularities) // 2 - 1
    scores = [0.0] * (height * width)
    for s in granularities:
        sampled = [
            row * width + column
            for row in range(start % s, height, s)
            for column in range(start % s, width, s)
        ]
        score = 1 - len(sampled) / (height * width) * spatial_lambda
        for patch in sampled:
            scores[patch] = max(scores[patch], score)
    return torch.tensor(scores, dtype=torch.float32)


def gather_patches(values: Tensor, patch_ids: Tensor) -> Tensor:
    """Pick values of a raster grid, 0 where the id is -1.

    Args:
        values: One per patch, [h*w].
        patch_ids: Raster ids, -1 for no patch, int64 [N].

    Returns:
        Values, [N].
    """
    # .to() keeps a constant's numbers in a trace on the meta device; device= would lose them.
    picked = values.to(patch_ids.device).index_select(0, patch_ids.clamp(min=0))  # [N]
    return torch.where(patch_ids >= 0, picked, 0.0)
