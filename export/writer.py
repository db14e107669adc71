"""Write one traced graph for each target, checked, and describe it for the manifest."""

from __future__ import annotations

import os
import time
from pathlib import Path

import onnx
import onnx_ir as ir

from patchsieve.contract import names
from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.external_data import relocated
from patchsieve.contract.graphs import Graph, Signature, Tensor, identify
from patchsieve.contract.links import locate
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
        graphs: Each graph written, as the manifest describes it.
        target_graphs: What graphs of a target take and give where they depart from that.
        paths: For each target the file of each graph, relative to the bundle.
        seconds: Time spent on each target's graphs, the tracing that all share apart.
        written: Every file that is in place, so that a failure can take it back.
    """

    def __init__(
        self, folder: Path, targets: tuple[str, ...], attention: str = names.DECOMPOSED
    ) -> None:
        self.folder, self.attention = folder, attention
        self.lowerings = [lowering(target) for target in targets]
        self.graphs: dict[str, Graph] = {}
        self.target_graphs: dict[str, dict[str, Signature]] = {}
        self.paths: dict[str, dict[str, str]] = {target: {} for target in targets}
        self.seconds = dict.fromkeys(targets, 0.0)
        self.written: list[Path] = []

    def save(
        self, name: str, traced: ir.Model, *, slots: int | None = None, fresh: bool = False
    ) -> None:
        """Lower a graph for every target and write it.

        Args:
            name: The graph's name.
            traced: What `trace` returned, bound to stored weights.
            slots: Length of the caches for targets that want a number.
            fresh: Never write over a file that is there.
        """
        identity, common = identify(name), _signature(traced.graph)
        assert identity is not None, name
        self.graphs[name] = Graph(common.inputs, common.outputs, identity, _weights(traced.graph))
        for target in self.lowerings:
            row, start = target.target, time.perf_counter()
            path = self.folder / f"{row.name}.{name}.onnx"
            generation = 1
            while fresh and path.exists():
                generation += 1
                path = self.folder / f"{row.name}.{name}.{generation}.onnx"
            lowered = lower(traced, target, slots, self.attention)
            own = _signature(lowered.graph)
            if own != common:
                self.target_graphs.setdefault(row.name, {})[name] = own
            model = ir.to_proto(lowered)
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            try:
                temporary.write_bytes(model.SerializeToString())
                self._check(temporary)
                _check_operators(name, model, row.operators)
                self.written.append(path)  # first: an interrupt may come right after the rename
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
            self.paths[row.name][name] = f"{self.folder.name}/{path.name}"
            self.seconds[row.name] += time.perf_counter() - start

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


def _signature(graph: ir.Graph) -> Signature:
    return Signature(tuple(map(_tensor, graph.inputs)), tuple(map(_tensor, graph.outputs)))


def _tensor(value: ir.Value) -> Tensor:
    axes = (axis if isinstance(axis, int) else str(axis.value) for axis in shape_of(value))
    return Tensor(str(value.name), dtype_of(value).name.lower(), tuple(axes))


def _weights(graph: ir.Graph) -> tuple[str, ...]:
    """The weights files that a graph reads, in the order of its initializers."""
    stored = (value.const_value for value in graph.initializers.values())
    read = (each.location for each in stored if isinstance(each, ir.ExternalTensor))
    return tuple(dict.fromkeys(f"graphs/{location}" for location in read))
