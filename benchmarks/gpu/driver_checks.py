"""Every verb of runtime/gpu's Driver on a device, with known bytes: what comes back must be right.

What CUDA must refuse is asked for too, and the stream must work after each refusal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from patchsieve.contract.errors import CapacityError, PatchsieveError
from patchsieve.runtime.gpu.device_times import DeviceTimes
from patchsieve.runtime.gpu.driver import ContextLostError, CudaError, Driver
from patchsieve.runtime.gpu.memory import ALIGNMENT, DeviceTensor, Memory, host_bytes

WAIT = "a check of the driver"
_COUNT = 1 << 20  # numbers of the array that is copied, 4 MB
_TOO_MUCH = 1 << 50  # bytes that no GPU has
_PAGE = 4096


class WrongError(PatchsieveError):
    """The device did another thing than asked."""


def check_driver(cuda: Any) -> dict[str, Any]:
    """Run every check.

    Args:
        cuda: cuda-python's binding of the CUDA runtime.

    Returns:
        Device and waits, what each check found, and under "wrong" a line for each that failed.

    Raises:
        BackendMissingError: There is no GPU.
    """
    driver = Driver(cuda)
    memory = Memory(driver)
    told: dict[str, Any] = {"gpu": str(driver.gpu), "found": {}, "wrong": []}
    for check in CHECKS:
        name = check.__name__
        try:
            told["found"][name] = check(driver, memory)
        except PatchsieveError as error:
            told["wrong"].append(f"{name}: {error}")
            if isinstance(error, ContextLostError):
                break  # every later call gives the same error
    memory.close()
    driver.close()
    return told | {"waits": dict(driver.waits)}


def copies(driver: Driver, memory: Memory) -> dict[str, float]:
    """Up, from block to block, and down; the GPU's clock times the middle."""
    numbers, whole = np.arange(_COUNT, dtype=np.float32), np.arange(7, dtype=np.int64)
    times = DeviceTimes(driver)
    sent = memory.upload({"numbers": numbers, "whole": whole})
    addresses = [tensor.address for tensor in sent.values()]
    _expect("addresses off alignment", [a for a in addresses if a % ALIGNMENT], [])
    copy = memory.empty(numbers.shape, numbers.dtype)
    with times.of("move"):
        driver.move(copy.address, sent["numbers"].address, copy.size)
    found = memory.fetch(WAIT, [copy, sent["whole"]])
    _expect_bytes("what was copied", found[0], numbers)
    _expect_bytes("the second array of an upload", found[1], whole)
    driver.check()
    ms = times.take()["move"]
    times.close()
    return {"move_ms": round(ms, 4), "bytes": copy.size}


def zeros(driver: Driver, memory: Memory) -> None:
    """Part of each row, nothing, and all."""
    rows = np.arange(1, _PAGE + 1, dtype=np.float32).reshape(-1, 16)  # 64 bytes each
    sent = memory.upload({"rows": rows})["rows"]
    driver.zero_rows(sent.address + 8, pitch=64, width=16, count=4)
    driver.zero_rows(sent.address, pitch=64, width=16, count=0)
    driver.zero(sent.address, 0)
    expected = rows.copy()
    expected[:4, 2:6] = 0
    _expect_bytes("rows with a part zeroed", memory.fetch(WAIT, [sent])[0], expected)
    driver.zero(sent.address, sent.size)
    _expect_bytes("zeroed rows", memory.fetch(WAIT, [sent])[0], np.zeros_like(rows))


def blocks(driver: Driver, memory: Memory) -> dict[str, int]:
    """Memory of both kinds is taken and given back."""
    free, total = driver.memory()
    if not 0 < free <= total:
        raise WrongError("the GPU's memory is not known", found=f"{free} of {total} bytes free")
    device, pinned = driver.allocate(_PAGE), driver.allocate_pinned(_PAGE)
    driver.zero(device, _PAGE)
    driver.download(pinned, device, _PAGE)
    driver.synchronise(WAIT)
    driver.free(device)
    driver.free_pinned(pinned)
    host = memory.on_host(np.arange(5))
    _expect("page-locked numbers", host_bytes(host.owner)[: host.size].view(np.int64).sum(), 10)
    return {"free": free, "total": total}


