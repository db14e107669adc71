"""Bundles for every target in several precisions, each exported once per session.

A test file takes the fixtures by `pytest_plugins = ["tests.support.target_bundles"]`, after it has
imported the names: too late for pytest's rewriting of assertions, hence PYTEST_DONT_REWRITE.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from patchsieve.contract.manifest import Limits
from patchsieve.contract.plan import Plan, SitePlan
from patchsieve.contract.targets import TARGETS
from patchsieve.export.exporter import ExportOptions, export
from tests.support.models import save_checkpoint
from tests.support.once import once

ON_A_CPU = ("cpu", "reference", "cuda")
# Each part once in half precision beside a float32 neighbour, and once the other way round.
MIXED = (
    "tower=float16,decoder=float32,head=float16",
    "tower=float32,decoder=float16,head=float32",
)
BFLOAT16 = "tower=bfloat16,decoder=bfloat16,head=float32"
FASTV = Plan((SitePlan(1, "fastv", {"keep_ratio": 0.5}),))


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, grouped heads."""
    made = once(
        tmp_path_factory,
        "small",
        lambda folder: save_checkpoint(folder / "own", "qwen2", layers=2, vision_layers=2),
    )
    return made / "own"


@pytest.fixture(scope="session")
def bundle_of(
    small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """For a precision the bundle with FastV at layer 1; not to be changed.

    One with a form of attention that is not the default has graphs for TensorRT-RTX alone.
    """
    made: dict[tuple[str, str | None], Path] = {}

    def bundle(precision: str, attention: str | None = None) -> Path:
        if (precision, attention) not in made:
            targets = [t for t in TARGETS if "bfloat16" not in precision or t not in ON_A_CPU]
            targets = targets if attention is None else ["tensorrt-rtx"]
            options = ExportOptions(
                plan=FASTV,
                plan_name="fastv",
                targets=tuple(targets),
                precision=precision,
                limits=Limits(64, 16, 2),
                attention=attention,
            )
            name = re.sub(r"\W+", "-", f"small-{precision}-{attention}")
            out = once(
                tmp_path_factory,
                name,
                lambda folder: export(str(small_checkpoint), folder / "bundle", options),
            )
            made[precision, attention] = out / "bundle"
        return made[precision, attention]

    return bundle
