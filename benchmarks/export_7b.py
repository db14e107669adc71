"""Export (and, if asked, build) at LLaVA-1.5-7B's real shape with random weights: time and memory.

    python -m benchmarks.export_7b WORKDIR [--layers 32] [--precision int4] [--build]
        [--build-memory GB] [--keep]

Writes a checkpoint of that shape in float16 shards (13.5 GB at 32 layers), exports it in a process
of its own and prints that process's peak resident memory beside the promise: 2 GB plus the largest
tensor in float16 (the default), 4 GB where matrices are quantised. With --build it compiles every
TensorRT-RTX engine, one process per graph; with --build-memory the decoder is divided so that each
takes at most so much.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.checkpoint import LLAVA_7B, ROOT, write_checkpoint

PROMISE = 2e9  # bytes beside the largest tensor
QUANTISING = 4e9  # bytes
# Not ru_maxrss: a child process starts with its parent's.
MEASURED = "import sys; from patchsieve.cli import main; from benchmarks.peak_memory import "
MEASURED += "peak_memory; code = main(sys.argv[1:]); print('PEAK', peak_memory()); sys.exit(code)"


def measured(arguments: list[str]) -> tuple[float, int, str]:
    """Run a patchsieve command in its own process: seconds, peak resident bytes, its output."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    seconds = time.perf_counter() - start
    output, _, peak = done.stdout.rpartition("PEAK ")
    return seconds, int(peak), output


def main() -> None:
    """Make, export, build, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--precision", default="float16", help="as `patchsieve export` takes it")
    parser.add_argument("--build", action="store_true")
    parser.add_argument("--build-memory", metavar="GB", help="as `patchsieve export` takes it")
    parser.add_argument("--keep", action="store_true", help="leave checkpoint and bundle there")
    args = parser.parse_args()
    checkpoint, bundle = args.workdir / "checkpoint", args.workdir / "bundle"
    weights = write_checkpoint(checkpoint, replace(LLAVA_7B, layers=args.layers))
    largest = 2 * LLAVA_7B.vocabulary * LLAVA_7B.hidden
    print(f"weights {weights / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB")
    sites = [site for site in (4, 14, 24) if site < args.layers]
    options = f"--method atp --theta-r 0.5 --theta-s 0.9 --sites {','.join(map(str, sites))}"
    options += f" --budget {','.join(map(str, [144, 96, 24][: len(sites)]))}"
    is_float = args.precision == "float16"
    options += f" --precision {args.precision} --quiet --json"
    options += f" --targets {'cpu,tensorrt-rtx' if is_float else 'tensorrt-rtx,tensorrt'}"
    if args.build_memory is not None:
        options += f" --build-memory {args.build_memory}"
    command = ["export", str(checkpoint), "-o", str(bundle), *options.split()]
    seconds, peak, _ = measured(command)
    limit = PROMISE + largest if is_float else QUANTISING
    stored = sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file())
    print(f"export: {seconds:.0f} s, peak {peak / 1e9:.2f} GB, promised under {limit / 1e9:.2f} GB")
    result = {
        "layers": args.layers,
        "weights_bytes": weights,
        "export_seconds": round(seconds, 1),
        "export_peak_bytes": peak,
        "export_limit_bytes": limit,
        "bundle_bytes": stored,
    }
    if args.build:
        seconds, _, output = measured(["build", str(bundle), "--quiet", "--json"])
        built = json.loads(output)
        peak = built["peak_memory_bytes"]  # of the processes that built, one for each graph
        print(f"build: {seconds:.0f} s, peak {peak / 1e9:.2f} GB, {built['bytes'] / 1e9:.2f} GB")
        result |= {"build_seconds": seconds, "build_peak_bytes": peak, "engines": built["engines"]}
    if not args.keep:
        shutil.rmtree(checkpoint)
        shutil.rmtree(bundle)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
