"""A bundle against its checkpoint: each value in the order of computation, on one request.

The bundle runs as it always does, through its runtime; a recorder keeps what its graphs returned.
The checkpoint runs in Hugging Face (`patchsieve.export.verify`). Both sides feed themselves, so
that the first part that departs is where to look.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from patchsieve import names
from patchsieve.errors import PatchsieveError
from patchsieve.export import verify as hf
from patchsieve.plan import NO_PRUNING
from patchsieve.runtime.backend import Backend
from patchsieve.runtime.bundle import Bundle
from patchsieve.runtime.images import load_image
from patchsieve.runtime.model import Model
from patchsieve.runtime.ort import TARGETS, OrtBackend
from patchsieve.runtime.prompt import ExpandedPrompt, expand
from patchsieve.runtime.record import Recorder
from patchsieve.runtime.rows import number_rows

# Largest error of a row's entries over the row's largest entry. float32: sums in another order,
# which grow through the layers. float16: each operator rounds to 5e-4, the reference does not.
TOLERANCE = {"float32": 1e-4, "float16": 3e-2}
PIXEL_TOLERANCE = 1e-6  # the preprocessor computes in float32 whatever the graphs do
SCORE_TIE = 1e-6  # closer scores may fall either way; in float16, closer than its tolerance


@dataclass(frozen=True)
class Part:
    """One comparison.

    Attributes:
        plan: The plan that was followed.
        name: What was compared.
        layer: The decoder layer that made it, if one did.
        max_error: Largest absolute error; None for what is compared exactly or is not finite.
        relative_error: Largest error of an entry over the largest entry of its row.
        tolerance: Of the relative error.
        departs: The bundle is not what the checkpoint is.
        note: For the eye.
    """

    plan: str
    name: str
    layer: int | None = None
    max_error: float | None = None
    relative_error: float | None = None
    tolerance: float | None = None
    departs: bool = False
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The part as JSON prints it."""
        return asdict(self)


