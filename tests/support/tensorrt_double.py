"""A small stand-in for the module `tensorrt`, whose packages no test machine has.

It parses real ONNX files, checks what it is asked as TensorRT documents it, and its engine is
a JSON text of how it was built. `install` writes it into a folder, from where a build's own process
imports it. Tests only: nothing here says what TensorRT would make of a graph.
"""

from __future__ import annotations

import enum
import json
import os
import signal
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx

FIRST_LINE = "# A stand-in for tests."


@dataclass(frozen=True)
class Kind:
    """Which TensorRT it stands for, and how much memory its machine has.

    Attributes:
        has_typed_flag: 10.x: networks are typed only when asked to.
        has_fp16: Up to 10.x: types may also be chosen by the builder.
        has_stream: An engine can be written as it is built.
        has_streaming: `BuilderFlag.WEIGHT_STREAMING` exists.
        has_gpu: Without one a builder cannot be made.
        most_workspace: A build that may ask for more runs out of memory.
        most_level: So does one of a higher level.
        needs_streaming: So does one that does not stream weights.
        dies: Running out of memory kills the process, as Linux does.
        fails: A build of a graph with this text in its file's name fails, or crashes.
        errors: What it says then; nothing for a crash.
        warnings: What it warns of first.
    """

    version: str = "10.3.0"
    has_typed_flag: bool = True
    has_fp16: bool = True
    has_stream: bool = False
    has_streaming: bool = True
    has_gpu: bool = True
    most_workspace: int | None = None
    most_level: int = 5
    needs_streaming: bool = False
    dies: bool = False
    fails: str = "nothing"
    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def install(folder: Path, kind: Kind) -> Path:
    """Write a `tensorrt.py` that is this double."""
    root = Path(__file__).resolve().parents[2]
    lines = [
        FIRST_LINE,
        "import sys",
        f"sys.path.append({str(root)!r})",
        "from tests.support import tensorrt_double",
        f"kind = tensorrt_double.Kind(**{asdict(kind)!r})",
        "vars().update(tensorrt_double.names(kind))",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tensorrt.py").write_text("\n".join(lines) + "\n")
    return folder


def names(kind: Kind) -> dict[str, Any]:
    """What the module holds."""
    typed = {"STRONGLY_TYPED": 1} if kind.has_typed_flag else {"EXPLICIT_BATCH": 0}
    flags = {"REFIT": 1} | ({"WEIGHT_STREAMING": 2} if kind.has_streaming else {})
    flags |= {"FP16": 3} if kind.has_fp16 else {}
    builder = type("Builder", (_StreamBuilder if kind.has_stream else _Builder,), {"kind": kind})
    return {
        "__version__": kind.version,
        "Builder": builder,
        "OnnxParser": _Parser,
        "ILogger": _Logger,
        "IProgressMonitor": type("IProgressMonitor", (), {}),
        "IStreamWriter": type("IStreamWriter", (), {}),
        "NetworkDefinitionCreationFlag": enum.IntEnum("NetworkDefinitionCreationFlag", typed),
        "BuilderFlag": enum.Enum("BuilderFlag", flags),
        "MemoryPoolType": enum.Enum("MemoryPoolType", {"WORKSPACE": 0}),
    }


def module(kind: Kind) -> ModuleType:
    """The double in this process."""
    made = ModuleType("tensorrt")
    vars(made).update(names(kind))
    return made


class _Logger:
    class Severity(enum.Enum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2


@dataclass
class _Tensor:
    name: str
    shape: tuple[int, ...]


class _Network:
    def __init__(self, is_typed: bool) -> None:
        self.is_typed = is_typed
        self.inputs: list[_Tensor] = []
        self.file = ""
        self.num_outputs = 0

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    def get_input(self, index: int) -> _Tensor:
        return self.inputs[index]


class _Parser:
    num_errors = 0

    def __init__(self, network: _Network, logger: Any) -> None:
        self.network = network

    def parse_from_file(self, path: str) -> bool:
        return self._read(onnx.load(path, load_external_data=False), Path(path))

    def parse(self, model: bytes, path: str) -> bool:
        return self._read(onnx.load_model_from_string(model), Path(path))

    def _read(self, model: onnx.ModelProto, path: Path) -> bool:
        graph, folder = model.graph, path.parent
        for tensor in graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    file = folder / entry.value
                    # As its strictest versions: a plain file, in the folder or below it.
                    if file.resolve() != folder.resolve() / entry.value:
                        return False
        for value in graph.input:
            sizes = [axis.dim_value or -1 for axis in value.type.tensor_type.shape.dim]
            self.network.inputs.append(_Tensor(value.name, tuple(sizes)))
        self.network.num_outputs = len(graph.output)
        self.network.file = path.name
        return True


class _TimingCache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return self.content or b"timings"


class _Config:
    def __init__(self) -> None:
        self.workspace: int | None = None
        self.builder_optimization_level = 3
        self.flags: list[str] = []
        self.profiles: list[dict[str, Any]] = []
        self.progress_monitor: Any = None
        self.cache: _TimingCache | None = None

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        assert pool.name == "WORKSPACE"
        self.workspace = size

    def set_flag(self, flag: Any) -> None:
        self.flags.append(flag.name)

    def create_timing_cache(self, content: bytes) -> _TimingCache:
        return _TimingCache(content)

    def set_timing_cache(self, cache: _TimingCache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if cache.content not in (b"", b"timings"):
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> _TimingCache:
        assert self.cache is not None
        return self.cache

    def add_optimization_profile(self, profile: _Profile) -> int:
        self.profiles.append(profile.shapes)
        return len(self.profiles) - 1


class _Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, name: str, low: Any, best: Any, high: Any) -> None:
        self.shapes[name] = [low, best, high]


class _Builder:
    kind: Kind

    def __init__(self, logger: Any) -> None:
        self.logger = logger
        if not self.kind.has_gpu:
            logger.log(_Logger.Severity.ERROR, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")

    def create_network(self, flags: int) -> _Network:
        return _Network(is_typed=bool(flags & 2) or not self.kind.has_typed_flag)

    def create_builder_config(self) -> _Config:
        return _Config()

    def create_optimization_profile(self) -> _Profile:
        return _Profile()

    def build_serialized_network(self, network: _Network, config: _Config) -> bytes | None:
        if config.progress_monitor is not None:
            config.progress_monitor.phase_start("Building engine", None, 1)
            config.progress_monitor.phase_finish("Building engine")
        kind = self.kind
        if kind.fails in network.file:
            for text in kind.warnings:
                self.logger.log(_Logger.Severity.WARNING, text)
            for text in kind.errors:
                self.logger.log(_Logger.Severity.ERROR, text)
            if not kind.errors:
                os.kill(os.getpid(), signal.SIGSEGV)
            return None
        has_room = (
            kind.most_workspace is None or (config.workspace or 1 << 62) <= kind.most_workspace
        )
        has_room &= config.builder_optimization_level <= kind.most_level
        has_room &= not kind.needs_streaming or "WEIGHT_STREAMING" in config.flags
        if not has_room and kind.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        if not has_room:
            self.logger.log(
                _Logger.Severity.ERROR,
                "[virtualMemoryBuffer.cpp::resizePhysical] Error Code 2: OutOfMemory (Requested "
                "size was 1073741824 bytes.)",
            )
            return None
        made = {
            "is_typed": network.is_typed,
            "workspace": config.workspace,
            "level": config.builder_optimization_level,
            "flags": config.flags,
            "profiles": config.profiles,
            "cache": None if config.cache is None else config.cache.content.decode(),
            "process": os.getpid(),
        }
        return json.dumps(made).encode()


class _StreamBuilder(_Builder):
    def build_serialized_network_to_stream(
        self, network: _Network, config: _Config, writer: Any
    ) -> bool:
        engine = self.build_serialized_network(network, config)
        if engine is None:
            return False
        half = len(engine) // 2
        return all(writer.write(part) == len(part) for part in (engine[:half], engine[half:]))
