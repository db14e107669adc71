"""What several test files share: tiny models, exported once a session."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator

import pytest


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the rows of a test that are slow, where the others are not."""
    for item in items:
        rows = [row for mark in item.iter_markers("slow_rows") for row in mark.args]
        if rows and item.callspec.id in rows:  # type: ignore[attr-defined]
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Notes of verified files and compiled kernels go where no user's are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def one_registry() -> Iterator[None]:
    """torch makes its table of operators anew for every graph that it writes: half a second."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with pytest.MonkeyPatch.context() as patch:
        once = staticmethod(functools.cache(ONNXRegistry.from_torchlib))
        patch.setattr(ONNXRegistry, "from_torchlib", once)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., object]:
    """Exports a row of TINY at its first use, and hands out the same bundle from then on."""
    from tests.support.tiny_bundles import TinyBundle, own_bundle

    # torch tells every step of an export to whoever listens, and pytest would keep it all.
    logging.getLogger("torch.__trace").propagate = False
    made: dict[str, TinyBundle] = {}

    def bundle(row: str) -> TinyBundle:
        if row not in made:
            made[row] = own_bundle(tmp_path_factory, row)
        return made[row]

    return bundle
