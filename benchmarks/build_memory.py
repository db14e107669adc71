"""Memory and time of building every TensorRT-RTX engine of a float16 bundle, without a GPU.

    python -m benchmarks.build_memory WORKDIR [--shape 1gb|7b] [--graphs vision,...] [--limit GB]

Makes a checkpoint of that shape with random weights (1gb: the true CLIP-L tower and a decoder 1024
wide with 16 layers; 7b: LLaVA-1.5-7B), exports it cut at two or three sites, and builds each engine
in a process of its own, as `patchsieve build` does. With --layers 12, 7b has that model's tower and
its first and last stage (4 layers; 8 layers and the head) in less than half of the time.

Extra memory is what that process has resident above what it had before it parsed the graph. It has
two parts: memory of its own, and pages of the weights' files, which TensorRT maps and the build
gives back as it goes (runtime/building/mapped_weights.py). With --limit builds run under
RLIMIT_DATA: the kernel itself refuses a process more private memory than that, all included.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import onnx
from onnx.external_data_helper import uses_external_data

from benchmarks.checkpoint import LLAVA_7B, ROOT, Shape, write_checkpoint
from patchsieve.contract import files, manifest
from patchsieve.runtime.building.builder_process import Job, build_in_process, memory_of
from patchsieve.runtime.building.profiles import profiles
from patchsieve.runtime.trt.engines import Options, misfit

TARGET = "tensorrt-rtx"
PROMISE = 1.5e9  # bytes of extra memory for a model of 1 GB
_EVERY = 0.005  # seconds between two looks at the process
ONE_GB = replace(
    LLAVA_7B, name="1gb", layers=16, hidden=1024, inner=2816, heads=16, plans={"": ((4, 10), ())}
)
SHAPES = {
    "1gb": ONE_GB,
    "7b": replace(LLAVA_7B, plans={"": ((4, 14, 24), ())}),
}


@dataclass(frozen=True)
class Cost:
    """What one engine cost; bytes beyond what was resident before parsing."""

    graph: str
    weights: int
    engine: int
    seconds: float
    extra: int
    own: int
    mapped: int


class Sampler:
    """Looks at the child process again and again and keeps the largest figures."""

    def __init__(self) -> None:
        self.most = {"RssAnon": 0, "RssFile": 0}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(_EVERY):
            for path in Path("/proc/self/task").glob("*/children"):
                for child in path.read_text().split():
                    for name in self.most:
                        self.most[name] = max(self.most[name], memory_of(name, child) or 0)


def weights_of(graph: Path) -> int:
    """Bytes of external data that a graph points to, each piece once."""
    pieces = set()
    for tensor in onnx.load(graph, load_external_data=False).graph.initializer:
        if uses_external_data(tensor):
            where = {entry.key: entry.value for entry in tensor.external_data}
            pieces.add((where["location"], where["offset"], int(where["length"])))
    return sum(length for _, _, length in pieces)


def make_bundle(work: Path, shape: Shape) -> None:
    """Export a float16 bundle of a shape, with random weights."""
    checkpoint = work / "checkpoint"
    write_checkpoint(checkpoint, shape)
    sites = ",".join(str(cut) for cut in shape.cuts if cut < shape.layers)
    options = f"--method fastv --sites {sites} --keep-ratio 0.25 --precision float16"
    command = ["export", str(checkpoint), "-o", str(work / "bundle"), *options.split()]
    command += ["--targets", f"cpu,{TARGET}", "--quiet"]
    subprocess.run([sys.executable, "-m", "patchsieve", *command], check=True, cwd=ROOT)
    shutil.rmtree(checkpoint)


def measure(bundle: Path, facts: manifest.Manifest, graph: str, out: Path) -> Cost:
    """Build one engine and throw it away."""
    source = bundle / facts.targets[TARGET][graph]
    shapes = tuple(profiles(facts, graph, TARGET))
    job = Job(str(source), str(out), shapes, TARGET, Options(), None)
    # A process that has only loaded the library: its parts of memory, told apart.
    idle = subprocess.run(
        [sys.executable, "-c", _IDLE], check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    anonymous, file = map(int, idle.stdout.split())
    with Sampler() as sampler:
        done = build_in_process(job)
    size = out.stat().st_size
    out.unlink()
    assert done.base_bytes is not None and done.peak_bytes is not None, "no /proc"
    return Cost(
        graph,
        weights_of(source),
        size,
        round(done.seconds, 2),
        extra=done.peak_bytes - done.base_bytes,
        own=sampler.most["RssAnon"] - anonymous,
        mapped=sampler.most["RssFile"] - file,
    )


_IDLE = """
from patchsieve.runtime.building import builder_process as b
b.load_tensorrt("tensorrt-rtx")
print(b.memory_of("RssAnon"), b.memory_of("RssFile"))
"""


def main() -> None:
    """Make, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1gb")
    parser.add_argument("--layers", type=int, help="decoder layers; by default those of the shape")
    parser.add_argument("--graphs", help="which graphs to build, all by default")
    parser.add_argument("--limit", type=float, metavar="GB", help="private memory allowed")
    parser.add_argument("--keep", action="store_true", help="leave the bundle there")
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    shape = replace(shape, layers=args.layers or shape.layers)
    args.workdir.mkdir(parents=True, exist_ok=True)
    bundle = args.workdir / "bundle"
    if not bundle.exists():
        make_bundle(args.workdir, shape)
    facts = files.read(bundle)
    graphs = [graph for graph in facts.targets[TARGET] if not misfit(facts, graph)]
    if args.graphs:
        graphs = [graph for graph in graphs if graph in args.graphs.split(",")]
    sources = {graph: weights_of(bundle / facts.targets[TARGET][graph]) for graph in graphs}
    print(f"floor: weights {sum(sources.values()) / 1e9:.2f} GB, read once and written once;")
    print(
        f"       at least one engine's own weights at a time: {max(sources.values()) / 1e6:.0f} MB"
    )
    if args.limit:
        most = int(args.limit * 1e9)
        resource.setrlimit(resource.RLIMIT_DATA, (most, resource.RLIM_INFINITY))
        print(f"each process may have {args.limit} GB of private memory (RLIMIT_DATA)")
    print(f"{'engine':28}{'weights MB':>11}{'s':>8}{'extra MB':>10}{'own':>8}{'mapped':>8}")
    costs, start = [], time.perf_counter()
    for graph in graphs:
        cost = measure(bundle, facts, graph, args.workdir / "engine")
        costs.append(cost)
        figures = (cost.extra, cost.own, cost.mapped)
        print(
            f"{graph:28}{cost.weights / 1e6:11.1f}{cost.seconds:8.1f}{figures[0] / 1e6:10.0f}"
            f"{figures[1] / 1e6:8.0f}{figures[2] / 1e6:8.0f}",
            flush=True,
        )
    extra, own = max(cost.extra for cost in costs), max(cost.own for cost in costs)
    print(
        f"most extra memory {extra / 1e9:.2f} GB, {own / 1e9:.2f} of it the process's own "
        f"(promised for 1 GB: {PROMISE / 1e9} GB)"
    )
    if not args.keep:
        shutil.rmtree(bundle)
    result = {
        "shape": shape.name,
        "layers": shape.layers,
        "seconds": round(time.perf_counter() - start, 1),
        "limit_bytes": None if args.limit is None else int(args.limit * 1e9),
        "extra_bytes": extra,
        "own_bytes": own,
        "promise_bytes": PROMISE,
        "engines": [asdict(cost) for cost in costs],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
