"""The learnable thresholds of ATP-LLaVA (section 3.3.2, eqs. 6-8)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from patchsieve.contract.errors import PatchsieveError

ACTIVATIONS = {None: None, "relu": functional.relu, "gelu": functional.gelu}
# Before training almost everything passes theta_r, and only the coarsest grids theta_s.
INITIAL_THETA_R, INITIAL_THETA_S = 0.12, 0.88


def logit(theta: float) -> float:
    """What the sigmoid makes theta of."""
    return math.log(theta) - math.log1p(-theta)


class Thresholds(nn.Module):
    """theta_r and theta_s of one instance at one site, from its score maps.

    z = Linear(cat(S_self, S_cross)) (eq. 6); theta_r = sigmoid(Linear_r(z)) (eq. 7);
    theta_s = sigmoid(Linear_s(z)) (eq. 8). One module per site.

    The paper leaves open: the hidden size; how a Linear of fixed width takes the shrunken lists of
    later sites (here: the scores lie on the raster grid, with zeros for pruned patches, and other
    grids are interpolated to this one); an activation (eq. 6 shows none, the prose says "MLP"); the
    initial values of the heads (here biases that give the initial thresholds). A low initial
    theta_s lets the finest grid through from the start; training then drops all else and stays
    there, for a mask that is nearly 1 has no gradient (benchmarks/LOG.md).

    Args:
        hidden: Width of z.
        grid: Height and width of the score maps that the module takes.
        activation: None, "relu" or "gelu", applied to z.
        initial: theta_r and theta_s of a z of 0, in (0, 1).

    Raises:
        PatchsieveError: The activation is unknown, a size is not positive or an initial threshold
            is none.
    """

    def __init__(
        self,
        hidden: int = 64,
        grid: tuple[int, int] = (24, 24),
        activation: str | None = None,
        initial: tuple[float, float] = (INITIAL_THETA_R, INITIAL_THETA_S),
    ) -> None:
        """Make the three layers."""
        super().__init__()
        is_possible = hidden > 0 < min(grid) and 0 < min(initial) <= max(initial) < 1
        if activation not in ACTIVATIONS or not is_possible:
            raise PatchsieveError(
                "the threshold module cannot be built",
                found=f"hidden {hidden}, grid {grid}, activation {activation}, initial {initial}",
                expected="positive sizes, an activation of None, relu or gelu, and initial "
                "thresholds between 0 and 1",
                do="correct the options of Thresholds",
            )
        self.grid = tuple(grid)
        self.activation = activation
        self.trunk = nn.Linear(2 * grid[0] * grid[1], hidden)
        self.head_r = nn.Linear(hidden, 1)
        self.head_s = nn.Linear(hidden, 1)
        for head, theta in zip((self.head_r, self.head_s), initial, strict=True):
            nn.init.constant_(head.bias, logit(theta))

    def forward(
        self, s_self: Tensor, s_cross: Tensor, patch_ids: Tensor, grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Predict both thresholds.

        Args:
            s_self: Normalised self-modality scores of the alive tokens, [B, N].
            s_cross: Normalised cross-modality scores, [B, N].
            patch_ids: Raster ids on `grid`, -1 for no patch, int64 [N].
            grid: Height and width of the image's original grid.

        Returns:
            theta_r and theta_s in (0, 1), float32 [B, 1] each.
        """
        maps = score_maps(s_self, s_cross, patch_ids, grid)  # [B, 2, h, w]
        if tuple(grid) != self.grid:
            maps = functional.interpolate(
                maps, size=self.grid, mode="bilinear", align_corners=False
            )  # [B, 2, 24, 24]
        z = functional.linear(maps.flatten(1), self.trunk.weight.float(), self.trunk.bias.float())
        activate = ACTIVATIONS[self.activation]
        z = z if activate is None else activate(z)  # [B, hidden]
        theta_r = functional.linear(z, self.head_r.weight.float(), self.head_r.bias.float())
        theta_s = functional.linear(z, self.head_s.weight.float(), self.head_s.bias.float())
        return torch.sigmoid(theta_r), torch.sigmoid(theta_s)  # [B, 1]


class ConstantThresholds(nn.Module):
    """The same theta_r and theta_s for every instance: no training needed.

    Differs from the paper: its thresholds adapt to the instance; these do not, though the number of
    survivors still does.

    Args:
        theta_r: Redundancy threshold; below 0 keeps everything.
        theta_s: Spatial threshold; 1 or more switches spatial sampling off.

    Raises:
        PatchsieveError: A threshold is not finite.
    """

    def __init__(self, theta_r: float = 0.5, theta_s: float = 0.5) -> None:
        """Hold two numbers."""
        super().__init__()
        if not (math.isfinite(theta_r) and math.isfinite(theta_s)):
            raise PatchsieveError(
                "a threshold is not a number",
                found=f"theta_r {theta_r}, theta_s {theta_s}",
                expected="finite numbers, usually in (0, 1)",
                do="correct the thresholds",
            )
        self.theta_r = float(theta_r)
        self.theta_s = float(theta_s)

    def forward(
        self, s_self: Tensor, s_cross: Tensor, patch_ids: Tensor, grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Both thresholds (see `Thresholds.forward`), float32 [B, 1] each."""
        shape = (s_self.shape[0], 1)
        theta_r = torch.full(shape, self.theta_r, dtype=torch.float32, device=s_self.device)
        theta_s = torch.full(shape, self.theta_s, dtype=torch.float32, device=s_self.device)
        return theta_r, theta_s

    def extra_repr(self) -> str:
        """Show the two numbers in print."""
        return f"theta_r={self.theta_r}, theta_s={self.theta_s}"


def score_maps(s_self: Tensor, s_cross: Tensor, patch_ids: Tensor, grid: tuple[int, int]) -> Tensor:
    """Lay both scores on the raster grid, zeros where a patch is pruned; float32 [B, 2, h, w]."""
    height, width = grid
    num_patches = height * width
    scores = torch.stack((s_self, s_cross), dim=1).float()  # [B, 2, N]
    # A row without a patch goes to a spare last cell, which is cut off.
    cells = torch.where(patch_ids >= 0, patch_ids, num_patches)  # [N]
    empty = scores.new_zeros(scores.shape[0], 2, num_patches + 1)
    laid = empty.scatter(2, cells.expand(scores.shape), scores)  # [B, 2, h*w+1]
    return laid[:, :, :num_patches].reshape(-1, 2, height, width)  # [B, 2, h, w]
