"""The entries of the catalogue: one for each method and place, without torch.

To add a method, write its class in a file of its own and its entry here. Options of `export`,
`cost` and `calibrate`, their checks, the cost model, the README's table and docs/methods.md come
from the entries.
"""

from __future__ import annotations

import math
from dataclasses import replace

from patchsieve.contract.plan import CLS_SOURCES, TEXTS
from patchsieve.pruning.entry import (
    ADAPTS,
    DECODER,
    ENCODER,
    NUMBER,
    PROJECTOR,
    RATIO,
    RECIPE,
    Entry,
    Option,
    Published,
    TowerRule,
)

# IVTP does not print its schedule. On a log scale the tower takes this share of the way from all
# tokens to the last count: 576 -> 120 -> 64, which its FLOPs fit.
IVTP_TOWER_SHARE = 5 / 7
HALF_SHARE = math.log(2, 9)  # half of the tokens: 288 of 576

IVTP = ("IVTP", "https://doi.org/10.1007/978-3-031-72643-9_13")
ATP = ("ATP-LLaVA", "https://arxiv.org/abs/2412.00447")
FASTV = ("FastV", "https://arxiv.org/abs/2403.06764")
EVIT = ("EViT", "https://arxiv.org/abs/2202.07800")
PYRAMIDDROP = ("PyramidDrop", "https://arxiv.org/abs/2410.17247")
SPARSEVLM = ("SparseVLM", "https://arxiv.org/abs/2410.04417")
TOME = ("ToMe", "https://arxiv.org/abs/2210.09461")
DIVPRUNE = ("DivPrune", "https://arxiv.org/abs/2503.02175")
DART = ("DART", "https://arxiv.org/abs/2502.11494")
PRUMERGE = ("LLaVA-PruMerge", "https://arxiv.org/abs/2403.15388")
VISIONZIP = ("VisionZip", "https://arxiv.org/abs/2412.04467")

_RATIO = Option(
    "keep_ratio",
    "ratio",
    "fraction that is KEPT of the image's tokens that enter the decoder, halves rounded up; one "
    "number, or one per site",
    0.5,
    metavar="R",
    is_per_site=True,
)
_NUMBER = Option("num_keep", "count", "tokens that stay of an image", 64, metavar="N")
_FUSIONS = ("rollout", "single", "mean", "max", "multiply")
_FUSION = Option("fusion", "text", "how a group's layers become one score", "rollout", _FUSIONS)
_BLOCK = Option("block", "text", "rows of the maps in the decoder", "visual", ("visual", "prefix"))
_IDENTITY = Option(
    "identity_first", "flag", "add the identity in a group's lowest layer too", False, word=None
)
_SCORE = Option(
    "score",
    "text",
    "rank patches by the class token's attention, or by cosine with it",
    "attention",
    ("attention", "cosine"),
)


_ROWS = Option(
    "rows",
    "text",
    "the rows that look: the prompt's last (FastV's code), the mean of the instruction's, or of "
    "all (FastV's paper)",
    "last",
    ("last", "mean", "all"),
)


def _as_published(ratios: tuple[float, ...]) -> Option:
    """Ratios that a paper has for its own sites."""
    shown = f"{','.join(f'{ratio:.4g}' for ratio in ratios)} at {len(ratios)} sites, else 0.5"
    return replace(_RATIO, shown=shown)


def _judge(text: str) -> tuple[Option, ...]:
    """Options of the pseudo-CLS, a method's own `text` being the default."""
    return (
        Option("text", "text", "which words of the question judge", text, TEXTS, is_of_plan=True),
        Option("tau", "number", "least cosine of a word that judges", 0.2, is_of_plan=True),
        Option(
            "cls",
            "text",
            "the tower layer whose class token judges",
            "last",
            CLS_SOURCES,
            word="visual-cls",
            is_of_plan=True,
        ),
    )


