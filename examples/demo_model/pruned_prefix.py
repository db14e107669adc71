"""What a demo model's decoder reads of pictures whose tokens a plan prunes, made to train with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from patchsieve.calibration.passes import GONE
from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.plan import Plan
from patchsieve.export.families import family_of
from patchsieve.export.graphs.vision import Vision
from patchsieve.export.methods import build_encoder, build_method
from patchsieve.export.sites import check_sites
from patchsieve.export.weights import weights_of
from patchsieve.pruning.decoder.site import Site
from patchsieve.pruning.select import ascending

from .shared_prefix import layer_weights, run_rows
from .train_language import Words


def vision_of(model: Any, plan: Plan) -> Vision:
    """The module that export traces, on a model's own weights: who trains it trains the model."""
    config = model.config
    family = family_of(config)
    vision = Vision(
        family.vision(config),
        config.text_config.hidden_size,
        build_encoder(plan.encoder),
        has_cls_outputs=True,
    )
    own = {family.canonical(name): parameter for name, parameter in model.named_parameters()}
    for weight in weights_of(vision):
        values = own[weight.source].detach()
        owner, _, name = weight.name.rpartition(".")
        values = values.T if weight.transposed else values  # a view
        setattr(vision.get_submodule(owner), name, nn.Parameter(values))
    return vision


class PrunedPrefix:
    """What the decoder reads before a question, and what of it falls there.

    Args:
        model: The LLaVA model.
        plan: What prunes.
        words: Of the model's prompt.
        seed: Of what falls, where chance decides.
        is_random: In the decoder chance decides which tokens fall, and only their number is the
            plan's. Otherwise IVTP does, guided by the picture's own CLS whatever the question is.
    """

    def __init__(
        self, model: Any, plan: Plan, words: Words, seed: int, *, is_random: bool = True
    ) -> None:
        counted = all("num_keep" in site.params for site in plan.sites)
        chosen = is_random or all(site.method == "ivtp" for site in plan.sites)
        is_followed = plan.projector is None and plan.position_rule != "contiguous"
        if not (counted and chosen and is_followed):
            raise PatchsieveError(
                "training follows plans with a method in the tower, sites that keep a number (ivtp "
                "alone unless tokens fall at random), and original positions",
                found=plan.to_dict(),
            )
        methods = [build_method(site) for site in plan.sites]
        check_sites(plan, methods)
        self.vision = vision_of(model, plan)
        self._language, self._words = model.model.language_model, words
        self._counts = {site.layer: int(site.params["num_keep"]) for site in plan.sites}
        self._methods = {site.layer: m for site, m in zip(plan.sites, methods, strict=True)}
        self._generator = torch.Generator().manual_seed(seed)
        self._is_random = is_random or not plan.sites

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The prefix of each image.

        Returns:
            Rows, [B, P, C]; what hides those that fall, [layers, B, P]; their rotary positions,
            [B, P]; and the raster ids of the patches among them, [B, N].
        """
        with torch.autocast("cpu", enabled=False):  # a bundle chooses in float32
            visual, ids, _, cls = self.vision(images)
        first, patches = self._words.image, self.vision.facts.num_patches
        text = self._language.embed_tokens(torch.tensor(self._words.prefix))
        text = text.expand(len(images), -1, -1)
        rows = torch.cat([text[:, :first], visual.to(text.dtype), text[:, first + 1 :]], 1)
        places = torch.arange(len(self._words.prefix) - 1 + patches).expand(len(images), -1)
        places = torch.cat([places[:, :first], first + ids, places[:, first + patches :]], 1)
        after = first + ids.shape[1]
        if self._is_random:
            kept = self._draw(ids)
        else:
            with torch.autocast("cpu", enabled=False):
                kept = self._choose(rows, places, cls, after)
        bias = torch.zeros(len(self._language.layers), *rows.shape[:2])
        for layer, alive in kept.items():
            bias[layer:, :, first:after] = ~alive * GONE
        return rows, bias, places, ids

    def _draw(self, ids: Tensor) -> dict[int, Tensor]:
        """What is left after each site, by chance, bool [B, N]."""
        order = torch.rand(ids.shape, generator=self._generator).argsort(1)
        return {layer: order < count for layer, count in self._counts.items()}

    @torch.no_grad()
    def _choose(self, rows: Tensor, places: Tensor, cls: Tensor, after: int) -> dict[int, Tensor]:
        """What a bundle leaves after each site, if no word guides it, bool [B, N].

        Args:
            rows: The prefix, [B, P, C].
            places: Its positions, [B, P].
            cls: Projected CLS of each picture, [B, C], which becomes the side row.
            after: The first row after the picture.
        """
        first, num_visual, kept = self._words.image, after - self._words.image, {}
        hidden = torch.cat([rows, cls[:, None].to(rows.dtype)], 1)
        places = torch.cat([places, places[:, after : after + 1]], 1)
        alive = torch.arange(num_visual).expand(len(rows), -1)  # places among the image's tokens
        below: list[tuple[Tensor, Tensor, Tensor]] = []
        for layer, block in enumerate(self._language.layers):
            if layer in self._methods:
                keep = self._decide(layer, below, alive.shape[1])
                left = ascending(keep, min(self._counts[layer], alive.shape[1]))  # [B, n]
                text = torch.arange(first + alive.shape[1], hidden.shape[1])
                text = text.expand(len(rows), -1)
                alive = alive.gather(1, left)
                front = torch.arange(first).expand(len(rows), -1)
                taken = torch.cat([front, first + left, text], 1)
                hidden = hidden.gather(1, taken[..., None].expand(-1, -1, hidden.shape[2]))
                places = places.gather(1, taken)
                kept[layer] = torch.zeros(len(rows), num_visual).scatter(1, alive, 1.0).bool()
                below = []
            if layer == max(self._methods):
                break
            turn = self._language.rotary_emb(hidden, places)
            sees = torch.ones(hidden.shape[1], hidden.shape[1]).tril().bool()
            sees[-1, first + alive.shape[1] : -1] = False  # the side row: what is up to the image
            hidden, *seen = run_rows(hidden, layer_weights(block), *turn, sees)
            below.insert(0, tuple(seen))
        return kept

    def _decide(
        self, layer: int, below: list[tuple[Tensor, Tensor, Tensor]], num_alive: int
    ) -> Tensor:
        """The plan's own decision on all images, bool [B, n]."""
        first, (query, key, value) = self._words.image, below[0]
        last = query.shape[2] - 1
        site = Site(
            query=query,
            key=key,
            value=value,
            lower=tuple((query, key) for query, key, _ in below[1:]),
            visual_rows=torch.arange(first, first + num_alive),
            text_rows=torch.tensor([last - 1]),
            patch_ids=torch.arange(num_alive),
            grid=self.vision.facts.grid,
            num_visual=num_alive,
            side_row=torch.tensor([last]),
            last_row=torch.tensor([last - 1]),
        )
        return self._methods[layer].decide(site, torch.tensor([num_alive])).keep
