"""A Hugging Face LLaVA whose visual tokens ATP masks on their way through the decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from patchsieve.calibration import dropping
from patchsieve.calibration.attention import PASS, install
from patchsieve.calibration.options import Losses
from patchsieve.calibration.passes import ImageRows, PruningPass
from patchsieve.calibration.rotary import install_sections
from patchsieve.export.families import family_of
from patchsieve.pruning.decoder.atp import ATP
from patchsieve.pruning.decoder.training import atp_loss, average_tokens, target_loss


class PrunedLlava(nn.Module):
    """A LLaVA and the threshold modules that learn when to drop its visual tokens.

    The LLaVA is frozen, or learns to do with fewer tokens: decoder, output matrix and projector,
    as LLaVA's own instruction tuning has it; never the tower.

    Args:
        llava: The model of Hugging Face, as its family loads it.
        methods: ATP of each site, by layer; their thresholds are what is trained.
        patch_ids: Raster index of each of an image's N tokens, -1 for a class token.
        grid: Patch rows and columns.
        losses: Weights of the budget losses.
        sections: Rotary frequencies of each axis, where positions lie on several (grid2d).
        train_lm: Train the language model too.

    Attributes:
        is_hard: Tokens weigh 1 or nothing, as in a bundle; else their soft masks.
        drops: Where hard, tokens of no weight leave the decoder's rows: the same, for less.
    """

    accepts_loss_kwargs = False  # the budget losses are means of a batch: so is the language loss

    def __init__(
        self,
        llava: Any,
        methods: Mapping[int, ATP],
        patch_ids: Sequence[int],
        grid: tuple[int, int],
        losses: Losses | None = None,
        *,
        sections: Sequence[int] = (),
        train_lm: bool = False,
    ) -> None:
        super().__init__()
        self.llava: Any = llava.requires_grad_(False)
        self.parts = family_of(llava.config).parts(llava)
        decoder = self.parts.decoder
        if train_lm:
            for part in (decoder, self.parts.head, self.parts.projector):
                part.requires_grad_(True)
        self.trains_lm = train_lm
        self.config = llava.config  # the Trainer looks for it
        install(decoder)
        dropping.install(decoder)
        install_sections(decoder, sections)
        self.methods, self.grid = dict(sorted(methods.items())), grid
        self.thresholds = nn.ModuleDict({str(k): m.thresholds for k, m in self.methods.items()})
        self.patch_ids = nn.Buffer(torch.tensor(list(patch_ids)), persistent=False)
        self.losses = losses or Losses()
        self.num_layers: int = llava.config.text_config.num_hidden_layers
        self.is_hard = False
        self.drops = dropping.can_drop(decoder.config._attn_implementation)
        # A number that is fixed is its site's budget, as in a bundle: so ties keep no more.
        fixed = {k: getattr(m.thresholds, "count", None) for k, m in self.methods.items()}
        self.budgets = {k: count for k, count in fixed.items() if count is not None}
        self.last: PruningPass | None = None  # the pass of the last forward, for who reports on it

    @property
    def projector(self) -> nn.Module:
        """From the tower to the decoder."""
        return self.parts.projector

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Recompute the decoder's layers in the backward pass (the Trainer calls this)."""
        self.llava.gradient_checkpointing_enable(*args, **kwargs)

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """The same, as transformers 5.23 calls it."""
        self.llava.activation_checkpointing_enable(*args, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        pixel_values: Tensor | None = None,
        image_sample: Tensor | None = None,
        visual_rows: Tensor | None = None,
        text_rows: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Run a batch, padded on the right, through the masked model.

        Args:
            input_ids: Each visual token an image token, int64 [B, L].
            attention_mask: 1 for a row that is no padding, int64 [B, L].
            labels: Answer tokens, -100 elsewhere, int64 [B, L].
            pixel_values: Every image of the batch, float32 [M, 3, h, w].
            image_sample: The sample of each image, int64 [M].
            visual_rows: Rows of each image's tokens, int64 [M, N].
            text_rows: Rows of the instruction that judges it, -1 for padding, int64 [M, T].
            position_ids: On A axes, int64 [B, L, A]; by default a row's place.

        Returns:
            `loss` 0-d: language loss + lambda_atp L_ATP + lambda_target L_target (eq. 14);
            `logits` [B, L, V].
        """
        self.last = pruning = PruningPass(
            self.methods,
            _images(image_sample, visual_rows, text_rows),
            attention_mask.bool(),
            self.patch_ids,
            self.grid,
            hard=self.is_hard,
            temperature=self.losses.temperature,
            budgets=self.budgets,
            drops=self.drops,
        )
        out = self.llava(
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=labels,
            pixel_values=pixel_values,
            position_ids=position_ids,
            use_cache=False,
            **{PASS: pruning},
        )
        return {"loss": out.loss + self._budget_loss(pruning), "logits": out.logits}

    def _budget_loss(self, pruning: PruningPass) -> Tensor:
        """Lambda_atp L_ATP + lambda_target L_target (eqs. 12 and 13), 0-d; 0 without images."""
        if not pruning.sites:  # what took no part still needs a gradient, on every device
            idle = [*self.thresholds.parameters(), *self.parts.projector.parameters()]
            return sum(p.sum() for p in idle if p.requires_grad) * torch.zeros(())
        sites, num_visual = list(pruning.sites), len(self.patch_ids)
        masks = [record.mask for record in pruning.sites.values()]
        loss = self.losses.lambda_atp * atp_loss(masks, sites, num_visual)
        if self.losses.target_tokens is not None:
            # Differs from the paper: the value counts survivors by the rule, only the gradient is
            # that of the soft masks. Else half masks, of spatial scores above all, which are few
            # numbers, meet the target on paper and another one in a bundle.
            counted = [
                record.mask + (record.alive.float() - record.mask).detach()
                for record in pruning.sites.values()
            ]
            target = self.losses.target_tokens
            away = target_loss(counted, sites, target, self.num_layers, num_visual)
            loss = loss + self.losses.lambda_target * away
        return loss

    @torch.no_grad()
    def facts(self) -> dict[str, float]:
        """Tokens and mean thresholds of each site in the last pass; empty without images."""
        if self.last is None or not self.last.sites:
            return {}
        facts, counts = {}, []
        for site, record in self.last.sites.items():
            counts.append(record.alive.float().sum(-1))  # [M]
            facts[f"tokens_{site}"] = float(counts[-1].mean())
            facts[f"theta_r_{site}"] = float(record.theta_r.mean())
            facts[f"theta_s_{site}"] = float(record.theta_s.mean())
        sites, num_visual = list(self.last.sites), len(self.patch_ids)
        average = average_tokens(counts, sites, self.num_layers, num_visual)  # [M]
        return facts | {"average_tokens": float(average.mean())}


def _images(samples: Tensor | None, visual: Tensor | None, text: Tensor | None) -> list[ImageRows]:
    """Where the images of a batch lie; see `PrunedLlava.forward`."""
    if samples is None or visual is None or text is None:
        return []
    return [
        ImageRows(int(sample), rows, judges[judges >= 0])
        for sample, rows, judges in zip(samples, visual, text, strict=True)
    ]