def _schedule(keep: str, group: str = "1", curve: str = "linear") -> tuple[Option, ...]:
    """Options of a schedule in the tower (`patchsieve.pruning.schedules.TowerSchedule`)."""
    return (
        Option("keep", "count", "tokens that leave the tower", metavar="N", shown=keep),
        Option(
            "counts",
            "integers",
            "tokens left by each pruning, such as 473,389,320,263,216,178,146,120",
            metavar="N",
            shown="what keep and curve give",
        ),
        Option(
            "group_layers",
            "count",
            "prune after every L-th layer",
            word="group",
            metavar="L",
            shown=group,
        ),
        Option(
            "layers",
            "integers",
            "prune at these tower layers, the last one alone for one shot",
            metavar="LAYERS",
            shown="the last of each group",
        ),
        Option(
            "curve",
            "text",
            "how the counts fall: by one ratio or by one number",
            choices=("geometric", "linear"),
            shown=curve,
        ),
    )


PYRAMIDDROP_RATIOS = (0.5, 0.25, 0.125)
# What SparseVLM's second version keeps of 576 tokens at its three sites, by its nominal average.
SPARSEVLM_COUNTS = {
    192: (300, 200, 118),
    128: (238, 108, 60),
    96: (246, 54, 28),
    64: (66, 34, 20),
}
SPARSEVLM_RATIOS = tuple(count / 576 for count in SPARSEVLM_COUNTS[192])
_SPARSEVLM_LISTS = ", ".join(
    f"{','.join(f'{count / 576:.4g}' for count in counts)} for {average}"
    for average, counts in SPARSEVLM_COUNTS.items()
)

_PRUNED, _GROUPED = "64 of 576", "120 of 576"

_DECODER = (
    Entry(
        "random",
        DECODER,
        "patchsieve.pruning.decoder.random:Random",
        "keep tokens at random, the baseline that every score has to beat",
        RATIO,
        (_RATIO,),
        example={"sites": [2], "keep_ratio": 0.5},
        draws=True,
    ),
    Entry(
        "fastv",
        DECODER,
        "patchsieve.pruning.decoder.fastv:FastV",
        "keep the tokens that the text attends to most in the layer before the site",
        RATIO,
        (_RATIO, _ROWS),
        (FASTV,),
        {"sites": [2], "keep_ratio": 0.5},
    ),
    Entry(
        "pyramiddrop",
        DECODER,
        "patchsieve.pruning.decoder.pyramiddrop:PyramidDrop",
        "keep the tokens that the prompt's last row attends to most in the layer that they enter",
        RATIO,
        (_as_published(PYRAMIDDROP_RATIOS),),
        (PYRAMIDDROP,),
        published=Published((8, 16, 24), 32, {"keep_ratio": PYRAMIDDROP_RATIOS}),
    ),
    Entry(
        "sparsevlm",
        DECODER,
        "patchsieve.pruning.decoder.sparsevlm:SparseVLM",
        "keep the tokens that those words attend to most which the image resembles",
        RATIO,
        (
            replace(
                _as_published(SPARSEVLM_RATIOS),
                help=f"{_RATIO.help}; version 2 has {_SPARSEVLM_LISTS} of 576 tokens",
            ),
            Option(
                "over_heads",
                "text",
                "heads whose attention counts: all, or the 14 of 32 that look at the image most",
                "best",
                ("best", "all"),
                word="over-heads",
            ),
        ),
        (SPARSEVLM,),
        published=Published((3, 7, 16), 32, {"keep_ratio": SPARSEVLM_RATIOS}),
    ),
    Entry(
        "atp",
        DECODER,
        "patchsieve.pruning.decoder.atp:ATP",
        "keep what passes thresholds that fit image, question and layer, learned or constant",
        ADAPTS,
        (
            Option(
                "heads",
                "folder",
                "folder of learned thresholds; by default those of the checkpoint, if it holds any",
                metavar="DIR",
            ),
            Option("theta_r", "number", "constant redundancy threshold, instead of heads"),
            Option("theta_s", "number", "constant spatial threshold, instead of heads"),
            Option(
                "normalisation",
                "text",
                "how the scores are scaled",
                "minmax",
                ("minmax", "rank", "softmax", "none"),
            ),
            Option(
                "modality",
                "text",
                "which scores S_red is the mean of",
                "both",
                ("both", "self", "cross"),
            ),
            Option("causal", "flag", "use only the causal pairs in eq. 3", False),
            Option(
                "parts",
                "text",
                "which rule keeps a token: S_red above theta_r (redundant), S_spatial above "
                "theta_s (spatial), or either (both)",
                "both",
                ("both", "redundant", "spatial"),
                word=None,
            ),
            Option(
                "granularities",
                "integers",
                "strides of the nested spatial sets",
                (2, 4, 8),
                word=None,
            ),
            Option("spatial_lambda", "number", "lambda_sample of eq. 5", 3.0, word=None),
        ),
        (ATP,),
        {"sites": [4, 14, 24], "theta_r": 0.5, "theta_s": 0.9, "budget": [300, 200, 100]},
    ),
    Entry(
        "topk",
        DECODER,
        "patchsieve.pruning.decoder.topk:DecoderTopK",
        "keep the tokens that one row attends to most",
        NUMBER,
        (
            _NUMBER,
            *_judge("none"),
            Option(
                "row",
                "text",
                "the row that judges: the pseudo-CLS or the prompt's last",
                "cls",
                ("cls", "last"),
                word=None,
            ),
        ),
        (IVTP,),
        {"sites": [3, 6], "num_keep": 64},
        judges={"row": "cls"},
    ),
    Entry(
        "tome",
        DECODER,
        "patchsieve.pruning.decoder.tome:DecoderToMe",
        "merge the tokens whose keys are most alike",
        NUMBER,
        (_NUMBER,),
        (TOME, IVTP),
        {"sites": [3], "num_keep": 300},
        merges=True,
    ),
    Entry(
        "ivtp",
        DECODER,
        "patchsieve.pruning.decoder.ivtp:IVTP",
        "keep the tokens that the question's words attend to through a group of layers",
        NUMBER,
        (
            _NUMBER,
            Option("group", "count", "layers of the group that ends at the site", 3),
            _FUSION,
            _BLOCK,
            _IDENTITY,
        ),
        (IVTP,),
        judges={},
    ),
)

