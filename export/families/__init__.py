"""Model families, one file each. A family is found by the `model_type` of a config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from patchsieve.contract.errors import UnsupportedModelError
from patchsieve.export.families.family import Family
from patchsieve.export.families.llava import Llava

FAMILIES: dict[str, Family] = {family.model_type: family for family in (Llava(),)}


def family_of(config: Any) -> Family:
    """The family of a config that `read_config` or `Family.plain` gave."""
    return FAMILIES[config.model_type]


def check_structure(raw: Mapping[str, Any], where: Path | str = "this config.json") -> Family:
    """The family of a config.json's content, which names only structures that export knows.

    Args:
        raw: The content.
        where: The file, to be named in an error.

    Raises:
        UnsupportedModelError: A structure is not known; the error lists those that are.
    """
    found = raw.get("model_type")
    family = FAMILIES.get(found) if isinstance(found, str) else None
    if family is None:
        raise _unknown("model_type", found)
    for part, known in family.known_parts.items():
        content = raw.get(part, {})
        if not isinstance(content, Mapping):
            raise UnsupportedModelError(
                f"{where} is not well formed",
                found=f"{part} {content!r}"[:80],
                expected="an object",
                do="download the checkpoint again",
            )
        kind = content.get("model_type", family.default_types[part])
        if not isinstance(kind, str) or kind not in known:
            raise _unknown(part, kind)
    return family


def _unknown(part: str, found: Any) -> UnsupportedModelError:
    return UnsupportedModelError(
        "this checkpoint is not supported",
        found=f"{part} {found!r}"[:80],
        expected="; or ".join(map(str, FAMILIES.values())),
        do="give a checkpoint of one of these structures",
    )
