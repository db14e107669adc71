"""Soft masks and budget losses that train the thresholds of ATP-LLaVA (eqs. 9-13)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from patchsieve.contract.errors import ShapeError

Number = TypeVar("Number", float, Tensor)


def soft_mask(score: Tensor, theta: Tensor, temperature: float = 50.0) -> Tensor:
    """Differentiable mask sigmoid((S - theta) T) (eqs. 9 and 10).

    Above 0.5 exactly where S > theta, but for differences that float32 rounds away (below about
    1e-7 / T).

    The paper leaves open: T, "sufficiently large". 50 suits scores in [0, 1].

    Args:
        score: S_red or S_spatial, [B, N].
        theta: Its threshold, [B, 1].
        temperature: T.

    Returns:
        Mask in (0, 1), [B, N].
    """
    return torch.sigmoid((score - theta) * temperature)


def joint_mask(
    s_red: Tensor,
    s_spatial: Tensor,
    theta_r: Tensor,
    theta_s: Tensor,
    temperature: float = 50.0,
) -> Tensor:
    """Mask = max(Mask_r, Mask_s) (eq. 11), [B, N]; above 0.5 where `hard_keep`'s rule holds.

    Args:
        s_red: Redundant pruning scores, [B, N].
        s_spatial: Spatial pruning scores, [N] or [B, N].
        theta_r: Threshold of `s_red`, [B, 1].
        theta_s: Threshold of `s_spatial`, [B, 1].
        temperature: T.
    """
    return torch.maximum(
        soft_mask(s_red, theta_r, temperature), soft_mask(s_spatial, theta_s, temperature)
    )


def check_sites(sites: Sequence[int], given: Sequence[object]) -> None:
    """Refuse sites that are not ascending or that do not pair with what is given for them.

    Raises:
        ShapeError: As said.
    """
    ascending = all(a < b for a, b in zip(sites, sites[1:], strict=False))
    if len(sites) != len(given) or not sites or not ascending:
        raise ShapeError(
            "pruning sites and their values do not pair",
            found=f"{len(given)} values for sites {list(sites)}",
            expected="one value for each site, sites ascending",
            do="give one mask or count per site, in the order of the layers",
        )


def atp_loss(masks: Sequence[Tensor], sites: Sequence[int], num_visual: int = 576) -> Tensor:
    """L_ATP = sum over sites of Sum(Mask_ik) / 576 * i_k (eq. 12), batch mean, 0-d.

    The weight i_k grows with depth, as the paper intends, though pruning deep saves less.

    Args:
        masks: Effective mask of each site, the product of the masks so far, [B, N] each. A token
            that fell before weighs 0, or the little that its soft masks leave of it.
        sites: Layer index i_k of each site, from 0, ascending.
        num_visual: Tokens before any pruning.

    Raises:
        ShapeError: Masks and sites do not pair.
    """
    check_sites(sites, masks)
    terms = [
        mask.float().sum(-1).mean() / num_visual * i for mask, i in zip(masks, sites, strict=True)
    ]
    return torch.stack(terms).sum()


def average_tokens(
    counts: Sequence[Number],
    sites: Sequence[int],
    num_layers: int = 32,
    num_visual: int = 576,
) -> Number:
    """Mean number of visual tokens over all layers, those before the first site included.

    A site i prunes the input of layer i, so layers 0..i_0-1 hold all tokens and layers
    i_k..i_{k+1}-1 hold n_k. This is how the paper's table 2 counts.

    Args:
        counts: Tokens n_k kept at each site: numbers, or tensors of one shape.
        sites: Layer index i_k of each site, from 0, ascending.
        num_layers: Layers of the decoder.
        num_visual: Tokens before any pruning.

    Returns:
        The mean, of the type of `counts`.

    Raises:
        ShapeError: Counts and sites do not pair, or a site lies past the last layer.
    """
    check_sites(sites, counts)
    if sites[0] < 0 or sites[-1] >= num_layers:
        raise ShapeError(
            "a pruning site is no layer of the decoder",
            found=list(sites),
            expected=f"layers 0 to {num_layers - 1}",
            do="correct the sites or the number of layers",
        )
    ends = (*sites[1:], num_layers)
    total = counts[0] * 0 + sites[0] * num_visual
    for count, i, end in zip(counts, sites, ends, strict=True):
        total = total + (end - i) * count
    return total / num_layers


def target_loss(
    masks: Sequence[Tensor],
    sites: Sequence[int],
    target: float,
    num_layers: int = 32,
    num_visual: int = 576,
) -> Tensor:
    """L_target = |N_bar - N_target| in tokens (eq. 13), 0-d.

    N_bar is the batch mean of `average_tokens` over all layers, of the masks' sums.

    Args:
        masks: Effective mask of each site, as for `atp_loss`, [B, N] each.
        sites: Layer index i_k of each site, from 0, ascending.
        target: N_target, tokens.
        num_layers: Layers of the decoder.
        num_visual: Tokens before any pruning.

    Raises:
        ShapeError: Masks and sites do not pair, or a site lies past the last layer.
    """
    counts = [mask.float().sum(-1) for mask in masks]  # [B] each
    return (average_tokens(counts, sites, num_layers, num_visual).mean() - target).abs()
