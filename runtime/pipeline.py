"""Rows through the stages: prefill with the decisions in between, then decode row by row."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from hashlib import sha256
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from patchsieve.contract import names
from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.plan import SitePlan
from patchsieve.runtime.backend import Backend
from patchsieve.runtime.bundle import Bundle
from patchsieve.runtime.cache import Cache, StageCache, empty_cache
from patchsieve.runtime.pseudo_cls import VisualCls
from patchsieve.runtime.result import SiteResult, since
from patchsieve.runtime.rows import TEXT, Rows
from patchsieve.runtime.scorer import TextScorer


@dataclass
class Prefill:
    """What came of a prefill.

    Attributes:
        logits: Of the last row, float32 [V].
        sites: What was decided.
        stage_ms: Time of each stage.
        decide_ms: Time of each site's decisions, compaction included.
    """

    logits: np.ndarray
    sites: list[SiteResult] = field(default_factory=list)
    stage_ms: list[float] = field(default_factory=list)
    decide_ms: list[float] = field(default_factory=list)


class Seen(NamedTuple):
    """What the tower gives of B images.

    Attributes:
        features: Visual tokens, [B, N, C].
        ids: Their raster ids, [B, N].
        sources: Token that each patch went to [B, patches], or [0, patches] where nothing prunes
            before the decoder.
        cls: Each image as a whole, where the plan asks for it.
    """

    features: np.ndarray
    ids: np.ndarray
    sources: np.ndarray
    cls: list[VisualCls]


class Pipeline:
    """The graphs of a bundle in their order.

    Args:
        bundle: The opened bundle.
        backend: What runs its graphs.

    Attributes:
        spare_images: Of how many images the visual tokens are kept, for who asks much about each;
            0, the default, keeps none, so that every request pays for its own.
    """

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.bundle, self.backend, self.facts = bundle, backend, bundle.manifest
        self.spare_images = 0
        self._seen: dict[tuple[str, bytes], Seen] = {}
        self._only_row = np.zeros(1, np.int64)
        self._scorer: TextScorer | None = None

    def new_cache(self, plan: str) -> Cache:
        """An empty cache with the reservation of a plan; an engine's own is the same for all."""
        slots = self.facts.slots(plan)
        if self.backend.has_fixed_slots:
            slots = [stage.slots for stage in self.facts.stages]
        return empty_cache(self.facts, slots, self.backend.allocate)

    def see(self, pixel_values: np.ndarray, plan: str, rng: np.random.Generator) -> Seen:
        """Turn pixels [B, 3, h, w] into the visual tokens of a plan.

        Args:
            pixel_values: The images.
            plan: Name of the plan.
            rng: Noise for methods that draw, a number for each patch.
        """
        graph = self.facts.vision_graph(plan)
        has_noise = self.facts.graphs[graph].input(names.NOISE) is not None
        if not self.spare_images or has_noise:
            return self._see(graph, pixel_values, rng if has_noise else None)
        key = (graph, sha256(pixel_values.tobytes()).digest())
        if key not in self._seen:
            while len(self._seen) >= self.spare_images:
                del self._seen[next(iter(self._seen))]
            self._seen[key] = self._see(graph, pixel_values, None)
        return self._seen[key]

    def _see(self, graph: str, pixel_values: np.ndarray, rng: np.random.Generator | None) -> Seen:
        num_patches = self.facts.vision.num_patches
        inputs = {names.PIXEL_VALUES: pixel_values}
        if rng is not None:
            inputs[names.NOISE] = rng.random((len(pixel_values), num_patches), np.float32)
        out = self.backend.run(graph, inputs)
        found = dict(zip(out, self.backend.fetch("image features", *out.values()), strict=True))
        joint = found.get(names.CLS_JOINT, [None] * len(pixel_values))
        cls = zip(found.get(names.CLS_FEATURES, ()), joint, strict=False)
        return Seen(
            found[names.IMAGE_FEATURES],
            found[names.IMAGE_IDS],
            found.get(names.IMAGE_SOURCES, np.empty((0, num_patches), np.int64)),
            [VisualCls(features, own) for features, own in cls],
        )

    def score(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """A text's tokens in the space of the image [K, E], and their characters [K, 2]."""
        if self._scorer is None:
            facts = self.facts.scorer
            assert facts is not None  # the manifest was checked: the plan that asks has one
            path = self.bundle.place.file(facts.tokenizer)
            self._scorer = TextScorer(facts, path, self._text_features)
        return self._scorer(text)

    def _text_features(self, text_ids: np.ndarray) -> np.ndarray:
        out = self.backend.run(names.SCORER, {names.TEXT_IDS: text_ids})
        return self.backend.fetch("text features", out[names.TEXT_FEATURES])[0]

    def prefill(
        self,
        hidden: np.ndarray,
        rows: Rows,
        cache: Cache,
        plan: str,
        rng: np.random.Generator,
        scores: bool = False,
    ) -> Prefill:
        """Feed rows through all stages, dropping visual rows where the plan says.

        Args:
            hidden: Embeddings and image features, [1, L0, C].
            rows: What they are.
            cache: Rows are added to it; after an error it stands as before.
            plan: Name of the plan.
            rng: Noise for methods that draw.
            scores: Bring every decision's scores to the host too.

        Raises:
            PatchsieveError: The logits are not finite.
        """
        mark = cache.mark()
        try:
            return self._prefill(hidden, rows, cache, plan, rng, scores)
        except BaseException:
            self._undo(cache, mark)
            raise

    def _prefill(
        self,
        hidden: Any,
        rows: Rows,
        cache: Cache,
        plan: str,
        rng: np.random.Generator,
        scores: bool,
    ) -> Prefill:
        sites = {site.layer: site for site in self.facts.plans[plan].sites}
        result = Prefill(np.zeros(0, np.float32))
        keep_indices = np.arange(len(rows))
        position = rows.next_position
        queries: dict[str, Any] = {}  # of the rows as they are now
        for index, stage_cache in enumerate(cache.stages):
            start = time.perf_counter()
            slot = stage_cache.length
            out = self._stage(
                index,
                hidden,
                keep_indices,
                rows.position_ids,
                stage_cache,
                rows.last_seen(),
                rows.num_side,
            )
            if names.LOGITS in out:
                (result.logits,) = self.backend.fetch("logits of the prompt", out[names.LOGITS])
            result.stage_ms.append(since(start))
            hidden = out.get(names.HIDDEN_OUT)
            queries |= out
            keep_indices = np.arange(len(rows))
            read = queries | {names.HIDDEN: hidden}
            site = sites.get(stage_cache.stage.last)
            if site is not None and rows.images():
                start = time.perf_counter()
                rows, keep_indices, hidden = self._decide(
                    plan, site, read, slot, rows, cache, rng, result.sites, scores
                )
                queries = {}
                result.decide_ms.append(since(start))
        cache.position = position
        result.logits = _finite(result.logits)
        return result

    def decode(self, token_id: int, cache: Cache) -> np.ndarray:
        """Feed one token and return the logits behind it, float32 [V]."""
        mark = cache.mark()
        try:
            hidden = self.bundle.embed(np.array([token_id]))[None]  # [1, 1, C]
            axes = len(self.facts.text.rotary_sections)
            position = np.full((1, axes) if axes else 1, cache.position)
            steps = [
                self._inputs(index, self._only_row, position, stage_cache)
                for index, stage_cache in enumerate(cache.stages)
            ]
            logits = self.backend.decode(hidden, steps, cache.stages)
            for stage_cache in cache.stages:
                stage_cache.length, stage_cache.num_side = stage_cache.length + 1, 0
            cache.position += 1
            return _finite(logits)
        except BaseException:
            self._undo(cache, mark)
            raise

    def _stage(
        self,
        index: int,
        hidden: Any,
        keep_indices: np.ndarray,
        position_ids: np.ndarray,
        cache: StageCache,
        last_seen: np.ndarray | None = None,
        num_side: int = 0,
    ) -> dict[str, Any]:
        """Run a stage; of the rows fed, the last `num_side` do not count as cached."""
        inputs = self._inputs(index, keep_indices, position_ids, cache, last_seen, num_side)
        out = self.backend.run_stage(index, {names.HIDDEN: hidden, **inputs}, cache)
        cache.length, cache.num_side = cache.length + len(keep_indices) - num_side, num_side
        return out

    def _inputs(
        self,
        index: int,
        keep_indices: np.ndarray,
        position_ids: np.ndarray,
        cache: StageCache,
        last_seen: np.ndarray | None = None,
        num_side: int = 0,
    ) -> dict[str, np.ndarray]:
        """All inputs of a stage but the rows themselves."""
        count = len(keep_indices)
        last_seen = np.arange(count) if last_seen is None else last_seen
        inputs = {
            names.KEEP_INDICES: keep_indices,
            names.POSITION_IDS: position_ids,
            names.SLOT: np.array([cache.length]),
            names.LAST_KEY: cache.length + last_seen,
        }
        if index == len(self.facts.stages) - 1:
            inputs[names.LOGITS_ROW] = np.array([count - num_side - 1])
        return inputs

    def _decide(
        self,
        plan: str,
        site: SitePlan,
        made: dict[str, Any],
        slot: int,
        rows: Rows,
        cache: Cache,
        rng: np.random.Generator,
        sites: list[SiteResult],
        scores: bool,
    ) -> tuple[Rows, np.ndarray, Any]:
        """Run a site's decision once per image.

        Returns:
            The rows that go on; where they stand in the stage's output; that output, which a method
            that merges gives anew.
        """
        graph, layer = names.decide(plan, site.layer), site.layer
        budget = site.budget or self.facts.num_visual(plan)
        read = self._read(graph, layer, made, cache)
        keep: Any = np.ones(len(rows), bool)
        is_merging = names.HIDDEN in read
        asked = [names.NUM_WANTED, *[names.MERGED_INTO] * is_merging, *[names.SCORES] * scores]
        told: list[Any] = []  # of each image what is asked
        if layer == self.facts.side_layer(plan):
            keep = rows.side_of == TEXT  # side rows have done their work
        for image in rows.images():
            visual_rows = rows.of_image(image)
            out = self.backend.run(
                graph,
                read
                | {
                    names.SLOT: np.array([slot]),
                    names.VISUAL_ROWS: visual_rows,
                    names.TEXT_ROWS: rows.text_for(image),
                    names.PATCH_IDS: rows.patch_ids[visual_rows],
                    names.SIDE_ROW: rows.side_row(image),
                    names.LAST_ROW: rows.last_row(),
                    names.KEEP: keep,
                    names.BUDGET: np.array([budget]),
                    names.SIZES: rows.sizes[visual_rows],
                    names.NOISE: rng.random((1, len(visual_rows)), np.float32),
                },
            )
            keep = out[names.KEEP_OUT]
            told += [out[name] for name in asked]
            if is_merging:
                read[names.HIDDEN] = out[names.HIDDEN_OUT]
        out = self.backend.run(names.COMPACT, {names.KEEP: keep})
        num_keep, keep_indices, *told = self.backend.fetch(
            "survivors of a site", out[names.NUM_KEEP], out[names.KEEP_INDICES], *told
        )
        keep_indices = keep_indices[: int(num_keep[0])]
        before = rows
        for number, image in enumerate(before.images()):
            found = dict(zip(asked, told[number * len(asked) :], strict=False))
            moved = found.get(names.MERGED_INTO)
            if moved is not None:
                rows = rows.merge(image, moved)
            sites.append(_told(before, rows.take(keep_indices), layer, image, found))
        return rows.take(keep_indices), keep_indices, read.get(names.HIDDEN, made[names.HIDDEN])

    def _read(self, graph: str, layer: int, made: dict[str, Any], cache: Cache) -> dict[str, Any]:
        """Rows, queries, keys and values that a decision takes, by its names for them."""
        top, read = layer - 1, {}
        for tensor in self.facts.graphs[graph].inputs:
            name = tensor.name
            what, _, number = name.partition(".")
            of = int(number) if number else top
            if what == names.QUERY:
                read[name] = made[names.query(of)]
            elif what == names.HIDDEN:
                read[name] = made[name]
            elif what in (names.KEY, names.VALUE):
                stage = next(c for c in cache.stages if c.stage.first <= of < c.stage.last)
                give = self.backend.key_cache if what == names.KEY else self.backend.value_cache
                read[name] = give(stage, of)
        return read

    def _undo(self, cache: Cache, mark: tuple[int, ...]) -> None:
        """Forget rows and zero their slots: a mask does not stop a NaN in an unused slot."""
        cache.rewind(mark)
        for stage_cache in cache.stages:
            self.backend.clear(stage_cache)


def _told(
    before: Rows, kept: Rows, layer: int, image: int, found: dict[str, np.ndarray]
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


def _finite(logits: np.ndarray) -> np.ndarray:
    """Logits as one row [V], refused where one is NaN or infinite."""
    values = logits.reshape(-1)
    if not np.isfinite(values).all():
        raise PatchsieveError(
            "the model's output is not finite",
            found="NaN or infinity in the logits",
            do="check the checkpoint; in float16 try --precision float32",
        )
    return values
