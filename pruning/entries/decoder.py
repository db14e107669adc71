"""Entries of methods that prune inside the decoder."""

from __future__ import annotations

from dataclasses import replace

from patchsieve.pruning.entries.shared import (
    ATP,
    BLOCK,
    FASTV,
    FUSION,
    IDENTITY_FIRST,
    IVTP,
    KEEP_RATIO,
    NUM_KEEP,
    PYRAMIDDROP,
    SPARSEVLM,
    TOME,
    judge,
)
from patchsieve.pruning.entry import ADAPTS, DECODER, NUMBER, RATIO, Entry, Option, Published

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
    return replace(KEEP_RATIO, shown=shown)


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

IN_DECODER = (
    Entry(
        "random",
        DECODER,
        "patchsieve.pruning.decoder.random:Random",
        "keep tokens at random, the baseline that every score has to beat",
        RATIO,
        (KEEP_RATIO,),
        example={"sites": [2], "keep_ratio": 0.5},
        draws=True,
    ),
    Entry(
        "fastv",
        DECODER,
        "patchsieve.pruning.decoder.fastv:FastV",
        "keep the tokens that the text attends to most in the layer before the site",
        RATIO,
        (KEEP_RATIO, _ROWS),
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
                help=f"{KEEP_RATIO.help}; version 2 has {_SPARSEVLM_LISTS} of 576 tokens",
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
            NUM_KEEP,
            *judge("none"),
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
        (NUM_KEEP,),
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
            NUM_KEEP,
            Option("group", "count", "layers of the group that ends at the site", 3),
            FUSION,
            BLOCK,
            IDENTITY_FIRST,
        ),
        (IVTP,),
        judges={},
    ),
)
