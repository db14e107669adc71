"""The command lines that build the same engines by hand; nothing needs to be installed.

Flags as `trtexec --help` of TensorRT 10.3 to 11 lists them, and for TensorRT-RTX its tool
`tensorrt_rtx`, which builds without a GPU.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from patchsieve.contract.manifest import Manifest
from patchsieve.contract.targets import compiler_of
from patchsieve.runtime.building.build_config import TIMING_CACHE
from patchsieve.runtime.building.profiles import Profile, profiles
from patchsieve.runtime.trt.engines import Options, engine_path


def command_line(bundle: Path, facts: Manifest, target: str, graph: str, options: Options) -> str:
    """The line that builds a graph's engine.

    Args:
        bundle: The directory, as the line is to name it.
        facts: Its manifest.
        target: The target.
        graph: One of its graphs.
        options: What the engine is to be.
    """
    compiler = compiler_of(target)
    engine = engine_path(bundle, target, graph)
    words = [
        compiler.tool,
        f"--onnx={bundle / facts.targets[target][graph]}",
        f"--saveEngine={engine}",
    ]
    shapes = profiles(facts, graph, target)
    for number, profile in enumerate(shapes):
        if len(shapes) > 1:
            words.append(f"--profile={number}")
        words += [
            f"--{name}Shapes={_spec(profile, which)}"
            for which, name in enumerate(("min", "opt", "max"))
        ]
    # 11.x is always typed and takes the flag without effect; TensorRT-RTX does not know it.
    if not compiler.is_ahead_of_time:
        words += ["--stronglyTyped", f"--timingCacheFile={engine.with_name(TIMING_CACHE)}"]
    words += _options(options)
    return shlex.join([*words, "--skipInference"])


def _options(options: Options) -> list[str]:
    words = []
    if options.workspace_bytes is not None:
        words.append(f"--memPoolSize=workspace:{options.workspace_bytes / (1 << 20):.10g}M")
    if options.optimization_level is not None:
        words.append(f"--builderOptimizationLevel={options.optimization_level}")
    if options.weight_streaming:
        words.append("--allowWeightStreaming")
    if "current" in options.compute_capabilities:
        words.append("--useGpu")
    elif options.compute_capabilities:
        listed = ",".join(text.replace(".", "") for text in options.compute_capabilities)
        words.append(f"--computeCapabilities={listed}")
    return words


def _spec(profile: Profile, which: int) -> str:
    return ",".join(f"{name}:{'x'.join(map(str, s[which]))}" for name, s in profile.items())
