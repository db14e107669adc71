"""Answer one request under each plan of a bundle, and print the peak memory of this process.

    python -m benchmarks.precision.peak BUNDLE SIDE TEXT

It imports what a board imports: no torch.
"""

from __future__ import annotations

import sys

import numpy as np

from benchmarks.peak_memory import peak_memory
from patchsieve.runtime.model import Model

THREADS, NEW_TOKENS = 2, 32


def main() -> None:
    """Answer; the picture is noise of SIDE x SIDE pixels."""
    bundle, side, text = sys.argv[1:]
    model = Model(bundle, threads=THREADS, check="size")
    image = np.random.default_rng(0).integers(0, 256, (int(side), int(side), 3), np.uint8)
    for plan in model.facts.plans:
        model.generate(image, text, plan=plan, max_new_tokens=NEW_TOKENS, ignore_eos=True, stop=())
    print(peak_memory() or 0)


if __name__ == "__main__":
    main()