def full_memory(driver: Driver, memory: Memory) -> str:
    """A request for more than there is fails alone."""
    try:
        driver.allocate(_TOO_MUCH)
    except CapacityError as error:
        _still_works(driver, memory)
        return str(error)
    raise WrongError("the GPU gave more memory than it has", found=f"{_TOO_MUCH} bytes")


def events(driver: Driver, memory: Memory) -> str:
    """Times between events that passed, and the name of the error where one never did."""
    start, end = driver.event(), driver.event()
    try:
        name = _refusal(driver, "an event without a time", lambda: driver.elapsed_ms(start, end))
        driver.record(start)
        _still_works(driver, memory)
        driver.record(end)
        driver.synchronise(WAIT)
        if driver.elapsed_ms(start, end) < 0:
            raise WrongError("time runs backwards between two events")
    finally:
        driver.destroy_event(start)
        driver.destroy_event(end)
    return name


def replays(driver: Driver, memory: Memory) -> None:
    """A captured graph reads the bytes that lie there when it is launched, not when captured."""
    here, there, back = (
        memory.pinned.take(_PAGE),
        memory.device.take(_PAGE),
        memory.pinned.take(_PAGE),
    )
    host_bytes(here)[:] = host_bytes(back)[:] = 1

    def work() -> None:
        driver.upload(there.address, here.address, _PAGE)
        driver.download(back.address, there.address, _PAGE)

    graph = driver.capture(work)
    try:
        for value in (3, 5, 7):
            host_bytes(here)[:] = value
            driver.launch(graph)
            driver.synchronise(WAIT)
            expected = np.full(_PAGE, value, np.uint8)
            _expect_bytes(f"replay with {value}", host_bytes(back)[:_PAGE], expected)
    finally:
        driver.destroy_graph(graph)


def allocation_in_a_capture(driver: Driver, memory: Memory) -> str:
    """Is refused, by the name that is returned."""
    return _refusal_in_a_capture(driver, memory, lambda: driver.allocate(_PAGE))


def wait_in_a_capture(driver: Driver, memory: Memory) -> str:
    """Is refused, by the name that is returned."""
    return _refusal_in_a_capture(driver, memory, lambda: driver.synchronise(WAIT))


def block_let_go_in_a_capture(driver: Driver, memory: Memory) -> None:
    """Python may let a block go at any time: it is freed after the capture, which stays whole."""
    held = [memory.device.take_own(_PAGE)]
    kept = memory.device.take(_PAGE)
    before = memory.device.bytes()

    def work() -> None:
        held.clear()
        driver.zero(kept.address, _PAGE)

    graph = driver.capture(work)
    driver.launch(graph)
    driver.keep(kept)
    driver.synchronise(WAIT)
    driver.destroy_graph(graph)
    _expect("bytes given back", before - memory.device.bytes(), _PAGE)
    tensor = DeviceTensor(kept.address, (_PAGE,), np.dtype(np.uint8), kept)
    _expect_bytes("what the graph zeroed", memory.fetch(WAIT, [tensor])[0], np.zeros(_PAGE))


CHECKS: tuple[Callable[[Driver, Memory], Any], ...] = (
    copies,
    zeros,
    blocks,
    full_memory,
    events,
    replays,
    allocation_in_a_capture,
    wait_in_a_capture,
    block_let_go_in_a_capture,
)


def _refusal_in_a_capture(driver: Driver, memory: Memory, work: Callable[[], Any]) -> str:
    name = _refusal(driver, "in a capture", lambda: driver.capture(lambda: work()))
    _still_works(driver, memory)
    replays(driver, memory)
    return name


def _refusal(driver: Driver, what: str, work: Callable[[], Any]) -> str:
    """Name of the error that CUDA gives."""
    try:
        work()
    except CudaError as error:
        return error.name
    raise WrongError(f"CUDA allows {what} what it must refuse")


def _still_works(driver: Driver, memory: Memory) -> None:
    """The stream takes work after an error."""
    numbers = np.arange(100)
    (found,) = memory.fetch(WAIT, [memory.upload({"numbers": numbers})["numbers"]])
    _expect_bytes("a copy after a refusal", found, numbers)
    driver.check()


def _expect(what: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise WrongError(f"{what} differ", found=found, expected=expected)


def _expect_bytes(what: str, found: np.ndarray, expected: np.ndarray) -> None:
    if not np.array_equal(found, expected):
        count = int(np.count_nonzero(np.asarray(found) != expected))
        raise WrongError(f"{what}: {count} of {expected.size} numbers differ")
