"""Papers and options that the entries of several methods name."""

from __future__ import annotations

import math

from patchsieve.contract.plan import CLS_SOURCES, TEXTS
from patchsieve.pruning.entry import Option

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

KEEP_RATIO = Option(
    "keep_ratio",
    "ratio",
    "fraction that is KEPT of the image's tokens that enter the decoder, halves rounded up; one "
    "number, or one per site",
    0.5,
    metavar="R",
    is_per_site=True,
)
NUM_KEEP = Option("num_keep", "count", "tokens that stay of an image", 64, metavar="N")
FUSIONS = ("rollout", "single", "mean", "max", "multiply")
FUSION = Option("fusion", "text", "how a group's layers become one score", "rollout", FUSIONS)
BLOCK = Option("block", "text", "rows of the maps in the decoder", "visual", ("visual", "prefix"))
IDENTITY_FIRST = Option(
    "identity_first", "flag", "add the identity in a group's lowest layer too", False, word=None
)
SCORE = Option(
    "score",
    "text",
    "rank patches by the class token's attention, or by cosine with it",
    "attention",
    ("attention", "cosine"),
)


def judge(text: str) -> tuple[Option, ...]:
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


def schedule(keep: str, group: str = "1", curve: str = "linear") -> tuple[Option, ...]:
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


PRUNED, GROUPED = "64 of 576", "120 of 576"
