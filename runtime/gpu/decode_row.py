"""One row through all stages on the GPU: the same memory at every step, one wait per token.

Where nothing but numbers in memory changes from token to token, the second step on a cache is
captured as one CUDA graph, and every later one is a single launch: the copy of the embedding and
of positions and slots to the device, all stages, the copy of the logits back.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from patchsieve.contract import names
from patchsieve.contract.errors import BundleError
from patchsieve.runtime.gpu.device_cache import DeviceCache, is_cache
from patchsieve.runtime.gpu.driver import CudaError
from patchsieve.runtime.gpu.engine import Context
from patchsieve.runtime.gpu.memory import DeviceTensor, Memory, aligned, host_bytes, part

log = logging.getLogger(__name__)

WAIT = "logits of a new token"

# Byte at which the numbers of an input lie, their shape and their type.
_Place = tuple[int, tuple[int, ...], np.dtype[Any]]


def why_not_captured(contexts: Sequence[Context], form: str) -> str | None:
    """The reason why decoding cannot be captured; None if it can.

    Args:
        contexts: The stages' contexts for decoding.
        form: Of the caches: IN_PLACE or NEW_ROWS of `patchsieve.contract.names`.
    """
    if form == names.NEW_ROWS:
        return "the past is an input whose shape grows with every token"
    for context in contexts:
        engine = context.engine
        if engine.streamed_bytes:
            return f"the weights of {engine.graph} are streamed, which makes the host wait"
        on_host = [port.name for port in engine.ports.values() if port.is_on_host]
        if on_host:
            return f"{engine.graph} reads {on_host[0]} with the CPU"
        if context.has_run and not context.is_capturable():
            return f"{engine.trt.__name__} cannot capture {engine.graph}"
    return None


class RowDecoder:
    """Feeds single rows.

    Args:
        memory: Of the bundle.
        contexts: The stages' contexts for decoding.
        form: Of the caches.

    Attributes:
        obstacle: Why steps are not captured; None if they are.
    """

    def __init__(self, memory: Memory, contexts: Sequence[Context], form: str) -> None:
        self.memory, self.driver, self.contexts = memory, memory.driver, list(contexts)
        self.form, self.obstacle = form, why_not_captured(contexts, form)
        self._graph: Any = None
        self._key: tuple[int, ...] = ()  # addresses of the caches that the last step wrote
        self._outputs: list[DeviceTensor] = []
        self._is_pending = False  # a step was enqueued and nobody has waited for it
        first = self.contexts[0].engine.ports[names.HIDDEN]
        row = DeviceTensor(0, (1, 1, first.shape[2]), first.dtype)
        places, size = self._lay_out(row.size)
        # The row and every number of every stage, alike on both sides: one copy brings them over.
        self._host, self._device = memory.pinned.take(size), memory.device.take(size)
        self._host_bytes = size
        content = host_bytes(self._host)
        self._row = part(content, 0, row.shape, row.dtype)
        self._numbers = {key: part(content, *place) for key, place in places.items()}
        self._bind_inputs(places)
        self._logits = self._bind_outputs(replace(row, address=self._device.address))
        self._answer = memory.pinned.take(self._logits.size)
        shape = (self._logits.shape[-1],)
        self._answer_row = part(host_bytes(self._answer), 0, shape, self._logits.dtype)

    def enqueue(
        self,
        hidden: np.ndarray,
        steps: Sequence[Mapping[str, np.ndarray]],
        caches: Sequence[DeviceCache],
        lengths: Sequence[int],
    ) -> None:
        """Feed one row.

        Args:
            hidden: Its embedding, [1, 1, C].
            steps: The other inputs of each stage, those of one row.
            caches: Each stage's cache.
            lengths: Rows present in each.
        """
        if self._is_pending:
            # The step before failed, or nobody asked for its logits. Its copy may still be on its
            # way, and reads the very memory that is written next.
            self.driver.synchronise("a step that was given up")
        self._is_pending = True
        self._row[...] = hidden
        for (index, name), number in self._numbers.items():
            number[...] = steps[index][name]
        key = tuple(cache.block.address for cache in caches)
        if key != self._key:
            self.forget()
        elif self._graph is None and self.obstacle is None:
            self._capture(caches, lengths)
        if self._graph is not None:
            self.driver.launch(self._graph)
        else:
            self._enqueue(caches, lengths)
        self._key = key

    def logits(self) -> np.ndarray:
        """Wait for the logits after the row, [V].

        All of them come, not only the best: the sampler reads them all, to penalise repetition and
        to refuse what is not finite, and 32,000 numbers cross in about ten microseconds.
        """
        self.driver.synchronise(WAIT)
        self._is_pending = False
        return self._answer_row.copy()

    def forget(self) -> None:
        """Drop the captured graph: it holds addresses of caches that may be gone."""
        graph, self._graph, self._key = self._graph, None, ()
        if graph is not None and not self.driver.lost:
            self.driver.destroy_graph(graph)

    def _capture(self, caches: Sequence[DeviceCache], lengths: Sequence[int]) -> None:
        """Capture a step on caches that a step has just written.

        That step, not captured, is what TensorRT asks for: the first call after a change of shape
        does work of its own. One graph lives at a time, because a context may keep memory that the
        graphs captured from it share.
        """
        self.obstacle = why_not_captured(self.contexts, self.form)
        if self.obstacle is not None:
            return
        try:
            self._graph = self.driver.capture(lambda: self._enqueue(caches, lengths))
        except (BundleError, CudaError) as error:  # the step itself then runs uncaptured
            self.obstacle = str(error)
            log.warning("decoding is not captured as a CUDA graph: %s", self.obstacle)

    def _enqueue(self, caches: Sequence[DeviceCache], lengths: Sequence[int]) -> None:
        driver = self.driver
        driver.upload(self._device.address, self._host.address, self._host_bytes)
        for context, cache, length in zip(self.contexts, caches, lengths, strict=True):
            moves = cache.bind(context, length, 1)
            context.enqueue()
            for place, rows in moves:
                driver.move(place, rows.address, rows.size)
        driver.download(self._answer.address, self._logits.address, self._logits.size)

    def _lay_out(self, row_bytes: int) -> tuple[dict[tuple[int, str], _Place], int]:
        """Where each stage's numbers lie after the row, and the bytes of it all."""
        places, size = {}, aligned(row_bytes)
        for index, context in enumerate(self.contexts):
            for port in context.engine.ports.values():
                if port.is_input and port.name != names.HIDDEN and not is_cache(port):
                    shape = tuple(1 if length < 0 else length for length in port.shape)
                    places[index, port.name] = (size, shape, port.dtype)
                    size += aligned(math.prod(shape) * port.dtype.itemsize)
        return places, size

    def _bind_inputs(self, places: Mapping[tuple[int, str], _Place]) -> None:
        """Bind the numbers, once; what the CPU reads stays on its side."""
        for (index, name), (place, shape, dtype) in places.items():
            context = self.contexts[index]
            block = self._host if context.engine.ports[name].is_on_host else self._device
            context.bind(name, DeviceTensor(block.address + place, shape, dtype, block))

    def _bind_outputs(self, hidden: DeviceTensor) -> DeviceTensor:
        """Bind what passes from stage to stage, once, and return where the logits come out."""
        bound: dict[str, DeviceTensor] = {}
        for context in self.contexts:
            context.bind(names.HIDDEN, hidden)
            for port in context.engine.outputs():
                if not port.name.endswith((names.OUT, names.NEW)):
                    shape = tuple(1 if length < 0 else length for length in port.shape)
                    bound[port.name] = self.memory.empty(shape, port.dtype)
                    context.bind(port.name, bound[port.name])
            self._outputs += bound.values()
            hidden = bound.get(names.HIDDEN_OUT, hidden)
        return bound[names.LOGITS]
