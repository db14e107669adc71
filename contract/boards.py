"""Whether the memory of a board holds a model, its engines while they are built, and a request.

A board's GPU has no memory of its own. On a board an engine's file is mapped while it is loaded, so
weights are there once: in the engines of TensorRT, or in the files that ONNX Runtime maps. Of the
weights files a TensorRT target needs only the table of embeddings when it runs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from patchsieve.contract import engine_memory, names
from patchsieve.contract.formats import Chosen
from patchsieve.contract.manifest import Manifest
from patchsieve.contract.model import TextModel, VisionModel
from patchsieve.contract.precision import BYTES, Precision
from patchsieve.contract.sizes import Group
from patchsieve.contract.targets import TARGETS, WITH_ENGINES
from patchsieve.contract.weights import EMBEDDINGS, HEAD, JOINT, LAYER, SCORER, TOWER

# What Linux sees of the memory; firmware keeps the rest. tests/recorded/jetson: 7620 MiB of an
# Orin Nano of 8 GB with JetPack 6.2, 62817 MiB of an AGX Orin of 64 GB with 7.2.
_SEEN = 0.93
# What the system takes of it: 1.41 GB in the recording of the Orin Nano; 0.58 GB without a desktop
# (github.com/dusty-nv/jetson-containers/issues/342, the same board, JetPack 5.1.2).
SYSTEM = int(1.5e9)
NEW_TOKENS = 256  # of an answer, where no bundle limits it
# Assumptions: Python and the library of a target, the CUDA context included.
_LIBRARIES = {False: int(0.3e9), True: int(0.5e9)}


@dataclass(frozen=True)
class Board:
    """A size of memory that boards have.

    Attributes:
        name: As it is sold.
        memory: Bytes.
        example: Boards that have it.
    """

    name: str
    memory: int
    example: str

    @property
    def free(self) -> int:
        """Bytes that programs may have."""
        return int(self.memory * _SEEN) - SYSTEM


BOARDS = (
    Board("8 GB", 8 << 30, "Orin Nano, Orin NX"),
    Board("16 GB", 16 << 30, "Orin NX"),
    Board("32 GB", 32 << 30, "AGX Orin"),
    Board("64 GB", 64 << 30, "AGX Orin"),
)


@dataclass(frozen=True)
class Demand:
    """Bytes that a model takes on a machine under a plan.

    Attributes:
        target: What runs it.
        weights: Of its engines, or of the files that ONNX Runtime maps, embeddings included.
        kv: Of the KV caches that a request reserves.
        activations: Of a prefill: an estimate.
        libraries: Of Python and the library that runs it: an assumption.
        building: The most while an engine is built, before anything runs; 0 without engines.
        largest: Weights of the largest engine.
    """

    target: str
    weights: int
    kv: int
    activations: int
    libraries: int
    building: int = 0
    largest: int = 0

    @property
    def running(self) -> int:
        """All that is there while a request is answered."""
        return self.weights + self.kv + self.activations + self.libraries

    def to_dict(self) -> dict[str, Any]:
        """All of it by name."""
        return asdict(self) | {"running": self.running}


def of_bundle(facts: Manifest, plan: str, target: str | None = None) -> Demand:
    """What a bundle takes under a plan.

    Args:
        facts: Its manifest.
        plan: The plan.
        target: What runs it; by default a target of TensorRT if the bundle has one.
    """
    target = target or target_of(facts.targets)
    has_engines = target in WITH_ENGINES
    held = {graph: facts.graphs[graph].weights for graph in facts.targets.get(target, {})}
    parts = {graph: engine_memory.weight_bytes(facts, graph) for graph in held}
    table = facts.files[facts.embeddings.file].size if facts.embeddings.file in facts.files else 0
    if has_engines:
        total = sum(parts.values()) + table
    else:
        paths = {path for each in held.values() for path in each} | {facts.embeddings.file}
        total = sum(facts.files[path].size for path in paths if path in facts.files)
    is_fixed = has_engines and TARGETS[target].has_fixed_slots
    slots = [stage.slots for stage in facts.stages] if is_fixed else facts.slots(plan)
    kv = sum(n * facts.row_bytes(stage) for n, stage in zip(slots, facts.stages, strict=True))
    rows = slots[0] - facts.limits.max_new_tokens
    return Demand(
        target=target,
        weights=total,
        kv=kv,
        activations=activations(
            facts.text, facts.vision, facts.precision, rows, slots[0], facts.limits.max_images
        ),
        libraries=_LIBRARIES[has_engines],
        **_building(engine_memory.by_format(facts, graph) for graph in held if has_engines),
    )


def target_of(targets: Iterable[str]) -> str:
    """The target that a board would run: one of TensorRT if there is one."""
    return min(targets, key=lambda target: target not in WITH_ENGINES, default="")


@dataclass(frozen=True)
class Request:
    """What a model without a bundle is asked.

    Attributes:
        cuts: Layers at which the decoder is divided.
        num_visions: Graphs of the tower: a plan that prunes in it has one beside that of no plan.
        kv: Bytes of the KV caches.
        rows: Of the longest prefill.
        slots: Of the caches before the first cut.
        images: Of the request.
    """

    cuts: Sequence[int]
    num_visions: int
    kv: int
    rows: int
    slots: int
    images: int


def of_model(
    text: TextModel,
    vision: VisionModel,
    found: Sequence[Group],
    chosen: Chosen,
    request: Request,
    target: str,
) -> Demand:
    """What a model that is not exported takes.

    Args:
        text: The decoder.
        vision: The tower and the projector.
        found: Its tensors, from `sizes.groups`.
        chosen: Their types and formats.
        request: What is asked.
        target: What runs it.
    """
    has_engines = target in WITH_ENGINES
    counts = [group.num_bytes(chosen.types, chosen.formats) for group in found]
    total = sum(sum(each.values()) for each in counts)
    engines: dict[str, dict[str, int]] = {}
    if has_engines:
        engines = engines_of(found, counts, [*request.cuts, text.num_layers])
        held = {graph: sum(each.values()) for graph, each in engines.items()}
        total = sum(held.values()) + (request.num_visions - 1) * held[names.VISION]
        total += text.vocab_size * text.hidden_size * BYTES[chosen.types.decoder]  # mapped
    return Demand(
        target=target,
        weights=total,
        kv=request.kv,
        activations=activations(
            text, vision, chosen.types, request.rows, request.slots, request.images
        ),
        libraries=_LIBRARIES[has_engines],
        **_building(engines.values()),
    )


def _building(engines: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The most that building one of some engines takes, and the weights of that engine."""
    pairs = [(engine_memory.expected(each), sum(each.values())) for each in engines]
    building, largest = max(pairs, default=(0, 0))
    return {"building": building, "largest": largest}


