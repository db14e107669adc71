"""Rows through the stages: prefill with the decisions in between, then decode row by row."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np

from patchsieve.contract import names
from patchsieve.contract.errors import PatchsieveError
from patchsieve.runtime.backend import Backend
from patchsieve.runtime.bundle import Bundle
from patchsieve.runtime.cache import Cache, StageCache, empty_cache
from patchsieve.runtime.decide import Decider, Given
from patchsieve.runtime.pseudo_cls import VisualCls
from patchsieve.runtime.result import SiteResult, since
from patchsieve.runtime.rows import Rows
from patchsieve.runtime.scorer import TextScorer
from patchsieve.runtime.turn import Turn


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
    """What the vision graph gives of one image.

    Attributes:
        features: Visual tokens, [N, C].
        ids: Their raster ids, [N].
        sources: Token that each patch went to, [patches]; None if nothing prunes before the
            decoder.
        num_wanted: Tokens without the bound of a method whose count adapts; None for others.
        cls: The image as a whole, where the plan asks for it.
    """

    features: np.ndarray
    ids: np.ndarray
    sources: np.ndarray | None
    num_wanted: int | None
    cls: VisualCls | None


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
        self._seen: dict[tuple[str, bytes], list[Seen]] = {}
        self._decider = Decider(self.facts, backend)
        self._only_row = np.zeros(1, np.int64)
        self._scorer: TextScorer | None = None

    def new_cache(self, plan: str) -> Cache:
        """An empty cache with the reservation of a plan; an engine's own is the same for all."""
        slots = self.facts.slots(plan)
        if self.backend.has_fixed_slots:
            slots = [stage.slots for stage in self.facts.stages]
        return empty_cache(self.facts, slots, self.backend.allocate)

    def see(self, pixel_values: np.ndarray, plan: str, rng: np.random.Generator) -> list[Seen]:
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

    def _see(
        self, graph: str, pixel_values: np.ndarray, rng: np.random.Generator | None
    ) -> list[Seen]:
        num_patches = self.facts.vision.num_patches
        inputs = {names.PIXEL_VALUES: pixel_values}
        if rng is not None:
            inputs[names.NOISE] = rng.random((len(pixel_values), num_patches), np.float32)
        out = self.backend.run(graph, inputs)
        found = dict(zip(out, self.backend.fetch("image features", *out.values()), strict=True))
        return [
            _seen({name: values[image] for name, values in found.items()})
            for image in range(len(pixel_values))
        ]

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

    def prefill(self, hidden: Any, rows: Rows, cache: Cache, turn: Turn) -> Prefill:
        """Feed rows through all stages, dropping visual rows where the plan says.

        Args:
            hidden: Embeddings and image features, [1, L0, C].
            rows: What they are.
            cache: Rows are added to it; after an error it is as before.
            turn: The plan, its noise, and whether scores are wanted.

        Raises:
            PatchsieveError: The logits are not finite.
        """
        done = Prefill(np.zeros(0, np.float32))
        sites = {site.layer: site for site in self.facts.plans[turn.plan].sites}
        fed, entered = hidden, np.arange(len(rows))
        keep_indices = entered
        queries: dict[str, Any] = {}  # of the rows as they are now, since the last site
        with self._undone_on_error(cache):
            for index, stage in enumerate(cache.stages):
                start, slot = time.perf_counter(), stage.length
                # The rows of the stage before come whole, and this stage gathers the survivors:
                # their number is then a shape, as compiled engines need it, and a dropped token
                # never gets a slot in this stage's cache.
                inputs = self._inputs(
                    index, stage, keep_indices, rows.position_ids, rows.last_seen(), rows.num_side
                )
                out = self.backend.run_stage(index, {names.HIDDEN: hidden, **inputs}, stage)
                stage.grow(len(rows) - rows.num_side, rows.num_side)
                if names.LOGITS in out:  # on a GPU the host waits here, and at sites, only
                    (logits,) = self.backend.fetch("logits of the prompt", out[names.LOGITS])
                    done.logits = _finite(logits)
                done.stage_ms.append(since(start))
                hidden, keep_indices = out.get(names.HIDDEN_OUT), np.arange(len(rows))
                queries |= out
                site = sites.get(stage.stage.last)
                # A site judges by the layer before it, so it comes after the stage that ends there.
                # A turn without an image decides nothing: earlier survivors stay.
                if site is not None and rows.images():
                    start = time.perf_counter()
                    given = Given(queries | {names.HIDDEN: hidden}, cache, slot, fed, entered)
                    rows, keep_indices, hidden, found = self._decider.decide(
                        site, rows, given, turn
                    )
                    queries, entered = {}, entered[keep_indices]  # those are of rows that are gone
                    done.sites += found
                    done.decide_ms.append(since(start))
            # Survivors keep their rotary positions, as in the papers: nothing is renumbered, and
            # later tokens continue from the unpruned length.
            cache.position = rows.next_position
        return done

    def decode(self, token_id: int, cache: Cache) -> np.ndarray:
        """Feed one token and return the logits after it, float32 [V]."""
        hidden = self.bundle.embed(np.array([token_id]))[None]  # [1, 1, C]
        axes = len(self.facts.text.rotary_sections)
        position = np.full((1, axes) if axes else 1, cache.position)
        with self._undone_on_error(cache):
            steps = [
                self._inputs(index, stage, self._only_row, position, self._only_row)
                for index, stage in enumerate(cache.stages)
            ]
            logits = self.backend.decode(hidden, steps, cache.stages)
            for stage in cache.stages:
                stage.grow(1)
            cache.position += 1
            return _finite(logits)

    def _inputs(
        self,
        index: int,
        stage: StageCache,
        keep_indices: np.ndarray,
        position_ids: np.ndarray,
        last_seen: np.ndarray,
        num_side: int = 0,
    ) -> dict[str, np.ndarray]:
        """All inputs of a stage but the rows themselves.

        Args:
            index: Number of the stage.
            stage: Its cache.
            keep_indices: Which of the rows that come are fed, [L].
            position_ids: Their rotary positions, [L] or [L, A].
            last_seen: The last of the fed rows that each row sees, [L].
            num_side: Side rows at their end.
        """
        inputs = {
            names.KEEP_INDICES: keep_indices,
            names.POSITION_IDS: position_ids,
            names.SLOT: np.array([stage.length]),
            names.LAST_KEY: stage.length + last_seen,
        }
        if index == len(self.facts.stages) - 1:
            inputs[names.LOGITS_ROW] = np.array([len(keep_indices) - num_side - 1])
        return inputs

    @contextmanager
    def _undone_on_error(self, cache: Cache) -> Iterator[None]:
        """Forget the rows of a run that fails, and zero their slots.

        Attention multiplies every slot by its weight, and 0 times NaN is NaN: so a mask does not
        stop a NaN in an unused slot.
        """
        mark = cache.mark()
        try:
            yield
        except BaseException:
            cache.rewind(mark)
            for stage in cache.stages:
                self.backend.clear(stage)
            raise


def _seen(found: dict[str, np.ndarray]) -> Seen:
    """One image of a vision graph's outputs, without padding."""
    features, ids = found[names.IMAGE_FEATURES], found[names.IMAGE_IDS]
    num_wanted, cls = None, None
    if names.NUM_WANTED in found:  # rows up to a bound: the tokens, then padding
        num_wanted = int(found[names.NUM_WANTED])
        features, ids = features[:num_wanted], ids[:num_wanted]
    if names.CLS_FEATURES in found:
        cls = VisualCls(found[names.CLS_FEATURES], found.get(names.CLS_JOINT))
    return Seen(features, ids, found.get(names.IMAGE_SOURCES), num_wanted, cls)


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
