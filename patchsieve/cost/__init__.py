"""What a model and a plan cost, counted from shapes: FLOPs, tokens and KV bytes, with no weights.

    shape = read_shape(Path("config.json"))
    pruned = cost(shape, ivtp(shape), text_tokens=512)
    print(pruned.flops.total, pruned.kv_bytes, pruned.average_tokens)

A multiply-accumulate counts as 2 FLOPs. Elementwise work, norms, softmax and the decisions between
the stages are not counted; attention is counted over all pairs, as the papers do, causal or not.
"""

from patchsieve.cost.config import (
    MODELS,
    DecoderShape,
    Measures,
    ModelShape,
    ScorerShape,
    TowerShape,
    from_bundle,
    from_manifest,
    measures_of_config,
    read_measures,
    read_shape,
    scorer_of,
    shape_of_config,
)
from patchsieve.cost.flops import (
    PAPERS,
    RUNTIME,
    Convention,
    Cost,
    Flops,
    Schedule,
    cost,
)
from patchsieve.cost.methods import (
    after_tower,
    in_decoder,
    in_tower,
    ivtp,
    no_pruning,
    of_plan,
    resampler,
)
from patchsieve.pruning.schedules import geometric, linear

__all__ = [
    "MODELS",
    "PAPERS",
    "RUNTIME",
    "Convention",
    "Cost",
    "DecoderShape",
    "Flops",
    "Measures",
    "ModelShape",
    "Schedule",
    "ScorerShape",
    "TowerShape",
    "after_tower",
    "cost",
    "from_bundle",
    "from_manifest",
    "geometric",
    "in_decoder",
    "in_tower",
    "ivtp",
    "linear",
    "measures_of_config",
    "no_pruning",
    "of_plan",
    "read_measures",
    "read_shape",
    "resampler",
    "scorer_of",
    "shape_of_config",
]
