"""A bundle against its checkpoint: each value in the order of computation, on one request.

The bundle runs as it always does, through its runtime; a recorder keeps what its graphs returned.
The checkpoint runs in Hugging Face (`patchsieve.verify.reference`). Both sides feed themselves, so
that the first part that departs is where to look.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from patchsieve.contract import files, names
from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.plan import NO_PRUNING
from patchsieve.contract.targets import CHECKABLE
from patchsieve.runtime.backend import Backend
from patchsieve.runtime.bundle import Bundle
from patchsieve.runtime.inputs.images import load_image
from patchsieve.runtime.inputs.prompt import ExpandedPrompt, Prompt, expand
from patchsieve.runtime.model import Model
from patchsieve.runtime.ort.backend import OrtBackend
from patchsieve.runtime.positions import number_rows
from patchsieve.runtime.pseudo_cls import cosines, pool
from patchsieve.runtime.result import Result
from patchsieve.runtime.sampling_options import PLAIN
from patchsieve.runtime.target import AUTO, Choice, choose
from patchsieve.verify import reference as hf
from patchsieve.verify import sites
from patchsieve.verify.parts import (
    PIXEL_TOLERANCE,
    TOLERANCE,
    Part,
    allowed_error,
    compare,
    compare_survivors,
    compare_tokens,
)
from patchsieve.verify.recorder import Recorder


class Verification:
    """One request on both sides.

    Args:
        bundle: The bundle's directory.
        checkpoint: A directory or a hub id.
        target: Which of the bundle's graphs, or "auto"; they run in ONNX Runtime on the CPU.
        threads: Of the bundle's backend.
        revision: Branch, tag or commit of a hub id; None for its main branch.

    Attributes:
        choice: The target, and why "auto" took it.
    """

    def __init__(
        self,
        bundle: Path,
        checkpoint: str,
        *,
        target: str = AUTO,
        threads: int | None = None,
        revision: str | None = None,
    ) -> None:
        self.choice = Choice(target)
        if target == AUTO:
            self.choice = choose(bundle, files.read(bundle), among=CHECKABLE)
            target = self.choice.target
        if target not in CHECKABLE:
            raise PatchsieveError(
                "verify cannot run this target: it runs graphs in ONNX Runtime",
                found=target,
                expected=", ".join(CHECKABLE),
                do="choose one of these with --target",
            )

        def recorder(opened: Bundle) -> Backend:
            facts = opened.manifest
            graphs = {facts.vision_graph(plan) for plan in facts.plans}
            graphs |= set(map(names.stage, range(len(facts.stages))))
            models = {graph: hf.tapped(opened.graph_path(graph)) for graph in graphs}
            self.recorder = Recorder(
                OrtBackend(opened, threads=threads, models=models, device="cpu")
            )
            return self.recorder

        self.model = Model(bundle, target=target, backend=recorder)
        self.facts = self.model.facts
        self.reference = hf.Reference(checkpoint, revision)
        self._check_shapes(checkpoint)
        self.tolerance = allowed_error(self.facts)
        self.is_exact = self.tolerance == TOLERANCE["float32"]

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
        inputs = self._hf_inputs(images, prompt, raw)
        built = self._prompt(prompt, len(images), raw)
        our_features, our_ids = self._seen(plan)
        rows = expand(built, [len(ids) for ids in our_ids])
        cls: np.ndarray | None = None
        whole, layers_seen = self.reference.vision(inputs[names.PIXEL_VALUES])
        features = list(whole)
        yield from self._inputs(plan, rows.token_ids, inputs)
        if self.facts.plans[plan].has_vision:
            features, patch_ids, cls = self._reduced(plan, inputs[names.PIXEL_VALUES])
            yield self._patches(plan, patch_ids)
        else:
            patch_ids = our_ids
            yield from self._tower(plan, layers_seen)
        theirs = np.concatenate(features)  # the tokens of all images, [N, C]
        yield self._part(plan, names.IMAGE_FEATURES, np.concatenate(our_features), theirs)
        if list(map(len, features)) != list(map(len, our_features)):
            return  # other tokens: nothing after them can be compared
        embeddings = self.reference.embed(rows.token_ids[None], theirs)
        fed = self.recorder.inputs[names.stage(0)][names.HIDDEN]
        num_rows = len(rows.token_ids)
        yield self._part(plan, "embeddings", fed[:, :num_rows], embeddings)
        if fed[:, :num_rows].shape != embeddings.shape:
            return  # other rows: nothing after them can be compared
        if fed.shape[1] > num_rows and cls is not None:
            side, note = self._side_rows(plan, cls, result, built)
            yield self._part(plan, "pseudo-CLS", fed[:, num_rows:], side, note=note)
            embeddings = np.concatenate((embeddings, side), axis=1)
        yield from self._decoder(plan, embeddings, rows, patch_ids)
        if failure:
            yield Part(plan, "greedy tokens", departs=True, note=failure)
        else:
            yield self._tokens(plan, result, inputs, count)

    def _tokens(self, plan: str, result: Result, inputs: dict[str, np.ndarray], count: int) -> Part:
        """The answer, against `count` greedy tokens of the checkpoint."""
        if plan == NO_PRUNING and not self.facts.text.rotary_sections:
            said, by = self.reference.generate(inputs, count), "generate"
        else:
            said, by = self.reference.decode(self._layers, count), "eager decoding of the survivors"
        return compare_tokens(plan, result.token_ids, said, by, self.tolerance)

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
        yield self._part(plan, "logits", self.recorder.values[names.LOGITS][0], layers.logits[None])

    def close(self) -> None:
        """Give back memory."""
        self.model.close()

    def _answer(
        self, images: list[Any], prompt: str, plan: str, raw: bool, count: int
    ) -> tuple[Result, str]:
        """The bundle's answer, or why it gave none although its graphs ran."""
        result = Result()
        options: dict[str, Any] = {"raw": raw, "max_new_tokens": count, "ignore_eos": True} | PLAIN
        answer = self.model.stream(images, prompt, plan=plan, result=result, **options)
        try:
            deque(answer, maxlen=0)
            return result, ""
        except PatchsieveError as error:
            if names.LOGITS not in self.recorder.values:
                raise
            return result, str(error)

    def _hf_inputs(self, images: list[Any], prompt: str, raw: bool) -> dict[str, np.ndarray]:
        message = self.model.bundle.prompts.user_message(prompt, len(images))
        pictures = [load_image(image) for image in images]
        return self.reference.inputs(pictures, prompt if raw else [dict(message)])

    def _prompt(self, prompt: str, num_images: int, raw: bool) -> Prompt:
        """The prompt that the bundle feeds, each image still one token."""
        prompts = self.model.bundle.prompts
        if raw:
            return prompts.build_raw(prompt, num_images)
        return prompts.build([prompts.user_message(prompt, num_images)], num_images)

    def _seen(self, plan: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Features [N, C] and raster ids [N] of each image that the bundle's graph returned."""
        values, graph = self.recorder.values, self.facts.vision_graph(plan)
        features, ids = (values[f"{graph}/{n}"] for n in (names.IMAGE_FEATURES, names.IMAGE_IDS))
        counts = values.get(f"{graph}/{names.NUM_WANTED}", [ids.shape[1]] * len(ids))
        return hf.without_padding(features, counts), hf.without_padding(ids, counts)

    def _reduced(
        self, plan: str, pixels: np.ndarray
    ) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
        """The same and the CLS by the plan's methods in torch, on the noise that was drawn."""
        fed = self.recorder.inputs[self.facts.vision_graph(plan)]
        return self.reference.reduced(self.facts.plans[plan], pixels, fed.get(names.NOISE))

    def _patches(self, plan: str, given: list[np.ndarray]) -> Part:
        """Survivors of the tower; the features say of those that are no patches."""
        ours, theirs = np.concatenate(self._seen(plan)[1]), np.concatenate(given)
        common = len(np.intersect1d(ours, theirs))
        note = f"{common} ids in common of {len(np.unique(ours))} and {len(np.unique(theirs))}"
        # float16 may swap patches whose scores are as good as equal; float32 seldom does.
        fewest = 1.0 if self.facts.precision.tower == "float32" else 0.99
        departs = common < fewest * len(np.unique(theirs))
        return Part(plan, "survivors of the tower", departs=departs, note=note)

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

    def _tower(self, plan: str, layers: list[np.ndarray]) -> Iterator[Part]:
        """Each layer of the tower."""
        for index in range(self.facts.vision.num_layers_run):
            rows = self.recorder.values[f"{names.VISION}/vision.layers.{index}.output"]
            yield self._part(plan, f"vision layer {index}", rows, layers[index])

    def _layer(self, plan: str, index: int, layers: hf.Layers) -> Iterator[Part]:
        """Keys, values and rows of a layer; its queries where the bundle returns them."""
        values = self.recorder.values
        pairs = [
            ("keys", names.key_cache(index), layers.key),
            ("values", names.value_cache(index), layers.value),
            ("queries", names.query(index), layers.query),
            ("hidden rows", names.layer_output(index), layers.hidden),
        ]
        for what, name, theirs in pairs:
            if name in values:
                yield self._part(plan, f"layer {index} {what}", values[name], theirs[index], index)

    def _judge(self, plan: str, decisions: dict[int, list[Part]]) -> hf.Judge:
        """Compare decisions, then continue with the bundle's survivors, so that a tie ends here."""

        def judge(layer: int, made: hf.Layers) -> tuple[np.ndarray, np.ndarray]:
            runs = self.recorder.runs[names.decide(plan, layer)]
            hidden, parts = made.hidden[-1], decisions.setdefault(layer, [])
            for image, (fed, told) in enumerate(runs):
                theirs = self._decided(plan, layer, made, fed)
                visual, keep = fed[names.VISUAL_ROWS], told[names.KEEP_OUT]
                part = compare_survivors(
                    plan,
                    layer,
                    keep[visual],
                    theirs.keep,
                    theirs.scores,
                    0.0 if self.is_exact else self.tolerance,
                    image if len(runs) > 1 else None,
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
    ) -> Part:
        return compare(plan, name, ours, theirs, self.tolerance, layer, note)

    def _check_shapes(self, checkpoint: str) -> None:
        """Refuse another model's checkpoint at once."""
        text = self.reference.config.text_config
        ours: dict[str, Any] = {
            "hidden_size": self.facts.text.hidden_size,
            "num_hidden_layers": self.facts.text.num_layers,
            "vocab_size": self.facts.text.vocab_size,
            "num_attention_heads": self.facts.text.num_heads,
        }
        theirs = {name: getattr(text, name) for name in ours}
        ours["rotary_sections"] = list(self.facts.text.rotary_sections)
        theirs["rotary_sections"] = list(self.reference.sections)
        if ours != theirs:
            raise PatchsieveError(
                f"the bundle was not made from {checkpoint}",
                found=ours,
                expected=theirs,
                do="name the bundle's own checkpoint with --against",
            )
