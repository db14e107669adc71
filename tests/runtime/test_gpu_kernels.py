"""Kernels that TensorRT-RTX compiles at run time are kept, beside the engines or at home."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.fake_tensorrt import (
    CudaGraphStrategy,
    DynamicShapesKernelSpecializationStrategy,
    ExecutionContextAllocationStrategy,
)
from patchsieve.contract import names
from patchsieve.runtime.gpu.kernel_cache import FILE_NAME
from patchsieve.runtime.model import Model
from patchsieve.runtime.trt import engines
from tests.support.gpu import QUESTION, ROW, TARGET, Machine
from tests.support.tiny_bundles import TinyBundle

pytest_plugins = ["tests.support.gpu"]


@pytest.fixture
def own(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyBundle:
    """A bundle of one's own, and a home of one's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    without = shutil.ignore_patterns("engines")
    shutil.copytree(tiny(ROW).path, tmp_path / "bundle", ignore=without)
    return TinyBundle(tiny(ROW).checkpoint, tmp_path / "bundle")


def answer(machine: Machine, bundle: TinyBundle) -> Model:
    """Load, answer and close."""
    model = machine.load(bundle)
    model.generate(None, QUESTION, max_new_tokens=3)
    model.close()
    return model


def test_kernels_are_kept_and_found_at_the_next_start(own, machine) -> None:
    path = engines.folder_of(own.path, TARGET) / FILE_NAME
    answer(machine(), own)
    kernels = path.read_text().split("\n")
    assert {names.stage(0), names.stage(3)} <= set(kernels) and names.VISION not in kernels
    written = path.stat().st_mtime_ns
    again = machine()
    model = again.load(own)
    assert set(kernels[1:]) <= model.backend.kernels._cache._kernels
    model.close()
    assert path.stat().st_mtime_ns == written  # nothing came in: nothing is written
    assert not list(path.parent.glob(f".{FILE_NAME}*"))


def test_kernels_of_another_library_are_compiled_anew(own, machine) -> None:
    path = engines.folder_of(own.path, TARGET) / FILE_NAME
    answer(machine(), own)
    newer = machine()
    newer.trt.__version__ = "1.8.0"
    answer(newer, own)
    assert path.read_text().startswith("1.8.0\nstage_0")


def test_a_bundle_that_cannot_be_written_keeps_them_in_the_cache_directory(
    own, machine, tmp_path: Path, monkeypatch, caplog
) -> None:
    from patchsieve.runtime.gpu import kernel_cache

    write = kernel_cache.write_whole

    def refuses(path: Path, content: bytes) -> None:
        if path.is_relative_to(own.path):
            raise PermissionError(f"read-only: {path}")
        write(path, content)

    monkeypatch.setattr(kernel_cache, "write_whole", refuses)
    answer(machine(), own)
    (path,) = (tmp_path / "home").rglob(FILE_NAME)
    assert "stage_0" in path.read_text()
    model = machine().load(own)
    assert "stage_0" in model.backend.kernels._cache._kernels
    model.close()
    path.unlink()
    monkeypatch.setattr(
        kernel_cache, "write_whole", lambda *_: (_ for _ in ()).throw(OSError("full"))
    )
    with caplog.at_level(logging.WARNING):
        answer(machine(), own)
    assert "compiles them again" in caplog.text


def test_only_decoding_waits_for_kernels_of_its_own_shape(own, machine) -> None:
    gpu = machine()
    answer(gpu, own)
    stages = [config for graph, config in gpu.trt.contexts if graph == names.stage(1)]
    strategies = DynamicShapesKernelSpecializationStrategy
    assert [c.dynamic_shapes_kernel_specialization_strategy for c in stages] == [
        strategies.LAZY,
        strategies.EAGER,
    ]
    for _, config in gpu.trt.contexts:
        assert config.cuda_graph_strategy == CudaGraphStrategy.DISABLED
    others: list[Any] = [c for graph, c in gpu.trt.contexts if not graph.startswith("stage_")]
    assert others and all(
        c.dynamic_shapes_kernel_specialization_strategy == strategies.LAZY for c in others
    )


def test_tensorrt_itself_has_no_kernels_to_keep(own, machine) -> None:
    gpu = machine(is_rtx=False)
    model = gpu.load(own, target="jetpack6")
    model.generate(None, QUESTION, max_new_tokens=3)
    model.close()
    assert {how for _, how in gpu.trt.contexts} == {ExecutionContextAllocationStrategy.USER_MANAGED}
    assert not list(own.path.rglob(FILE_NAME))
