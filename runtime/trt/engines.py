"""The record of a bundle's engines: what was built, from what, by which library, for which GPU.

`engines/<target>/engines.json` lies beside the engines. A board loads them through this module:

    paths = open_engines(bundle, facts, target, gpu=gpu, library=library)

which is `read_record`, `check_loadable` and `check_whole` in turn. No TensorRT is imported here. A
hash finds damage, not malice: an engine is code, so load only what you or someone you trust built.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType

from patchsieve.contract import files, manifest
from patchsieve.contract.errors import BackendMissingError, BundleError
from patchsieve.contract.graphs import DECISION
from patchsieve.contract.links import locate
from patchsieve.contract.manifest import Manifest
from patchsieve.contract.reading import read_as
from patchsieve.contract.targets import FULL, RTX, compiler_of, of_compiler
from patchsieve.contract.verified import Verified
from patchsieve.contract.writing import write_whole

SCHEMA_VERSION = 1
FILE_NAME = "engines.json"
_LARGEST_RECORD = 16 << 20

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Library:
    """What builds or loads an engine, such as tensorrt 10.3.0."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name:.40} {self.version:.40}"

    @classmethod
    def of(cls, module: ModuleType) -> Library:
        """The library of an imported module."""
        return cls(module.__name__, module.__version__)


@dataclass(frozen=True)
class Gpu:
    """A GPU as its driver names it.

    Attributes:
        compute_capability: Such as 8.7.
        driver: The driver's version, as CUDA's (13.0); for the reader, an engine outlives it.
    """

    name: str
    compute_capability: str
    driver: str = ""

    def __str__(self) -> str:
        return f"{self.name:.60} (SM {self.compute_capability:.10})"


@dataclass(frozen=True)
class Options:
    """What an engine was asked to be.

    Attributes:
        workspace_bytes: Scratch memory that a kernel may ask for; None is the library's choice.
        optimization_level: 0 to 5; None is the library's choice.
        weight_streaming: Weights may stay in host memory and stream to the GPU.
        compute_capabilities: GPUs compiled for, of an engine that is tied to none; empty is the
            library's own choice.
    """

    workspace_bytes: int | None = None
    optimization_level: int | None = None
    weight_streaming: bool = False
    compute_capabilities: tuple[str, ...] = ()


@dataclass(frozen=True)
class Attempt:
    """A rung of the fallback ladder that failed, and what the library said."""

    rung: str
    why: str


