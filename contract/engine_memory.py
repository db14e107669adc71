"""How much memory it takes to build an engine: export obeys it, build and doctor report it.

Measured with TensorRT-RTX 1.7.1, which builds without a GPU (benchmarks/LOG.md): what the process
has resident at most, all included, in float16, bfloat16, float32, int8, FP8, NVFP4 and int4. Other
libraries were not measured, and time kernels on the GPU as they build: theirs may be more.
"""

from __future__ import annotations

from collections.abc import Mapping

from patchsieve.contract.formats import FORMATS
from patchsieve.contract.manifest import Manifest
from patchsieve.contract.targets import AHEAD_OF_TIME, WITH_ENGINES

MEASURED = AHEAD_OF_TIME[0]
# Bytes whatever the engine, pages of the weights that are not yet given back among them; and tenths
# of a byte for each byte of its weights.
ALWAYS, _TENTHS = 550_000_000, 17
# Of int4, which is unpacked and packed again. 208, 415, 623 and 679 MB took 0.81, 1.55, 2.17 and
# 2.45 GB.
_TENTHS_INT4 = 30
_INT4 = {name for name, form in FORMATS.items() if form.bits == 4 and not form.is_float}


def source(facts: Manifest) -> str:
    """What the expectations of a bundle are worth, in words."""
    others = [t for t in WITH_ENGINES if t in facts.targets and t != MEASURED]
    rest = f", an estimate for {', '.join(others)}, which may take more" if others else ""
    return f"measured with {MEASURED}{rest}"


def expected(weights: Mapping[str, int]) -> int:
    """Most bytes that are resident while an engine is built, from its weights' bytes by format."""
    return ALWAYS + tenths(weights) // 10


def tenths(weights: Mapping[str, int]) -> int:
    """What the weights add to it, in tenths of a byte, which are exact."""
    return sum(
        count * (_TENTHS_INT4 if form in _INT4 else _TENTHS) for form, count in weights.items()
    )


def expectations(facts: Manifest) -> dict[str, int]:
    """The same for each graph of a bundle that becomes an engine."""
    graphs = {graph for target in WITH_ENGINES for graph in facts.targets.get(target, {})}
    return {graph: expected(by_format(facts, graph)) for graph in sorted(graphs)}


def by_format(facts: Manifest, graph: str) -> dict[str, int]:
    """Bytes of the weights files that a graph reads, each by the format of most of its numbers."""
    found: dict[str, int] = {}
    for path in facts.graphs[graph].weights:
        form = facts.weights[path].format
        found[form] = found.get(form, 0) + facts.files[path].size
    return found


def weight_bytes(facts: Manifest, graph: str) -> int:
    """Bytes of the weights files that a graph reads."""
    return sum(facts.files[path].size for path in facts.graphs[graph].weights)
