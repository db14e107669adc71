"""The checkpoint's parts on the rows that the bundle fed to its own: errors that do not add up.

Rounding to int8 and int4 makes an error in every matrix, and a later layer works on the sum of
all. So a layer is compared on the bundle's rows before it: what it makes of them differs by its own
rounding only, as small in the last layer as in the first, and a defect shows where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from patchsieve.verify.reference import Reference

TOWER_LAYER = "vision_tower.encoder.layers."


@dataclass
class Made:
    """What a layer of the checkpoint makes of the bundle's rows.

    Attributes:
        fed: The rows, [B, L, C].
        hidden: The rows after it, [B, L, C].
        query: Rotated queries of a decoder layer, heads side by side, [1, L, H * D].
        key: Its rotated keys, [1, G, L, D].
        value: Its values, [1, G, L, D].
        products: What each of its matrices makes of its rows, without a bias, by the matrix's name.
    """

    fed: np.ndarray
    hidden: np.ndarray
    query: np.ndarray | None = None
    key: np.ndarray | None = None
    value: np.ndarray | None = None
    products: dict[str, np.ndarray] = field(default_factory=dict)


class Own:
    """The checkpoint's layers, each by itself.

    Args:
        reference: The checkpoint in Hugging Face.
    """

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        named = ((_name(reference, name), each) for name, each in reference.model.named_modules())
        self.modules = dict(named)

    @torch.no_grad()
    def vision(
        self, pixel_values: np.ndarray, rows: Sequence[np.ndarray]
    ) -> tuple[list[Made], np.ndarray, dict[str, np.ndarray]]:
        """Each layer of the tower, and the projector, on the bundle's rows.

        Args:
            pixel_values: [B, 3, h, w].
            rows: The bundle's, after each of the tower's layers, [B, N, C].

        Returns:
            The layers, the features [B, N, C], and the products of the projector.
        """
        layers = [self.modules[f"{TOWER_LAYER}{index}"] for index in range(len(rows))]
        with self.products() as found, forced(layers, rows) as made:
            features = self.reference.model.model.get_image_features(torch.from_numpy(pixel_values))
        for index, layer in enumerate(made):
            layer.products = _below(found, f"{TOWER_LAYER}{index}.")
        projected = {name: rows for name, rows in found.items() if not name.startswith("vision_")}
        return made, torch.stack(list(features.pooler_output)).numpy(), projected

    @torch.no_grad()
    def layer(
        self,
        index: int,
        rows: np.ndarray,
        positions: np.ndarray,
        seen: np.ndarray,
        past: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> Made:
        """A layer of the decoder.

        Args:
            index: Its number.
            rows: The bundle's rows before it, [1, L, C].
            positions: Theirs, [L] or [L, A].
            seen: Which rows each of them sees, bool [L, P + L].
            past: The bundle's keys and values of the P rows before them, [1, G, P, D] each.
        """
        import transformers

        reference = self.reference
        cache = transformers.DynamicCache(config=reference.config.text_config)
        count = 0
        if past is not None:
            keys, values = map(torch.from_numpy, past)
            cache.update(keys, values, index)
            count = keys.shape[2]
        with self.products() as found:
            x, at, mask = map(torch.from_numpy, (rows, positions, seen))
            hidden, query = reference.layer(index, x, at, cache, mask)
        stored: Any = cache.layers[index]
        key, value = (each[:, :, count:].numpy() for each in (stored.keys, stored.values))
        return Made(rows, hidden.numpy(), query.numpy(), key, value, dict(found))

    @torch.no_grad()
    def logits(self, row: np.ndarray) -> np.ndarray:
        """Logits [V] of the bundle's row after the last layer, [1, 1, C]."""
        return self.reference.logits(torch.from_numpy(row))

    @contextmanager
    def products(self) -> Iterator[dict[str, np.ndarray]]:
        """What each matrix makes of its rows inside, without a bias."""
        found: dict[str, np.ndarray] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook(module: nn.Linear, _: Any, product: Tensor) -> None:
                bare = product if module.bias is None else product - module.bias
                found[name] = bare.numpy()

            return hook

        with ExitStack() as stack:
            for name, module in self.modules.items():
                if isinstance(module, nn.Linear):
                    handle = module.register_forward_hook(keep(name))
                    stack.callback(handle.remove)
            yield found


@contextmanager
def forced(layers: Sequence[nn.Module], rows: Sequence[np.ndarray]) -> Iterator[list[Made]]:
    """Let each layer give the bundle's rows to the next, and keep what it made itself.

    Args:
        layers: Layers of a tower.
        rows: The bundle's rows after each, [B, N, C]. Other numbers of rows than a layer's own are
            not passed on: the bundle kept others there.
    """
    made: list[Made] = []

    def hook(_: nn.Module, given: tuple[Any, ...], out: Any) -> Any:
        own = out[0] if isinstance(out, tuple) else out
        ours = torch.from_numpy(rows[len(made)])
        made.append(Made(given[0].numpy(), own.numpy()))
        if ours.shape != own.shape:
            return out
        return (ours, *out[1:]) if isinstance(out, tuple) else ours

    with ExitStack() as stack:
        for layer in layers:  # before the hooks by which transformers keeps hidden states
            stack.callback(layer.register_forward_hook(hook, prepend=True).remove)
        yield made


def _name(reference: Reference, module: str) -> str:
    """A module of Hugging Face's model as the bundle calls it."""
    return reference.family.canonical(f"{module}.weight").removesuffix(".weight")


def _below(found: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name: rows for name, rows in found.items() if name.startswith(prefix)}
