"""The steps of a LLaVA model fed layer by layer: tower, projector, decoder, head.

Nothing is pruned. A conversation is fed whole, its answers too, as training feeds it: every row is
one that a bundle feeds before or while it answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patchsieve.calibration.encoder import Encoder
from patchsieve.calibration.layerwise import Reader, Rows, Step
from patchsieve.calibration.samples import Sample
from patchsieve.contract.model import VisionModel
from patchsieve.export.families.specs import DecoderSpec, ProjectorSpec, TowerSpec
from patchsieve.export.graphs.layers import RMSNorm, rotary_tables
from patchsieve.export.graphs.stage import DecoderLayer
from patchsieve.export.graphs.vision import Projector, TowerLayer, VisionTower
from patchsieve.export.job import EMBEDDING_TABLE
from patchsieve.export.weights import Source
from patchsieve.pruning.encoder.walk import Tower, Walk


@dataclass(frozen=True)
class Conversation:
    """A conversation as the decoder is fed it.

    Attributes:
        token_ids: int64 [L].
        visual: Rows of each image, int64 [N] each; those from L on are cut off.
        position_ids: Rotary positions, int64 [L, A]; None if they are a row's place.
    """

    token_ids: Tensor
    visual: tuple[Tensor, ...]
    position_ids: Tensor | None

    @classmethod
    def of(cls, sample: Sample, most: int) -> Conversation:
        """The first rows of a sample. The decoder is causal: the rest changes nothing in them."""
        positions = sample.position_ids
        return cls(
            sample.input_ids[:most],
            tuple(sample.visual),
            None if positions is None else positions[:most],
        )


class Head(nn.Module):
    """The last norm, and the rows that the output matrix reads."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.norm, self.lm_head = RMSNorm(spec.hidden_size, spec.norm_eps), Reader()

    def forward(self, x: Tensor) -> Tensor:
        """[1, L, C] -> [1, L, C]."""
        rows: Tensor = self.lm_head(self.norm(x))
        return rows


def decoder_of(encoder: Encoder) -> DecoderSpec:
    """The decoder, with the rotary sections that the checkpoint was trained with."""
    spec = encoder.family.decoder(encoder.config)
    return replace(spec, rotary_sections=encoder.trained.rotary_sections)


