"""A graph whose weights are named by where they really lie.

ONNX Runtime and TensorRT look for external data in the model's own folder, and refuse, one or
another of their versions, names with `..` and files that are links. In a snapshot of the hub's
cache every file is a link. So the graph is read into memory, each `location` in it is rewritten to
the file that the link means, relative to the folder that holds them all, and the library is given
that folder.

onnx.proto is read here as far as that needs it; no field but `location` changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from patchsieve.contract.errors import BundleError
from patchsieve.contract.links import Place

Rename = Callable[[str], str]

_LENGTH_DELIMITED = 2
_FIXED = {1: 8, 5: 4}  # wire type -> bytes
# The fields of each message that lead to an entry of TensorProto.external_data [onnx.proto].
_LEADING = {
    "model": {7: "graph", 25: "function"},
    "function": {7: "node"},
    "graph": {1: "node", 5: "tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph"},
    "tensor": {13: "entry"},
}
_KEY, _VALUE = 1, 2  # of StringStringEntryProto
_DEEPEST = 64  # messages inside one another; graphs inside graphs are rare


def relocated(model: bytes, graph: str, place: Place) -> bytes:
    """A serialised graph whose weights are named relative to `place.root`, without links.

    Args:
        model: The graph.
        graph: Its file in the bundle, such as graphs/cpu.stage_0.onnx.
        place: Where the bundle lies.

    Raises:
        BundleError: The graph is damaged, or names a file that is not the bundle's.
    """
    folder = PurePosixPath(graph).parent

    def rename(location: str) -> str:
        pure = PurePosixPath(location)
        if pure.is_absolute() or ".." in pure.parts or not pure.parts or "\0" in location:
            raise BundleError(
                f"the graph {graph} reads a file outside the bundle", found=repr(location)[:120]
            )
        return place.file(str(folder / pure)).relative_to(place.root).as_posix()

    try:
        return _rewritten(model, "model", rename)
    except (IndexError, UnicodeDecodeError) as error:
        raise BundleError(
            f"the graph {graph} is damaged", found="no ONNX", do="export the bundle again"
        ) from error


def read_relocated(place: Place, graph: str) -> bytes:
    """Read a graph of a bundle and name its weights by where they lie."""
    path: Path = place.file(graph)
    try:
        return relocated(path.read_bytes(), graph, place)
    except OSError as error:
        raise BundleError(f"cannot read the bundle's file {graph}", found=error) from error


def _rewritten(message: bytes, kind: str, rename: Rename, depth: int = 0) -> bytes:
    if kind == "entry":
        return _entry(message, rename)
    if depth > _DEEPEST:
        raise IndexError("messages too deep")
    out = bytearray()
    for number, whole, content in _fields(message):
        inner = _LEADING[kind].get(number)
        if inner is None or content is None:
            out += whole
        else:
            changed = _rewritten(content, inner, rename, depth + 1)
            out += whole if changed == content else _field(number, changed)
    return bytes(out)


def _entry(message: bytes, rename: Rename) -> bytes:
    """A key and its value; the value of `location` is renamed."""
    texts = {number: content for number, _, content in _fields(message) if content is not None}
    if texts.get(_KEY) != b"location":
        return message
    value = rename(texts.get(_VALUE, b"").decode()).encode()
    return _field(_KEY, b"location") + _field(_VALUE, value)


def _fields(message: bytes) -> Iterator[tuple[int, bytes, bytes | None]]:
    """Each field: its number, all of its bytes, and its content where that has a length."""
    place = 0
    while place < len(message):
        start = place
        tag, place = _varint(message, place)
        wire, content = tag & 7, None
        if wire == 0:
            _, place = _varint(message, place)
        elif wire == _LENGTH_DELIMITED:
            size, place = _varint(message, place)
            content = message[place : place + size]
            place += size
        elif wire in _FIXED:
            place += _FIXED[wire]
        else:
            raise IndexError("unknown wire type")
        if place > len(message):
            raise IndexError("cut off")
        yield tag >> 3, message[start:place], content


def _varint(message: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place
        if shift > 63:
            raise IndexError("number too long")


def _field(number: int, content: bytes) -> bytes:
    return _number(number << 3 | _LENGTH_DELIMITED) + _number(len(content)) + content


def _number(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
