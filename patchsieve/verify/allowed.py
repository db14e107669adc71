"""What error a bundle's formats allow: of each part by the matrices that made it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from patchsieve.contract.formats import FORMATS
from patchsieve.contract.manifest import Manifest
from patchsieve.contract.weights import STEP
from patchsieve.export.weights import stored_weights
from patchsieve.verify.parts import TOLERANCE

_FIRST = ("q_proj", "k_proj", "v_proj")  # what reads a layer's rows as they come
_LAYER = re.compile(r"(.*layers\.\d+|multi_modal_projector)\.")


class Allowed:
    """Tolerances of own errors, by what a bundle's weights files hold.

    A row of `FORMATS` says the error that a matrix may make. What comes late in a layer holds the
    errors of the layer's matrices before it, for which the row leaves room.

    Args:
        facts: The bundle's manifest.
        locate: Where a file of the bundle lies.
    """

    def __init__(self, facts: Manifest, locate: Callable[[str], Path]) -> None:
        self.types = facts.precision
        self.formats: dict[tuple[bool, str], str] = {}  # of single rows' copy or not, and matrix
        for path, entry in facts.weights.items():
            for tensor in stored_weights(locate(path)):
                matrix, mark, form = tensor.partition(".weight.")
                if mark and form in FORMATS:
                    self.formats[entry.part == STEP.name, matrix] = form

    def product(self, matrix: str, *, is_step: bool = False) -> float:
        """Of what a matrix makes of its rows."""
        whole = _LAYER.match(matrix)
        if whole is None or matrix.endswith(_FIRST):
            return self._most([matrix], is_step)
        return self.layer(whole[0], is_step=is_step)

    def layer(self, prefix: str, *, is_step: bool = False) -> float:
        """Of a layer, whose matrices' names begin with a prefix."""
        inside = (name for copy, name in self.formats if copy == is_step)
        return self._most([prefix, *(n for n in inside if n.startswith(prefix))], is_step)

    def _most(self, names: Iterable[str], is_step: bool) -> float:
        names = list(names)
        kind = self.types.decoder
        if names[0].startswith(("vision_tower", "multi_modal_projector")):
            kind = self.types.tower
        elif names[0] == "lm_head":
            kind = self.types.head
        forms = (self.formats.get((is_step, name)) for name in names)
        return max(TOLERANCE[kind], *(FORMATS[form].error for form in forms if form), 0.0)
