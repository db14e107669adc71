"""The GPU of this machine, asked of its driver through ctypes: a board needs no library for it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from patchsieve.runtime.trt.engines import Gpu

_DRIVER = "libcuda.so.1"
# Attributes of cuDeviceGetAttribute, as cuda.h numbers them.
_INTEGRATED, _MAJOR, _MINOR = 18, 75, 76


@dataclass(frozen=True)
class Device:
    """The first GPU that CUDA sees.

    Attributes:
        memory_bytes: All of its memory.
        is_integrated: It shares the memory of the host, as on Jetson.
    """

    gpu: Gpu
    memory_bytes: int
    is_integrated: bool


def find_device(load: Callable[[str], Any] = ctypes.CDLL) -> Device | None:
    """Find the first GPU; None if there is no driver or no GPU.

    Args:
        load: Opens the driver's library.
    """
    try:
        driver = load(_DRIVER)
    except OSError:
        return None
    device, version = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    failed = (
        driver.cuDeviceGetName(name, len(name), device)
        or driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        or driver.cuDriverGetVersion(ctypes.byref(version))
    )
    if failed:
        return None

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), number, device)
        return value.value

    return Device(
        Gpu(
            name=name.value.decode(errors="replace"),
            compute_capability=f"{attribute(_MAJOR)}.{attribute(_MINOR)}",
            driver=f"{version.value // 1000}.{version.value % 1000 // 10}",
        ),
        memory_bytes=memory.value,
        is_integrated=bool(attribute(_INTEGRATED)),
    )