class Verification:
    """One request on both sides.

    Args:
        bundle: The bundle's directory.
        checkpoint: A directory or a hub id.
        target: Which of the bundle's graphs; they run in ONNX Runtime on the CPU.
        threads: Of the bundle's backend.
    """

    def __init__(
        self, bundle: Path, checkpoint: str, *, target: str = "cpu", threads: int | None = None
    ) -> None:
        if target not in TARGETS:
            raise PatchsieveError(
                "verify runs graphs in ONNX Runtime", found=target, expected=", ".join(TARGETS)
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
        self.reference = hf.Reference(checkpoint)
        self._check_shapes(checkpoint)
        self.tolerance = max(TOLERANCE[kind] for kind in self.facts.precision.kinds)

    def compare(
        self, image: Any, prompt: str, plan: str, *, raw: bool = False, count: int = 32
    ) -> Iterator[Part]:
        """Compare one plan, part by part, in the order of computation."""
        self.recorder.forget()
        count = min(count, self.facts.limits.max_new_tokens)
        tokens, failure = self._answer(image, prompt, plan, raw, count)
        inputs = self._hf_inputs(image, prompt, raw)
        rows = self._rows(prompt, plan, raw)
        features, layers_seen = self.reference.vision(inputs[names.PIXEL_VALUES])
        yield from self._inputs(plan, rows.token_ids, inputs)
        if self.facts.plans[plan].has_vision:
            features, patch_ids = self._reduced(plan, inputs[names.PIXEL_VALUES])
            yield self._patches(plan, patch_ids)
        else:
            _, patch_ids = self._seen(plan)
            yield from self._tower(plan, layers_seen)
        yield self._part(plan, names.IMAGE_FEATURES, self._seen(plan)[0], features)
        fed = self.recorder.inputs[names.stage(0)][names.HIDDEN]
        has_side_row = self.facts.plans[plan].pseudo_cls is not None
        fed = fed[:, :-1] if has_side_row else fed
        embeddings = self.reference.embed(rows.token_ids[None], features)
        yield self._part(plan, "embeddings", fed, embeddings)
        if fed.shape != embeddings.shape:
            return  # other rows: nothing behind them can be compared
        if has_side_row:
            note = "the decoder is not compared: Hugging Face has no side rows"
            yield Part(plan, "pseudo-CLS", note=note)
            return
        decisions: dict[int, Part] = {}
        sites = self.facts.plans[plan].layers
        spans = [slice(*span) for span in rows.image_spans]
        rule, axes = self.facts.position_rule(plan), len(self.facts.text.rotary_sections)
        images = list(zip(spans, patch_ids, strict=True))
        positions = number_rows(len(rows.token_ids), images, self.facts.vision, rule, axes)
        layers = self.reference.prefill(
            embeddings, positions, {site: self._judge(plan, decisions) for site in sites}
        )
        for index in range(self.facts.text.num_layers):
            if index in decisions:
                yield decisions[index]
            yield from self._layer(plan, index, layers)
        yield self._part(plan, "logits", self.recorder.values[names.LOGITS][0], layers.logits[None])
        if failure:
            yield Part(plan, "greedy tokens", departs=True, note=failure)
            return
        if plan == NO_PRUNING and not axes:
            said, by = self.reference.generate(inputs, count), "generate"
        else:
            said, by = self.reference.decode(layers, count), "eager decoding of the survivors"
        yield compare_tokens(plan, tokens, said, by, self.tolerance)

    def close(self) -> None:
        """Give back memory."""
        self.model.close()

    def _answer(
        self, image: Any, prompt: str, plan: str, raw: bool, count: int
    ) -> tuple[list[int], str]:
        """The bundle's tokens, or why it gave none although its graphs ran."""
        try:
            options: dict[str, Any] = {"max_new_tokens": count, "ignore_eos": True}
            result = self.model.generate(image, prompt, plan=plan, raw=raw, **options)
            return result.token_ids, ""
        except PatchsieveError as error:
            if names.LOGITS not in self.recorder.values:
                raise
            return [], str(error)

    def _hf_inputs(self, image: Any, prompt: str, raw: bool) -> dict[str, np.ndarray]:
        message = self.model.bundle.prompts.user_message(prompt, 1)
        return self.reference.inputs(load_image(image), prompt if raw else [dict(message)])

    def _rows(self, prompt: str, plan: str, raw: bool) -> ExpandedPrompt:
        """The rows that the bundle feeds, the image's token repeated for each of its tokens."""
        prompts = self.model.bundle.prompts
        built = (
            prompts.build_raw(prompt, 1)
            if raw
            else prompts.build([prompts.user_message(prompt, 1)], 1)
        )
        return expand(built, self.facts.num_visual(plan))

    def _seen(self, plan: str) -> tuple[np.ndarray, np.ndarray]:
        """Image features and raster ids that the bundle's graph returned."""
        graph, values = self.facts.vision_graph(plan), self.recorder.values
        return values[f"{graph}/{names.IMAGE_FEATURES}"], values[f"{graph}/{names.IMAGE_IDS}"]

    def _reduced(self, plan: str, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same by the plan's methods in torch, on the noise that the bundle drew."""
        fed = self.recorder.inputs[self.facts.vision_graph(plan)]
        return self.reference.reduced(self.facts.plans[plan], pixels, fed.get(names.NOISE))

    def _patches(self, plan: str, theirs: np.ndarray) -> Part:
        """Survivors of the tower; the features say of those that are no patches."""
        ours = self._seen(plan)[1]
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
        yield self._part(plan, names.PIXEL_VALUES, pixels, theirs, tolerance=PIXEL_TOLERANCE)
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

    def _judge(self, plan: str, decisions: dict[int, Part]) -> hf.Drop:
        """Compare a decision, then go on with the bundle's survivors, so that a tie ends here."""

        def drop(layer: int, query: np.ndarray, key: np.ndarray) -> np.ndarray:
            graph = names.decide(plan, layer)
            fed, facts = self.recorder.inputs[graph], self.facts
            visual = fed[names.VISUAL_ROWS]
            keep = self.recorder.values[f"{graph}/{names.KEEP_OUT}"]
            wanted, scores = hf.decide(
                self.model.bundle.path,
                facts.plans[plan],
                layer,
                query,
                key,
                fed,
                facts.vision.grid,
                facts.num_visual(plan),
            )
            decisions[layer] = self._survivors(plan, layer, keep[visual], wanted, scores)
            return np.flatnonzero(keep)

        return drop

    def _survivors(
        self, plan: str, layer: int, ours: np.ndarray, theirs: np.ndarray, scores: np.ndarray
    ) -> Part:
        common, differ = int((ours & theirs).sum()), ours != theirs
        edge = float(scores[theirs].min()) if theirs.any() else 0.0
        is_exact = set(self.facts.precision.kinds) == {"float32"}
        closest = SCORE_TIE if is_exact else max(SCORE_TIE, self.tolerance * abs(edge))
        is_tie = bool((abs(scores[differ] - edge) < closest).all())
        note = f"{common} in common of {int(ours.sum())} and {int(theirs.sum())}"
        if differ.any() and is_tie:
            note += ", the others tie"
        return Part(plan, f"survivors at layer {layer}", layer, departs=not is_tie, note=note)

    def _part(
        self,
        plan: str,
        name: str,
        ours: np.ndarray,
        theirs: np.ndarray,
        layer: int | None = None,
        *,
        tolerance: float | None = None,
    ) -> Part:
        tolerance = self.tolerance if tolerance is None else tolerance
        if ours.shape != theirs.shape:
            note = f"shape {list(ours.shape)}, not {list(theirs.shape)}"
            return Part(plan, name, layer, tolerance=tolerance, departs=True, note=note)
        error = np.abs(ours.astype(np.float64) - theirs)
        size = np.abs(theirs).max(axis=-1, keepdims=True)
        if not np.isfinite(error).all():
            note = "not finite"
            return Part(plan, name, layer, tolerance=tolerance, departs=True, note=note)
        relative = float((error / np.maximum(size, 1e-12)).max(initial=0.0))
        largest = float(error.max(initial=0.0))
        return Part(plan, name, layer, largest, relative, tolerance, relative > tolerance)

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
                f"the bundle was not made from {checkpoint}", found=ours, expected=theirs
            )


def compare_tokens(
    plan: str, ours: list[int], logits: np.ndarray, by: str, tolerance: float
) -> Part:
    """Compare greedy tokens with Hugging Face's logits [T, V].

    At the first that differs the two logits may be as good as equal; behind it the two sides read
    different texts.
    """
    theirs = logits.argmax(axis=-1).tolist()
    pairs = zip(ours, theirs, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    note = f"{same} equal of {len(ours)} and {len(theirs)}, {by}"
    departs = ours != theirs
    if departs and same < min(len(ours), len(theirs)):
        row = logits[same]
        gap = float((row.max() - row[ours[same]]) / np.abs(row).max())
        departs = gap > tolerance
        note += f"; their logits differ by {gap:.1e}" + ("" if departs else ", a tie")
    return Part(plan, "greedy tokens", departs=departs, note=note)
