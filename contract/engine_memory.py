"""How much memory it takes to build an engine: export obeys it, build and doctor report it.

Measured with TensorRT-RTX 1.7.1, which builds without a GPU (benchmarks/LOG.md): what the process
has resident at most, all included, in float16, bfloat16, float32, int8, FP8, NVFP4 and int4. Other
libraries were not measured, and time kernels on the GPU as they build: theirs may be more.
"""

from __future__ import annotations

from patchsieve.contract.formats import FLOAT, FORMATS
from patchsieve.contract.manifest import Manifest
from patchsieve.contract.targets import AHEAD_OF_TIME, WITH_ENGINES

MEASURED = AHEAD_OF_TIME[0]
_ALWAYS = 0.55e9  # bytes, whatever the engine; pages of the weights that are not yet given back too
_FACTOR = 1.7  # bytes for each byte of an engine's weights
# Of int4, which is unpacked and packed again. 208, 415, 623 and 679 MB took 0.81, 1.55, 2.17 and
# 2.45 GB.
_INT4_FACTOR = 3.0


def source(facts: Manifest) -> str:
    """What the expectations of a bundle are worth, in words."""
    others = [t for t in WITH_ENGINES if t in facts.targets and t != MEASURED]
    rest = f", an estimate for {', '.join(others)}, which may take more" if others else ""
    return f"measured with {MEASURED}{rest}"


def expected(weights: int, format: str = FLOAT) -> int:
    """Most bytes that are resident while an engine is built.

    Args:
        weights: Bytes of its weights.
        format: A key of `formats.FORMATS`: that of most of them.
    """
    return int(_ALWAYS + _factor(format) * weights)


def expectations(facts: Manifest) -> dict[str, int]:
    """The same for each graph of a bundle that becomes an engine."""
    graphs = {graph for target in WITH_ENGINES for graph in facts.targets.get(target, {})}
    return {graph: _expected(facts, graph) for graph in sorted(graphs)}


def _expected(facts: Manifest, graph: str) -> int:
    """Most bytes that are resident while a graph of a bundle becomes an engine."""
    files = facts.graphs[graph].weights
    sizes = (facts.files[path].size * _factor(facts.weights[path].format) for path in files)
    return int(_ALWAYS + sum(sizes))


def _factor(format: str) -> float:
    row = FORMATS[format]
    return _INT4_FACTOR if row.bits == 4 and not row.is_float else _FACTOR


def weight_bytes(facts: Manifest, graph: str) -> int:
    """Bytes of the weights files that a graph reads."""
    return sum(facts.files[path].size for path in facts.graphs[graph].weights)
