"""What a model and a plan cost, counted from shapes: FLOPs, tokens and KV bytes, with no weights.

    shape = read_shape(Path("config.json"))
    pruned = cost(shape, ivtp(shape), text_tokens=512)
    print(pruned.flops.total, pruned.kv_bytes, pruned.average_tokens)

A multiply-accumulate counts as 2 FLOPs. Elementwise work, norms, softmax and the decisions between
the stages are not counted; attention is counted over all pairs, as the papers do, causal or not.
"""

from patchsieve.cost.config import (
    DecoderShape,
    ModelShape,
    ScorerShape,
    TowerShape,
    from_bundle,
    from_manifest,
    read_shape,
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
    "PAPERS",
    "RUNTIME",
    "Convention",
    "Cost",
    "DecoderShape",
    "Flops",
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
    "no_pruning",
    "of_plan",
    "read_shape",
    "resampler",
    "shape_of_config",
]
