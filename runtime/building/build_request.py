"""What a user asks of a build, and what follows from it for each graph."""

from __future__ import annotations

from dataclasses import dataclass, replace

from patchsieve.contract.errors import BundleError, PatchsieveError
from patchsieve.contract.graphs import STAGE, VISION
from patchsieve.contract.manifest import Manifest
from patchsieve.contract.targets import USUAL, WITH_ENGINES, compiler_of
from patchsieve.runtime.trt.device import Device
from patchsieve.runtime.trt.engines import Options

STREAMING = ("auto", "on", "off")


@dataclass(frozen=True)
class Request:
    """What the user asks of a build.

    Attributes:
        target: One that has engines.
        options: What the engines are to be; `weight_streaming` follows from the two below.
        streaming: "on", "off", or "auto": where the weights are larger than the GPU's memory.
        device_bytes: Memory of the GPU that will run the engines; the one here by default.
        force: Build existing engines again.
    """

    target: str
    options: Options = Options()
    streaming: str = "auto"
    device_bytes: int | None = None
    force: bool = False

    def __post_init__(self) -> None:
        if self.target not in WITH_ENGINES:
            raise PatchsieveError(
                "this target has no engines to build",
                found=self.target[:60],
                expected=", ".join(WITH_ENGINES),
                do="choose one of these with --target",
            )
        if self.streaming not in STREAMING:
            raise PatchsieveError(
                "bad --weight-streaming",
                found=self.streaming,
                expected=", ".join(STREAMING),
                do="choose one of these with --weight-streaming",
            )
        level = self.options.optimization_level
        if level is not None and not 0 <= level <= 5:
            raise PatchsieveError(
                "bad --optimization-level",
                found=level,
                expected="0 to 5",
                do="choose one of these with --optimization-level, or leave it out",
            )

    @property
    def is_ahead_of_time(self) -> bool:
        """Engines are compiled for a list of GPUs, none of which need be here."""
        is_here = "current" in self.options.compute_capabilities
        return compiler_of(self.target).is_ahead_of_time and not is_here


def graphs_of(facts: Manifest, target: str) -> dict[str, str]:
    """The graphs of a target, or why there are none to build."""
    if target not in facts.targets:
        raise BundleError(
            f"the bundle holds no graphs for {target}",
            found=", ".join(sorted(facts.targets)),
            do=f"export it again with --targets {USUAL},{target}",
        )
    return facts.targets[target]


def weight_bytes(facts: Manifest) -> int:
    """Bytes of the weights that engines hold: the table of embeddings stays with the host."""
    return sum(facts.files[path].size for path in facts.weights if path != facts.embeddings.file)


def should_stream(facts: Manifest, request: Request, device: Device | None) -> tuple[bool, str]:
    """Whether engines are to stream their weights, and what the user should know of it.

    All engines of a bundle are loaded at once, so that all weights count.
    """
    if request.streaming != "auto":
        return request.streaming == "on", ""
    weights = weight_bytes(facts)
    memory = request.device_bytes or (None if device is None else device.memory_bytes)
    if memory is None or weights <= memory:
        return False, ""
    sizes = f"the weights ({weights / 1e9:.1f} GB) exceed the memory ({memory / 1e9:.1f} GB)"
    if request.device_bytes is None and device is not None and device.is_integrated:
        return False, (
            f"{sizes}, which this GPU shares with the host: streaming them cannot help | "
            "what to do: export with a smaller --precision"
        )
    return True, f"{sizes}: engines are built to stream them (--weight-streaming off forbids it)"


def options_of(facts: Manifest, request: Request, graph: str, streams: bool) -> Options:
    """The options of a graph's engine; only those of tower and stages stream their weights."""
    is_heavy = facts.graphs[graph].kind in (VISION, STAGE)
    return replace(request.options, weight_streaming=streams and is_heavy)
