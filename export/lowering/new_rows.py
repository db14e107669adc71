"""Caches as past rows in and new rows out, where no operator updates a cache in place.

`patchsieve.contract.names` describes the form: the heads of a row lie side by side, the past is a
view of the first P rows of a buffer, and the rows that follow them are an output of their own.
"""

from __future__ import annotations

import onnx_ir as ir

from patchsieve.contract import names
from patchsieve.export.graphs import ops
from patchsieve.export.lowering.base import Lowering, length_of, shape_of


class NewRows(Lowering):
    """Turns every input that is shaped as a cache, [1, G, S, D], into rows, [1, P, G * D].

    What attends over a cache and writes to it takes the rows as they are, and returns the new ones
    in the place of the caches; whatever else reads a cache reads a view of the rows by heads.
    """

    def run(self) -> None:
        """Replace the caches, then every open node."""
        for value in self.graph.inputs:
            shape = shape_of(value)
            if len(shape) == 4 and str(shape[2]) == names.AXIS_SLOTS:
                self._as_rows(value, length_of(value, 1), length_of(value, 3))
        super().run()
        for value in self.graph.outputs:
            name = value.name or ""
            if name.endswith(names.OUT):
                cache = name.removesuffix(names.OUT)
                value.name = cache + names.NEW
                width = length_of(self.inputs[cache], 2)
                value.shape = ir.Shape([1, names.AXIS_ROWS, width])

    def present(self, past: ir.Value, new: ir.Value) -> ir.Value:
        """Past and new rows, [1, P + L, G * D]."""
        return self.op("Concat", past, new, axis=1)

    def new_rows_mask(self, past: ir.Value, dtype: ir.DataType) -> ir.Value:
        """What each new row sees of past and new rows, [1, 1, L, P + L]."""
        num_past = self.op("Shape", past, start=1, end=2)
        num_new = self.op("Shape", self.inputs[names.LAST_KEY])
        present = self.op("Squeeze", self.op("Add", num_past, num_new), self.constant([0]))
        return self.additive_mask(present, dtype)

    def _as_rows(self, value: ir.Value, num_heads: int, head_dim: int) -> None:
        uses = value.uses()
        is_written = all(use.node.domain == ops.DOMAIN for use in uses)
        axis = names.AXIS_PAST if is_written else names.AXIS_PRESENT
        value.shape = ir.Shape([1, axis, num_heads * head_dim])
        if not is_written:
            heads = self.once(f"heads.{value.name}", lambda: self.split_heads(value, num_heads))
            for use in uses:
                use.node.replace_input_with(use.idx, heads)
