"""The manifest of a bundle: what it holds, how large, and the hash of each file.

A field that says nothing in most bundles has a default and is written only where it departs from it
(`_OPTIONAL`), so that an older patchsieve reads the others.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from patchsieve.contract import names
from patchsieve.contract.formats import FORMATS
from patchsieve.contract.graphs import SCORER, STAGE, VISION, Graph, Signature
from patchsieve.contract.model import (
    Embeddings,
    Generation,
    Scorer,
    TextModel,
    Tokens,
    VisionModel,
)
from patchsieve.contract.plan import Plan
from patchsieve.contract.precision import BYTES, Precision
from patchsieve.contract.targets import QUANTISED_OPSET, TARGETS, Target
from patchsieve.contract.weights import WeightsFile, in_words

# 2 added `needs` and `target_tensors`, 3 `text.rotary_sections`. 4 has typed graphs, each with its
# weights files, and says the type of the caches and their form: `patchsieve.contract.older`.
SCHEMA_VERSION = 4
_OPTIONAL = ("scorer", "generation", "attention")


@dataclass(frozen=True)
class Limits:
    """What a request may ask for."""

    max_text_tokens: int
    max_new_tokens: int
    max_images: int

    def slots(self, budget: int, has_side_rows: bool = False) -> int:
        """Slots of a stage's cache: text, new tokens, and per image `budget` visual tokens.

        A side row of each image joins them in the stages that feed such rows.
        """
        per_image = budget + has_side_rows
        return self.max_text_tokens + self.max_new_tokens + self.max_images * per_image


@dataclass(frozen=True)
class Stage:
    """Decoder layers `first` to `last - 1`, and the slots that engines of fixed size reserve."""

    first: int
    last: int
    slots: int

    @property
    def num_layers(self) -> int:
        """Layers in the stage."""
        return self.last - self.first


@dataclass(frozen=True)
class Needs:
    """What builds or runs the graphs of a target.

    Attributes:
        library: The Python package, as pip calls it.
        versions: Which of its versions, as pip spells a range.
        where: The machines, for people.
        opset: The highest of standard ONNX in the target's graphs.
    """

    library: str
    versions: str
    where: str
    opset: int

    @classmethod
    def of(cls, target: Target, *, is_quantised: bool = False) -> Needs:
        """What the table says of a target, for a bundle that holds quantised matrices or none."""
        versions, opset = target.versions, target.opset
        if is_quantised:
            versions = target.quantised_versions or versions
            opset = max(opset, QUANTISED_OPSET)
        return cls(target.library, versions, target.where, opset)

    def __str__(self) -> str:
        """One line."""
        return f"{self.library} {self.versions} ({self.where}), opset {self.opset}"


@dataclass(frozen=True)
class File:
    """Size and hash of a file, by which damage is found."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """All that a bundle says of itself.

    Attributes:
        checkpoint: Name of the checkpoint it was made from.
        precision: Type of each part; hidden rows have the decoder's.
        cuts: Layers at which the decoder is divided.
        plans: Each plan by name; "none" prunes nothing.
        default_plan: The plan of a request that names none.
        targets: For each target the file of each graph.
        graphs: What each graph takes and gives, as most targets have it, and its weights files.
        target_graphs: What the graphs of a target take and give where they depart from `graphs`.
        cache_forms: How the stages of each target take their caches, `names.IN_PLACE` or
            `names.NEW_ROWS`.
        cache_type: The floating-point type of keys and values in the caches.
        weights: What each weights file holds, by its path in the bundle.
        needs: For each target what builds or runs it; bundles of schema 1 do not say.
        scorer: The text tower of plans that compare the question with an image; None without.
        generation: What the checkpoint asks of every answer.
        attention: How TensorRT's graphs spell half-precision attention, one of
            `names.ATTENTION_FORMS`; None if no graph has a choice.
    """

    patchsieve_version: str
    checkpoint: str
    precision: Precision
    text: TextModel
    vision: VisionModel
    tokens: Tokens
    embeddings: Embeddings
    limits: Limits
    stages: tuple[Stage, ...]
    plans: dict[str, Plan]
    default_plan: str
    preprocessor: str
    targets: dict[str, dict[str, str]]
    graphs: dict[str, Graph]
    cache_forms: dict[str, str]
    cache_type: str
    weights: dict[str, WeightsFile]
    target_graphs: dict[str, dict[str, Signature]] = field(default_factory=dict)
    needs: dict[str, Needs] = field(default_factory=dict)
    files: dict[str, File] = field(default_factory=dict)
    scorer: Scorer | None = None
    generation: Generation = Generation()
    attention: str | None = None
    schema_version: int = SCHEMA_VERSION

    @property
    def cuts(self) -> list[int]:
        """Layers at which the decoder is divided."""
        return [stage.first for stage in self.stages[1:]]

    @property
    def numbers(self) -> str:
        """Types and formats: "float32; tower and decoder int8, head int8-weights"."""
        stored = in_words(self.weights.values())
        caches = "" if self.cache_type == self.precision.decoder else f"caches {self.cache_type}"
        return "; ".join(part for part in (str(self.precision), stored, caches) if part)

    @property
    def is_dynamic(self) -> bool:
        """ONNX Runtime rounds rows to the format of a weights file on a CPU."""
        return any(FORMATS[entry.format].is_dynamic for entry in self.weights.values())

    def vision_graph(self, plan: str) -> str:
        """The graph that makes a plan's visual tokens."""
        return names.vision(plan) if self.plans[plan].has_vision else names.VISION

    def position_rule(self, plan: str) -> str:
        """How a plan numbers the tokens of an image."""
        return self.plans[plan].position_rule or self.text.trained_rule

    def num_visual(self, plan: str) -> int:
        """Visual tokens of an image that enter the decoder under a plan, or the most of them."""
        features = self.graphs[self.vision_graph(plan)].output(names.IMAGE_FEATURES)
        assert features is not None and isinstance(features.shape[1], int)  # checked when read
        return features.shape[1]

    def has_fixed_count(self, plan: str) -> bool:
        """Whether every image has `num_visual` tokens; else it decides, and they are the most."""
        return self.graphs[self.vision_graph(plan)].output(names.NUM_WANTED) is None

    def budgets(self, plan: str) -> list[int]:
        """Visual tokens per image that each stage reserves slots for under a plan."""
        at = {site.layer: site.budget for site in self.plans[plan].sites}
        budget, budgets = self.num_visual(plan), []
        for stage in self.stages:
            budget = min(budget, at.get(stage.first) or budget)
            budgets.append(budget)
        return budgets

    def slots(self, plan: str) -> list[int]:
        """Slots that each stage's cache reserves under a plan."""
        last = self.side_layer(plan)
        return [
            self.limits.slots(budget, stage.last <= last)
            for stage, budget in zip(self.stages, self.budgets(plan), strict=True)
        ]

    def side_layer(self, plan: str) -> int:
        """The last site whose decision reads side rows: they are fed up to there. 0 for none."""
        reading = [
            site.layer
            for site in self.plans[plan].sites
            if self.graphs[names.decide(plan, site.layer)].input(names.SIDE_ROW) is not None
        ]
        return max(reading, default=0)

    def signature(self, target: str, graph: str) -> Signature:
        """What a graph of a target takes and gives."""
        return self.target_graphs.get(target, {}).get(graph, self.graphs[graph])

    def has_fused_attention(self, target: str, graph: str) -> bool:
        """Whether a target's graph holds attention as one operator, which some TensorRTs refuse."""
        row, kind = TARGETS.get(target), self.graphs[graph].kind
        if row is None or not row.attention_forms or kind not in (VISION, SCORER, STAGE):
            return False
        numbers = self.precision.decoder if kind == STAGE else self.precision.tower
        is_chosen = self.attention == names.FUSED_TOWER and kind == VISION
        return numbers != "float32" and (is_chosen or self.attention == names.FUSED)

    def row_bytes(self, stage: Stage) -> int:
        """KV bytes of one row in a stage: layers x 2 x KV heads x head dim x bytes."""
        numbers = stage.num_layers * 2 * self.text.num_kv_heads * self.text.head_dim
        return numbers * BYTES[self.cache_type]

    def to_json(self) -> str:
        """The manifest as it is stored."""
        data: dict[str, Any] = asdict(self)
        data["plans"] = {name: plan.to_dict() for name, plan in self.plans.items()}
        data["precision"] = str(self.precision)
        data["cuts"] = self.cuts
        for each in fields(self):
            if each.name in _OPTIONAL and getattr(self, each.name) == each.default:
                del data[each.name]
        data["schema_version"] = SCHEMA_VERSION  # of what is written, whatever was read
        return json.dumps(data, indent=1) + "\n"
