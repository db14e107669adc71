"""What is tried when a build runs out of memory, in order. No rung changes what an engine computes.

A rung caps what the user asked for: it may cost speed, never an answer or a request that would have
fitted. What would (shorter prompts, fewer images, another precision) is decided at export, and the
error after the last rung says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from patchsieve.contract.errors import BundleError
from patchsieve.runtime.trt.engines import Attempt, Options

log = logging.getLogger(__name__)
Result = TypeVar("Result")

AS_ASKED = "as asked"
_WHY = 200  # characters of a failure that the record keeps


class OutOfMemoryError(BundleError):
    """A build needed more memory than there was, or than it was allowed."""


class CompilerError(BundleError):
    """TensorRT cannot build a graph that it could read, or crashed over it; memory was not short.

    No rung of the ladder helps. Another spelling of the graph may.
    """


@dataclass(frozen=True)
class Rung:
    """Caps on the options of a build; None leaves one as it is.

    Attributes:
        cost: What the cap costs, for the reader.
    """

    name: str
    cost: str
    workspace_bytes: int | None = None
    optimization_level: int | None = None
    weight_streaming: bool | None = None

    def apply(self, asked: Options) -> Options:
        """The options that this rung allows of what was asked."""
        return replace(
            asked,
            workspace_bytes=_least(asked.workspace_bytes, self.workspace_bytes),
            optimization_level=_least(asked.optimization_level, self.optimization_level),
            weight_streaming=asked.weight_streaming or bool(self.weight_streaming),
        )


LADDER = (
    Rung(AS_ASKED, "nothing"),
    Rung("workspace 1 GiB", "kernels that need more scratch memory", 1 << 30),
    Rung("workspace 256 MiB", "kernels that need more scratch memory", 1 << 28),
    Rung("level 1, workspace 1 GiB", "kernels chosen by rule, not by timing", 1 << 30, 1),
    Rung("level 0, workspace 256 MiB", "kernels chosen by rule, not by timing", 1 << 28, 0),
    Rung(
        "weight streaming, level 0, workspace 256 MiB",
        "weights may cross to the GPU at each run",
        1 << 28,
        0,
        weight_streaming=True,
    ),
)
# TensorRT-RTX 1.7.1 compiles kernels on the machine that runs them: neither workspace nor level nor
# streaming changed the memory of a build (benchmarks/build_memory.py).
ONE_RUNG = LADDER[:1]


def climb(
    asked: Options,
    attempt: Callable[[Options], Result],
    *,
    ladder: tuple[Rung, ...] = LADDER,
    may_stream: bool = True,
    told: Callable[[str], None] = lambda _: None,
) -> tuple[Result, Options, str, tuple[Attempt, ...]]:
    """Try each rung until one has memory enough.

    Args:
        asked: What the user asked for.
        attempt: Builds with the given options.
        ladder: The rungs.
        may_stream: Weight streaming is allowed.
        told: Hears, in one line, why a rung failed and which is tried next.

    Returns:
        What `attempt` returned, the options it took, its rung, and the rungs that failed.

    Raises:
        OutOfMemoryError: Every rung failed.
        PatchsieveError: A build failed for another reason, for which no rung helps.
    """
    rungs = [rung for rung in ladder if may_stream or not rung.weight_streaming]
    failed: list[Attempt] = []
    tried: list[Options] = []
    for rung in rungs:
        options = rung.apply(asked)
        if options in tried:  # the user asked for as little already
            continue
        if failed:
            told(f"{failed[-1].rung} failed ({failed[-1].why}); trying {rung.name}: {rung.cost}")
        tried.append(options)
        try:
            return attempt(options), options, rung.name, tuple(failed)
        except OutOfMemoryError as error:
            failed.append(Attempt(rung.name, f"{error.what} | found: {error.found}"[:_WHY]))
    raise OutOfMemoryError(
        "no way to build this engine fits in memory",
        found="; ".join(f"{one.rung}: {one.why}" for one in failed),
        do="free memory or add swap; or export with a --build-memory, fewer "
        "--max-text-tokens or --max-images, or a smaller --precision",
    )


def _least(asked: int | None, cap: int | None) -> int | None:
    given = [value for value in (asked, cap) if value is not None]
    return min(given) if given else None
