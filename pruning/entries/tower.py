"""Entries of methods that prune inside the vision tower."""

from __future__ import annotations

from patchsieve.pruning.entries.shared import (
    EVIT,
    FUSION,
    GROUPED,
    IDENTITY_FIRST,
    IVTP,
    IVTP_TOWER_SHARE,
    PRUNED,
    SCORE,
    TOME,
    schedule,
)
from patchsieve.pruning.entry import ENCODER, NUMBER, Entry, Option, TowerRule

IN_TOWER = (
    Entry(
        "gtp",
        ENCODER,
        "patchsieve.pruning.encoder.gtp:GTP",
        "drop patches after each group of layers, by the class token's rollout attention",
        NUMBER,
        (
            *schedule(GROUPED, "3", "geometric"),
            FUSION,
            IDENTITY_FIRST,
            Option(
                "value_heads",
                "text",
                "norm of the values over all heads, or the sum of the heads' norms",
                "concatenated",
                ("concatenated", "summed"),
                word=None,
            ),
        ),
        (IVTP,),
        {"encoder_keep": 120},
        tower=TowerRule(group_layers=3, curve="geometric", share=IVTP_TOWER_SHARE),
    ),
    Entry(
        "topk",
        ENCODER,
        "patchsieve.pruning.encoder.topk:TopK",
        "keep the patches nearest to the class token",
        NUMBER,
        (*schedule(PRUNED), SCORE),
        (IVTP,),
        {"encoder_keep": 64},
    ),
    Entry(
        "random",
        ENCODER,
        "patchsieve.pruning.encoder.random:RandomPatches",
        "keep patches at random",
        NUMBER,
        schedule(PRUNED),
        example={"encoder_keep": 64},
        draws=True,
    ),
    Entry(
        "evit",
        ENCODER,
        "patchsieve.pruning.encoder.evit:EViT",
        "keep what the class token attends to and fuse the rest into one token",
        NUMBER,
        schedule(PRUNED, "the ends of the first three quarters", "geometric"),
        (EVIT,),
        {"encoder_keep": 64},
        tower=TowerRule(is_inside=True, at_quarters=True, curve="geometric", fewest=2),
    ),
    Entry(
        "tome",
        ENCODER,
        "patchsieve.pruning.encoder.tome:ToMe",
        "merge the patches whose keys are most alike",
        NUMBER,
        (
            *schedule(PRUNED),
            Option(
                "proportional", "flag", "count a token as often as it has patches", True, word=None
            ),
        ),
        (TOME,),
        {"encoder_keep": 64},
        merges=True,
        tower=TowerRule(is_inside=True),
    ),
)
