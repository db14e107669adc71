"""What fails on a GPU is told in one line, and leaves the bundle usable and the memory free."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.gpu.fake_cuda import TOTAL, FakeCudaRuntime, FakeGpu, cudaError_t
from patchsieve.contract import names
from patchsieve.contract.errors import (
    BackendMissingError,
    BundleError,
    CapacityError,
    PatchsieveError,
    RequestError,
)
from patchsieve.contract.targets import WITH_ENGINES
from patchsieve.runtime.backends import open_backend
from patchsieve.runtime.gpu import driver as driver_module
from patchsieve.runtime.gpu.device_times import DeviceTimes
from patchsieve.runtime.gpu.driver import ContextLostError, Driver, load_cudart
from patchsieve.runtime.gpu.engine import PREFILL
from patchsieve.runtime.gpu.memory import Memory, rounded
from patchsieve.runtime.model import Model
from patchsieve.runtime.ort import backend as ort_backend
from patchsieve.runtime.trt import engines
from tests.support.gpu import FASTV, QUESTION, ROW, TARGET, Machine
from tests.support.tiny_bundles import pictures

pytest_plugins = ["tests.support.gpu"]

LOST = cudaError_t.cudaErrorIllegalAddress


def ask(model: Model, **options: Any) -> list[int]:
    return model.generate(
        pictures(1), QUESTION, **{"max_new_tokens": 12, "ignore_eos": True} | options
    ).token_ids


def refused(do: Callable[[], Any], kind: type[PatchsieveError], words: str) -> None:
    with pytest.raises(kind, match=words) as caught:
        do()
    assert "\n" not in str(caught.value)


def caches_are_finite(model: Model, machine: Machine) -> bool:
    """Whether a mask stops all that stands in the spare cache: read past the driver."""
    machine.gpu.wait()
    (cache,) = model._spare.values()
    blocks = [stage.buffers.block for stage in cache.stages]
    contents = [machine.gpu.bytes_at(block.address, block.size) for block in blocks]
    return all(np.isfinite(content.view(np.float32)).all() for content in contents)


# Requests.


@pytest.mark.parametrize("row", (2, -1), ids=("early", "last"))
@pytest.mark.parametrize("target", (TARGET, "jetpack6"))
def test_output_that_is_not_finite_leaves_no_trace(tiny, machine, target: str, row: int) -> None:
    gpu = machine(is_rtx=target == TARGET)
    model = gpu.load(tiny(ROW), FASTV, target)
    right = ask(model)
    embed = model.bundle.embed

    def poisoned(ids: np.ndarray) -> np.ndarray:
        rows = np.array(embed(ids))
        rows[row % len(rows)] = np.nan
        return rows

    model.bundle.embed = poisoned  # type: ignore[method-assign]
    refused(lambda: ask(model), PatchsieveError, "not finite")
    del model.bundle.embed
    assert caches_are_finite(model, gpu)
    assert ask(model) == right
    model.close()


@pytest.mark.parametrize("graph", ("vision", "stage_2", "compact"))
def test_an_engine_that_fails_leaves_the_bundle_usable(tiny, machine, graph: str) -> None:
    gpu = machine()
    model = gpu.load(tiny(ROW), FASTV)
    right = ask(model)
    gpu.trt.refuses = graph
    refused(lambda: ask(model), BundleError, f"fails at the engine {graph}.*no kernel fits")
    gpu.trt.refuses = ""
    assert ask(model) == right
    model.close()


@pytest.mark.parametrize("function", ("cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync"))
def test_a_call_that_fails_leaves_the_bundle_usable(tiny, machine, function: str) -> None:
    gpu = machine()
    model = gpu.load(tiny(ROW), FASTV)
    right = ask(model)
    gpu.gpu.fail(function, cudaError_t.cudaErrorInvalidValue, after=1)
    if function == "cudaMemsetAsync":  # used where a new cache is made
        model._spare.clear()
    refused(lambda: ask(model), PatchsieveError, f"refuses {function}.*cudaErrorInvalidValue")
    assert ask(model) == right
    model.close()


def test_a_step_that_failed_is_over_before_its_row_is_written_again(tiny, machine) -> None:
    gpu = machine()
    model = gpu.load(tiny(ROW))
    ask(model)
    cache = model.pipeline.new_cache("none")  # so that the first step on it is not captured
    decoder = model.backend._decoder
    # The row's upload is on its way when the copy of the logits is refused.
    gpu.gpu.fail("cudaMemcpyAsync", cudaError_t.cudaErrorInvalidValue, after=1)
    refused(lambda: model.pipeline.decode(6, cache), PatchsieveError, "refuses cudaMemcpyAsync")
    failed, uploaded = decoder._row.copy(), []
    gpu.gpu.enqueue(lambda: uploaded.append(decoder._row.copy()))
    model.pipeline.decode(7, cache)
    assert np.array_equal(uploaded[0], failed) and not np.array_equal(decoder._row, failed)
    assert model.backend.driver.waits["a step that was given up"] == 1
    model.pipeline.decode(8, cache)
    assert model.backend.driver.waits["a step that was given up"] == 1
    model.close()


@pytest.mark.parametrize("calls", (0, 1))
def test_page_locked_memory_is_held_while_a_copy_that_failed_may_be_under_way(calls: int) -> None:
    gpu = FakeGpu()
    memory = Memory(Driver(gpu.module()))
    rows = np.arange(64, dtype=np.int64)
    tensors = [memory.upload({"a": rows})["a"] for _ in range(2)]
    memory.driver.synchronise("both are there")
    gpu.fail("cudaMemcpyAsync", cudaError_t.cudaErrorInvalidValue, after=calls)
    if calls:
        refused(lambda: memory.fetch("both", tensors), PatchsieveError, "cudaMemcpyAsync")
    else:
        refused(lambda: memory.upload({"a": rows}), PatchsieveError, "cudaMemcpyAsync")
    gc.collect()
    assert len(memory.driver._kept) == 1
    memory.driver.synchronise("all is over")
    assert not memory.driver._kept
    memory.close()


def test_a_stream_that_nobody_finishes_leaves_the_conversation_as_it_was(tiny, machine) -> None:
    gpu = machine()
    model = gpu.load(tiny(ROW), FASTV)
    right = ask(model)
    chat = model.chat()
    stream = chat.stream(QUESTION, pictures(1), max_new_tokens=12)
    for _ in range(3):
        next(stream)
    stream.close()
    result = chat.ask(QUESTION, pictures(1), max_new_tokens=12, ignore_eos=True)
    assert result.token_ids == right
    model.close()


def test_a_request_outside_the_profile_is_refused_before_it_runs(tiny, machine) -> None:
    gpu = machine()
    model = gpu.load(tiny(ROW))
    context = model.backend._contexts[names.stage(1), PREFILL]
    port = context.engine.ports[names.KEEP_INDICES]
    object.__setattr__(port, "ranges", (((1,), (10,)), port.ranges[1]))
    words = r"does not fit the engine of stage_1.*keep_indices \[\d\d\].*\[1\] to \[10\]"
    refused(lambda: ask(model), CapacityError, words)
    assert not context.has_run
    object.__setattr__(port, "ranges", (((1,), (500,)), port.ranges[1]))
    assert ask(model) == ask(tiny(ROW).model())
    model.close()


# The context.


@pytest.mark.parametrize(
    "function",
    ("cudaMemcpyAsync", "cudaGraphLaunch", "cudaStreamSynchronize", "cudaEventElapsedTime"),
)
def test_a_lost_context_is_told_at_once_and_ever_after(tiny, machine, function: str) -> None:
    gpu = machine()
    model = gpu.load(tiny(ROW), FASTV)
    ask(model)
    gpu.gpu.fail(function, LOST)
    words = "the GPU context is lost.*cudaErrorIllegalAddress.*load the bundle again"
    refused(lambda: ask(model), ContextLostError, words)
    refused(lambda: ask(model), ContextLostError, words)
    model.close()  # and closing does not fail


def test_work_on_memory_that_was_given_back_would_be_found() -> None:
    """The double itself: a program that goes wrong is caught."""
    gpu = FakeGpu()
    driver = Driver(gpu.module())
    address = driver.allocate(64)
    driver.zero(address, 64)
    driver.free(address)
    assert not gpu.wrong  # CUDA waits for the device before it frees
    driver.zero(address, 64)
    with pytest.raises(ContextLostError):
        driver.synchronise("a test")
    assert gpu.wrong


# Memory.


def test_everything_is_given_back_on_close(tiny, machine) -> None:
    gpu = machine()
    model = gpu.load(tiny(ROW), FASTV)
    chat = model.chat()
    chat.ask(QUESTION, pictures(1), max_new_tokens=12)
    model.generate(pictures(1), QUESTION, max_new_tokens=4, plan="none")
    assert all(
        gpu.gpu.live[kind] for kind in ("device memory", "pinned memory", "context", "event")
    )
    model.close()  # the conversation still holds its cache
    assert not any(gpu.gpu.live.values()), gpu.gpu.live
    refused(lambda: chat.ask("Why?"), RequestError, "closed")
    chat.close()
    gc.collect()
    assert not gpu.gpu.wrong


def test_two_hundred_requests_leave_no_memory_behind(tiny, machine) -> None:
    gpu = machine()
    model = gpu.load(tiny(ROW), FASTV)

    def fifty() -> tuple[int, int]:
        rng = np.random.default_rng(0)
        for number in range(50):  # a fifth of them fail, half-way
            image = rng.integers(0, 256, (20, 20, 3), np.uint8)
            words = " ".join(["Why?"] * int(rng.integers(1, 40)))
            if number % 5 == 0:
                gpu.trt.refuses = "stage_3"
                refused(lambda i=image, w=words: model.generate(i, w), BundleError, "fails")
                gpu.trt.refuses = ""
            model.generate([image] * (1 + number % 3), words, max_new_tokens=3)
        return gpu.gpu.used, sum(gpu.gpu.live.values())

    used, pieces = fifty()
    for _ in range(3):
        now_used, now_pieces = fifty()
    # A traceback may hold a block until Python collects it, so that the pool makes another; what
    # leaked with every request would be 150 pieces.
    assert now_pieces < pieces + 15 and now_used < 1.2 * used
    model.close()
    assert not any(gpu.gpu.live.values()), gpu.gpu.live


def test_a_cache_goes_back_when_nobody_holds_it(tiny, machine) -> None:
    gpu = machine()
    model = gpu.load(tiny(ROW))
    ask(model)
    before = gpu.gpu.used
    cache = model.pipeline.new_cache("none")
    reserved = cache.kv_bytes()["reserved"]
    assert gpu.gpu.used - before >= reserved > 0
    del cache
    assert gpu.gpu.used == before
    model.close()


def test_full_memory_refuses_one_request_and_not_the_next(tiny, machine) -> None:
    gpu = machine()
    model = gpu.load(tiny(ROW), FASTV)
    right = ask(model)
    gpu.gpu.total = gpu.gpu.used  # not a byte left
    refused(
        lambda: model.pipeline.new_cache("none"), CapacityError, "GPU's memory is full.*GB free"
    )
    longer = "Why? " * 60  # needs rows that no idle block holds
    refused(lambda: model.generate(pictures(3), longer), CapacityError, "GPU's memory is full")
    gpu.gpu.total = TOTAL
    assert ask(model) == right
    model.close()
    assert not any(gpu.gpu.live.values()), gpu.gpu.live


def test_idle_blocks_are_given_up_before_memory_is_called_full() -> None:
    gpu = FakeGpu()
    memory = Memory(Driver(gpu.module()))
    gpu.total = 1 << 20
    small = [memory.empty((100,), np.dtype(np.float32)) for _ in range(100)]
    del small
    idle = memory.device.bytes()
    assert idle > 40_000
    large = memory.empty(((1 << 20) - 1000,), np.dtype(np.uint8))
    assert memory.device.bytes() == large.owner.size == gpu.used
    memory.close()
    assert gpu.used == 0


def test_sizes_near_each_other_share_blocks() -> None:
    for size in (1, 255, 256, 257, 5000, 999_999, 12_345_678):
        assert size <= rounded(size) <= max(size + 255, size * 5 // 4)
        assert rounded(size) % 256 == 0
    gpu = FakeGpu()
    memory = Memory(Driver(gpu.module()))
    for rows in range(3000, 3100):
        memory.empty((rows,), np.dtype(np.float32))
    assert gpu.calls["cudaMalloc"] == 2


# Loading.

_STEPS = (
    "cudaStreamCreateWithFlags",
    "cudaGetDeviceProperties",
    "cudaMalloc",
    "cudaMallocHost",
    "cudaStreamSynchronize",
)


@pytest.mark.parametrize("function", _STEPS)
def test_a_load_that_fails_half_way_gives_everything_back(tiny, machine, function: str) -> None:
    gpu = machine()
    gpu.gpu.fail(function, cudaError_t.cudaErrorMemoryAllocation)
    refused(lambda: gpu.load(tiny(ROW), FASTV), CapacityError, "GPU's memory is full")
    gc.collect()
    assert not any(gpu.gpu.live.values()), gpu.gpu.live


@pytest.mark.parametrize(
    ("what", "words"),
    [("engine", "cannot load the engine.*damaged"), ("context", "cannot prepare.*out of memory")],
)
def test_an_engine_that_does_not_load_is_one_line(tiny, machine, what: str, words: str) -> None:
    gpu = machine()
    gpu.trt.refuses = what
    refused(lambda: gpu.load(tiny(ROW)), BundleError, words)
    gc.collect()
    assert not any(gpu.gpu.live.values()), gpu.gpu.live


def test_an_engine_that_copies_its_cache_is_refused(tiny, machine) -> None:
    gpu = machine()
    gpu.trt.copies_caches = True
    refused(lambda: ask(gpu.load(tiny(ROW))), BundleError, "copies its cache")


def test_engines_of_another_library_are_refused(tiny, machine) -> None:
    gpu = machine()
    gpu.load(tiny(ROW)).close()
    gpu.trt.__version__ = "1.8.0"
    refused(
        lambda: Model(tiny(ROW).path, target=TARGET, check="size", backend=gpu.backend),
        BundleError,
        "built by another library.*patchsieve build",
    )


def test_damaged_engines_are_refused(tiny, machine) -> None:
    gpu, path = machine(), engines.engine_path(tiny(ROW).path, TARGET, "compact")
    gpu.load(tiny(ROW)).close()
    path.write_bytes(path.read_bytes() + b" ")
    refused(
        lambda: Model(tiny(ROW).path, target=TARGET, check="size", backend=gpu.backend),
        BundleError,
        "compact.engine is damaged.*patchsieve build",
    )


# ONNX Runtime on the GPU.


@pytest.mark.parametrize(
    ("said", "kind", "words"),
    [
        ("Error in execution: CUDA failure 700", BundleError, "fails at the graph stage_2.*again"),
        (
            "Error in execution: Failed to allocate memory",
            CapacityError,
            "memory is full.*--budget",
        ),
    ],
)
def test_a_plain_runtime_error_of_onnxruntime_is_one_line(
    tiny, monkeypatch, said: str, kind: type[PatchsieveError], words: str
) -> None:
    model = tiny(ROW).model(FASTV)
    right = ask(model)
    run = model.backend._run

    def fail(session: Any, *rest: Any) -> Any:
        if session is model.backend._session(names.stage(2)):
            raise RuntimeError(said)
        return run(session, *rest)

    monkeypatch.setattr(model.backend, "_run", fail)
    refused(lambda: ask(model), kind, words)
    monkeypatch.undo()
    assert ask(model) == right


class OnnxRuntime:
    """The module of onnxruntime-gpu, whose provider finds its libraries only when preloaded."""

    __version__ = "1.31.1"

    def __init__(self, *, finds: bool) -> None:
        self.finds, self.is_loaded = finds, False

    def get_available_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def preload_dlls(self) -> None:
        self.is_loaded = self.finds
        if not self.finds:
            print("Failed to load libcublasLt.so.13: no such file")

    def disable_fallback(self) -> None:
        pass

    def get_providers(self) -> list[str]:
        return self.get_available_providers()[0 if self.is_loaded else 1 :]


@pytest.mark.parametrize("finds", (True, False))
def test_cuda_s_libraries_are_loaded_before_the_first_session(
    monkeypatch, capsys: pytest.CaptureFixture[str], finds: bool
) -> None:
    module = OnnxRuntime(finds=finds)
    monkeypatch.setattr(ort_backend, "ort", module)
    ort_backend.preload.cache_clear()
    try:
        provider = ort_backend._provider("cuda")
        if finds:
            ort_backend._check_provider(module, provider)
        else:
            words = (
                r"could not start.*found: no libcublasLt\.so\.13 \| .*onnxruntime-gpu\[cuda,cudnn\]"
            )
            refused(
                lambda: ort_backend._check_provider(module, provider), BackendMissingError, words
            )
    finally:
        ort_backend.preload.cache_clear()
    assert capsys.readouterr().out == ""  # stdout is the command's own


def test_a_graph_that_fails_leaves_no_event_without_a_time() -> None:
    gpu = FakeGpu()
    driver = Driver(gpu.module())
    times = DeviceTimes(driver)
    with pytest.raises(BundleError), times.of("stage_0"):
        raise BundleError("it fails")
    gpu.fail("cudaEventCreate", cudaError_t.cudaErrorInvalidValue, after=1)
    times._idle.clear()
    gpu.live["event"] -= 2
    with pytest.raises(PatchsieveError, match="cudaEventCreate"), times.of("stage_0"):
        pass
    with times.of("stage_1"):
        driver.synchronise("work")
    driver.synchronise("the end")
    assert list(times.take()) == ["stage_1"]
    times.close()
    assert gpu.live["event"] == 0


# What is absent.


@pytest.mark.parametrize(
    ("jetpack", "install"),
    [
        (None, r'pip install "cuda-python>=12\.6"'),
        ("6.2+b77", r'pip install "cuda-python==12\.6\.\*"'),
        ("7.2", r'pip install "cuda-python>=12\.6"'),
    ],
)
def test_absent_cuda_python_names_the_line_of_this_board(
    monkeypatch, jetpack: str | None, install: str
) -> None:
    for name in ("cuda", "cuda.bindings", "cuda.bindings.runtime", "cuda.cudart"):
        monkeypatch.setitem(sys.modules, name, None)
    on_board = None if jetpack is None else {"jetpack": jetpack}
    monkeypatch.setattr(driver_module.machine, "jetson", lambda probes: on_board)
    refused(lambda: load_cudart("jetpack6"), BackendMissingError, f"cuda-python.*{install}")
    newer = FakeGpu()
    newer.fail("cudaGetDeviceCount", cudaError_t.cudaErrorInsufficientDriver)
    older = r"cuda-python==12\.6" if (jetpack or "").startswith("6") else "cuda-python<13"
    refused(lambda: Driver(newer.module()), BackendMissingError, f"update the driver.*{older}")


def test_an_older_cuda_python_without_a_driver_is_one_line() -> None:
    """Up to 12.8 it raises where later ones return an error."""

    class Older(FakeCudaRuntime):
        def cudaGetDeviceCount(self) -> Any:
            raise RuntimeError("Failed to dlopen libcuda.so.1")

    words = "driver is absent.*Failed to dlopen libcuda.so.1.*install or update the driver"
    refused(lambda: Driver(Older(FakeGpu())), BackendMissingError, words)


def test_a_function_that_an_older_driver_lacks_is_one_line() -> None:
    class Older(FakeCudaRuntime):
        def cudaEventCreate(self) -> Any:
            raise RuntimeError('Function "cuEventCreate_v2" not found')

    driver = Driver(Older(FakeGpu()))
    refused(driver.event, PatchsieveError, "refuses cudaEventCreate.*cuEventCreate_v2")


def test_older_cuda_python_is_found_under_its_own_name(monkeypatch) -> None:
    older = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace(cudart=older, __path__=[]))
    monkeypatch.setitem(sys.modules, "cuda.cudart", older)
    assert load_cudart("jetpack6") is older


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (cudaError_t.cudaErrorInsufficientDriver, "driver is absent or older.*cuda-python<13"),
        (cudaError_t.cudaErrorNoDevice, "no NVIDIA GPU.*--target cpu"),
    ],
)
def test_an_absent_gpu_or_driver_is_one_line(error: cudaError_t, words: str) -> None:
    gpu = FakeGpu()
    gpu.fail("cudaGetDeviceCount", error)
    refused(lambda: Driver(gpu.module()), BackendMissingError, words)


@pytest.mark.parametrize("target", WITH_ENGINES)
def test_absent_tensorrt_is_one_line_for_each_target(monkeypatch, target: str) -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    bundle: Any = SimpleNamespace(target=target, manifest=None, path=Path("b"))
    refused(lambda: open_backend(bundle), BackendMissingError, f"target {target} needs")


def test_threads_are_no_option_of_a_gpu() -> None:
    bundle: Any = SimpleNamespace(target=TARGET)
    refused(lambda: open_backend(bundle, threads=2), RequestError, "leave --threads out")
