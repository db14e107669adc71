"""The rules that decoder methods share: what stays of the scores that a method gives."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from patchsieve.pruning.catalogue import Catalogued
from patchsieve.pruning.decoder.site import Decision, Site
from patchsieve.pruning.entry import DECODER
from patchsieve.pruning.select import keep_count, keep_fraction


class DecoderMethod(Catalogued):
    """The base of methods of a decoder site, which `patchsieve.pruning.decoder.site` describes."""

    acts_at = DECODER


@dataclass(frozen=True)
class KeepRatio(DecoderMethod):
    """Keep a fixed fraction of the image's tokens, those of the highest scores.

    A method writes `scores`.

    Attributes:
        keep_ratio: Fraction kept of the image's tokens as they enter the decoder, in (0, 1].
    """

    keep_ratio: float = 0.5

    def scores(self, site: Site) -> Tensor:
        """Score of each visual token, higher is kept, float32 [B, N]."""
        raise NotImplementedError

    def decide(self, site: Site, budget: Tensor) -> Decision:
        """Keep the fraction that scores highest (see `Method.decide`)."""
        scores = self.scores(site)
        keep, num_wanted = keep_fraction(scores, self.keep_ratio, site.num_visual, budget)
        return Decision(keep, scores, num_wanted)


@dataclass(frozen=True)
class KeepNumber(DecoderMethod):
    """Keep a fixed number of tokens of each image, those of the highest scores.

    A method writes `scores`.

    Attributes:
        num_keep: Tokens kept of each image.
    """

    num_keep: int = 64

    def scores(self, site: Site) -> Tensor:
        """Score of each visual token, higher is kept, float32 [B, N]."""
        raise NotImplementedError

    def decide(self, site: Site, budget: Tensor) -> Decision:
        """Keep the tokens that score highest (see `Method.decide`)."""
        scores = self.scores(site)
        keep, num_wanted = keep_count(scores, self.num_keep, budget)
        return Decision(keep, scores, num_wanted)
