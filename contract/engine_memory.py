"""How much memory it takes to build an engine: what export obeys, and build and doctor tell.

Measured with TensorRT-RTX 1.7.1, which builds without a GPU (benchmarks/LOG.md): what the process
has resident at most, all included, in float16, bfloat16 and float32. Other libraries were not
measured, and time kernels on the GPU as they build: theirs may be more.
"""

from __future__ import annotations

from pathlib import Path

from patchsieve.contract import names
from patchsieve.contract.manifest import WEIGHTS, Manifest
from patchsieve.contract.precision import BYTES

MEASURED = "tensorrt-rtx"
TARGETS = (MEASURED, "tensorrt", "tensorrt10", "jetpack6")  # whose graphs become engines
_ALWAYS = 0.55e9  # bytes, whatever the engine; pages of the weights that are not yet given back too
_FACTOR = 1.7  # bytes for each of an engine's weights


def source(facts: Manifest) -> str:
    """What the expectations of a bundle are worth, in words."""
    others = [t for t in TARGETS if t in facts.targets and t != MEASURED]
    rest = f", an estimate for {', '.join(others)}, which may take more" if others else ""
    return f"measured with {MEASURED}{rest}"


def expected(weights: int) -> int:
    """Most bytes that are resident while an engine with so many bytes of weights is built."""
    return int(_ALWAYS + _FACTOR * weights)


def expectations(facts: Manifest) -> dict[str, int]:
    """The same for each graph of a bundle that becomes an engine."""
    graphs = {graph for target in TARGETS for graph in facts.targets.get(target, {})}
    return {graph: expected(weight_bytes(facts, graph)) for graph in sorted(graphs)}


def weight_bytes(facts: Manifest, graph: str) -> int:
    """Bytes of the weights' files that a graph points into."""
    sizes = {
        Path(path).name.removesuffix(".safetensors"): file.size
        for path, file in facts.files.items()
        if path.startswith(WEIGHTS)
    }
    stages = {names.stage(index): stage for index, stage in enumerate(facts.stages)}
    parts: list[str] = []
    if names.is_vision(graph):
        plan = facts.plans.get(graph.partition(".")[2])
        is_joint = plan is not None and plan.pseudo_cls is not None and plan.pseudo_cls.needs_scorer
        parts = ["vision", "joint"] if is_joint else ["vision"]
    elif graph == names.SCORER:
        parts = ["scorer"]
    elif (stage := stages.get(graph)) is not None:
        parts = [f"layers.{layer}" for layer in range(stage.first, stage.last)]
        if stage.last == facts.text.num_layers:
            parts += ["head"]
            matrix = facts.text.vocab_size * facts.text.hidden_size * BYTES[facts.precision.head]
            if sizes.get("head", 0) < matrix:  # the output matrix is the table of embeddings
                parts += [Path(facts.embeddings.file).name.removesuffix(".safetensors")]
    return sum(sizes.get(part, 0) for part in parts)
