"""ATP-LLaVA (Ye et al., "Adaptive Token Pruning for Large Vision Language Models", 2024)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from patchsieve.contract.errors import PatchsieveError, ShapeError
from patchsieve.pruning.decoder.normalise import MOST_RANKED, normalise, redundancy
from patchsieve.pruning.decoder.rule import DecoderMethod
from patchsieve.pruning.decoder.site import Decision, Site, key_slots, received_attention
from patchsieve.pruning.decoder.spatial import check_granularities, gather_patches, spatial_scores
from patchsieve.pruning.decoder.thresholds import ConstantThresholds
from patchsieve.pruning.rows import mean_over
from patchsieve.pruning.select import apply_budget, first_best

# Of which scores S_red is the mean.
MODALITIES = {"both": (0, 1), "self": (0, 0), "cross": (1, 1)}
# Which pairs of score and threshold judge a token: redundant pruning, spatial pruning.
PARTS = {"both": (0, 1), "redundant": (0, 0), "spatial": (1, 1)}


class Scores(NamedTuple):
    """The scores of one image at one site, float32.

    Attributes:
        s_self: Self-modality score, normalised, [B, N].
        s_cross: Cross-modality score, normalised, [B, N].
        s_red: Redundant pruning score, their mean, or one of them, [B, N].
        s_spatial: Spatial pruning score, [N].
    """

    s_self: Tensor
    s_cross: Tensor
    s_red: Tensor
    s_spatial: Tensor


@dataclass(frozen=True)
class ATP(DecoderMethod):
    """Keep what is important enough or spatially sampled, by thresholds that fit the instance.

    A token stays if S_red > theta_r or S_spatial > theta_s (section 3.4: "below the threshold
    discarded"), so the number of survivors adapts to image, question and layer.

    The paper leaves open: the normalisation of the two scores, the granularities of the spatial
    sampling, and what happens when nothing passes (here the token of highest S_red stays) or when
    more pass than the budget (here the largest max(S_red - theta_r, S_spatial - theta_s) stay).

    Attributes:
        thresholds: Module that gives theta_r and theta_s: `Thresholds` or `ConstantThresholds`.
        granularities: Strides of the nested spatial sets.
        normalisation: "minmax", "rank", "softmax" or "none".
        causal: False takes eq. 3 literally, with every pair of visual tokens; True only the pairs
            that causal attention uses, queries at or after the key.
        spatial_lambda: lambda_sample of eq. 5.
        modality: S_red is the mean of "both" scores, or "self" or "cross" alone, as in the paper's
            ablation (table 5); thresholds are predicted from both all the same.
        parts: A token stays by "both" rules, or by the "redundant" or the "spatial" one alone, as
            in the paper's ablation (table 4). If nothing passes, the highest score of the rule
            that judges stays.

    Raises:
        PatchsieveError: An option is unknown or out of range.
    """

    name: ClassVar[str] = "atp"
    reads: ClassVar[tuple[str, ...]] = ("query", "key")

    thresholds: nn.Module = field(default_factory=ConstantThresholds)
    granularities: tuple[int, ...] = (2, 4, 8)
    normalisation: str = "minmax"
    causal: bool = False
    spatial_lambda: float = 3.0
    modality: str = "both"
    parts: str = "both"

    def __post_init__(self) -> None:
        """Check the options."""
        if not isinstance(self.thresholds, nn.Module):
            raise PatchsieveError(
                "ATP needs a module that gives its thresholds",
                found=type(self.thresholds).__name__,
                expected="Thresholds or ConstantThresholds",
                do="wrap fixed numbers as ConstantThresholds(theta_r, theta_s)",
            )
        super().__post_init__()
        object.__setattr__(self, "granularities", tuple(self.granularities))
        check_granularities(self.granularities, self.spatial_lambda)

    def score(self, site: Site) -> Scores:
        """Compute all scores of the site's image.

        Raises:
            ShapeError: "rank" is asked to order more tokens than it can.
        """
        if self.normalisation == "rank" and site.num_visual > MOST_RANKED:
            raise ShapeError(
                "an image has too many tokens for the rank normalisation",
                found=site.num_visual,
                expected=f"at most {MOST_RANKED}",
                do="use minmax",
            )
        pair = normalise(self_score(site, self.causal), cross_score(site), self.normalisation)
        s_self, s_cross = pair
        on_grid = spatial_scores(site.grid, self.granularities, self.spatial_lambda)  # [h*w]
        s_spatial = gather_patches(on_grid, site.patch_ids)  # [N]
        first, second = MODALITIES[self.modality]
        s_red = redundancy(pair[first], pair[second], self.normalisation)  # [B, N]
        return Scores(s_self, s_cross, s_red, s_spatial)

    def decide(self, site: Site, budget: Tensor) -> Decision:
        """Keep what passes a threshold (see `Method.decide`).

        The decision's scores are the margins max(S_red - theta_r, S_spatial - theta_s): what is
        above 0 passes, and the budget cuts the lowest.
        """
        scores = self.score(site)
        thetas = self.thresholds(scores.s_self, scores.s_cross, site.patch_ids, site.grid)
        keep, margin = self.judge(scores, *thetas)  # [B, N] each
        keep, num_wanted = apply_budget(keep, margin, budget)
        return Decision(keep, margin, num_wanted)

    def judge(self, scores: Scores, theta_r: Tensor, theta_s: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the thresholds, in training as in a bundle.

        Args:
            scores: Of one image at one site.
            theta_r: Threshold of S_red, [B, 1].
            theta_s: Threshold of S_spatial, [B, 1].

        Returns:
            What stays, bool [B, N], and how far the better of the parts is above its threshold,
            max(S_red - theta_r, S_spatial - theta_s), [B, N].
        """
        rules = (scores.s_red, theta_r), (scores.s_spatial.expand_as(scores.s_red), theta_s)
        (first, theta_1), (second, theta_2) = (rules[part] for part in PARTS[self.parts])
        keep = hard_keep(first, second, theta_1, theta_2)
        return keep, torch.maximum(first - theta_1, second - theta_2)


def self_score(site: Site, causal: bool = False) -> Tensor:
    """Mean attention logit that each visual token receives from the visual tokens (eq. 3).

    S_self[n] = mean over m of q_m . k_n / sqrt(D), mean over the heads. The logits of eq. 1 carry
    no mask and are linear in q, so the mean moves inside: k_n . mean(q_m) / sqrt(D), exactly, at
    O(N D) instead of O(N^2 D).

    Differs from the paper: in a matrix A = Q K^T the first index of A(v_n, v_m) is the query, which
    would make eq. 3 the attention that v_n pays. The prose says "receives", and the sentence after
    eq. 4 has A(v_n, t_m) as what t_m pays to v_n: so n is the key here, and m the query.

    The paper leaves open: whether pairs that causal attention never uses count. Read literally they
    do (`causal` False). With `causal` True the mean runs over m >= n only, by suffix means of q.

    Args:
        site: The image at the site.
        causal: Leave out the queries before the key.

    Returns:
        S_self, unbounded, float32 [B, N].
    """
    batch, heads, _, head_dim = site.query.shape
    kv_heads = site.key.shape[1]
    num_tokens = site.visual_rows.shape[0]
    query = site.query.index_select(2, site.visual_rows).float()  # [B, H, N, D]
    # The head mean is linear too: heads that share a KV head are averaged before the product.
    query = query.reshape(batch, kv_heads, heads // kv_heads, num_tokens, head_dim)
    query = mean_over(query, 2)  # [B, G, N, D]
    key = site.key.index_select(2, key_slots(site, site.visual_rows)).float()  # [B, G, N, D]
    if causal:
        suffix = query.flip(2).cumsum(2).flip(2)  # [B, G, N, D]
        counts = torch.arange(num_tokens, 0, -1, device=query.device).float()  # [N]
        query = suffix / counts[:, None]  # [B, G, N, D]
    else:
        query = mean_over(query, 2)[:, :, None]  # [B, G, 1, D]
    return mean_over((key * query).sum(-1), 1) * head_dim**-0.5  # [B, N]


def cross_score(site: Site) -> Tensor:
    """Mean attention that each visual token receives from the text rows (eq. 4), float32 [B, N].

    The text looks (query), the visual token is looked at (key), as the prose under eq. 4 says; the
    softmax runs over every key that the row sees, and the mean over rows and heads.

    The paper leaves open: which text counts. Here the instruction after the image, without system
    prompt and role markers, as the site's `text_rows` has it.
    """
    return received_attention(site, site.text_rows)


def hard_keep(s_red: Tensor, s_spatial: Tensor, theta_r: Tensor, theta_s: Tensor) -> Tensor:
    """Apply the thresholds at inference: keep iff S_red > theta_r or S_spatial > theta_s.

    The paper leaves open: an image of which nothing passes. Here the token of highest S_red stays,
    the lower index of several.

    Args:
        s_red: Redundant pruning scores, [B, N].
        s_spatial: Spatial pruning scores, [N] or [B, N].
        theta_r: Threshold of `s_red`, [B, 1].
        theta_s: Threshold of `s_spatial`, [B, 1].

    Returns:
        Mask with at least one true in each row, bool [B, N].
    """
    keep = (s_red > theta_r) | (s_spatial > theta_s)  # [B, N]
    is_empty = keep.float().sum(-1, keepdim=True) < 1  # [B, 1]
    return keep | (is_empty & first_best(s_red))
