"""Entries of methods between the tower and the decoder."""

from __future__ import annotations

from patchsieve.pruning.entries.shared import (
    DART,
    DIVPRUNE,
    HALF_SHARE,
    IVTP,
    PRUMERGE,
    PRUNED,
    SCORE,
    VISIONZIP,
)
from patchsieve.pruning.entry import ADAPTS, NUMBER, PROJECTOR, Entry, Option, TowerRule

_LEFT = Option("keep", "count", "tokens that are left", metavar="N", shown=PRUNED)
_NEIGHBOURS = Option("neighbours", "count", "patches that each token takes up", 32, word=None)


def _most(shown: str) -> Option:
    """The bound of a method whose count adapts."""
    return Option("keep", "count", "most tokens that are left", metavar="N", shown=shown)


AFTER_TOWER = (
    Entry(
        "pooling",
        PROJECTOR,
        "patchsieve.pruning.projector.pooling:Pooling",
        "average the patches of each cell of a square grid (a square number of tokens)",
        NUMBER,
        (
            _LEFT,
            Option(
                "place", "text", "before or after the projection", "before", ("before", "after")
            ),
        ),
        (IVTP,),
        {"projector_keep": 64},
        is_grid=True,
    ),
    Entry(
        "topk",
        PROJECTOR,
        "patchsieve.pruning.encoder.topk:TopK",
        "keep the patches nearest to the class token",
        NUMBER,
        (_LEFT, SCORE),
        (IVTP,),
        {"projector_keep": 64},
    ),
    Entry(
        "random",
        PROJECTOR,
        "patchsieve.pruning.encoder.random:RandomPatches",
        "keep patches at random",
        NUMBER,
        (_LEFT,),
        example={"projector_keep": 64},
        draws=True,
    ),
    Entry(
        "divprune",
        PROJECTOR,
        "patchsieve.pruning.projector.divprune:DivPrune",
        "keep the tokens that are least alike, as the decoder gets them",
        NUMBER,
        (_LEFT,),
        (DIVPRUNE,),
        {"projector_keep": 64},
        is_projected=True,
    ),
    Entry(
        "visionzip",
        PROJECTOR,
        "patchsieve.pruning.projector.visionzip:VisionZip",
        "keep what the class token attends to, and the class token; merge the rest into a few",
        NUMBER,
        (
            _LEFT,
            Option("class_token", "flag", "the class token is one of the tokens", True, word=None),
        ),
        (VISIONZIP,),
        {"projector_keep": 64},
        tower=TowerRule(fewest=3),
    ),
    Entry(
        "prumerge",
        PROJECTOR,
        "patchsieve.pruning.projector.prumerge:PruMerge",
        "keep the outliers of the class token's attention, each with its neighbours added",
        ADAPTS,
        (_most(PRUNED), _NEIGHBOURS),
        (PRUMERGE,),
        {"projector_keep": 64},
        tower=TowerRule(fewest=2),
    ),
    Entry(
        "prumerge-plus",
        PROJECTOR,
        "patchsieve.pruning.projector.prumerge:PruMergePlus",
        "prumerge, with patches at even distances beside the outliers",
        ADAPTS,
        (_most("288 of 576"), _NEIGHBOURS),
        (PRUMERGE,),
        {"projector_keep": 288},
        tower=TowerRule(share=HALF_SHARE, fewest=2),
    ),
    Entry(
        "dart",
        PROJECTOR,
        "patchsieve.pruning.projector.dart:DART",
        "keep a few long tokens and those that are least like them, as the decoder gets them",
        NUMBER,
        (_LEFT, Option("pivots", "count", "long tokens that the others are compared with", 4)),
        (DART,),
        {"projector_keep": 64},
        is_projected=True,
    ),
)