def engines_of(
    found: Sequence[Group], counts: Sequence[Mapping[str, int]], ends: Sequence[int]
) -> dict[str, dict[str, int]]:
    """Bytes of the weights in each engine, by format.

    Args:
        found: The model's tensors.
        counts: Bytes of each group by format.
        ends: The layer after the last of each stage.
    """
    is_tied = not any(group.part == HEAD and group.matrices for group in found)
    last = names.stage(len(ends) - 1)
    graphs = {TOWER: names.VISION, JOINT: names.VISION, SCORER: names.SCORER, HEAD: last}
    if is_tied:
        graphs[EMBEDDINGS] = last
    held: dict[str, dict[str, int]] = {}
    for group, count in zip(found, counts, strict=True):
        graph = graphs.get(group.part)
        if group.part == LAYER and group.layer is not None:
            graph = names.stage(bisect_right(ends, group.layer))
        if graph is not None:
            engine = held.setdefault(graph, {})
            engine |= {form: engine.get(form, 0) + n for form, n in count.items()}
    return held


def activations(
    text: TextModel, vision: VisionModel, types: Precision, rows: int, slots: int, images: int
) -> int:
    """Bytes that a prefill computes at once, about: rows of the widest layer, and its scores.

    Scores are float32 in the graphs of every target, before and after the softmax. A kernel that
    fuses attention takes less.

    Args:
        text: The decoder.
        vision: The tower.
        types: Type of each part.
        rows: Of the longest prefill.
        slots: Of the caches that they see.
        images: Of the request, which the tower takes together.
    """
    wide = rows * (6 * text.hidden_size + 3 * text.intermediate_size) * BYTES[types.decoder]
    decoder = wide + 2 * 4 * text.num_heads * rows * slots
    patches = vision.num_patches + vision.has_cls
    wide = patches * (6 * vision.hidden_size + vision.intermediate_size) * BYTES[types.tower]
    tower = images * (wide + 2 * 4 * vision.num_heads * patches**2)
    features = images * vision.num_visual * text.hidden_size * BYTES[types.decoder]
    return max(decoder, tower) + features + 4 * text.vocab_size


@dataclass(frozen=True)
class Fit:
    """Whether a demand fits, and by how many bytes; negative if it does not.

    Attributes:
        memory: Name of the board, or of the machine.
        free: Bytes that programs may have.
        run: Left while a request is answered.
        build: Left while the largest engine is built; None without engines.
    """

    memory: str
    free: int
    run: int
    build: int | None

    def to_dict(self) -> dict[str, Any]:
        """All of it by name."""
        fits = {"runs": self.run >= 0, "builds": None if self.build is None else self.build >= 0}
        return asdict(self) | fits


def fits(demand: Demand, places: Mapping[str, int] | None = None) -> list[Fit]:
    """How a demand fits each board, or other places by their free bytes."""
    free = {board.name: board.free for board in BOARDS} if places is None else places
    return [
        Fit(
            name,
            count,
            count - demand.running,
            count - demand.building if demand.building else None,
        )
        for name, count in free.items()
    ]
