"""Whether a checkpoint's weights are quantised, and by which method.

The tensors decide, not what config.json says: trainers leave `quantization_config` in checkpoints
whose weights were merged into floats. Modules that a method leaves out (`modules_to_not_convert`,
`ignore`) are stored in floating point, so those lists need not be read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchsieve.contract.errors import UnsupportedModelError
from patchsieve.export.source.awq import Awq
from patchsieve.export.source.compressed_tensors import CompressedTensors
from patchsieve.export.source.gptq import Gptq
from patchsieve.export.source.modelopt import ModelOpt
from patchsieve.export.source.packed import FLOATS, ORIGIN, Layout
from patchsieve.export.source.weight_files import read_json

_LOG = logging.getLogger(__name__)
_PARTS = ("text_config", "vision_config")
_ENTRIES = ("quantization_config", "compression_config")
# Files of older checkpoints, beside a config.json that says nothing, and whose they are.
SETTINGS = {
    "quantize_config.json": "gptq",  # AutoGPTQ
    "quant_config.json": "awq",  # AutoAWQ
    "hf_quant_config.json": "modelopt",
}
LAYOUTS: dict[str, type[Layout]] = {
    layout.method: layout for layout in (Awq, Gptq, CompressedTensors, ModelOpt)
}
# End of a tensor's name, which a quantised layer has beside its weight or in its place -> method.
_SIGNS = {
    ".weight.absmax": "bitsandbytes",
    ".weight.quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".g_idx": "gptq",
    ".qweight": "gptq or awq",
    ".qzeros": "gptq or awq",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "compressed-tensors",
    ".weight_scale_inv": "fp8",
    ".weight._data": "quanto",
    ".W_q": "hqq",
    ".codebooks": "aqlm",
}
_WAYS_OUT = {
    "bitsandbytes": "load it in transformers, call dequantize() and save_pretrained(), and give "
    f"the result; or {ORIGIN}",
}


@dataclass(frozen=True)
class Quantisation:
    """What a checkpoint says of its quantisation.

    Attributes:
        method: As it is named there.
        layout: How the matrices are stored; None if no matrix is quantised.
    """

    method: str
    layout: Layout | None = None


@dataclass(frozen=True)
class Quantised:
    """The quantised matrices of a checkpoint.

    Attributes:
        method: As the checkpoint names it.
        matrices: Their names, without ".weight", in the order of the files.
    """

    method: str
    matrices: tuple[str, ...]

    def sentence(self, exact: int, rounded: int, floats: int) -> str:
        """What an export made of them, for people.

        Args:
            exact: Matrices that keep each number in a format of few bits.
            rounded: Matrices that were rounded again.
            floats: Matrices that became floats, as their part is stored so.
        """
        counts = (
            (exact, "held exactly"),
            (rounded, "rounded again"),
            (floats, "stored in floating point"),
        )
        said = ", ".join(f"{count} {what}" for count, what in counts if count)
        return (
            f"{len(self.matrices)} matrices came quantised with {self.method}: {said or 'unused'}"
        )


def without_quantisation(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json's content without what it says of a quantisation."""
    plain = {key: value for key, value in config.items() if key not in _ENTRIES}
    for part in _PARTS:
        if isinstance(plain.get(part), dict):
            plain[part] = {k: v for k, v in plain[part].items() if k not in _ENTRIES}
    return plain


