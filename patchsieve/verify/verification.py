"""A bundle against its checkpoint: each value in the order of computation, on one request.

The bundle runs as it always does, through its runtime; a recorder keeps what its graphs returned.
The checkpoint runs in Hugging Face (`patchsieve.verify.reference`). Both sides feed themselves, so
that the first part that departs is where to look. Where matrices are rounded to int8 or int4, their
errors add up on the way; there each part counts by what the checkpoint makes of the bundle's rows
before it (`patchsieve.verify.low`), and the sum of all is shown beside it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from patchsieve.contract import names, reads
from patchsieve.contract.plan import NO_PRUNING
from patchsieve.export.methods import build_method
from patchsieve.runtime.inputs.prompt import ExpandedPrompt, Prompt, expand
from patchsieve.runtime.positions import number_rows
from patchsieve.runtime.pseudo_cls import cosines, pool
from patchsieve.runtime.result import Result
from patchsieve.verify import reference as hf
from patchsieve.verify import sites
from patchsieve.verify.low import PROJECTOR, Tower, worst
from patchsieve.verify.opened import Opened
from patchsieve.verify.parts import (
    PIXEL_TOLERANCE,
    Alone,
    Part,
    compare,
    compare_alone,
    compare_next,
    compare_survivors,
    compare_tokens,
)

# A rounded tower's patches whose scores are as good as equal may change places within one layer.
FEWEST_BY_SAME_ROWS = 0.9


class Verification(Opened):
    """One request on both sides."""

    def compare(
        self, images: Any, prompt: str, plan: str, *, raw: bool = False, count: int = 32
    ) -> Iterator[Part]:
        """Compare one plan, part by part, in the order of computation.

        Args:
            images: One or a list, as `Model.generate` takes them.
            prompt: The user's words.
            plan: Name of the plan.
            raw: The prompt is the whole text, without a chat template.
            count: Greedy tokens.
        """
        self.recorder.forget()
        images = list(images) if isinstance(images, (list, tuple)) else [images]
        count = min(count, self.facts.limits.max_new_tokens)
        result, failure = self._answer(images, prompt, plan, raw, count)
        cached = self.recorder.cached()
        inputs = self._hf_inputs(images, prompt, raw)
        built = self._prompt(prompt, len(images), raw)
        our_features, our_ids = self._seen(plan)
        rows = expand(built, [len(ids) for ids in our_ids])
        yield from self._inputs(plan, rows.token_ids, inputs)
        seen = yield from self._vision(plan, inputs[names.PIXEL_VALUES])
        if list(map(len, seen.features)) != list(map(len, our_features)):
            return  # other tokens: nothing after them can be compared
        embeddings = yield from self._embeddings(plan, seen, result, built, rows)
        if embeddings is None:
            return  # other rows: nothing after them can be compared
        yield from self._decoder(plan, embeddings, rows, seen.ids)
        if self.low is not None:
            yield from self.low.steps(plan, self._layers, cached)
        if failure:
            yield Part(plan, "greedy tokens", departs=True, note=failure)
        else:
            yield self._tokens(plan, result, inputs, count)

    def _tokens(self, plan: str, result: Result, inputs: dict[str, np.ndarray], count: int) -> Part:
        """The answer, against `count` greedy tokens of the checkpoint."""
        said, by = result.token_ids, "eager decoding of the survivors"
        if self.low is not None:
            logits = self.reference.decode(self._layers, len(said), said)
            return compare_next(plan, said, self.low.chosen(), logits, by)
        if plan == NO_PRUNING and not self.facts.text.rotary_sections:
            logits, by = self.reference.generate(inputs, count), "generate"
        else:
            logits = self.reference.decode(self._layers, count)
        return compare_tokens(plan, said, logits, by, self.tolerance)

    def _vision(self, plan: str, pixels: np.ndarray) -> Generator[Part, None, hf.Reduced]:
        """The tower, the projector, and what prunes in them.

        Returns:
            The checkpoint's tokens. Where a rounded tower prunes, they are of the bundle's rows, so
            that other survivors end there.
        """
        facts, tower = self.facts, None
        graph = facts.vision_graph(plan)
        if facts.plans[plan].has_vision:
            noise = self.recorder.inputs[graph].get(names.NOISE)
            module = self.reference.plan_vision(facts.plans[plan])
            seen = self.reference.reduced(module, pixels, noise)
            if self.low is not None:
                tower = self.low.tower(graph, pixels, module, noise)
                yield from self._tower(plan, graph, None, tower)
            yield self._patches(plan, seen.ids, None if tower is None else tower.reduced.ids)
            seen = seen if tower is None else tower.reduced
        else:
            whole, layers = self.reference.vision(pixels)
            seen = hf.Reduced(list(whole), self._seen(plan)[1], whole[:, 0])
            if self.low is not None:
                tower = self.low.tower(graph, pixels)
            yield from self._tower(plan, graph, layers, tower)
        ours, theirs = (np.concatenate(rows) for rows in (self._seen(plan)[0], seen.features))
        alone = None
        if tower is not None and self.low is not None:
            yield from self.low.products(plan, tower.products, self._values(graph))
            alone = self.low.features(tower)
        yield self._part(plan, names.IMAGE_FEATURES, ours, theirs, alone=alone)
        return seen

    def _embeddings(
        self,
        plan: str,
        seen: hf.Reduced,
        result: Result,
        prompt: Prompt,
        rows: ExpandedPrompt,
    ) -> Generator[Part, None, np.ndarray | None]:
        """What enters the decoder.

        Returns:
            The checkpoint's rows [1, L0 + M, C]; None if the bundle's are other in number.
        """
        embed, low = self.reference.embed, self.low is not None
        embeddings = embed(rows.token_ids[None], np.concatenate(seen.features))
        fed, count = self.recorder.inputs[names.stage(0)][names.HIDDEN], len(rows.token_ids)
        alone = None
        if low:
            ours = embed(rows.token_ids[None], np.concatenate(self._seen(plan)[0]))
            alone = Alone(ours, self.tolerance)
        yield self._part(plan, "embeddings", fed[:, :count], embeddings, alone=alone)
        if fed[:, :count].shape != embeddings.shape:
            return None
        if fed.shape[1] > count and self.facts.plans[plan].pseudo_cls is not None:
            side, note = self._side_rows(plan, seen.cls, result, prompt)
            alone = Alone(side, self.allowed.layer(PROJECTOR)) if low else None
            yield self._part(plan, "pseudo-CLS", fed[:, count:], side, note=note, alone=alone)
            embeddings = np.concatenate((embeddings, side), axis=1)
        return embeddings

    def _decoder(
        self,
        plan: str,
        embeddings: np.ndarray,
        rows: ExpandedPrompt,
        patch_ids: list[np.ndarray],
    ) -> Iterator[Part]:
        """Every layer of the decoder, its decisions, and the logits of the last row.

        Args:
            plan: The plan.
            embeddings: Rows, side rows after them, [1, L0 + M, C].
            rows: What the L0 are.
            patch_ids: Raster ids of each image's tokens, [N].
        """
        decisions: dict[int, list[Part]] = {}
        facts, judge = self.facts, self._judge(plan, decisions)
        spans = [slice(*span) for span in rows.image_spans]
        given = list(zip(spans, patch_ids, strict=True))
        count, rule = len(rows.token_ids), facts.position_rule(plan)
        axes = len(facts.text.rotary_sections)
        positions = number_rows(count, given, facts.vision, rule, axes)
        side = embeddings.shape[1] - count
        self._layers = layers = self.reference.prefill(
            embeddings,
            positions,
            rows.image_index if side else None,
            dict.fromkeys(facts.plans[plan].layers, judge),
        )
        for index in range(facts.text.num_layers):
            yield from decisions.get(index, ())
            yield from self._layer(plan, index, layers)
        alone = None if self.low is None else self.low.prompt_logits()
        ours = self.recorder.values[names.LOGITS][0]
        yield self._part(plan, "logits", ours, layers.logits[None], alone=alone)

    def _seen(self, plan: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Features [N, C] and raster ids [N] of each image that the bundle's graph returned."""
        values, graph = self.recorder.values, self.facts.vision_graph(plan)
        features, ids = (values[f"{graph}/{n}"] for n in (names.IMAGE_FEATURES, names.IMAGE_IDS))
        counts = values.get(f"{graph}/{names.NUM_WANTED}", [ids.shape[1]] * len(ids))
        return hf.without_padding(features, counts), hf.without_padding(ids, counts)

    def _values(self, graph: str) -> dict[str, np.ndarray]:
        """What a graph other than a stage returned."""
        start = f"{graph}/"
        values = self.recorder.values.items()
        return {name.removeprefix(start): rows for name, rows in values if name.startswith(start)}

    def _patches(
        self, plan: str, given: list[np.ndarray], by_same_rows: list[np.ndarray] | None
    ) -> Part:
        """Survivors of the tower; the features say of those that are no patches.

        Args:
            plan: The plan.
            given: The checkpoint's, by its own rows.
            by_same_rows: The checkpoint's by the bundle's rows, where the tower is rounded.
        """
        ours, theirs = np.concatenate(self._seen(plan)[1]), np.concatenate(given)
        share, note = _common_ids(ours, theirs)
        if by_same_rows is not None:
            judged, by_rows = _common_ids(ours, np.concatenate(by_same_rows))
            note = f"{share:.1%} in common; by the same rows {by_rows}"
            fewest = FEWEST_BY_SAME_ROWS
        else:
            # float16 may swap patches whose scores are as good as equal; float32 seldom does.
            judged, fewest = share, 1.0 if self.facts.precision.tower == "float32" else 0.99
        departs = judged < fewest
        return Part(plan, "survivors of the tower", departs=departs, in_common=share, note=note)

    def _inputs(self, plan: str, ids: np.ndarray, inputs: dict[str, np.ndarray]) -> Iterator[Part]:
        """Pixels and token ids; an image counts as one token where the plan leaves fewer."""
        pixels = self.recorder.inputs[self.facts.vision_graph(plan)][names.PIXEL_VALUES]
        theirs = inputs[names.PIXEL_VALUES]
        yield compare(plan, names.PIXEL_VALUES, pixels, theirs, PIXEL_TOLERANCE)
        hf_ids = inputs["input_ids"][0]
        if self.facts.plans[plan].has_vision:
            image = self.facts.tokens.image_token_id
            ids, hf_ids = (each[each != image] for each in (ids, hf_ids))
        departs = not np.array_equal(ids, hf_ids)
        note = f"{len(ids)} and {len(hf_ids)} ids" if departs else f"{len(ids)} ids"
        yield Part(plan, "token ids", departs=departs, note=note)

    def _tower(
        self, plan: str, graph: str, layers: list[np.ndarray] | None, tower: Tower | None
    ) -> Iterator[Part]:
        """Each layer of the tower; the checkpoint's have other rows where it prunes."""
        values = self._values(graph)
        for index in range(self.facts.vision.num_layers_run):
            rows, name = values[f"vision.layers.{index}.output"], f"vision layer {index}"
            if tower is None or self.low is None:
                if layers is not None:
                    yield self._part(plan, name, rows, layers[index])
                continue
            made = tower.layers[index]
            products = self.low.products(plan, made.products, values)
            yield from products
            alone, note = self.low.tower_layer(index, made), worst(products)
            if layers is not None:
                yield self._part(plan, name, rows, layers[index], note=note, alone=alone)
            elif rows.shape == made.fed.shape == made.hidden.shape:  # a layer that prunes none
                yield compare_alone(plan, name, rows, alone)

    def _layer(self, plan: str, index: int, layers: hf.Layers) -> Iterator[Part]:
        """Keys, values and rows of a layer; its queries where the bundle returns them."""
        values = self.recorder.values
        pairs = [
            ("keys", names.key_cache(index), layers.key),
            ("values", names.value_cache(index), layers.value),
            ("queries", names.query(index), layers.query),
            ("hidden rows", names.layer_output(index), layers.hidden),
        ]
        first, others, states = [], [], dict[str, Alone]()
        if self.low is not None:
            made = self.low.layer(index, layers)
            states = self.low.states(index, made)
            first, others = (
                self.low.products(plan, made.products, values, index, is_first=is_first)
                for is_first in (True, False)
            )
        yield from first
        for what, name, theirs in pairs:
            label, note = f"layer {index} {what}", ""
            if what == "hidden rows":
                yield from others
                note = worst([*first, *others])
            if name in values:
                rows, alone = values[name], states.get(what)
                yield self._part(plan, label, rows, theirs[index], index, note, alone)

    def _judge(self, plan: str, decisions: dict[int, list[Part]]) -> hf.Judge:
        """Compare decisions, then continue with the bundle's survivors, so that a tie ends here."""

        def judge(layer: int, made: hf.Layers) -> tuple[np.ndarray, np.ndarray]:
            runs = self.recorder.runs[names.decide(plan, layer)]
            hidden, parts = made.hidden[-1], decisions.setdefault(layer, [])
            for image, (fed, told) in enumerate(runs):
                theirs, carried = self._decided(plan, layer, made, fed), None
                closest = 0.0 if self.is_exact else self.tolerance
                if self.low is not None:
                    carried = theirs.keep
                    theirs = self._decided(plan, layer, self.low.recorded(made), fed)
                    closest = max(closest, self._next_error(plan, layer))
                visual, keep = fed[names.VISUAL_ROWS], told[names.KEEP_OUT]
                part = compare_survivors(
                    plan,
                    layer,
                    keep[visual],
                    theirs.keep,
                    theirs.scores,
                    closest,
                    image if len(runs) > 1 else None,
                    carried,
                )
                moved = told.get(names.MERGED_INTO)
                if moved is not None and theirs.moved is not None:
                    hidden = sites.merged(hidden, visual, fed[names.SIZES], moved)
                    differ = int((moved != theirs.moved).sum())
                    note = f"{part.note}; {differ} merged into others"
                    departs = part.departs or (differ > 0 and self.is_exact)
                    part = replace(part, note=note, departs=departs)
                parts.append(part)
            return np.flatnonzero(keep), hidden

        return judge

    def _next_error(self, plan: str, layer: int) -> float:
        """Error of a decision's queries and keys, where it makes those of the layer at the site."""
        site = next(site for site in self.facts.plans[plan].sites if site.layer == layer)
        if reads.NEXT_LAYER not in build_method(site).reads:
            return 0.0
        matrices = (f"layers.{layer}.self_attn.{name}" for name in ("q_proj", "k_proj"))
        return max(map(self.allowed.product, matrices))

    def _decided(
        self, plan: str, layer: int, made: hf.Layers, fed: dict[str, np.ndarray]
    ) -> sites.Decided:
        facts = self.facts
        site = next(site for site in facts.plans[plan].sites if site.layer == layer)
        folder, sizes = self.model.bundle.path, (facts.vision.grid, facts.num_visual(plan))
        return sites.decide(
            folder, site, made, fed, *sizes, lambda number: self.reference.next_layer(number, made)
        )

    def _side_rows(
        self, plan: str, cls: np.ndarray, result: Result, prompt: Prompt
    ) -> tuple[np.ndarray, str]:
        """Each image's pseudo-CLS on the checkpoint's embeddings (eq. 8).

        Which words count is the bundle's own choice where CLIP's text tower makes it, for that is
        not in the checkpoint.

        Args:
            plan: The plan.
            cls: Projected visual CLS of each image, [M, C].
            result: The bundle's answer, with its words.
            prompt: The question is part of it.

        Returns:
            The rows, [1, M, C], and how they were made.
        """
        rule = self.facts.plans[plan].pseudo_cls
        assert rule is not None
        asked = prompt.instruction if prompt.has_question else prompt.instruction[:0]
        embeddings = self.reference.embed_text(prompt.token_ids[asked])  # [T, C]
        rows, counts = [], []
        for own, said in zip(cls, result.words, strict=True):
            selected = said.selected
            if rule.text == "similarity":
                selected = cosines(own, embeddings) >= rule.tau
            rows.append(pool(embeddings, selected, own))
            counts.append(str(int(selected.sum())))
        by = ", which the bundle's scorer chose" if rule.needs_scorer else ""
        note = f"of {' and '.join(counts)} of {len(asked)} tokens{by}"
        return np.stack(rows)[None], note

    def _part(
        self,
        plan: str,
        name: str,
        ours: np.ndarray,
        theirs: np.ndarray,
        layer: int | None = None,
        note: str = "",
        alone: Alone | None = None,
    ) -> Part:
        return compare(plan, name, ours, theirs, self.tolerance, layer, note, alone)


def _common_ids(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, str]:
    """Share of the checkpoint's raster ids that the bundle has too, and both counts for people."""
    common, count = len(np.intersect1d(ours, theirs)), len(np.unique(theirs))
    note = f"{common} ids in common of {len(np.unique(ours))} and {count}"
    return common / max(count, 1), note