class LlavaSteps:
    """Makes the steps.

    Args:
        encoder: The checkpoint.
        source: Its tensors.
        conversations: What is fed.
        pixels: Gives the images of all conversations in their order, [1, 3, h, w] each.
        folder: Where rows lie between steps.

    Attributes:
        steps: The steps so far, in order.
    """

    def __init__(
        self,
        encoder: Encoder,
        source: Source,
        conversations: tuple[Conversation, ...],
        pixels: Callable[[], Iterator[Tensor]],
        folder: Path,
    ) -> None:
        self.facts, self.spec = encoder.tower, decoder_of(encoder)
        self.source, self.conversations = source, conversations
        self.pixels, self.folder = pixels, folder
        self.steps: list[Step] = []
        features = self._tower()
        self._head(self._decoder(self._projector(features)))

    @property
    def wanted(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the checkpoint's tensors that the steps read."""
        shapes = {w.source: w.source_shape for step in self.steps for w in step.weights}
        return shapes | {EMBEDDING_TABLE: (self.spec.vocab_size, self.spec.hidden_size)}

    def _add(
        self,
        label: str,
        make: Callable[[], nn.Module],
        prefix: str,
        blocks: Callable[[Any], Iterator[Tensor]],
        reads: tuple[Rows, ...],
        *out: Any,
    ) -> Rows:
        """Add a step; `out` are lengths and width of what it writes."""
        path = self.folder / f"{len(self.steps):03}.rows"
        rows = Rows(path, *out) if out else None
        self.steps.append(Step(label, make, prefix, self.source, blocks, reads, rows))
        return rows or reads[0]

    def _tower(self) -> tuple[Rows, ...]:
        """Add the tower; gives the rows of the layers whose features the projector reads."""
        facts, spec = self.facts, TowerSpec.of_facts(self.facts)
        walk = Walk(Tower(facts.grid, facts.num_layers_run, facts.has_cls), ())  # nothing prunes
        images = sum(len(each.visual) for each in self.conversations)
        size = (facts.num_patches + facts.has_cls,) * images, facts.hidden_size
        rows = self._add(
            "embedding patches",
            lambda: VisionTower(spec, [0]),  # with no layer
            "vision_tower.",
            lambda module: (module(image, walk) for image in self.pixels()),
            (),
            *size,
        )
        after = [rows]
        for index in range(facts.num_layers_run):

            def blocks(layer: Any, index: int = index, rows: Rows = rows) -> Iterator[Tensor]:
                return (layer(rows.read(image), index, walk) for image in range(images))

            rows = self._add(
                f"tower layer {index + 1} of {facts.num_layers_run}",
                lambda: TowerLayer(spec),
                f"vision_tower.encoder.layers.{index}.",
                blocks,
                (rows,),
                *size,
            )
            after.append(rows)
        return tuple(after[index] for index in facts.feature_layers)

    def _projector(self, features: tuple[Rows, ...]) -> Rows:
        """Add the projector, after which visual tokens lie between the embeddings of text."""
        facts, size = self.facts, self.spec.hidden_size
        return self._add(
            "projecting images",
            lambda: Projector(ProjectorSpec.of_facts(facts), size),
            "multi_modal_projector.",
            lambda projector: self._embed(projector, facts, features),
            features,
            tuple(len(each.token_ids) for each in self.conversations),
            size,
        )

    def _embed(
        self, projector: Any, facts: VisionModel, features: tuple[Rows, ...]
    ) -> Iterator[Tensor]:
        """The rows that enter the decoder, [1, L, C] for each conversation."""
        table, image = self.source.read(EMBEDDING_TABLE), 0
        for each in self.conversations:
            rows = table[each.token_ids].float()  # [L, C]
            for places in each.visual:
                read = [layer.read(image)[:, facts.num_dropped :] for layer in features]
                visual = projector(torch.cat(read, dim=-1))[0]  # [N, C]
                is_fed = places < len(rows)
                rows[places[is_fed]] = visual[is_fed]
                image += 1
            yield rows[None]

    def _decoder(self, rows: Rows) -> Rows:
        """Add the decoder's layers; gives the rows after the last."""
        spec = self.spec
        for index in range(spec.num_layers):

            def blocks(layer: Any, rows: Rows = rows) -> Iterator[Tensor]:
                for number, each in enumerate(self.conversations):
                    yield _decode(layer, rows.read(number), each.position_ids, spec)

            rows = self._add(
                f"decoder layer {index + 1} of {spec.num_layers}",
                lambda: DecoderLayer(spec),
                f"layers.{index}.",
                blocks,
                (rows,),
                rows.lengths,
                rows.width,
            )
        return rows

    def _head(self, rows: Rows) -> None:
        self._add(
            "last norm",
            lambda: Head(self.spec),
            "",
            lambda head: (head(rows.read(number)) for number in range(len(rows.lengths))),
            (rows,),
        )


def _decode(layer: Any, x: Tensor, position_ids: Tensor | None, spec: DecoderSpec) -> Tensor:
    """One decoder layer over a whole conversation, [1, L, C] -> [1, L, C]."""
    places = torch.arange(x.shape[1])  # [L]: each row sees itself and those before it
    positions = places if position_ids is None else position_ids
    inv_freq = torch.tensor(spec.inv_freq, dtype=torch.float32)
    cos, sin = rotary_tables(positions, inv_freq, spec, x.dtype)
    empty = x.new_zeros(1, spec.num_kv_heads, x.shape[1], spec.head_dim)
    out: Tensor = layer(x, cos, sin, places[:1], places, empty, empty)[0]
    return out
