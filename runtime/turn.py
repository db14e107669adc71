"""What everybody who works on one answer needs to know of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from patchsieve.runtime.result import Result
from patchsieve.runtime.sampling import streams
from patchsieve.runtime.sampling_options import SamplingOptions


@dataclass(frozen=True)
class Turn:
    """One question of a conversation, on its way to an answer.

    Attributes:
        plan: Name of the plan that prunes it.
        options: How tokens are chosen and when the answer ends.
        result: Filled as the parts of the answer come.
        scores: The scores of each decision come to the host too.
        start: When it was asked, by `time.perf_counter`.
        noise: Random numbers of pruning methods that draw; tokens are drawn from another stream of
            the same seed.
    """

    plan: str
    options: SamplingOptions = field(default_factory=SamplingOptions)
    result: Result = field(default_factory=Result)
    scores: bool = False
    start: float = field(default_factory=time.perf_counter)
    noise: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise", streams(self.options.seed)[0])
