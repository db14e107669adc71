"""Build engines with TensorRT, on a board or ahead of time, and read what its parser understood.

One module serves `tensorrt` 10.3 to 11.x and `tensorrt_rtx` (1.7.1 is the version seen): builder,
parser and profiles carry the same names in both. What only one of them has is found by looking for
the name, never by comparing versions.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from patchsieve.errors import BackendMissingError, BundleError, ShapeError
from patchsieve.runtime.tensorrt_network import NetworkSummary, summarize

log = logging.getLogger(__name__)

Shape = tuple[int, ...]
Profile = dict[str, tuple[Shape, Shape, Shape]]  # input name -> (min, opt, max)
Progress = Callable[[str, int, int], None]  # phase, step reached, steps of the phase

PIP = {
    "tensorrt_rtx": "pip install tensorrt-rtx",
    "tensorrt": "pip install tensorrt --extra-index-url https://pypi.nvidia.com",
}
# JetPack brings its own tensorrt; the copy on pip does not run on these boards.
JETPACK = "apt install python3-libnvinfer, then python3 -m venv --system-site-packages"

# Said of every int64 input, and of every machine without a driver when anything else fails.
_HARMLESS = ("Int64 binding", "catchCudaError")


@dataclass(frozen=True)
class BuildReport:
    """What one build cost and what TensorRT said of it."""

    path: Path
    seconds: float
    engine_bytes: int
    profiles: int
    library: str
    warnings: tuple[str, ...] = ()


def load_tensorrt(target: str) -> ModuleType:
    """Import the library that serves a target.

    Args:
        target: `tensorrt-rtx`, `tensorrt`, or a JetPack such as `jetpack6`.

    Raises:
        BackendMissingError: It is not installed, or its own libraries are not.

    """
    name = "tensorrt_rtx" if target == "tensorrt-rtx" else "tensorrt"
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:  # OSError: a wheel whose shared library is absent
        raise BackendMissingError(
            f"target {target} needs the Python package {name}",
            found=str(error),
            do=JETPACK if target.startswith("jetpack") else PIP[name],
        ) from error


def build_engine(
    onnx_path: str | Path,
    out_path: str | Path,
    profiles: Sequence[Profile],
    *,
    target: str,
    memory_limit: int | None = None,
    compute_capabilities: Sequence[str] = (),
    progress: Progress | None = None,
) -> BuildReport:
    """Compile an ONNX file, types as written in it, and put the engine in place when it is whole.

    Args:
        onnx_path: The graph; external data is read from its own folder.
        out_path: Where the engine goes. An older file stays until the new one is complete.
        profiles: Optimisation profiles, in the order in which the runtime names them. Each gives
            every dynamic input its (min, opt, max) shape. A decode profile is 1/1/2 rows: exactly
            one row makes TensorRT-RTX 1.7.1 store fp16 weights twice.
        target: `tensorrt-rtx`, `tensorrt` or a JetPack.
        memory_limit: Bytes of scratch memory that a kernel may ask for.
        compute_capabilities: Of TensorRT-RTX only: the GPUs to compile for, such as
            `("8.6", "12.0")` or `("current",)`. Empty is the library's own choice, which needs
            no GPU.
        progress: Called with phase, step and number of steps, from several threads; must not
            raise.

    Raises:
        BackendMissingError: The library is absent.
        BundleError: The graph cannot be parsed or built.
        ShapeError: A profile does not fit the inputs of the graph.

    """
    onnx_path, out_path = Path(onnx_path), Path(out_path)
    trt = load_tensorrt(target)
    with collect_messages(trt) as messages:
        start = time.perf_counter()
        builder, network, parser = _parse(trt, onnx_path, messages)
        config = builder.create_builder_config()
        if memory_limit is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, memory_limit)
        _set_compute_capabilities(trt, config, compute_capabilities, target)
        for number, profile in enumerate(profiles):
            _check_profile(network, profile, number, onnx_path)
            _add_profile(builder, config, profile, number, messages)
        if progress is not None:
            config.progress_monitor = _progress_monitor(trt, progress)
        engine_bytes = _write_engine(trt, builder, network, config, out_path, onnx_path, messages)
        # The parser owns the memory that the network's weights point to: alive until here.
        del parser
        seconds = time.perf_counter() - start
    report = BuildReport(
        path=out_path,
        seconds=seconds,
        engine_bytes=engine_bytes,
        profiles=config.num_optimization_profiles,
        library=f"{trt.__name__} {trt.__version__}",
        warnings=tuple(dict.fromkeys(messages.warnings)),
    )
    log.info("%s: %.1f MB in %.1f s", out_path.name, engine_bytes / 1e6, seconds)
    return report


def parse_network(onnx_path: str | Path, *, target: str = "tensorrt-rtx") -> NetworkSummary:
    """Parse an ONNX file and tell what the network holds, without building it.

    A build that succeeds proves little: a parser may drop an input without a word. Tests ask here.

    Raises:
        BackendMissingError: The library is absent.
        BundleError: The graph cannot be parsed.

    """
    trt = load_tensorrt(target)
    with collect_messages(trt) as messages:
        _, network, _ = _parse(trt, Path(onnx_path), messages)
        return summarize(network)


@dataclass
class Messages:
    """Warnings and errors of one parse or build."""

    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def reason(self) -> str:
        """Pick the first error that says something, in one line."""
        lines = [text for text in self.errors if not any(word in text for word in _HARMLESS)]
        return (lines or self.errors or ["TensorRT gave no reason"])[0]


@functools.cache
def shared_logger(trt: ModuleType) -> Any:
    """Make the process's only logger: TensorRT keeps the first that it meets, ignores others."""

    class Logger(trt.ILogger):  # type: ignore[name-defined]  # found at run time
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages = Messages()

        def log(self, severity: Any, msg: str) -> None:
            severities = trt.ILogger.Severity
            if severity in (severities.ERROR, severities.INTERNAL_ERROR):
                self.messages.errors.append(msg)
            elif severity == severities.WARNING and not any(word in msg for word in _HARMLESS):
                self.messages.warnings.append(msg)
            log.debug("%s: %s", severity.name, msg)

    return Logger()


