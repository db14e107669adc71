"""Tiny bundles in int8 and int4, each exported once a run, and ways to spoil their weights.

A test file takes the fixtures by `pytest_plugins = ["tests.support.low_bundles"]`, after it has
imported the functions: too late for pytest's rewriting of assertions, hence PYTEST_DONT_REWRITE.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from patchsieve.contract import weights
from patchsieve.contract.manifest import Limits
from tests.support import damage
from tests.support.bundles import export_tiny
from tests.support.models import save_checkpoint
from tests.support.once import once

MIXED = "mixed"
# A layer and a kind of matrix are excepted.
INT4 = "int4,decisions=int4,layers.1=float,layers.*.mlp.down_proj=int8"


@pytest.fixture(scope="session")
def low_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five layers, each matrix of which divides into blocks of 32 and of 64."""
    made = once(
        tmp_path_factory,
        "low-checkpoint",
        lambda folder: save_checkpoint(
            folder / "tiny", layers=5, kv_heads=2, text={"intermediate_size": 192}
        ),
    )
    return made / "tiny"


@pytest.fixture(scope="session")
def low_bundle(
    low_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """For `MIXED` or `INT4` the bundle; shared by all tests: copy it before changing it."""

    def bundle(precision: str) -> Path:
        made = once(
            tmp_path_factory,
            f"low-{'mixed' if precision == MIXED else 'int4'}",
            lambda folder: export_tiny(
                low_checkpoint,
                folder / "bundle",
                precision=precision,
                targets=("cpu", "reference"),
                limits=Limits(64, 32, 2),
            ),
        )
        return made / "bundle"

    return bundle


@pytest.fixture
def own_low(low_bundle: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy that a test may change."""
    return lambda precision: Path(shutil.copytree(low_bundle(precision), tmp_path / "own"))


def tensors_of(bundle: Path, file: str) -> dict[str, np.ndarray]:
    """The tensors of a weights file, int4 as bytes."""
    data = (bundle / f"{weights.FOLDER}{file}.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    kinds = {"F32": np.float32, "F16": np.float16, "I8": np.int8, "U8": np.uint8}
    found = {}
    for name, entry in json.loads(data[8:start]).items():
        a, b = entry["data_offsets"]
        values = np.frombuffer(data[start + a : start + b], kinds[entry["dtype"]])
        found[name] = values.reshape(entry["shape"])
    return found


def store(bundle: Path, file: str, changed: dict[str, np.ndarray]) -> None:
    """Put tensors of the same sizes into a weights file, and its hash into the manifest."""
    name = f"{weights.FOLDER}{file}.safetensors"
    data = bytearray((bundle / name).read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    for tensor, values in changed.items():
        a, b = (start + offset for offset in header[tensor]["data_offsets"])
        data[a:b] = np.ascontiguousarray(values).tobytes()
        assert b - a == values.nbytes, tensor
    damage.rewrite(bundle, name, bytes(data))
