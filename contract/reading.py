"""Read a dataclass from JSON by its annotations: a value of another type is refused in one line."""

from __future__ import annotations

import types
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from patchsieve.contract.errors import BundleError

_LARGEST = 1 << 53  # whole numbers up to here survive every JSON reader
_SHOWN = 60  # characters of a value that an error repeats


def read_as(kind: Any, value: Any, where: str) -> Any:
    """Turn a JSON value into `kind`, refusing what does not fit.

    Args:
        kind: A dataclass, int, float, bool, str, Any, a tuple, list, dict or union of them.
        value: What json.loads gave.
        where: What the value is called in an error.

    Raises:
        BundleError: The value has another type, or a number lies outside 0 to 2^53.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if is_dataclass(kind):
        return _record(kind, value, where)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        parts = [part for part in inner if part is not type(None)]
        fitting = next((part for part in parts if type(value) is part), parts[0])
        return read_as(fitting, value, where)
    if origin is dict and isinstance(value, dict):
        return {key: read_as(inner[1], part, f"{where}.{key}") for key, part in value.items()}
    if origin is list and isinstance(value, list):
        return [read_as(inner[0], part, f"{where}[{i}]") for i, part in enumerate(value)]
    if origin is tuple and isinstance(value, list):
        kinds = (inner[0],) * len(value) if inner[1:] == (Ellipsis,) else inner
        if len(kinds) == len(value):
            pairs = enumerate(zip(kinds, value, strict=True))
            return tuple(read_as(part, one, f"{where}[{i}]") for i, (part, one) in pairs)
    if kind is str and isinstance(value, str) and _is_unicode(value):
        return value
    if kind is int and type(value) is int and 0 <= value < _LARGEST:
        return value
    if kind is float and type(value) in (int, float) and 0 <= value < _LARGEST:  # nor NaN
        return float(value)
    if kind is bool and type(value) is bool:
        return value
    raise _misfit(where, value, _spelt(kind))


def _record(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _misfit(where, value, "an object")
    hints = get_type_hints(kind)
    wanted = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
    missing, unknown = sorted(wanted - set(value)), sorted(set(value) - set(hints))
    if missing or unknown:
        raise BundleError(
            f"{where} is not well formed",
            found="; ".join(
                f"{word} {', '.join(names)[:_SHOWN]}"
                for word, names in (("no", missing), ("unknown", unknown))
                if names
            ),
            expected=", ".join(sorted(hints)),
        )
    return kind(**{k: read_as(hints[k], v, f"{where}.{k}") for k, v in value.items()})


def _is_unicode(text: str) -> bool:
    """JSON can spell half a surrogate pair, which no file and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _misfit(where: str, value: Any, expected: str) -> BundleError:
    # A number of thousands of digits has no decimal form.
    found = "a huge number" if isinstance(value, int) and abs(value) > _LARGEST else repr(value)
    return BundleError(f"{where[:200]} is not well formed", found=found[:_SHOWN], expected=expected)


def _spelt(kind: Any) -> str:
    names = {
        int: "a whole number of at least 0",
        float: "a number of at least 0",
        bool: "true or false",
        str: "a text",
        dict: "an object",
    }
    return names.get(kind) or names.get(get_origin(kind)) or "a list of the right length"