@contextmanager
def collect_messages(trt: ModuleType) -> Iterator[Messages]:
    """Gather what TensorRT says inside a `with`; nested ones each get their own."""
    logger = shared_logger(trt)
    outer, logger.messages = logger.messages, Messages()
    try:
        yield logger.messages
    finally:
        logger.messages = outer


def _parse(trt: ModuleType, path: Path, messages: Messages) -> tuple[Any, Any, Any]:
    """Builder, network and parser; the parser must outlive the network's weights."""
    if not path.is_file():
        raise BundleError(f"graph {path} is not there", do="export the bundle again")
    builder = trt.Builder(shared_logger(trt))
    # 10.x reads types from the graph only when asked to; 11.x and RTX always do.
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, shared_logger(trt))
    if not parser.parse_from_file(str(path)):
        raise _parser_error(parser, path, messages)
    if network.num_outputs == 0:  # a file that is not ONNX parses as an empty network
        raise BundleError(f"{path} holds no graph", do="export the bundle again")
    return builder, network, parser


def _parser_error(parser: Any, path: Path, messages: Messages) -> BundleError:
    library = type(parser).__module__.rpartition(".")[2]
    if parser.num_errors == 0:
        return BundleError(f"{library} cannot read {path.name}", found=messages.reason())
    error = parser.get_error(0)
    lines = [line for line in error.desc().splitlines() if not any(w in line for w in _HARMLESS)]
    where = ""
    if error.node_operator():
        where = f" at node {error.node_name()!r}, operator {error.node_operator()}"
    missing = [text for text in messages.errors if "Failed to open file" in text]
    return BundleError(
        f"{library} cannot read {path.name}{where}",
        found=missing[0] if missing else " ".join(lines),
        do="keep the weights beside the graph" if missing else "export again for this target",
    )


def _check_profile(network: Any, profile: Profile, number: int, path: Path) -> None:
    inputs = {t.name: t for t in (network.get_input(i) for i in range(network.num_inputs))}
    what = f"profile {number} of {path.name}"
    unknown = sorted(set(profile) - set(inputs))
    if unknown:
        raise ShapeError(
            f"{what} names inputs that the graph lacks", found=unknown, expected=sorted(inputs)
        )
    for name, tensor in inputs.items():
        shape = tuple(tensor.shape)
        if name not in profile:
            if -1 in shape:
                raise ShapeError(f"{what} gives no shapes for {name}", expected=shape)
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
            )


def _add_profile(
    builder: Any, config: Any, profile: Profile, number: int, messages: Messages
) -> None:
    optimisation = builder.create_optimization_profile()
    for name, (low, best, high) in profile.items():
        optimisation.set_shape(name, low, best, high)
    if config.add_optimization_profile(optimisation) < 0:
        raise ShapeError(f"TensorRT refuses profile {number}", found=messages.reason())


def _set_compute_capabilities(
    trt: ModuleType, config: Any, wanted: Sequence[str], target: str
) -> None:
    if not wanted:
        return
    if not hasattr(config, "set_compute_capability"):
        raise BundleError(
            f"target {target} compiles only for the GPU of this machine",
            found=f"compute capabilities {', '.join(wanted)}",
            do="leave the list empty, or use the target tensorrt-rtx",
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
            )


def _progress_monitor(trt: ModuleType, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined]  # found at run time
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            progress(phase_name, 0, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            steps = self.steps.pop(phase_name, 0)
            progress(phase_name, steps, steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            progress(phase_name, step + 1, self.steps.get(phase_name, 0))
            return True

    return Monitor()


def _write_engine(
    trt: ModuleType,
    builder: Any,
    network: Any,
    config: Any,
    out_path: Path,
    onnx_path: Path,
    messages: Messages,
) -> int:
    """Build into a temporary file beside the target, then rename it; return its bytes."""
    if not out_path.parent.is_dir():
        raise BundleError(f"engine {out_path} has no folder to go to", do="make the folder first")
    part = out_path.with_name(f".{out_path.name}.{os.getpid()}.part")
    failure = f"{trt.__name__} {trt.__version__} cannot build {onnx_path.name}"
    try:
        with part.open("wb") as file:
            if hasattr(builder, "build_serialized_network_to_stream"):
                _stream_engine(trt, builder, network, config, file, failure, messages)
            else:  # 10.3 knows only the whole engine in memory
                engine = builder.build_serialized_network(network, config)
                if engine is None:
                    raise BundleError(failure, found=messages.reason())
                file.write(engine)
            file.flush()
            os.fsync(file.fileno())  # boards lose power: a renamed file must be whole
            engine_bytes = file.tell()
        part.replace(out_path)
    except OSError as error:
        raise BundleError(
            f"engine {out_path} cannot be written", found=str(error), do="free space or rights"
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return engine_bytes


def _stream_engine(
    trt: ModuleType,
    builder: Any,
    network: Any,
    config: Any,
    file: Any,
    failure: str,
    messages: Messages,
) -> None:
    class Writer(trt.IStreamWriter):  # type: ignore[name-defined]  # found at run time
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                return file.write(data)
            except OSError as error:  # must not cross the C++ frames in between
                self.error = error
                return 0

    writer = Writer()
    built = builder.build_serialized_network_to_stream(network, config, writer)
    if writer.error is not None:
        raise writer.error
    if not built:
        raise BundleError(failure, found=messages.reason())
