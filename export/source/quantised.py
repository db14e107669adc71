"""Whether a checkpoint's weights are quantised. The tensors decide, not what config.json says.

Trainers leave `quantization_config` in checkpoints whose weights were merged into floats.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from patchsieve.contract.errors import UnsupportedModelError
from patchsieve.export.source.weight_files import read_json

_LOG = logging.getLogger(__name__)
_PARTS = ("text_config", "vision_config")
_ENTRIES = ("quantization_config", "compression_config")
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
ORIGIN = "give the checkpoint that it was quantised from"
_WAYS_OUT = {
    "bitsandbytes": "load it in transformers, call dequantize() and save_pretrained(), and give "
    f"the result; or {ORIGIN}",
}


def without_quantisation(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json's content without what it says of a quantisation."""
    plain = {key: value for key, value in config.items() if key not in _ENTRIES}
    for part in _PARTS:
        if isinstance(plain.get(part), dict):
            plain[part] = {k: v for k, v in plain[part].items() if k not in _ENTRIES}
    return plain


def check_quantisation(directory: Path, names: set[str], odd: dict[str, str]) -> str | None:
    """Refuse weights that are quantised; say so if config.json is wrong about them.

    Args:
        directory: The checkpoint.
        names: Its tensors.
        odd: Type of each tensor that is not stored in floating point.

    Returns:
        The method that config.json names, None without.

    Raises:
        UnsupportedModelError: They are quantised.
    """
    path = directory / "config.json"
    said = list(_said(read_json(path))) if path.is_file() else []
    weights = {name: dtype for name, dtype in odd.items() if name.endswith(".weight")}
    signs = {
        name: method
        for name in sorted(names)
        for end, method in _SIGNS.items()
        if name.endswith(end)
    }
    # A scale beside a float weight counts only if config.json says what it is for.
    signs = {name: m for name, m in signs.items() if said or weights or _replaces(name, names)}
    if not (signs or (said and weights)):
        if not said:
            return None
        place, method = said[0]
        _LOG.warning(
            "%s has a %s (%s), but the weights are stored in floating point: used as they are",
            path,
            place,
            method,
        )
        return method
    method = said[0][1] if said else sorted(signs.values())[0]
    name, dtype = next(iter(weights.items()), (next(iter(signs), ""), "of this name"))
    raise UnsupportedModelError(
        f"the weights of {directory} are quantised with {method}",
        found=f"the tensor {name}, {dtype}",
        expected="weights in float32, float16 or bfloat16",
        do=_WAYS_OUT.get(method, ORIGIN),
    )


def _said(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Each place where a config.json speaks of a quantisation, and the method that it names."""
    parts = {part: config[part] for part in _PARTS if isinstance(config.get(part), dict)}
    for place, part in {"config.json": config, **parts}.items():
        for entry in _ENTRIES:
            value = part.get(entry)
            if value:
                name = entry if place == "config.json" else f"{place}.{entry}"
                yield name, _method(value)


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
