"""The doubles speak as the libraries do: no name that a real one lacks, no value that differs."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import fake_cuda, fake_tensorrt
from patchsieve.contract.errors import BackendMissingError
from patchsieve.runtime.gpu import backend as trt_backend
from patchsieve.runtime.gpu import (
    decode_row,
    device_cache,
    device_times,
    driver,
    kernel_cache,
    memory,
    weight_streaming,
)
from patchsieve.runtime.gpu import engine as trt_engine

MODULES = (
    decode_row,
    device_cache,
    device_times,
    driver,
    kernel_cache,
    memory,
    trt_backend,
    trt_engine,
    weight_streaming,
)
CLASSES = (
    "ICudaEngine",
    "IExecutionContext",
    "ILogger",
    "IRuntimeCache",
    "IRuntimeConfig",
    "Runtime",
)
ENUMS = (
    "CudaGraphStrategy",
    "DataType",
    "DynamicShapesKernelSpecializationStrategy",
    "ExecutionContextAllocationStrategy",
    "TensorIOMode",
    "TensorLocation",
)
RTX = {"ICudaEngine": "RtxEngine", "IExecutionContext": "RtxContext"}


@pytest.fixture(scope="module")
def cudart() -> Any:
    return pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed")


def names_of(thing: Any) -> set[str]:
    """Public names, those that a constructor sets too."""
    found = {name for name in vars(thing) if not name.startswith("_")}
    for parent in thing.__mro__[:-1]:
        found |= {name for name in vars(parent) if not name.startswith("_")}
        source = inspect.getsource(parent)
        found |= set(re.findall(r"self\.([a-z]\w*)(?:: \w+)? = ", source))
    return found


@pytest.mark.tensorrt
@pytest.mark.parametrize("name", CLASSES)
def test_every_method_of_the_double_is_one_of_tensorrt_rtx(name: str) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    found = names_of(getattr(fake_tensorrt, RTX.get(name, name)))
    assert found and found <= set(dir(getattr(trt, name))), found - set(dir(getattr(trt, name)))


@pytest.mark.tensorrt
@pytest.mark.parametrize("name", ENUMS)
def test_every_choice_of_the_double_is_one_of_tensorrt_rtx(name: str) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    members = set(getattr(fake_tensorrt, name).__members__)
    assert members <= set(getattr(trt, name).__members__)


@pytest.mark.tensorrt
def test_tensorrt_rtx_takes_a_mapped_file_and_says_why_it_is_no_engine(tmp_path: Path) -> None:
    """Of all calls, these need no GPU."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    from patchsieve.contract.errors import BundleError
    from patchsieve.runtime.trt.library import shared_logger

    path = tmp_path / "stage_0.engine"
    path.write_bytes(b"no engine " * 500)
    runtime = trt.Runtime(shared_logger(trt))
    with pytest.raises(
        BundleError, match=r"cannot load the engine stage_0.engine \| found: ."
    ) as e:
        trt_engine.Engine(trt, runtime, "stage_0", path)
    assert "\n" not in str(e.value)


def test_every_function_of_the_double_is_one_of_cuda_python(cudart) -> None:
    found = {name for name in vars(fake_cuda.FakeCudaRuntime) if name.startswith("cuda")}
    assert found and found <= set(dir(cudart)), found - set(dir(cudart))


@pytest.mark.parametrize("name", ("cudaError_t", "cudaMemcpyKind", "cudaStreamCaptureMode"))
def test_every_number_of_the_double_is_that_of_cuda_python(cudart, name: str) -> None:
    real = {member.name: int(member) for member in getattr(cudart, name)}
    ours = {member.name: int(member) for member in getattr(fake_cuda, name)}
    assert ours.items() <= real.items()
    assert int(cudart.cudaStreamNonBlocking) == fake_cuda.FakeCudaRuntime.cudaStreamNonBlocking


def test_every_cuda_name_in_the_runtime_is_one_of_cuda_python(cudart) -> None:
    known = set(dir(cudart))
    for name in ("cudaError_t", "cudaMemcpyKind", "cudaStreamCaptureMode"):
        known |= set(getattr(cudart, name).__members__)
    for module in MODULES:
        used = set(re.findall(r"\bcuda[A-Z]\w+", inspect.getsource(module)))
        assert used <= known, (module.__name__, used - known)


def test_cuda_python_answers_as_the_double_does(cudart) -> None:
    """Without a GPU each call gives an error and nothing else; the driver says which."""
    error, *_ = cudart.cudaGetDeviceCount()
    if int(error) == 0:
        pytest.skip("this machine has a GPU, and `make gpu` asks it more")
    assert isinstance(cudart.cudaGetErrorString(error)[1], bytes)
    assert cudart.cudaMemsetAsync(0, 0, 4, 0)[0] == cudart.cudaFree(0)[0] == error
    with pytest.raises(BackendMissingError) as caught:
        driver.Driver(cudart)
    assert "\n" not in str(caught.value) and "what to do" in str(caught.value)
