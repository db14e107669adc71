"""Compile every graph of a bundle, ahead of time or on the board that runs it."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from patchsieve.contract import files
from patchsieve.contract.errors import BackendMissingError, BundleError, PatchsieveError
from patchsieve.contract.links import locate
from patchsieve.contract.manifest import Manifest
from patchsieve.contract.targets import RTX, compiler_of
from patchsieve.contract.writing import one_line
from patchsieve.runtime.building.build_config import TIMING_CACHE
from patchsieve.runtime.building.build_request import Request, graphs_of, options_of, should_stream
from patchsieve.runtime.building.builder_process import Done, Job, build_in_process
from patchsieve.runtime.building.ladder import LADDER, ONE_RUNG, CompilerError, climb
from patchsieve.runtime.building.profiles import profiles
from patchsieve.runtime.trt import engines as record_module
from patchsieve.runtime.trt.device import Device, find_device
from patchsieve.runtime.trt.engines import (
    Engine,
    Gpu,
    Library,
    Options,
    Record,
    engine_path,
    misfit,
)
from patchsieve.runtime.trt.library import load_tensorrt

_SECONDS = 5.0  # between two words on one engine: its phases change many times a second
_IN_HUB_CACHE = (
    "the bundle is a snapshot of the hub's cache: its engines are kept in it and go with it; "
    "another revision needs engines of its own"
)
Progress = Callable[[str, float], None]
Told = Callable[[str], None]
Builder = Callable[..., Done]


@dataclass(frozen=True)
class Built:
    """One graph of a build.

    Attributes:
        engine: What was recorded; None if none was built.
        was_there: An engine of the same graph, weights, library, GPU and options existed.
        note: Why none was built.
    """

    graph: str
    path: Path
    engine: Engine | None
    was_there: bool = False
    note: str = ""


def build(
    bundle: Path,
    request: Request,
    *,
    progress: Progress = lambda *_: None,
    told: Told = lambda _: None,
    builder: Builder = build_in_process,
) -> Iterator[Built]:
    """Compile the graphs of a bundle, one at a time; each engine is recorded when it is whole.

    Args:
        bundle: The directory.
        request: For what, and how.
        progress: Told what is being done and the fraction done.
        told: Hears what the user should know at once, such as a rung of the ladder that failed.
        builder: Builds one engine.

    Yields:
        Each engine, built or found.

    Raises:
        BackendMissingError: The target's library is absent, or the GPU that it builds on.
        BundleError: The bundle is damaged, has no graphs for the target, or one cannot be built.
        PatchsieveError: The disk is full, or another build of the target is at work.
    """
    facts = files.read(bundle)
    graphs = graphs_of(facts, request.target)
    library = Library.of(load_tensorrt(request.target))
    device = _device_for(request)
    others = {path for g in facts.targets.values() for path in g.values()} - set(graphs.values())
    progress("checking the bundle", 0.0)
    paths = [path for path in facts.files if path not in others]
    # All of it, whatever was read before: what an engine is recorded to hold, it holds.
    files.check_files(bundle, facts, paths=paths, again=True)
    streams, note = should_stream(facts, request, device)
    if note:
        told(note)
    gpu = None if request.is_ahead_of_time or device is None else device.gpu
    place = locate(bundle)
    if place.repository is not None:
        told(_IN_HUB_CACHE)
    job = _Job(bundle, facts, request, library, gpu, streams, told, builder, place.has_links(paths))
    folder = record_module.folder_of(bundle, request.target)
    with one_line(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _only_builder(folder):
            job.read()
            for done, graph in enumerate(graphs):
                yield job.build(graph, _steps(graph, done / len(graphs), progress))


def _device_for(request: Request) -> Device | None:
    """The GPU here, without which only engines for a list of GPUs can be built."""
    device = find_device()
    if device is None and not request.is_ahead_of_time:
        raise BackendMissingError(
            f"engines for {request.target} are built on the GPU that runs them",
            found="no NVIDIA driver, or no GPU",
            do=f"copy the bundle there, then: patchsieve build BUNDLE --target {request.target}",
        )
    return device


@dataclass
class _Job:
    """One build of a bundle: what is known before the first engine, and the record.

    Attributes:
        gpu: The GPU that the engines are tied to, if to one.
        streams: Engines are to stream their weights.
        has_links: The bundle's files are links.
    """

    bundle: Path
    facts: Manifest
    request: Request
    library: Library
    gpu: Gpu | None
    streams: bool
    told: Told
    builder: Builder
    has_links: bool

    def __post_init__(self) -> None:
        self.weights = record_module.weights_hash(self.facts)
        self.record = Record(self.bundle, self.request.target)
        self.is_rtx = compiler_of(self.request.target) is RTX

    def read(self) -> None:
        """Take up the record of an earlier build, and remove what a killed one left."""
        folder = record_module.folder_of(self.bundle, self.request.target)
        for part in folder.glob(".*.part"):
            part.unlink()
        if not (folder / record_module.FILE_NAME).exists():
            return
        try:
            self.record = record_module.read_record(self.bundle, self.request.target)
        except BundleError as error:
            self.told(f"all engines are built again: {error}")

    def build(self, graph: str, step: Callable[[str], None]) -> Built:
        """Build a graph's engine unless it is there already."""
        path = engine_path(self.bundle, self.request.target, graph)
        if note := misfit(self.facts, graph):
            return Built(graph, path, None, note=note)
        asked = options_of(self.facts, self.request, graph, self.streams)
        there = self.record.engines.get(graph)
        if (
            not self.request.force
            and there is not None
            and self._is_current(graph, path, there, asked)
        ):
            return Built(graph, path, there, was_there=True)
        engine = self._compile(graph, path, asked, step)
        self.record.engines[graph] = engine
        record_module.write_record(self.record)
        return Built(graph, path, engine)

    def _is_current(self, graph: str, path: Path, there: Engine, asked: Options) -> bool:
        """Whether an engine was built from this graph, for this GPU, as asked, and is whole."""
        shapes = tuple(profiles(self.facts, graph, self.request.target))
        found = (there.graph_sha256, there.weights_sha256, there.profiles)
        wanted = (self.facts.files[self._source(graph)].sha256, self.weights, shapes)
        same = found == wanted and (there.library, there.asked) == (self.library, asked)
        return same and _same_gpu(there, self.gpu) and record_module.is_whole(path, there)

    def _source(self, graph: str) -> str:
        return self.facts.targets[self.request.target][graph]

    def _remedy(self, graph: str, said: str) -> str:
        """What may help where TensorRT's compiler failed."""
        if "FP32 GEMM is not supported" in said:  # TensorRT-RTX 1.7.1 of SM 7.5
            return (
                "leave --compute-capability 7.5 out: TensorRT-RTX has no float32 products on "
                "Turing, which decisions and the scores of attention are made of"
            )
        if self.facts.has_fused_attention(self.request.target, graph):
            # Only an export can give it: which graph is right is a matter of the whole bundle.
            return (
                "export the bundle again with --attention decomposed: this graph holds attention "
                "as one operator, which some TensorRTs cannot compile"
            )
        other = "" if self.is_rtx else "--optimization-level or another "
        return f"try another {other}release of {self.library.name}, and report the failure"

    def _compile(
        self, graph: str, path: Path, asked: Options, step: Callable[[str], None]
    ) -> Engine:
        shapes = tuple(profiles(self.facts, graph, self.request.target))

        def attempt(options: Options) -> Done:
            job = Job(
                onnx_path=str(self.bundle / self._source(graph)),
                out_path=str(path),
                profiles=shapes,
                target=self.request.target,
                options=options,
                # TensorRT-RTX has no timings to keep: its cache belongs to the runtime.
                timing_cache=None if self.is_rtx else str(path.with_name(TIMING_CACHE)),
                bundle=str(self.bundle) if self.has_links else None,
            )
            return self.builder(job, lambda phase, *_: step(phase))

        try:
            done, options, rung, failed = climb(
                asked,
                attempt,
                ladder=ONE_RUNG if self.is_rtx else LADDER,
                may_stream=self.request.streaming != "off",
                told=lambda text: self.told(f"{graph}: {text}"),
            )
        except CompilerError as error:
            remedy = {"do": self._remedy(graph, str(error))}
            raise CompilerError(**error.fields() | remedy) from error
        file = files.hash_file(path)
        return Engine(
            graph_sha256=self.facts.files[self._source(graph)].sha256,
            weights_sha256=self.weights,
            library=self.library,
            gpu=self.gpu,
            asked=asked,
            options=options,
            rung=rung,
            profiles=shapes,
            seconds=round(done.seconds, 3),
            base_bytes=done.base_bytes,
            peak_bytes=done.peak_bytes,
            size=file.size,
            sha256=file.sha256,
            failed=failed,
            warnings=done.warnings,
        )


def _same_gpu(there: Engine, gpu: Gpu | None) -> bool:
    if there.gpu is None or gpu is None:
        return there.gpu is gpu
    return (there.gpu.name, there.gpu.compute_capability) == (gpu.name, gpu.compute_capability)


def _steps(graph: str, fraction: float, progress: Progress) -> Callable[[str], None]:
    """Say that a graph is being built, and every few seconds what TensorRT is at."""
    progress(f"building {graph}", fraction)
    start = said = time.monotonic()

    def step(phase: str) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= _SECONDS:
            said = now
            progress(f"building {graph}: {phase}, {now - start:.0f} s", fraction)

    return step


@contextmanager
def _only_builder(folder: Path) -> Iterator[None]:
    """Refuse to build where another process builds; a killed one holds nothing."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PatchsieveError(
                "another build of this target is at work", found=folder, do="wait for it to end"
            ) from error
        yield
    finally:
        os.close(handle)
