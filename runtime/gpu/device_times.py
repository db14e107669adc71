"""GPU time of each graph, by events on the stream: the host's clock sees only the queueing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from patchsieve.runtime.gpu.driver import Driver


class DeviceTimes:
    """Times of the graphs that ran since they were last taken.

    Args:
        driver: On whose stream they run.
    """

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self._idle: list[Any] = []
        self._taken: list[tuple[str, Any, Any]] = []

    @contextmanager
    def of(self, graph: str) -> Iterator[None]:
        """Time what is enqueued inside; what fails has no time."""
        events: list[Any] = []
        try:
            for _ in range(2):
                events.append(self._event())
            self.driver.record(events[0])
            yield
            self.driver.record(events[1])
        except BaseException:
            self._idle += events  # an event that was never recorded has no time to ask for
            raise
        self._taken.append((graph, events[0], events[1]))

    def take(self) -> dict[str, float]:
        """Milliseconds of each graph, added up; the host must have waited for all of them."""
        times: dict[str, float] = {}
        for graph, start, end in self._taken:
            times[graph] = times.get(graph, 0.0) + self.driver.elapsed_ms(start, end)
        self.forget()
        return times

    def forget(self) -> None:
        """Begin again, after a request that failed half-way."""
        for _, start, end in self._taken:
            self._idle += (start, end)
        self._taken.clear()

    def close(self) -> None:
        """Give the events back."""
        self.forget()
        while self._idle:
            event = self._idle.pop()
            if not self.driver.lost:
                self.driver.destroy_event(event)

    def _event(self) -> Any:
        return self._idle.pop() if self._idle else self.driver.event()
