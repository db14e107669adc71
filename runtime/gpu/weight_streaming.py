"""How many weights stay on the GPU, of engines that were built to be larger than its memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from patchsieve.runtime.gpu.driver import Driver
from patchsieve.runtime.gpu.engine import Engine

log = logging.getLogger(__name__)

_SPARE = 256 << 20  # bytes left to the driver, the display and the rows of a request


def set_budgets(driver: Driver, engines: Sequence[Engine], cache_bytes: int) -> None:
    """Share the GPU's memory among the engines whose weights may be streamed.

    Called between loading the engines and making their contexts: until then such weights are in
    host memory. Engines built without streaming have none of them.

    Args:
        driver: The GPU.
        engines: All engines of the bundle.
        cache_bytes: KV bytes that a conversation needs.
    """
    sizes = [int(engine.engine.streamable_weights_size) for engine in engines]
    if not any(sizes):
        return
    free, _ = driver.memory()
    scratch = max(engine.activation_bytes for engine in engines)
    for engine, size, budget in zip(
        engines, sizes, budgets(sizes, free - scratch - cache_bytes - _SPARE), strict=True
    ):
        if size:
            engine.engine.weight_streaming_budget_v2 = budget
            if budget < size:
                log.warning(
                    "%s: %.2f of %.2f GB of weights stay on the GPU, each call copies the others",
                    engine.graph,
                    budget / 1e9,
                    size / 1e9,
                )


def budgets(sizes: Sequence[int], room: int) -> list[int]:
    """Bytes of each engine's weights that stay on the GPU: all, or the same share of each.

    Args:
        sizes: Weights of each engine that can be streamed, bytes.
        room: Bytes free for them.
    """
    total = sum(sizes)
    if total <= room:
        return list(sizes)
    return [max(0, room) * size // total for size in sizes]