@dataclass(frozen=True)
class Engine:
    """One built engine.

    Attributes:
        graph_sha256: Of the ONNX file it was built from.
        weights_sha256: Over all weights of the bundle.
        gpu: The GPU that it is tied to; None if it was compiled for a list of them, which needs
            none (TensorRT-RTX).
        asked: The options that the user gave: a later build with the same takes the engine.
        options: The options that it was built with; they differ from `asked` below the first rung.
        rung: The rung of the fallback ladder that succeeded.
        failed: The rungs tried before.
        profiles: (min, opt, max) shape of each changing input, one dict per profile.
        peak_bytes: The most that the process of the build had resident, pages of the mapped weights
            included; None if the system does not say.
        size: Bytes of the engine file.
        base_bytes: Resident there before the graph was parsed.
    """

    graph_sha256: str
    weights_sha256: str
    library: Library
    gpu: Gpu | None
    asked: Options
    options: Options
    rung: str
    profiles: tuple[dict[str, tuple[Shape, Shape, Shape]], ...]
    seconds: float
    peak_bytes: int | None
    size: int
    sha256: str
    base_bytes: int | None = None
    failed: tuple[Attempt, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """All engines of a bundle for one target, by graph."""

    bundle: Path
    target: str
    engines: dict[str, Engine] = field(default_factory=dict)

    @property
    def command(self) -> str:
        """What mends whatever is wrong with it."""
        return f"patchsieve build {self.bundle} --target {self.target}"


def folder_of(bundle: Path, target: str) -> Path:
    """Where a target's engines lie."""
    return bundle / "engines" / target


def engine_path(bundle: Path, target: str, graph: str) -> Path:
    """File of a graph's engine.

    Raises:
        BundleError: The graph's name would leave the folder.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", graph):
        raise BundleError(
            "the manifest names a graph that cannot be a file",
            found=repr(graph)[:120],
            expected="letters, digits, . - and _",
            do="do not use this bundle unless you know who made it",
        )
    return folder_of(bundle, target) / f"{graph}.engine"


def weights_hash(facts: Manifest) -> str:
    """One hash over all weights: graphs only point to them, engines hold them."""
    digest = hashlib.sha256()
    for path in sorted(facts.weights):
        digest.update(f"{path} {facts.files[path].sha256}\n".encode())
    return digest.hexdigest()


def misfit(facts: Manifest, graph: str) -> str:
    """Why a decision has no engine: its plan needs more slots than the stages reserve; or ""."""
    entry = facts.graphs[graph]
    plan = entry.identity.plan
    if (
        plan is None
        or entry.kind != DECISION
        or all(
            needed <= stage.slots
            for needed, stage in zip(facts.slots(plan), facts.stages, strict=True)
        )
    ):
        return ""
    return (
        f"not built: the plan {plan} needs {facts.slots(plan)} slots, the engines reserve "
        f"{[stage.slots for stage in facts.stages]} (export with a larger --budget)"
    )


def read_record(bundle: Path, target: str) -> Record:
    """Read the record of a target's engines.

    Raises:
        BundleError: There is none, or it is damaged or newer.
    """
    empty = Record(bundle, target)
    path = folder_of(bundle, target) / FILE_NAME
    if not files.is_there(path):
        raise BundleError(
            f"the bundle holds no engines for {target}", found=f"no {path}", do=empty.command
        )
    try:
        if path.stat().st_size > _LARGEST_RECORD:
            raise BundleError("the record of engines is too large to be one", do=empty.command)
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON
        raise BundleError(
            f"the record of engines {path} cannot be read",
            found=str(error)[:120],
            do=empty.command,
        ) from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if type(version) is not int or version != SCHEMA_VERSION:
        raise BundleError(
            f"the record of engines {path} is of another patchsieve",
            found="no schema_version" if version is None else f"schema {version!r:.20}",
            expected=f"schema {SCHEMA_VERSION}",
            do=empty.command,
        )
    if data.get("target") != target:
        raise BundleError(
            f"the record of engines {path} is of another target",
            found=f"{data.get('target')!r:.60}",
            expected=target,
            do=empty.command,
        )
    try:
        engines = read_as(dict[str, Engine], data.get("engines"), "the record's engines")
    except BundleError as error:
        raise BundleError(**error.fields() | {"do": empty.command}) from error
    return Record(bundle, target, engines)


def write_record(record: Record) -> None:
    """Write the record beside its engines: it is whole or as before."""
    engines = {graph: asdict(engine) for graph, engine in record.engines.items()}
    data = {"schema_version": SCHEMA_VERSION, "target": record.target, "engines": engines}
    path = folder_of(record.bundle, record.target) / FILE_NAME
    write_whole(path, (json.dumps(data, indent=1) + "\n").encode())


def check_loadable(record: Record, gpu: Gpu | None, library: Library) -> None:
    """Refuse engines that another library built, or that another GPU was meant to run.

    Args:
        record: The engines, all of which are to be loaded.
        gpu: The GPU here; None if there is none.
        library: The library that is to load them.

    Raises:
        BackendMissingError: There is no GPU.
        BundleError: An engine does not fit; the line ends in the command that mends it.
    """
    if gpu is None:
        raise BackendMissingError(
            f"engines for {record.target} run on an NVIDIA GPU",
            found="no GPU, or no driver",
            do="patchsieve doctor says what is missing; --target cpu runs without",
        )
    compiler = compiler_of(record.target)
    if not compiler.takes(gpu.compute_capability):
        usual, *others = of_compiler(FULL)
        raise BundleError(
            f"{compiler.label} runs no engine on this GPU",
            found=gpu,
            expected=f"compute capability {', '.join(compiler.capabilities or ())}",
            do=f"export with --targets {usual} ({' or '.join(others)} on a board), build there",
        )
    for graph, engine in record.engines.items():
        if engine.library != library:
            raise BundleError(
                f"the engine {graph} was built by another library",
                found=engine.library,
                expected=library,
                do=record.command,
            )
        if not runs_on(engine, gpu):
            raise BundleError(
                f"the engine {graph} was built for another GPU",
                found=_built_for(engine),
                expected=gpu,
                do=_command_for(record, engine, gpu),
            )


def check_whole(
    record: Record,
    facts: Manifest,
    graphs: Iterable[str] | None = None,
    *,
    hashes: bool = True,
    again: bool = False,
) -> dict[str, Path]:
    """Refuse engines that are missing, damaged, or built from another export of the bundle.

    Args:
        record: The engines.
        facts: The bundle's manifest.
        graphs: Which are wanted; by default all that can be built.
        hashes: Compare contents too, not only sizes; of files that were found whole and have not
            changed since, not again.
        again: Of those too.

    Returns:
        The engine file of each graph.

    Raises:
        BundleError: One line, with the command that mends it.
    """
    onnx = facts.targets[record.target]
    if graphs is None:
        graphs = [graph for graph in onnx if not misfit(facts, graph)]
    weights, paths = weights_hash(facts), {}
    verified = Verified(locate(record.bundle).root)
    try:
        for graph in graphs:
            path = engine_path(record.bundle, record.target, graph)
            engine = record.engines.get(graph)
            if engine is None or not files.is_there(path):
                raise BundleError(f"the engine {graph} is not built", do=record.command)
            if (engine.graph_sha256, engine.weights_sha256) != (
                facts.files[onnx[graph]].sha256,
                weights,
            ):
                raise BundleError(
                    f"the engine {graph} was built from another export", do=record.command
                )
            is_known = hashes and not again and verified.knows(path.resolve(), engine.sha256)
            if not is_whole(path, engine, hashes=hashes and not is_known, verified=verified):
                raise _damaged(record, path, engine)
            paths[graph] = path
    finally:
        verified.save()
    return paths


def is_whole(
    path: Path, engine: Engine, *, hashes: bool = True, verified: Verified | None = None
) -> bool:
    """Whether an engine file is the one that was recorded; `verified` learns whether it is."""
    if not files.is_there(path) or path.stat().st_size != engine.size:
        return False
    real, expected = path.resolve(), manifest.File(engine.size, engine.sha256)
    return not hashes or files.has_hash(real, expected, verified or Verified(path.parent))


def check_contents(record: Record) -> int:
    """Read every engine that is recorded, whatever was read before, and return how many there are.

    Raises:
        BundleError: One is missing or damaged.
    """
    verified = Verified(locate(record.bundle).root)
    try:
        for graph, engine in record.engines.items():
            path = engine_path(record.bundle, record.target, graph)
            if not is_whole(path, engine, verified=verified):
                raise _damaged(record, path, engine)
    finally:
        verified.save()
    return len(record.engines)


def _damaged(record: Record, path: Path, engine: Engine) -> BundleError:
    return BundleError(
        f"the engine {path} is damaged",
        found=f"{path.stat().st_size} bytes" if files.is_there(path) else "no such file",
        expected=f"{engine.size} bytes, sha256 {engine.sha256}",
        do=record.command,
    )


def open_engines(
    bundle: Path,
    facts: Manifest,
    target: str,
    *,
    gpu: Gpu | None,
    library: Library,
    graphs: Iterable[str] | None = None,
    hashes: bool = True,
    again: bool = False,
) -> dict[str, Path]:
    """Find the engines of a bundle that this library can load on this GPU.

    Returns:
        The engine file of each graph.

    Raises:
        BackendMissingError: There is no GPU.
        BundleError: Something does not fit; the line ends in the command that mends it.
    """
    record = read_record(bundle, target)
    wanted = None if graphs is None else list(graphs)
    engines = {g: e for g, e in record.engines.items() if wanted is None or g in wanted}
    check_loadable(Record(bundle, target, engines), gpu, library)
    return check_whole(record, facts, wanted, hashes=hashes, again=again)


def runs_on(engine: Engine, gpu: Gpu) -> bool:
    """Whether an engine was built for a GPU."""
    if engine.gpu is not None:
        # Tactics were timed on that card: another one of the same SM is another engine.
        tied = (engine.gpu.name, engine.gpu.compute_capability)
        return tied == (gpu.name, gpu.compute_capability)
    if engine.options.compute_capabilities:
        return gpu.compute_capability in engine.options.compute_capabilities
    return gpu.compute_capability in RTX.portable


def _built_for(engine: Engine) -> str:
    if engine.gpu is not None:
        return str(engine.gpu)
    listed = ", ".join(engine.options.compute_capabilities or RTX.portable)
    return f"compute capability {listed:.80}"


def _command_for(record: Record, engine: Engine, gpu: Gpu) -> str:
    if engine.gpu is not None:
        return record.command
    return f"{record.command} --compute-capability {gpu.compute_capability}"
