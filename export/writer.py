"""Write one traced graph for each target, checked, and describe its tensors for the manifest."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from patchsieve.contract import names
from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.external_data import relocated
from patchsieve.contract.links import locate
from patchsieve.contract.manifest import Tensors
from patchsieve.export import operators
from patchsieve.export.lowering import lower, lowering
from patchsieve.export.lowering.base import dtype_of, shape_of
from patchsieve.export.weights import DIRECTORY


class GraphWriter:
    """The graphs' folder of a bundle.

    Args:
        folder: `graphs/` of the bundle.
        targets: For which each graph is written.
        attention: How half-precision attention is spelt, one of `names.ATTENTION_FORMS`.

    Attributes:
        tensors: Inputs and outputs of each graph written, as the manifest lists them.
        target_tensors: The same for the targets and graphs whose own are others.
        seconds: Time spent on each target's graphs, the tracing that all share apart.
        written: Every file that stands, so that a failure can take it back.
    """

    def __init__(
        self, folder: Path, targets: tuple[str, ...], attention: str = names.DECOMPOSED
    ) -> None:
        self.folder, self.attention = folder, attention
        self.lowerings = [lowering(target) for target in targets]
        self.tensors: Tensors = {}
        self.target_tensors: dict[str, Tensors] = {}
        self.seconds = dict.fromkeys(targets, 0.0)
        self.written: list[Path] = []

    def save(
        self, name: str, traced: ir.Model, *, slots: int | None = None, fresh: bool = False
    ) -> dict[str, str]:
        """Lower a graph for every target and write it.

        Args:
            name: The graph's name.
            traced: What `trace` returned, bound to stored weights.
            slots: Length of the caches for targets that want a number.
            fresh: Never write over a file that is there.

        Returns:
            For each target the file, relative to the bundle.
        """
        self.tensors[name] = _describe(traced.graph)
        paths = {}
        for target in self.lowerings:
            start = time.perf_counter()
            path = self.folder / f"{target.name}.{name}.onnx"
            generation = 1
            while fresh and path.exists():
                generation += 1
                path = self.folder / f"{target.name}.{name}.{generation}.onnx"
            lowered = lower(traced, target, slots, self.attention)
            own = _describe(lowered.graph)
            if own != self.tensors[name]:
                self.target_tensors.setdefault(target.name, {})[name] = own
            model = ir.to_proto(lowered)
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            try:
                temporary.write_bytes(model.SerializeToString())
                self._check(temporary)
                _check_operators(name, model, target.operators)
                self.written.append(path)  # first: an interrupt may come right behind the rename
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
            paths[target.name] = f"{self.folder.name}/{path.name}"
            self.seconds[target.name] += time.perf_counter() - start
        return paths

    def _check(self, file: Path) -> None:
        """Let onnx check a graph; it takes no weights that are links, as the hub's cache has."""
        if not any(path.is_symlink() for path in (self.folder / DIRECTORY).glob("*")):
            onnx.checker.check_model(str(file))
            return
        place = locate(self.folder.parent)
        seen = place.root / file.name
        content = relocated(file.read_bytes(), f"{self.folder.name}/{file.name}", place)
        try:
            seen.write_bytes(content)
            onnx.checker.check_model(str(seen))
        finally:
            seen.unlink(missing_ok=True)


def _check_operators(name: str, model: onnx.ModelProto, table: str | None) -> None:
    """Refuse here what a board's parser would refuse later."""
    if table is None:
        return
    taken = operators.load(table)
    found = operators.problems(model, taken)
    if found:
        more = f", and {len(found) - 1} more" if len(found) > 1 else ""
        raise PatchsieveError(
            f"the graph {name} holds what {taken.library} does not take",
            found=found[0] + more,
            expected=f"operators of patchsieve/export/operators/{table}.json",
            do="leave this target or this method out, and report it",
        )


def _describe(graph: ir.Graph) -> dict[str, list[dict[str, Any]]]:
    return {
        "inputs": [_tensor(value) for value in graph.inputs],
        "outputs": [_tensor(value) for value in graph.outputs],
    }


def _tensor(value: ir.Value) -> dict[str, Any]:
    return {
        "name": value.name,
        "dtype": dtype_of(value).name.lower(),
        "shape": [axis if isinstance(axis, int) else str(axis.value) for axis in shape_of(value)],
    }
