"""Bytes by part and format of the weights files that a bundle really has, from their headers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from patchsieve.contract import links
from patchsieve.contract.errors import BundleError
from patchsieve.contract.formats import FLOAT, FORMATS
from patchsieve.contract.manifest import Manifest
from patchsieve.contract.sizes import PROJECTOR_LABEL, PROJECTOR_PREFIX, Share, merged
from patchsieve.contract.weights import HEAD, PARTS

_LARGEST_HEADER = 1 << 24  # bytes
_BESIDE = (".scale", ".whole", ".input")  # after a matrix's name: what belongs to its numbers
Tensors = dict[str, dict[str, Any]]


def shares(bundle: Path, facts: Manifest) -> list[Share]:
    """Bytes of each part and format.

    Args:
        bundle: The directory.
        facts: Its manifest.

    Raises:
        BundleError: A weights file is not there or has no header.
    """
    place = links.locate(bundle)
    found: list[Share] = []
    for path, entry in facts.weights.items():
        label = PARTS[entry.part].label
        for name, form, count in _tensors(header(place.file(path))):
            is_projector = name.startswith(PROJECTOR_PREFIX)
            found.append(Share(PROJECTOR_LABEL if is_projector else label, entry.type, form, count))
    return merged(found)


def has_own_head(bundle: Path, facts: Manifest) -> bool:
    """Whether a bundle stores its output matrix apart from the table of embeddings."""
    file = links.locate(bundle).file(HEAD.path())
    return any(name.startswith("lm_head.") for name in header(file))


def header(path: Path) -> Tensors:
    """The tensors that a safetensors file begins with: their types, shapes and places.

    Raises:
        BundleError: It is not there, or is no such file.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            found = json.loads(file.read(min(length, _LARGEST_HEADER)))
        found.pop("__metadata__", None)
        for entry in found.values():
            start, end = entry["data_offsets"]
            if not 0 <= start <= end:
                raise ValueError(f"a tensor from {start} to {end}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(
            f"cannot read the tensors of {path}",
            found=error,
            expected="a weights file (safetensors)",
            do="copy or export the bundle again",
        ) from error
    return found  # type: ignore[no-any-return]


def _tensors(found: Tensors) -> Iterator[tuple[str, str, int]]:
    """Each tensor's name, the format that it belongs to, its bytes."""
    packed = dict(name.rsplit(".", 1) for name in found if name.rsplit(".", 1)[-1] in FORMATS)
    for name, entry in found.items():
        start, end = entry["data_offsets"]
        matrix, _, last = name.rpartition(".")
        is_packed = last in FORMATS or name.endswith(_BESIDE)
        yield name, packed.get(matrix, FLOAT) if is_packed else FLOAT, end - start
