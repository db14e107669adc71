"""The tests' table of methods, and the rule by which two decisions count as the same."""

import numpy as np
import torch

from patchsieve.pruning.catalogue import entry
from patchsieve.pruning.decoder.atp import ATP
from patchsieve.pruning.decoder.fastv import FastV
from patchsieve.pruning.decoder.ivtp import IVTP
from patchsieve.pruning.decoder.random import Random
from patchsieve.pruning.decoder.sparsevlm import SparseVLM
from patchsieve.pruning.decoder.thresholds import ConstantThresholds, Thresholds
from patchsieve.pruning.decoder.tome import DecoderToMe
from patchsieve.pruning.decoder.topk import DecoderTopK
from patchsieve.pruning.entry import DECODER, NUMBER, RATIO
from patchsieve.pruning.table import METHODS

# Scores closer than this may swap between backends and precisions.
NEAR = 1e-6


def learned(grid=(6, 6), activation=None, seed=0):
    """Make a threshold module whose weights are large enough to tell instances apart."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = Thresholds(hidden=16, grid=grid, activation=activation)
        with torch.no_grad():
            for name, value in module.named_parameters():
                value.mul_(3.0 if "weight" in name else 0.2)
    return module.requires_grad_(False)


CASES = {
    "random": Random(0.5),
    "fastv last": FastV(0.4),
    "fastv mean": FastV(0.25, rows="mean"),
    "fastv all": FastV(0.4, rows="all"),
    "atp": ATP(),
    "atp strict": ATP(ConstantThresholds(0.8, 0.9)),
    "atp nothing passes": ATP(ConstantThresholds(1.5, 1.5)),
    "atp causal": ATP(causal=True, granularities=(3, 6)),
    "atp rank": ATP(normalisation="rank"),
    "atp softmax": ATP(ConstantThresholds(0.4, 0.9), normalisation="softmax"),
    "atp as printed": ATP(ConstantThresholds(0.0, 0.9), normalisation="none"),
    "atp by the self score": ATP(modality="self"),
    "atp by the cross score": ATP(learned(), normalisation="rank", modality="cross"),
    "atp learned": ATP(learned()),
    "atp learned, redundant pruning alone": ATP(learned(), parts="redundant"),
    "atp learned, spatial pruning alone": ATP(learned(), parts="spatial"),
    "atp learned on another grid": ATP(learned((5, 7), "relu"), causal=True),
    "ivtp": IVTP(7),
    "ivtp prefix": IVTP(7, block="prefix"),
    "ivtp of two layers": IVTP(5, group=2, identity_first=True),
    "ivtp single": IVTP(9, fusion="single"),
    "ivtp mean": IVTP(6, fusion="mean"),
    "ivtp max": IVTP(6, group=2, fusion="max", block="prefix"),
    "ivtp multiply": IVTP(6, fusion="multiply"),
    "topk cls": DecoderTopK(6),
    "topk last": DecoderTopK(8, row="last"),
    "tome": DecoderToMe(13),
    "sparsevlm": SparseVLM(0.4),
    "sparsevlm all heads": SparseVLM(0.3, over_heads="all"),
}

# A method without a row of its own is tried as it is.
CASES |= {
    name: kind() for name, kind in METHODS.items() if name not in {c.name for c in CASES.values()}
}

# The same methods with options that drop nothing.
ALL = {RATIO: {"keep_ratio": 1.0}, NUMBER: {"num_keep": 999}}
KEEP_ALL = {
    name: kind(**ALL[entry(DECODER, name).leaves])
    for name, kind in METHODS.items()
    if entry(DECODER, name).leaves in ALL
}
KEEP_ALL |= {"atp": ATP(ConstantThresholds(-1.0, 0.5))}


def assert_same_choice(keep, expected, scores):
    """Demand equal masks [B, N], or survivors that differ by less than `NEAR` in score.

    Returns:
        How many tokens differ.
    """
    for row, want, values in zip(keep, expected, scores, strict=True):
        differs = row != want
        if differs.any() and row.sum() == want.sum():
            assert np.ptp(values[differs]) < NEAR  # tied at the cut
        elif differs.any():
            assert np.abs(values[differs]).max() < NEAR  # on the threshold
    return int((keep != expected).sum())
