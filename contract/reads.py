"""What a decision may read: the one table that export, runtime, `verify` and the tests go by.

A decision runs once per image, over the L rows that the stage before its site has made. Its method
names what it reads: tensors of TABLE by their names; `query.1` and `key.1` for the layer below the
one before the site, `query.2` for the next lower one; NEXT_LAYER for what the layer at the site
would make of the same rows. Whatever the method does not use is no input of its graph, and nobody
has to feed it. In a graph, layers have their numbers in the decoder: `query.7`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from patchsieve.contract import names

# Who gives a tensor.
STAGE = "stage"  # an output of the stage that ends at the site, or of one below
CACHE = "cache"  # the runtime's cache of a layer
HOST = "host"  # a fact that the host knows of the rows, the image or the plan

DECODER = "decoder"  # the type of the decoder's hidden rows and caches

# Lengths that are measures of the decoder, beside the axes whose length changes.
QUERIES = "num_heads * head_dim"
KV_HEADS = "num_kv_heads"
HEAD_DIM = "head_dim"
WIDTH = "hidden_size"
SECTIONS = "rotary_sections"  # no axis at all in a decoder without them

# A method's word for the queries and keys of the layer at the site. The graph computes them with
# that layer's own weights, from these two.
NEXT_LAYER = "next_layer"
NEXT_LAYER_READS = (names.HIDDEN, names.POSITION_IDS)


@dataclass(frozen=True)
class Read:
    """A tensor that a decision may read.

    Attributes:
        name: Of the graph's input.
        axes: A length, the name of an axis, or a measure of the decoder for each.
        dtype: ONNX's name for the type, or DECODER.
        source: Who gives it: STAGE, CACHE or HOST.
        has_lower: Layers below the one before the site give it too, as `{name}.{layer}`.
    """

    name: str
    axes: tuple[int | str, ...]
    dtype: str
    source: str = HOST
    has_lower: bool = False

    def shape(self, decoder: Mapping[str, Any]) -> tuple[int | str, ...]:
        """Lengths, and names of the axes whose length changes.

        Args:
            decoder: Its measures by the names of `manifest.TextModel`.
        """
        measures: dict[int | str, int] = {
            QUERIES: decoder["num_heads"] * decoder["head_dim"],
            SECTIONS: len(decoder["rotary_sections"]),
        }
        measures |= {name: decoder[name] for name in (KV_HEADS, HEAD_DIM, WIDTH)}
        return tuple(length for axis in self.axes if (length := measures.get(axis, axis)))


ROWS, SLOTS, VISUAL, TEXT = names.AXIS_ROWS, names.AXIS_SLOTS, names.AXIS_VISUAL, names.AXIS_TEXT
_CACHE = (1, KV_HEADS, SLOTS, HEAD_DIM)

# In the order of a graph's inputs.
TABLE = {
    read.name: read
    for read in (
        Read(names.QUERY, (1, ROWS, QUERIES), DECODER, STAGE, has_lower=True),
        Read(names.KEY, _CACHE, DECODER, CACHE, has_lower=True),
        Read(names.VALUE, _CACHE, DECODER, CACHE),
        Read(names.SLOT, (1,), "int64"),
        Read(names.VISUAL_ROWS, (VISUAL,), "int64"),
        Read(names.TEXT_ROWS, (TEXT,), "int64"),
        Read(names.PATCH_IDS, (VISUAL,), "int64"),
        Read(names.SIDE_ROW, (1,), "int64"),
        Read(names.LAST_ROW, (1,), "int64"),
        Read(names.KEEP, (ROWS,), "bool"),
        Read(names.BUDGET, (1,), "int64"),
        Read(names.NOISE, (1, VISUAL), "float32"),
        Read(names.HIDDEN, (1, ROWS, WIDTH), DECODER, STAGE),
        Read(names.SIZES, (VISUAL,), "float32"),
        Read(names.POSITION_IDS, (ROWS, SECTIONS), "int64"),
        Read(names.EMBEDDINGS, (1, ROWS, WIDTH), DECODER),
    )
}


class Named(NamedTuple):
    """What an input's name says: the row of the table, and which layer's it is."""

    read: Read
    layer: int | None  # None for the layer before the site, and where no layer gives it


def named(name: str) -> Named | None:
    """Read the name of a decision's input; None if no decision may read it."""
    what, dot, layer = name.partition(".")
    read = TABLE.get(what)
    if read is None or (dot and not (read.has_lower and layer.isdecimal())):
        return None
    return Named(read, int(layer) if dot else None)


def inputs(below: Sequence[int] = ()) -> dict[str, Read]:
    """Every input that a decision may have, by name.

    Args:
        below: Layers that it reads beside the one before the site, the nearest first.
    """
    lower = {f"{read.name}.{k}": read for read in TABLE.values() if read.has_lower for k in below}
    top = {name: TABLE[name] for name in (names.QUERY, names.KEY, names.VALUE)}
    return top | lower | TABLE


def depths(words: Iterable[str]) -> list[int]:
    """How many layers below the one before the site a method's words reach, ascending, each once.

    0 is the layer before the site itself.
    """
    parts = (word.partition(".") for word in words)
    layered = {int(k or 0) for what, _, k in parts if what in TABLE and TABLE[what].has_lower}
    return sorted(layered)
