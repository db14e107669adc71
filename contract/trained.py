"""What a checkpoint says of its training: the entry `patchsieve` of its config.json.

    "patchsieve": {"position_rule": "grid2d", "rotary_sections": [16, 24, 24], "heads": "heads"}

A checkpoint without the entry was trained with positions in a row, as every plain one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any

from patchsieve.contract.errors import UnsupportedModelError
from patchsieve.contract.plan import GRID2D, TRAINED_RULES

KEY = "patchsieve"
LAYOUTS = ("mrope", "2d")


@dataclass(frozen=True)
class Trained:
    """How a language model was trained.

    Attributes:
        position_rule: How its rows were numbered: "original" or "grid2d".
        rotary_sections: With "grid2d", how many of the D / 2 rotary frequencies turn by each axis,
            the fastest first: time, row and column, or row and column.
        heads: Folder of the checkpoint that holds ATP's thresholds; None without.
    """

    position_rule: str = TRAINED_RULES[0]
    rotary_sections: tuple[int, ...] = ()
    heads: str | None = None

    @classmethod
    def of(cls, config: Any) -> Trained:
        """What a Hugging Face config says.

        Args:
            config: Config of the whole model; `text_config` gives the width of the heads.

        Raises:
            UnsupportedModelError: The entry is damaged, or of a later patchsieve.
        """
        entry = getattr(config, KEY, None)
        if entry is None:
            return cls()
        text = config.text_config
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        if not isinstance(entry, dict) or set(entry) - set(cls.__dataclass_fields__):
            raise _refused(entry, "an object with position_rule, rotary_sections and heads")
        rule, parts = entry.get("position_rule", "original"), entry.get("rotary_sections") or []
        if rule not in TRAINED_RULES:
            raise _refused(rule, " or ".join(TRAINED_RULES))
        if not isinstance(parts, list) or not are_sections(parts, width, rule == GRID2D):
            raise _refused(parts, f"2 or 3 numbers whose sum is {width // 2}, with grid2d alone")
        heads = entry.get("heads")
        if heads is not None and not _is_folder(heads):
            raise _refused(heads, "a folder of the checkpoint")
        return cls(rule, tuple(parts), heads)

    def to_dict(self) -> dict[str, Any]:
        """The entry as JSON holds it."""
        return asdict(self) | {"rotary_sections": list(self.rotary_sections)}


def sections(head_dim: int, layout: str = "mrope") -> tuple[int, ...]:
    """Rotary frequencies of each axis for heads of a width.

    "mrope" is Qwen2-VL's: of 64 frequencies 16 turn by time, 24 by row, 24 by column. Of another
    number n, row and column take 3 n / 8 each, rounded down, and time the rest. "2d" is row and
    column alone, half each; the odd one is the row's.

    Args:
        head_dim: D.
        layout: "mrope" or "2d".

    Raises:
        UnsupportedModelError: The heads are too narrow.
    """
    count = head_dim // 2
    if layout == "2d":
        found: tuple[int, ...] = (count - count // 2, count // 2)
    else:
        side = 3 * count // 8
        found = (count - 2 * side, side, side)
    if min(found) < 1:
        raise UnsupportedModelError(
            "the heads are too narrow for two-dimensional positions",
            found=f"{head_dim} wide",
            expected="8 or more",
            do="train with --positions original",
        )
    return found


def are_sections(parts: Any, head_dim: int, is_grid: bool) -> bool:
    """Whether numbers divide the frequencies of a head; there are none without a grid."""
    if not is_grid:
        return not parts
    is_whole = all(type(part) is int and part > 0 for part in parts)
    return is_whole and len(parts) in (2, 3) and sum(parts) == head_dim // 2


def _is_folder(name: Any) -> bool:
    return isinstance(name, str) and len(PurePosixPath(name).parts) == 1 and name not in ("..", "/")


def _refused(found: Any, expected: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the entry {KEY} of the checkpoint's config.json cannot be used",
        found=repr(found)[:80],
        expected=expected,
        do="train the checkpoint again, or upgrade patchsieve",
    )
