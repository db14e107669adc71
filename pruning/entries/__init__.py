"""The entries of the catalogue: one for each method and place, without torch.

To add a method, write its class in a file of its own and its entry in the file of its place.
Options of `export`, `cost` and `calibrate`, their checks, the cost model, the README's table and
docs/methods.md come from the entries.
"""

from __future__ import annotations

from patchsieve.pruning.entries.decoder import IN_DECODER
from patchsieve.pruning.entries.projector import AFTER_TOWER
from patchsieve.pruning.entries.recipes import RECIPES
from patchsieve.pruning.entries.tower import IN_TOWER

ENTRIES = (*RECIPES, *IN_DECODER, *IN_TOWER, *AFTER_TOWER)