def quantisation_of(
    directory: Path, names: set[str], odd: Mapping[str, str]
) -> Quantisation | None:
    """How a checkpoint's weights are quantised; warns if its settings are wrong about them.

    Args:
        directory: The checkpoint.
        names: Its tensors.
        odd: Type of each tensor that is not stored in floating point.

    Returns:
        The method and the layout; None if nothing is said of a quantisation.

    Raises:
        UnsupportedModelError: They are quantised with a method that is not known.
    """
    said = list(_said(directory))
    weights = {name: dtype for name, dtype in odd.items() if name.endswith(".weight")}
    ends = _SIGNS.items()
    signs = {name: method for name in sorted(names) for end, method in ends if name.endswith(end)}
    # A scale beside a float weight counts only if the settings say what it is for.
    signs = {name: m for name, m in signs.items() if said or weights or _replaces(name, names)}
    if not (signs or (said and weights)):
        if not said:
            return None
        place, method, _ = said[0]
        _LOG.warning(
            "%s has a %s (%s), but the weights are stored in floating point: used as they are",
            directory,
            place,
            method,
        )
        return Quantisation(method)
    if said and said[0][1] in LAYOUTS:
        method, settings = said[0][1:]
        layout = LAYOUTS[method](settings)
        weights = {} if "weight" in layout.holders else weights
        signs = {name: m for name, m in signs.items() if not _belongs(name, names, odd, layout)}
        if not (signs or weights):
            return Quantisation(method, layout)
    method = said[0][1] if said else sorted(signs.values())[0]
    name, dtype = next(iter(weights.items()), (next(iter(signs), ""), "of this name"))
    raise UnsupportedModelError(
        f"the weights of {directory} are quantised with {method}",
        found=f"the tensor {name}, {dtype}" + ("" if said else ", and no quantization_config"),
        expected=f"floating point, or tensors and settings of {', '.join(LAYOUTS)}",
        do=_WAYS_OUT.get(method, ORIGIN),
    )


def matrices(types: Mapping[str, str], layout: Layout) -> dict[str, dict[str, str]]:
    """The quantised matrices: the names of their tensors, by their ends, by the matrix's name.

    Args:
        types: Type of each tensor, by the codes of safetensors.
        layout: How matrices are stored.
    """
    found: dict[str, dict[str, str]] = {}
    for name, code in types.items():
        matrix, _, end = name.rpartition(".")
        if end in layout.holders and (end != "weight" or code not in FLOATS):
            ends = {each: f"{matrix}.{each}" for each in layout.ends}
            found[matrix] = {each: full for each, full in ends.items() if full in types}
    return found


def _belongs(name: str, names: set[str], odd: Mapping[str, str], layout: Layout) -> bool:
    """Whether a tensor is part of a quantised matrix of a layout."""
    matrix, _, end = name.rpartition(".")
    holders = [f"{matrix}.{each}" for each in layout.holders]
    is_float = {each for each in holders if each.endswith(".weight") and each not in odd}
    return end in layout.ends and any(each in names - is_float for each in holders)


def _said(directory: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Each place where a checkpoint speaks of a quantisation, the method, and what it says."""
    path = directory / "config.json"
    config = read_json(path) if path.is_file() else {}
    parts = {part: config[part] for part in _PARTS if isinstance(config.get(part), dict)}
    is_said = False
    for place, part in {"config.json": config, **parts}.items():
        for entry in _ENTRIES:
            value = part.get(entry)
            if value:
                is_said = True
                name = entry if part is config else f"{place}.{entry}"
                settings = value if isinstance(value, dict) else {}
                yield f"{name} in {path.name}", _method(value), settings
    for file, method in SETTINGS.items():
        if not is_said and (directory / file).is_file():
            value = read_json(directory / file)
            inner = value.get("quantization")  # ModelOpt's
            settings = inner if isinstance(inner, dict) else value
            yield file, str(value.get("quant_method", method))[:40], settings


def _method(entry: Any) -> str:
    if not isinstance(entry, dict):
        return str(entry)[:40]
    if entry.get("load_in_4bit") or entry.get("load_in_8bit"):
        return "bitsandbytes"  # old entries of it name no method
    return str(entry.get("quant_method", "a method that it does not name"))[:40]


def _replaces(name: str, names: set[str]) -> bool:
    """Whether a quantised layer's tensor takes the place of its weight."""
    end = next(end for end in _SIGNS if name.endswith(end))
    return f"{name.removesuffix(end)}.weight" not in names
