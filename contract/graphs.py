"""Graphs and tensors as the manifest describes them."""

from __future__ import annotations

from dataclasses import dataclass

from patchsieve.contract import names

# Kinds of graphs.
VISION = "vision"
SCORER = "scorer"
STAGE = "stage"
STEP = "step"  # a stage that feeds a single row, on its own copy of the weights
DECISION = "decision"
COMPACT = "compact"


@dataclass(frozen=True)
class Tensor:
    """An input or output of a graph.

    Attributes:
        dtype: Its type, as ONNX spells it in lower case: float, float16, int64, bool, ...
        shape: Its lengths; an axis whose length changes has a name of `patchsieve.contract.names`.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Signature:
    """What a graph takes and gives."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    def input(self, name: str) -> Tensor | None:
        """The input of a name; None if the graph does not take it."""
        return next((tensor for tensor in self.inputs if tensor.name == name), None)

    def output(self, name: str) -> Tensor | None:
        """The output of a name; None if the graph does not give it."""
        return next((tensor for tensor in self.outputs if tensor.name == name), None)


@dataclass(frozen=True)
class Identity:
    """What a graph is, apart from its tensors.

    Attributes:
        kind: `VISION`, `SCORER`, `STAGE`, `STEP`, `DECISION` or `COMPACT`.
        plan: The plan that a decision or a vision graph belongs to; None for what all plans share.
        stage: Number of a stage.
        layer: Of a decision, the decoder layer that its survivors enter.
    """

    kind: str
    plan: str | None = None
    stage: int | None = None
    layer: int | None = None

    @property
    def is_large(self) -> bool:
        """It holds weights, and much of a request's time."""
        return self.kind in (VISION, SCORER, STAGE, STEP)


@dataclass(frozen=True)
class Graph(Signature):
    """One graph of a bundle, as most of its targets have it.

    Attributes:
        identity: What it is.
        weights: The weights files that it reads, by their paths in the bundle.
    """

    identity: Identity
    weights: tuple[str, ...]

    @property
    def kind(self) -> str:
        """`VISION`, `SCORER`, `STAGE`, `STEP`, `DECISION` or `COMPACT`."""
        return self.identity.kind


def identify(graph: str) -> Identity | None:
    """What the graph of a name is; None for a name that no version of ours gives."""
    whole = {names.VISION: VISION, names.SCORER: SCORER, names.COMPACT: COMPACT}
    if graph in whole:
        return Identity(whole[graph])
    kind, _, number = graph.partition("_")
    if kind in (STAGE, STEP) and _is_number(number):
        return Identity(kind, stage=int(number))
    first, _, rest = graph.partition(".")
    if first == names.VISION and rest:
        return Identity(VISION, plan=rest)
    plan, _, layer = rest.rpartition(".")
    if first == "decide" and plan and _is_number(layer):
        return Identity(DECISION, plan=plan, layer=int(layer))
    return None


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 8
