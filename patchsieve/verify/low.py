"""A bundle rounded to int8 or int4: each part compared by itself, and the rows decoded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from patchsieve.contract import names
from patchsieve.contract.manifest import Manifest
from patchsieve.contract.weights import STEP
from patchsieve.export.graphs.vision import Vision
from patchsieve.verify.allowed import Allowed
from patchsieve.verify.own import TOWER_LAYER, Made, Own, forced
from patchsieve.verify.parts import Alone, Part, compare_alone
from patchsieve.verify.recorder import Recorder
from patchsieve.verify.reference import Layers, Reduced, Reference

PROJECTOR = "multi_modal_projector."
# Export may move a factor from its output channels to what reads them: down_proj shows its errors.
_FOLDED = ".up_proj"
SINGLE = "single rows, "  # before the parts of rows decoded
_FIRST = (".q_proj", ".k_proj", ".v_proj")


class Tower(NamedTuple):
    """What the checkpoint's tower makes of the bundle's rows, layer by layer.

    Attributes:
        layers: Each layer.
        reduced: What comes out.
        products: Of the projector.
    """

    layers: list[Made]
    reduced: Reduced
    products: dict[str, np.ndarray]


class Low:
    """What `verify` adds for such a bundle.

    Args:
        reference: The checkpoint.
        allowed: The errors that its formats allow.
        recorder: What its graphs were fed and gave.
        facts: Its manifest.
    """

    def __init__(
        self, reference: Reference, allowed: Allowed, recorder: Recorder, facts: Manifest
    ) -> None:
        self.own, self.allowed, self.recorder, self.facts = (
            Own(reference),
            allowed,
            recorder,
            facts,
        )

    def tower(
        self,
        graph: str,
        pixel_values: np.ndarray,
        module: Vision | None = None,
        noise: np.ndarray | None = None,
    ) -> Tower:
        """The tower of a vision graph.

        Args:
            graph: Its name.
            pixel_values: [B, 3, h, w].
            module: The plan's vision module, if it prunes before the decoder.
            noise: [B, patches], where a method draws.
        """
        count = self.facts.vision.num_layers_run
        values = self.recorder.values
        rows = [values[f"{graph}/vision.layers.{index}.output"] for index in range(count)]
        if module is None:
            made, features, products = self.own.vision(pixel_values, rows)
            return Tower(made, Reduced(list(features), [], features[:, 0]), products)
        layers: Any = module.vision_tower.encoder.layers
        with forced(layers, rows) as made:
            reduced = self.own.reference.reduced(module, pixel_values, noise)
        return Tower(made, reduced, {})

    def tower_layer(self, index: int, made: Made) -> Alone:
        """A layer of the tower."""
        return self._residual(made, f"{TOWER_LAYER}{index}.")

    def features(self, tower: Tower) -> Alone:
        """The tokens of all images, [N, C]."""
        tolerance = self.allowed.layer(PROJECTOR)
        return Alone(np.concatenate(tower.reduced.features), tolerance)

    def layer(self, index: int, layers: Layers) -> Made:
        """What a decoder layer of the checkpoint makes of the rows that the bundle's was fed."""
        return self.own.layer(index, self._fed(index), *layers.fed[index])

    def states(self, index: int, made: Made, *, is_step: bool = False) -> dict[str, Alone]:
        """Keys, values, queries and rows of a decoder layer."""
        prefix = f"layers.{index}."
        found = {"hidden rows": self._residual(made, prefix, is_step=is_step)}
        projections = {"keys": "k_proj", "values": "v_proj", "queries": "q_proj"}
        for what, rows in {"keys": made.key, "values": made.value, "queries": made.query}.items():
            matrix = f"{prefix}self_attn.{projections[what]}"
            assert rows is not None  # of a decoder layer
            found[what] = Alone(rows, self.allowed.product(matrix, is_step=is_step))
        return found

    def recorded(self, made: Layers) -> Layers:
        """The bundle's rows, queries, keys and values in place of the checkpoint's."""
        values = self.recorder.values

        def taken(name: Any, theirs: list[np.ndarray]) -> list[np.ndarray]:
            return [values.get(name(index), rows) for index, rows in enumerate(theirs)]

        return replace(
            made,
            hidden=taken(names.layer_output, made.hidden),
            query=taken(names.query, made.query),
            key=taken(names.key_cache, made.key),
            value=taken(names.value_cache, made.value),
        )

    def logits(self, rows: np.ndarray) -> Alone:
        """Logits [L, V] of the bundle's rows after the last layer, [1, L, C]."""
        found = [self.own.logits(rows[:, index, None]) for index in range(rows.shape[1])]
        return Alone(np.stack(found), self.allowed.product("lm_head"))

    def prompt_logits(self) -> Alone:
        """Logits [1, V] of the prompt's last row."""
        row = self.recorder.inputs[names.stage(len(self.facts.stages) - 1)][names.LOGITS_ROW]
        last = self.recorder.values[names.layer_output(self.facts.text.num_layers - 1)]
        return self.logits(last[:, row])

    def chosen(self) -> list[int]:
        """Tokens of largest logit in the bundle's logits that were kept."""
        kept = [self.recorder.values, *self.recorder.steps]
        return [int(values[names.LOGITS].argmax()) for values in kept]

    def products(
        self,
        plan: str,
        products: Mapping[str, np.ndarray],
        values: Mapping[str, np.ndarray],
        layer: int | None = None,
        *,
        is_first: bool | None = None,
        is_step: bool = False,
        label: str = "",
    ) -> list[Part]:
        """Compare what matrices make of their rows.

        Args:
            plan: The plan that was followed.
            products: The checkpoint's, by matrix.
            values: The bundle's, by name.
            layer: The decoder layer of the matrices, if they are of one.
            is_first: Only those that read the layer's rows as they come, or only the others.
            is_step: Of the copy for single rows.
            label: Before the name of each part.
        """
        parts = []
        for matrix, rows in products.items():
            ours = values.get(names.product(matrix))
            is_other = is_first is not None and matrix.endswith(_FIRST) != is_first
            if ours is None or is_other or matrix.endswith(_FOLDED):
                continue
            alone = Alone(rows, self.allowed.product(matrix, is_step=is_step))
            part = compare_alone(plan, label + matrix, ours, alone, layer)
            parts.append(replace(part, is_product=True))
        return parts

    def steps(self, plan: str, layers: Layers, cached: Mapping[str, np.ndarray]) -> Iterator[Part]:
        """Compare the layers on the rows decoded, which `mixed` feeds to a copy of them.

        Args:
            plan: The plan that was followed.
            layers: The checkpoint's prefill.
            cached: The bundle's keys and values up to these rows.
        """
        if not self.recorder.steps:
            return
        is_copy = any(entry.part == STEP.name for entry in self.facts.weights.values())
        rows = {
            name: np.concatenate([step[name] for step in self.recorder.steps], axis=1)
            for name in self.recorder.steps[0]
        }
        count = len(self.recorder.steps)
        axes = layers.row_positions.shape[1:]
        positions = layers.position + np.arange(count).reshape(-1, *(1 for _ in axes))
        positions = np.broadcast_to(positions, (count, *axes)).copy()
        for index, stage in enumerate(self.facts.stages):
            before = self.recorder.before[index]
            seen = np.tri(count, before + count, before, dtype=bool)
            for layer in range(stage.first, stage.last):
                pair = [cached[name(layer)] for name in (names.key_cache, names.value_cache)]
                past = pair[0][:, :, :before], pair[1][:, :, :before]
                fed = rows[names.layer_output(layer - 1) if layer else names.HIDDEN]
                made = self.own.layer(layer, fed, positions, seen, past)
                ours = {"keys": pair[0][:, :, before:], "values": pair[1][:, :, before:]}
                ours["hidden rows"] = rows[names.layer_output(layer)]
                yield from self._step(plan, layer, made, ours, rows, is_copy)
        last = rows[names.layer_output(self.facts.text.num_layers - 1)]
        ours_last = rows[names.LOGITS][0]
        yield compare_alone(plan, f"{SINGLE}logits", ours_last, self.logits(last))

    def _step(
        self,
        plan: str,
        layer: int,
        made: Made,
        ours: Mapping[str, np.ndarray],
        rows: Mapping[str, np.ndarray],
        is_copy: bool,
    ) -> Iterator[Part]:
        """A layer's parts: products, keys, values and rows."""
        states = self.states(layer, made, is_step=is_copy)
        products = self.products(plan, made.products, rows, layer, is_step=is_copy, label=SINGLE)
        yield from products
        for what, own in ours.items():
            note = worst(products) if what == "hidden rows" else ""
            name = f"{SINGLE}layer {layer} {what}"
            yield compare_alone(plan, name, own, states[what], layer, note)

    def _residual(self, made: Made, prefix: str, *, is_step: bool = False) -> Alone:
        return Alone(made.hidden, self.allowed.layer(prefix, is_step=is_step), made.fed)

    def _fed(self, index: int) -> np.ndarray:
        """The rows that a decoder layer of the bundle was fed, [1, L, C]."""
        number = next(i for i, s in enumerate(self.facts.stages) if s.first <= index < s.last)
        if index > self.facts.stages[number].first:
            return self.recorder.values[names.layer_output(index - 1)]
        fed = self.recorder.inputs[names.stage(number)]
        return fed[names.HIDDEN][:, fed[names.KEEP_INDICES]]


def worst(products: Sequence[Part]) -> str:
    """The matrix of the largest own error, for people."""
    measured = [part for part in products if part.own_error is not None]
    if not measured:
        return ""
    most = max(measured, key=lambda part: part.own_error or 0.0)
    return f"most in {most.name.rpartition('.')[2]}, {most.own_error:.1e}"
