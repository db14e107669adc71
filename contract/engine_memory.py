"""How much memory it takes to build an engine: export obeys it, build and doctor report it.

Measured with TensorRT-RTX 1.7.1, which builds without a GPU (benchmarks/LOG.md): what the process
has resident at most, all included, in float16, bfloat16 and float32. Other libraries were not
measured, and time kernels on the GPU as they build: theirs may be more.
"""

from __future__ import annotations

from patchsieve.contract.manifest import Manifest
from patchsieve.contract.targets import AHEAD_OF_TIME, WITH_ENGINES

MEASURED = AHEAD_OF_TIME[0]
_ALWAYS = 0.55e9  # bytes, whatever the engine; pages of the weights that are not yet given back too
_FACTOR = 1.7  # bytes for each of an engine's weights


def source(facts: Manifest) -> str:
    """What the expectations of a bundle are worth, in words."""
    others = [t for t in WITH_ENGINES if t in facts.targets and t != MEASURED]
    rest = f", an estimate for {', '.join(others)}, which may take more" if others else ""
    return f"measured with {MEASURED}{rest}"


def expected(weights: int) -> int:
    """Most bytes that are resident while an engine with so many bytes of weights is built."""
    return int(_ALWAYS + _FACTOR * weights)


def expectations(facts: Manifest) -> dict[str, int]:
    """The same for each graph of a bundle that becomes an engine."""
    graphs = {graph for target in WITH_ENGINES for graph in facts.targets.get(target, {})}
    return {graph: expected(weight_bytes(facts, graph)) for graph in sorted(graphs)}


def weight_bytes(facts: Manifest, graph: str) -> int:
    """Bytes of the weights files that a graph reads."""
    return sum(facts.files[path].size for path in facts.graphs[graph].weights)