_ENCODER = (
    Entry(
        "gtp",
        ENCODER,
        "patchsieve.pruning.encoder.gtp:GTP",
        "drop patches after each group of layers, by the class token's rollout attention",
        NUMBER,
        (
            *_schedule(_GROUPED, "3", "geometric"),
            _FUSION,
            _IDENTITY,
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
        (*_schedule(_PRUNED), _SCORE),
        (IVTP,),
        {"encoder_keep": 64},
    ),
    Entry(
        "random",
        ENCODER,
        "patchsieve.pruning.encoder.random:RandomPatches",
        "keep patches at random",
        NUMBER,
        _schedule(_PRUNED),
        example={"encoder_keep": 64},
        draws=True,
    ),
    Entry(
        "evit",
        ENCODER,
        "patchsieve.pruning.encoder.evit:EViT",
        "keep what the class token attends to and fuse the rest into one token",
        NUMBER,
        _schedule(_PRUNED, "the ends of the first three quarters", "geometric"),
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
            *_schedule(_PRUNED),
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

_LEFT = Option("keep", "count", "tokens that are left", metavar="N", shown=_PRUNED)
_NEIGHBOURS = Option("neighbours", "count", "patches that each token takes up", 32, word=None)


def _most(shown: str) -> Option:
    """The bound of a method whose count adapts."""
    return Option("keep", "count", "most tokens that are left", metavar="N", shown=shown)


_PROJECTOR = (
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
        (_LEFT, _SCORE),
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
        (_most(_PRUNED), _NEIGHBOURS),
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

_RECIPES = (
    Entry(
        "ivtp",
        RECIPE,
        "patchsieve.pruning.recipes:ivtp",
        "groups of layers in the tower and in the decoder, judged by the question",
        NUMBER,
        (
            _NUMBER,
            Option("group", "count", "layers of a group", 3, word="group-layers", metavar="L"),
            _FUSION,
            _BLOCK,
            *_judge("clip"),
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

ENTRIES = (*_RECIPES, *_DECODER, *_ENCODER, *_PROJECTOR)
