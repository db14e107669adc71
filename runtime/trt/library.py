"""Load TensorRT, hear what it says, and let it parse a graph.

One module serves `tensorrt` 10.3 to 11.x and `tensorrt_rtx` (1.7.1 is the version seen): builder,
parser and profiles carry the same names in both. What only one of them has is found by looking for
the name, never by comparing versions.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from patchsieve.contract.errors import BackendMissingError, BundleError
from patchsieve.contract.targets import TARGETS, by_version, compiler_of

log = logging.getLogger(__name__)

# How TensorRT says that memory was short.
_SHORTAGE = (
    "out of memory",
    "outofmemory",
    "memoryallocation",
    "bad_alloc",
    "could not be allocated",
    "insufficient memory",
    "insufficient workspace",
    "memory is insufficient",
)
# A compiler that cannot build a layer says the same words, so that they need one of those above
# beside them; where tactics were skipped for want of memory, only a warning says it.
_NO_KERNEL = "could not find any implementation"

# Said of every int64 input, and of every machine without a driver when anything else fails.
_HARMLESS = ("Int64 binding", "catchCudaError")


def load_tensorrt(target: str) -> ModuleType:
    """Import the library that makes and runs a target's engines.

    Raises:
        BackendMissingError: It is not installed, or its own libraries are not.
    """
    row, name = TARGETS[target], compiler_of(target).module
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:  # OSError: a wheel whose shared library is absent
        raise BackendMissingError(
            f"target {target} needs the Python package {name}",
            found=str(error),
            do=row.install_on_board if row.is_for_boards else row.install,
        ) from error


@dataclass
class Messages:
    """Warnings and errors of one parse or build."""

    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def reason(self) -> str:
        """Pick the first error that says something, in one line."""
        lines = [text for text in self.errors if not any(word in text for word in _HARMLESS)]
        return (lines or self.errors or ["TensorRT gave no reason"])[0]

    def shortage(self) -> str | None:
        """The first message that says that memory was short; None if nothing says so.

        A warning counts only beside an error that no kernel was found: a build that skips a tactic
        for want of memory warns of it and continues.
        """
        texts = list(self.errors)
        if any(_NO_KERNEL in text.lower() for text in self.errors):
            texts += self.warnings
        short = (text for text in texts if any(word in text.lower() for word in _SHORTAGE))
        return next(short, None)


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


def parse(
    trt: ModuleType, path: Path, messages: Messages, content: bytes | None = None
) -> tuple[Any, Any, Any]:
    """Make builder, network and parser; the parser must outlive the network's weights.

    Args:
        trt: The library.
        path: The graph's file; its weights lie in its folder.
        messages: Takes what the library says.
        content: The graph itself, where no file in that folder holds it.

    Raises:
        BackendMissingError: The library builds on a GPU only, and there is none.
        BundleError: The graph cannot be parsed.
    """
    if content is None and not path.is_file():
        raise BundleError(f"graph {path} is not there", do="export the bundle again")
    try:
        builder = trt.Builder(shared_logger(trt))
    except TypeError as error:  # "factory function returned nullptr": no driver, no GPU
        raise BackendMissingError(
            f"{trt.__name__} {trt.__version__} builds on the GPU that is to run the engine",
            found=messages.errors[0] if messages.errors else str(error),
            do="build on that machine; patchsieve doctor says what is missing",
        ) from error
    # 10.x reads types from the graph only when asked to; 11.x and RTX always do, and have no FP16.
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    if typed is None and hasattr(trt.BuilderFlag, "FP16"):
        raise BackendMissingError(
            "this TensorRT cannot take the types of a graph as they are written",
            found=f"{trt.__name__} {trt.__version__}",
            expected="10.3 (JetPack 6.1) or newer",
            do="upgrade TensorRT or JetPack",
        )
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, shared_logger(trt))
    is_read = (
        parser.parse_from_file(str(path)) if content is None else parser.parse(content, str(path))
    )
    if not is_read:
        raise _parser_error(trt, parser, path, messages)
    if network.num_outputs == 0:  # a file that is not ONNX parses as an empty network
        raise BundleError(f"{path} holds no graph", do="export the bundle again")
    return builder, network, parser


def _parser_error(trt: ModuleType, parser: Any, path: Path, messages: Messages) -> BundleError:
    what = f"{trt.__name__} {trt.__version__} cannot read {path.name}"
    if parser.num_errors == 0:
        return BundleError(what, found=messages.reason(), do="export the bundle again")
    error = parser.get_error(0)
    lines = [line for line in error.desc().splitlines() if not any(w in line for w in _HARMLESS)]
    if error.node_operator():
        what += f" at node {error.node_name()!r}, operator {error.node_operator()}"
    missing = [text for text in messages.errors if "Failed to open file" in text]
    return BundleError(
        what,
        found=missing[0] if missing else " ".join(lines),
        do="keep the weights beside the graph"
        if missing
        else f"build the target of this version: {by_version()}",
    )
