"""A bundle that answers through the GPU backend on a GPU that is not there.

A test file takes the fixture by `pytest_plugins = ["tests.support.gpu"]`, after it has imported the
names: too late for pytest's rewriting of assertions, hence PYTEST_DONT_REWRITE.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from benchmarks.gpu.fake_cuda import FakeGpu
from benchmarks.gpu.fake_tensorrt import FakeTensorRT, build_fakes
from patchsieve.runtime.gpu.backend import TensorRTBackend
from patchsieve.runtime.model import Model
from tests.support.tiny_bundles import TinyBundle

TARGET, ROW = "tensorrt-rtx", "qwen2"
QUESTION = "What is on the table?"
FASTV = [
    {"layer": 1, "method": "fastv", "params": {"keep_ratio": 0.75}},
    {"layer": 3, "method": "fastv", "params": {"keep_ratio": 0.25}},
]


@dataclass
class Machine:
    """A GPU, the libraries on it, and models loaded there."""

    gpu: FakeGpu
    trt: FakeTensorRT

    def load(
        self, bundle: TinyBundle, sites: list[dict[str, Any]] | None = None, target: str = TARGET
    ) -> Model:
        """Load a bundle whose default plan has these sites; engines are built as needed."""
        plan = bundle.model(sites).facts.default_plan  # writes the decisions, if they are new
        build_fakes(bundle.path, target, self.trt)
        model = Model(bundle.path, target=target, check="size", backend=self.backend)
        model.facts = replace(model.facts, default_plan=plan)
        return model

    def backend(self, bundle: Any) -> TensorRTBackend:
        return TensorRTBackend(bundle, trt=self.trt, cuda=self.gpu.module())


@pytest.fixture
def machine() -> Iterator[Callable[..., Machine]]:
    """Makes machines; at the end, none may have seen what a program must never do."""
    made = []

    def make(*, runs_late: bool = True, is_rtx: bool = True) -> Machine:
        gpu = FakeGpu(runs_late)
        made.append(Machine(gpu, FakeTensorRT(gpu, is_rtx=is_rtx)))
        return made[-1]

    yield make
    assert [one.gpu.wrong for one in made] == [[]] * len(made)
