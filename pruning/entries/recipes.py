"""Entries of whole systems, which are several methods under one name."""

from __future__ import annotations

from patchsieve.pruning.entries.shared import BLOCK, FUSION, IVTP, NUM_KEEP, judge
from patchsieve.pruning.entry import NUMBER, RECIPE, Entry, Option

RECIPES = (
    Entry(
        "ivtp",
        RECIPE,
        "patchsieve.pruning.recipes:ivtp",
        "groups of layers in the tower and in the decoder, judged by the question",
        NUMBER,
        (
            NUM_KEEP,
            Option("group", "count", "layers of a group", 3, word="group-layers", metavar="L"),
            FUSION,
            BLOCK,
            *judge("clip"),
            Option(
                "layers",
                "count",
                "first layers of the decoder that are grouped",
                word=None,
                shown="12, or all but the last",
            ),
            Option(
                "counts",
                "integers",
                "tokens left by each group of the tower, then of the decoder",
                word=None,
                shown="a geometric fall to num_keep",
            ),
        ),
        (IVTP,),
        {"num_keep": 64},
    ),
)
