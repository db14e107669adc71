"""One forward pass of a batch under ATP: scores, masks and survivors of every image at every site.

Soft, each mask is differentiable and every token stays in the sequence, its weight scaled by its
mask. Hard, a token that falls below its thresholds weighs nothing in later layers, which equals
dropping it: nothing is renumbered. Then only the budget losses reach the thresholds, and nothing
reaches through the scores into the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from patchsieve.pruning.decoder.atp import ATP, Scores
from patchsieve.pruning.decoder.site import Site
from patchsieve.pruning.select import apply_budget

GONE = -1e4  # a logit that softmax makes exactly 0, within the range of float16


@dataclass(frozen=True)
class ImageRows:
    """Where one image of a batch lies.

    Attributes:
        sample: Index in the batch.
        visual: Rows of its tokens, ascending, int64 [N].
        text: Rows of the instruction that judges it, int64 [T].
    """

    sample: int
    visual: Tensor
    text: Tensor


@dataclass
class SiteRecord:
    """What one site made of the images of a batch.

    Attributes:
        log_mask: Log of each image's effective soft mask, a product over the sites so far; a token
            that fell at an earlier site keeps the mask of that site, float32 [M, N].
        alive: What survives so far by the threshold rule, bool [M, N].
        theta_r: Thresholds of S_red, float32 [M].
        theta_s: Thresholds of S_spatial, float32 [M].
        s_red: S_red of each alive token of each image.
    """

    log_mask: Tensor
    alive: Tensor
    theta_r: Tensor
    theta_s: Tensor
    s_red: list[Tensor]

    @property
    def mask(self) -> Tensor:
        """The effective mask itself, [M, N]."""
        return self.log_mask.exp()


class PruningPass:
    """What the attention of each layer obeys and shows during one forward pass.

    Args:
        methods: ATP of each site, by layer.
        images: Every image of the batch, each of as many tokens.
        present: Rows that are no padding, bool [B, L].
        patch_ids: Raster index of each visual token, int64 [N].
        grid: Patch rows and columns.
        hard: Tokens weigh 1 or nothing, as in a bundle; else their masks.
        temperature: T of eqs. 9 and 10.
        budgets: Most survivors of each site, which a bundle reserves room for; by layer.
        drops: Take rows that fell, where hard, out of the sequence instead of masking them
            (`calibration.dropping`).

    Attributes:
        sites: What was decided so far, by layer.
    """

    def __init__(
        self,
        methods: Mapping[int, ATP],
        images: Sequence[ImageRows],
        present: Tensor,
        patch_ids: Tensor,
        grid: tuple[int, int],
        *,
        hard: bool = False,
        temperature: float = 50.0,
        budgets: Mapping[int, int] | None = None,
        drops: bool = False,
    ) -> None:
        self.methods, self.images, self.present = methods, images, present
        self.patch_ids, self.grid, self.hard = patch_ids, grid, hard
        self.temperature, self.budgets = temperature, budgets or {}
        self.sites: dict[int, SiteRecord] = {}
        self.drops = hard and drops
        self._biases: dict[int, Tensor] = {}  # log of the effective masks by site, [B, L]
        self._rows: dict[int, Tensor] = {}  # that are left by site, [B, R]

    def bias(self, layer: int) -> Tensor | None:
        """What a layer adds to the logits of each key, [B, L]; None before the first site."""
        return _newest(self._biases, layer)

    def rows(self, layer: int) -> Tensor | None:
        """Which of the L rows a layer is given, ascending, L for padding, int64 [B, R].

        None for all: before the first site, or where nothing is dropped.
        """
        return _newest(self._rows, layer)

    def see(self, layer: int, query: Tensor, key: Tensor) -> None:
        """Decide the site that follows a layer, if one does.

        Gradient checkpointing runs a layer twice: the second time gives the same again.

        Args:
            layer: The layer whose attention was computed.
            query: Its queries, rotated, [B, H, L, D].
            key: Its keys, rotated, [B, G, L, D].
        """
        site = layer + 1
        if site not in self.methods or not self.images:
            return
        before = self._before(site)
        judged = [self._judge(site, number, query, key) for number in range(len(self.images))]
        log_mask, alive, theta = (
            torch.stack(parts) for parts in list(zip(*judged, strict=True))[:3]
        )
        if before is not None:
            log_mask = log_mask + before.log_mask  # [M, N]
        s_red = [scores for *_, scores in judged]
        self.sites[site] = SiteRecord(log_mask, alive, theta[:, 0], theta[:, 1], s_red)
        if self.drops:
            self._rows[site] = self._left(self.sites[site])
        else:
            self._biases[site] = self._lay(torch.where(alive, 0.0, GONE) if self.hard else log_mask)

    def survivors(self, site: int) -> list[list[int]]:
        """Raster ids that survive a site, for each image."""
        return [self.patch_ids[kept].tolist() for kept in self.sites[site].alive]

    def _before(self, site: int) -> SiteRecord | None:
        """The record of the site before, looked up by number: a site may be seen twice."""
        return self.sites.get(max((other for other in self.sites if other < site), default=-1))

    def _judge(
        self, site: int, number: int, query: Tensor, key: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log mask [N], survivors [N], thresholds [2] and S_red [N alive] of one image."""
        method, seen, alive = self.methods[site], *self._site(site, number, query, key)
        scores = method.score(seen)
        if self.hard:
            scores = Scores(*(part.detach() for part in scores))
        maps = (scores.s_self, scores.s_cross, seen.patch_ids, seen.grid)
        theta_r, theta_s = method.thresholds(*maps)  # [1, 1]
        keep, margin = method.judge(scores, theta_r, theta_s)  # [1, N alive]
        # log max(sigmoid(a), sigmoid(b)), in a form whose gradient does not die.
        log_mask = functional.logsigmoid(margin * self.temperature)
        if site in self.budgets:
            room = torch.tensor([self.budgets[site]], device=keep.device)
            keep, _ = apply_budget(keep, margin, room)
        where = (torch.nonzero(alive)[:, 0],)  # [N alive]
        return (
            torch.zeros(alive.shape, device=alive.device).index_put(where, log_mask[0]),
            torch.zeros_like(alive).index_put(where, keep[0]),
            torch.cat((theta_r[0], theta_s[0])),
            scores.s_red[0].detach(),
        )

    def _site(self, site: int, number: int, query: Tensor, key: Tensor) -> tuple[Site, Tensor]:
        """An image at a site as a bundle would see it, and which of its tokens are alive, [N].

        The rows of padding and of tokens that fell at earlier sites are left out.
        """
        image = self.images[number]
        kept = self._kept(image.sample, self._before(site))  # [L]
        alive = kept[image.visual]  # [N]
        rows_kept = torch.nonzero(kept)[:, 0]  # [L kept]
        place = torch.cumsum(kept, 0) - 1  # [L]
        if self.rows(site - 1) is not None:  # the others are not among the queries any more
            rows_kept = torch.arange(len(rows_kept), device=kept.device)
        chosen = slice(image.sample, image.sample + 1)
        seen = Site(
            query=query[chosen].index_select(2, rows_kept),
            key=key[chosen].index_select(2, rows_kept),
            visual_rows=place[image.visual[alive]],
            text_rows=place[image.text],
            patch_ids=self.patch_ids[alive],
            grid=self.grid,
            num_visual=len(self.patch_ids),
        )
        return seen, alive

    def _kept(self, sample: int, before: SiteRecord | None) -> Tensor:
        """Rows of a sample that are neither padding nor tokens that fell, bool [L]."""
        kept = self.present[sample].clone()
        for number, image in enumerate(self.images):
            if image.sample == sample and before is not None:
                kept[image.visual] = before.alive[number]
        return kept

    def _left(self, record: SiteRecord) -> Tensor:
        """The rows that are left after a site, [B, R]."""
        batch, length = self.present.shape
        left = [torch.nonzero(self._kept(sample, record))[:, 0] for sample in range(batch)]
        return pad_sequence(left, batch_first=True, padding_value=length)

    def _lay(self, per_image: Tensor) -> Tensor:
        """Lay a value of each visual token [M, N] on the rows of the batch, 0 elsewhere: [B, L]."""
        samples = torch.tensor([image.sample for image in self.images], device=per_image.device)
        rows = torch.stack([image.visual for image in self.images])  # [M, N]
        empty = per_image.new_zeros(self.present.shape)
        return empty.index_put((samples[:, None].expand_as(rows), rows), per_image)


def _newest(of_sites: Mapping[int, Tensor], layer: int) -> Tensor | None:
    """What the last site at or before a layer left."""
    site = max((site for site in of_sites if site <= layer), default=None)
    return None if site is None else of_sites[site]
