"""Compile one graph into one engine, in this process, and write it where it belongs."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from patchsieve.contract.errors import BundleError, PatchsieveError
from patchsieve.contract.external_data import read_relocated
from patchsieve.contract.links import locate
from patchsieve.contract.writing import one_line, write_whole
from patchsieve.runtime.building.build_config import add_profile, set_options, take_timing_cache
from patchsieve.runtime.building.ladder import CompilerError, OutOfMemoryError
from patchsieve.runtime.building.mapped_weights import giving_back
from patchsieve.runtime.building.profiles import Profile
from patchsieve.runtime.trt.engines import Options
from patchsieve.runtime.trt.library import Messages, collect_messages, load_tensorrt, parse

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]  # phase, step reached, steps of the phase


@dataclass(frozen=True)
class _Graph:
    """A parsed graph, and TensorRT's objects that build it.

    Attributes:
        parser: Owns the memory that the network's weights point to, so it lives as long.
        path: The graph's file, as it was named.
        folder: Where its weights lie.
        messages: Takes what the library says.
    """

    trt: ModuleType
    parser: Any
    builder: Any
    network: Any
    config: Any
    path: Path
    folder: Path
    messages: Messages

    @classmethod
    def read(cls, trt: ModuleType, path: Path, bundle: Path | None, messages: Messages) -> _Graph:
        """Parse a file; that of a bundle of links from memory, where the links lead."""
        folder, content = path.parent, None
        if bundle is not None:
            place = locate(bundle)
            folder = place.root
            content = read_relocated(place, path.relative_to(bundle).as_posix())
        builder, network, parser = parse(trt, folder / path.name, messages, content)
        config = builder.create_builder_config()
        return cls(trt, parser, builder, network, config, path, folder, messages)

    def add_profiles(self, profiles: Sequence[Profile]) -> None:
        """Add the optimisation profiles, in their order."""
        for number, profile in enumerate(profiles):
            add_profile(
                self.builder, self.network, self.config, profile, number, self.path, self.messages
            )

    def save_timings(self, path: Path) -> None:
        """Write the kernel timings, those of this build included."""
        write_whole(path, bytes(memoryview(self.config.get_timing_cache().serialize())))

    def report(self, path: Path, seconds: float, size: int, is_warm: bool) -> BuildReport:
        """What the build of an engine of `size` bytes cost."""
        return BuildReport(
            path=path,
            seconds=seconds,
            engine_bytes=size,
            profiles=self.config.num_optimization_profiles,
            library=f"{self.trt.__name__} {self.trt.__version__}",
            warnings=tuple(dict.fromkeys(self.messages.warnings)),
            has_timing_cache=is_warm,
        )

    def failure(self) -> PatchsieveError:
        """Why the build failed, from the library's messages."""
        what = f"{self.trt.__name__} {self.trt.__version__} cannot build {self.path.name}"
        short = self.messages.shortage()
        if short is not None:
            return OutOfMemoryError(what, found=short, do="free memory or add swap")
        return CompilerError(
            what,
            found=self.messages.reason(),
            do="try another release of the library, and report the failure",
        )


@dataclass(frozen=True)
class BuildReport:
    """What one build cost and what TensorRT said of it.

    Attributes:
        has_timing_cache: Timings of an earlier build were reused.
    """

    path: Path
    seconds: float
    engine_bytes: int
    profiles: int
    library: str
    warnings: tuple[str, ...] = ()
    has_timing_cache: bool = False


def build_engine(
    onnx_path: str | Path,
    out_path: str | Path,
    profiles: Sequence[Profile],
    *,
    target: str,
    options: Options | None = None,
    timing_cache: Path | None = None,
    bundle: Path | None = None,
    progress: Progress | None = None,
) -> BuildReport:
    """Compile an ONNX file, types as written in it, and put the engine in place when it is whole.

    Args:
        onnx_path: The graph; external data is read from its own folder.
        out_path: Where the engine goes. An older file stays until the new one is complete.
        profiles: Optimisation profiles, in the order in which the runtime names them. Each gives
            every dynamic input its (min, opt, max) shape.
        target: One that has engines.
        options: What the engine is to be.
        timing_cache: File of kernel timings, read where it is there and written after the build.
        bundle: The graph's bundle, if its files are links: the graph is read into memory, and its
            weights are looked for where they really lie.
        progress: Called with phase, step and number of steps, from several threads; must not
            raise.

    Raises:
        BackendMissingError: The library or, where it needs one, the GPU is absent.
        BundleError: The graph cannot be parsed.
        CompilerError: It can be parsed and not built.
        OutOfMemoryError: It could be, with more memory.
        PatchsieveError: The disk is full or may not be written.
        ShapeError: A profile does not fit the inputs of the graph.
    """
    trt, out_path = load_tensorrt(target), Path(out_path)
    with collect_messages(trt) as messages:
        start = time.perf_counter()
        graph = _Graph.read(trt, Path(onnx_path), bundle, messages)
        set_options(trt, graph.config, options or Options(), target)
        timings = None if timing_cache is None else take_timing_cache(graph.config, timing_cache)
        graph.add_profiles(profiles)
        if progress is not None:
            graph.config.progress_monitor = _progress_monitor(trt, progress)
        engine_bytes = _write_engine(graph, out_path)
        if timing_cache is not None:
            graph.save_timings(timing_cache)
        seconds = time.perf_counter() - start
    log.info("%s: %.1f MB in %.1f s", out_path.name, engine_bytes / 1e6, seconds)
    is_warm = timings is not None and timings.is_warm
    return graph.report(out_path, seconds, engine_bytes, is_warm)


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


def _write_engine(graph: _Graph, out_path: Path) -> int:
    """Build into a temporary file beside the target, then rename it; return its bytes."""
    if not out_path.parent.is_dir():
        raise BundleError(f"engine {out_path} has no folder to go to", do="make the folder first")
    part = part_of(out_path)
    with giving_back(graph.folder), one_line(out_path):
        try:
            with part.open("wb") as file:
                # One copy of the weights less than a whole engine in memory, which is all that
                # 10.3 knows. Measured with TensorRT-RTX 1.7.1 on 0.59 GB: peak 1.65 against 2.08.
                if hasattr(graph.builder, "build_serialized_network_to_stream"):
                    is_built = _stream_engine(graph, file)
                else:
                    engine = graph.builder.build_serialized_network(graph.network, graph.config)
                    is_built = engine is not None
                    if is_built:
                        file.write(engine)
                if not is_built:
                    raise graph.failure()
                file.flush()
                os.fsync(file.fileno())  # boards lose power: a renamed file must be whole
            part.replace(out_path)
        finally:
            part.unlink(missing_ok=True)
    return out_path.stat().st_size


def part_of(engine: Path) -> Path:
    """Where an engine is written before it is whole."""
    return engine.with_name(f".{engine.name}.part")


def _stream_engine(graph: _Graph, file: Any) -> bool:
    trt = graph.trt

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
    is_built = graph.builder.build_serialized_network_to_stream(graph.network, graph.config, writer)
    if writer.error is not None:
        raise writer.error
    return bool(is_built)
