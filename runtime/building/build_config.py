"""What a builder is told before it builds: options, timings of earlier builds, profiles.

What a library lacks is found by looking for the name, never by comparing versions.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from patchsieve.contract.errors import BundleError, ShapeError
from patchsieve.contract.targets import AHEAD_OF_TIME
from patchsieve.runtime.building.profiles import Profile
from patchsieve.runtime.trt.engines import Options
from patchsieve.runtime.trt.library import Messages

log = logging.getLogger(__name__)

TIMING_CACHE = "timing.cache"


def set_options(trt: ModuleType, config: Any, options: Options, target: str) -> None:
    """Set a builder's config to the options of an engine.

    Raises:
        BundleError: The library does not know an option.
    """
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.weight_streaming:
        flag = getattr(trt.BuilderFlag, "WEIGHT_STREAMING", None)
        if flag is None:
            raise BundleError(
                f"{trt.__name__} {trt.__version__} cannot stream weights",
                do="build with --weight-streaming off",
            )
        config.set_flag(flag)
    # Else a context may allocate while it runs, and decoding cannot be captured as a CUDA graph.
    own = getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)
    if own is not None and not options.weight_streaming:
        config.set_flag(own)
    _set_compute_capabilities(trt, config, options.compute_capabilities, target)


def _set_compute_capabilities(
    trt: ModuleType, config: Any, wanted: Sequence[str], target: str
) -> None:
    if not wanted:
        return
    if not hasattr(config, "set_compute_capability"):
        raise BundleError(
            f"target {target} compiles only for the GPU of this machine",
            found=f"compute capabilities {', '.join(wanted)}",
            do=f"leave out --compute-capability, or use --target {AHEAD_OF_TIME[0]}",
        )
    config.num_compute_capabilities = len(wanted)
    for index, text in enumerate(wanted):
        name = "CURRENT" if text == "current" else f"SM{text.replace('.', '')}"
        capability = getattr(trt.ComputeCapability, name, None)
        if capability is None or not config.set_compute_capability(capability, index):
            known = sorted(trt.ComputeCapability.__members__)
            raise BundleError(
                f"{trt.__name__} {trt.__version__} cannot compile for a list with {text!r}",
                found=", ".join(wanted),
                expected=f"some of {', '.join(known)}, or `current` alone",
                do=f"leave {text} out of --compute-capability",
            )


@dataclass(frozen=True)
class TimingCache:
    """A cache in use; TensorRT reads it until the engine is built."""

    cache: Any
    is_warm: bool


def take_timing_cache(config: Any, path: Path) -> TimingCache:
    """Take up the timings of an earlier build, or begin again if they are of no use here."""
    stored = path.read_bytes() if path.is_file() else b""
    for content in (stored, b"") if stored else (b"",):
        cache = config.create_timing_cache(content)
        # Refused: damaged, of another GPU or of another version.
        if cache is not None and config.set_timing_cache(cache, False):
            return TimingCache(cache, is_warm=bool(content))
        log.warning("the timings in %s are of no use here and are made again", path)
    raise BundleError(
        "TensorRT cannot make a timing cache",
        found=path,
        do="see patchsieve doctor: the library may be damaged",
    )


def _check_profile(network: Any, profile: Profile, number: int, path: Path) -> None:
    inputs = {t.name: t for t in (network.get_input(i) for i in range(network.num_inputs))}
    what = f"profile {number} of {path.name}"
    unknown = sorted(set(profile) - set(inputs))
    if unknown:
        raise ShapeError(
            f"{what} names inputs that the graph lacks",
            found=unknown,
            expected=sorted(inputs),
            do="export the bundle again",
        )
    for name, tensor in inputs.items():
        shape = tuple(tensor.shape)
        if name not in profile:
            if -1 in shape:
                raise ShapeError(
                    f"{what} gives no shapes for {name}",
                    expected=shape,
                    do="export the bundle again",
                )
            continue
        low, best, high = profile[name]
        fits = len(low) == len(best) == len(high) == len(shape) and all(
            lo <= mid <= hi and (size == -1 or lo == hi == size)
            for lo, mid, hi, size in zip(low, best, high, shape, strict=True)
        )
        if not fits:
            raise ShapeError(
                f"{what} does not fit {name}",
                found=profile[name],
                expected=f"min <= opt <= max within {shape}",
                do="export the bundle again",
            )


def add_profile(
    builder: Any,
    network: Any,
    config: Any,
    profile: Profile,
    number: int,
    path: Path,
    messages: Messages,
) -> None:
    """Add an optimisation profile, after a look at whether it fits the network's inputs.

    Raises:
        ShapeError: It does not, or TensorRT refuses it.
    """
    _check_profile(network, profile, number, path)
    optimisation = builder.create_optimization_profile()
    for name, (low, best, high) in profile.items():
        optimisation.set_shape(name, low, best, high)
    if config.add_optimization_profile(optimisation) < 0:
        raise ShapeError(
            f"TensorRT refuses profile {number} of {path.name}",
            found=messages.reason(),
            do="export the bundle again",
        )
