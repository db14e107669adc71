"""What the tests of calibration share: a tiny checkpoint and conversations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from patchsieve.calibration.encoder import Encoder
from patchsieve.calibration.samples import Samples
from patchsieve.runtime.records import Records
from tests.support.conversations import make_conversations
from tests.support.models import save_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA of 36 visual tokens."""
    return save_checkpoint(tmp_path_factory.mktemp("calibration") / "checkpoint", "vicuna-6x6")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_conversations(tmp_path_factory.mktemp("data"), 12)


@pytest.fixture(scope="session")
def samples(checkpoint: Path, data: Path) -> Samples:
    return Samples(Records(data), Encoder(str(checkpoint)))


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Callable[[], dict[str, Any]]:
    """The last of the objects that were printed; nothing else may be."""
    return lambda: [json.loads(line) for line in capsys.readouterr().out.splitlines()][-1]
