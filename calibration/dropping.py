"""Hard masks at the price of what they leave: rows that fell are taken out of the decoder's rows.

Hugging Face's decoder runs its layers itself, so hooks shorten what a layer is given, and lengthen
what the decoder returns: rows that fell are zero there. Nothing is renumbered.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from patchsieve.calibration.attention import PASS
from patchsieve.calibration.passes import PruningPass

_KERNELS = ("eager", "sdpa")  # those that take any mask


def can_drop(kernel: str) -> bool:
    """Whether an attention, by its name, can be given fewer rows."""
    return kernel.endswith(_KERNELS)


def install(language_model: Any) -> None:
    """Let a decoder look for a pruning pass that drops rows among its keywords."""
    for layer in language_model.layers:
        layer.register_forward_pre_hook(_shorten, with_kwargs=True)
    language_model.register_forward_hook(_lengthen, with_kwargs=True)


def _shorten(
    layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Give a layer the rows that are left: hidden states, mask and rotary angles."""
    pruning: PruningPass | None = named.get(PASS)
    number: int = layer.self_attn.layer_idx  # type: ignore[union-attr, assignment]
    rows = None if pruning is None else pruning.rows(number)  # [B, R], L for padding
    if pruning is None or rows is None:
        return None
    hidden, *others = given
    if number in pruning.sites:
        before = pruning.rows(number - 1)
        places = rows if before is None else torch.searchsorted(before, rows)
        hidden = _take(hidden, places)
    angles = [_take(part.expand(len(rows), -1, -1), rows) for part in named["position_embeddings"]]
    mask = _mask(named.get("attention_mask"), rows, pruning.present.shape[1])
    changed = {"attention_mask": mask, "position_embeddings": tuple(angles), "position_ids": None}
    return (hidden, *others), named | changed


def _lengthen(model: nn.Module, given: Any, named: dict[str, Any], out: Any) -> None:
    """Put the rows that are left back in their places."""
    pruning: PruningPass | None = named.get(PASS)
    rows = None if pruning is None else pruning.rows(len(model.layers) - 1)  # type: ignore[arg-type]
    if pruning is not None and rows is not None:
        hidden = out.last_hidden_state  # [B, R, C]
        batch, length = pruning.present.shape
        whole = hidden.new_zeros(batch, length + 1, hidden.shape[-1])
        where = rows[:, :, None].expand(hidden.shape)
        out.last_hidden_state = whole.scatter(1, where, hidden)[:, :length]


def _take(values: Tensor, rows: Tensor) -> Tensor:
    """Rows [B, R] of [B, L, C]; padding takes the last."""
    rows = rows.clamp(max=values.shape[1] - 1)
    return values.gather(1, rows[:, :, None].expand(-1, -1, values.shape[-1]))


def _mask(mask: Tensor | None, rows: Tensor, length: int) -> Tensor:
    """The rows and columns that are left of a mask [B, 1, L, L]; None was a causal one."""
    if mask is None:
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=rows.device).tril()
    width, inside = rows.shape[1], rows.clamp(max=length - 1)
    mask = mask.expand(len(rows), -1, -1, -1)
    mask = mask.gather(2, inside[:, None, :, None].expand(-1, mask.shape[1], -1, length))
    mask = mask.gather(3, inside[:, None, None, :].expand(-1, mask.shape[1], width, -1))
    never = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return mask.masked_fill((rows == length)[:, None, None], never)
