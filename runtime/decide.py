"""One pruning site: its decision runs once per image, then the surviving rows come to the host."""

from __future__ import annotations

from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from patchsieve.contract import names, reads
from patchsieve.contract.manifest import Manifest
from patchsieve.contract.plan import SitePlan
from patchsieve.runtime.backend import Backend
from patchsieve.runtime.cache import Cache
from patchsieve.runtime.result import SiteResult
from patchsieve.runtime.rows import TEXT, Rows
from patchsieve.runtime.turn import Turn


class Given(NamedTuple):
    """What the decoder's layers before a site give its decision; none of it comes to the host.

    Attributes:
        tensors: `hidden` [1, L, C], and `query.{layer}` [1, L, H * D] of the layers since the site
            before, by these names.
        cache: Keys and values of all layers.
        slot: Slot of the first of the L rows in the caches.
        embeddings: The rows that entered the decoder, [1, L0, C], on the host.
        entered: Place of each of the L rows among them, [L].
    """

    tensors: dict[str, Any]
    cache: Cache
    slot: int
    embeddings: np.ndarray
    entered: np.ndarray


class Survivors(NamedTuple):
    """What a site leaves.

    Attributes:
        rows: The L' rows that the next stage is fed.
        keep_indices: Places of these rows among the L that came, ascending, [L'].
        hidden: The L rows [1, L, C]: as they came, or merged.
        sites: What was decided about each image.
    """

    rows: Rows
    keep_indices: np.ndarray
    hidden: Any
    sites: list[SiteResult]


class Decider:
    """Runs the decisions of a bundle.

    Args:
        facts: The bundle's manifest.
        backend: What runs its graphs.
    """

    def __init__(self, facts: Manifest, backend: Backend) -> None:
        self.facts, self.backend = facts, backend

    def decide(self, site: SitePlan, rows: Rows, given: Given, turn: Turn) -> Survivors:
        """Decide which of the rows enter the site's layer.

        Args:
            site: Where.
            rows: The L rows that came out of the layer before it.
            given: What that layer and those below it computed.
            turn: The plan, its noise, and whether scores are wanted.
        """
        graph = names.decide(turn.plan, site.layer)
        read = self._read(graph, site.layer, given)
        is_merging = self._is_merging(graph)
        wanted = [
            names.NUM_WANTED,
            *[names.MERGED_INTO] * is_merging,
            *[names.SCORES] * turn.scores,
        ]
        keep: Any = np.ones(len(rows), bool)
        if site.layer == self.facts.side_layer(turn.plan):
            keep = rows.side_of == TEXT  # the last decision that reads side rows: they end here
        hidden, decided = given.tensors[names.HIDDEN], list[dict[str, Any]]()
        for image in rows.images():
            # The mask, and the rows of a method that merges, go from image to image where they
            # were computed: a GPU is waited for once a site, not once an image.
            out = self.backend.run(
                graph, read | self._of_image(site, rows, image, turn) | {names.KEEP: keep}
            )
            keep = out[names.KEEP_OUT]
            if is_merging:
                read[names.HIDDEN] = hidden = out[names.HIDDEN_OUT]
            decided.append({name: out[name] for name in wanted})
        keep_indices, found = self._fetch(keep, decided)
        merged = rows
        for image, one in zip(rows.images(), found, strict=True):
            if is_merging:  # a token that took others in counts for their patches at the next site
                merged = merged.merge(image, one[names.MERGED_INTO])
        kept = merged.take(keep_indices)
        sites = [
            _site_result(site.layer, image, rows, kept, one)
            for image, one in zip(rows.images(), found, strict=True)
        ]
        return Survivors(kept, keep_indices, hidden, sites)

    def _is_merging(self, graph: str) -> bool:
        """Whether a decision gives the rows back, some of them merged."""
        return self.facts.graphs[graph].output(names.HIDDEN_OUT) is not None

    def _read(self, graph: str, layer: int, given: Given) -> dict[str, Any]:
        """What a decision takes of the layers before it, by its names for them."""
        read = {}
        for tensor in self.facts.graphs[graph].inputs:
            name = tensor.name
            what = reads.named(name)
            assert what is not None  # the manifest was checked
            of = layer - 1 if what.layer is None else what.layer
            if what.read.source == reads.STAGE:
                is_hidden = what.read.name == names.HIDDEN
                read[name] = given.tensors[name if is_hidden else names.query(of)]
            elif what.read.source == reads.CACHE:
                stages = given.cache.stages
                stage = next(one for one in stages if one.stage.first <= of < one.stage.last)
                is_key = what.read.name == names.KEY
                give = self.backend.key_cache if is_key else self.backend.value_cache
                read[name] = give(stage, of)
            elif what.read.name == names.EMBEDDINGS:
                read[name] = given.embeddings[:, given.entered]
        return read | {names.SLOT: np.array([given.slot])}

    def _of_image(self, site: SitePlan, rows: Rows, image: int, turn: Turn) -> dict[str, Any]:
        """What the host knows of an image, by the names of a decision's inputs."""
        visual_rows = rows.of_image(image)
        return {
            names.VISUAL_ROWS: visual_rows,
            names.TEXT_ROWS: rows.text_for(image),
            names.PATCH_IDS: rows.patch_ids[visual_rows],
            names.SIDE_ROW: rows.side_row(image),
            names.LAST_ROW: rows.last_row(),
            names.BUDGET: np.array([site.budget or self.facts.num_visual(turn.plan)]),
            names.SIZES: rows.sizes[visual_rows],
            names.POSITION_IDS: rows.position_ids,
            # Drawn for every decision, so that a site's noise does not hang on the others' methods
            names.NOISE: turn.noise.random((1, len(visual_rows)), np.float32),
        }

    def _fetch(
        self, keep: Any, decided: list[dict[str, Any]]
    ) -> tuple[np.ndarray, list[dict[str, np.ndarray]]]:
        """Bring the survivors' places [L'] and each image's outputs to the host, in one wait."""
        out = self.backend.run(names.COMPACT, {names.KEEP: keep})
        tensors = [tensor for one in decided for tensor in one.values()]
        num_keep, keep_indices, *fetched = self.backend.fetch(
            "survivors of a site", out[names.NUM_KEEP], out[names.KEEP_INDICES], *tensors
        )
        values = iter(fetched)
        found = [{name: next(values) for name in one} for one in decided]
        return keep_indices[: int(num_keep[0])], found


def _site_result(
    layer: int, image: int, before: Rows, kept: Rows, found: dict[str, np.ndarray]
) -> SiteResult:
    """What a site did to an image, from the outputs of its decision."""
    scores, moved = found.get(names.SCORES), found.get(names.MERGED_INTO)
    alive, left = before.of_image(image), kept.of_image(image)
    places = before.places[alive]
    return SiteResult(
        layer=layer,
        image=image,
        num_visual_before=len(alive),
        kept=np.sort(kept.patch_ids[left]).tolist(),
        num_wanted=int(found[names.NUM_WANTED][0]),
        places=kept.places[left].tolist(),
        scores=None if scores is None else _by_place(places, scores),
        merged=None
        if moved is None
        else [pair for pair in _by_place(places, places[moved]) if pair[0] != pair[1]],
    )


def _by_place(places: np.ndarray, values: np.ndarray) -> list[tuple[int, Any]]:
    """Place and value of an image's tokens that were alive, by place, [N] each."""
    return sorted(zip(places.tolist(), values.tolist(), strict=True), key=itemgetter(0))
