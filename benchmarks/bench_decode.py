"""Decode on the CPU: the time of a token depends on the rows present, not on the capacity.

    python benchmarks/bench_decode.py                   # 1024 wide, 16 layers, 0.27 B weights
    python benchmarks/bench_decode.py --shape tiny      # seconds, to see that it works

A random LLaVA is exported once for each capacity (--max-text-tokens + --max-new-tokens). Each
capacity decodes at the same numbers of rows; the capacities take turns in every round, so that the
machine's mood falls on all alike. Printed first: the floor, weight bytes and KV bytes that a token
must read over the memory bandwidth measured here. Times are medians; the ratio is of the largest
capacity to the smallest, round by round. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import make_checkpoint  # noqa: E402  (beside this folder)

from patchsieve.contract import files, manifest  # noqa: E402
from patchsieve.contract.weights import HEAD, LAYER  # noqa: E402
from patchsieve.export.exporter import ExportOptions, export  # noqa: E402
from patchsieve.runtime.board import machine  # noqa: E402
from patchsieve.runtime.model import Model  # noqa: E402

NEW_TOKENS = 64  # of each capacity; the rest is text


@dataclass(frozen=True)
class Shape:
    """A random decoder: `hidden` wide, `heads` x 64 where not given otherwise."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int


SHAPES = {
    "default": Shape(1024, 16, 16, 16, 1216),
    "grouped": Shape(1024, 16, 16, 4, 1216),
    "tiny": Shape(128, 4, 4, 2, 1216),
}


def make_bundles(shape: Shape, capacities: list[int], folder: Path) -> list[Path]:
    """Export one checkpoint once for each capacity."""
    model, processor = make_checkpoint.make_llava(
        "llama",
        hidden=shape.hidden,
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        vision_layers=2,
        vision_hidden=64,
        image_size=32,
        std=0.02,
        text={"max_position_embeddings": 1 << 16},
    )
    checkpoint = make_checkpoint.save_llava(folder / "checkpoint", model, processor)
    del model
    bundles = []
    for capacity in capacities:
        out = folder / f"capacity-{capacity}"
        limits = manifest.Limits(capacity - NEW_TOKENS, NEW_TOKENS, 1)
        export(str(checkpoint), out, ExportOptions(limits=limits))
        bundles.append(out)
    shutil.rmtree(checkpoint)
    return bundles


def bandwidth(threads: int) -> float:
    """Bytes per second that `threads` threads read from memory, best of five, 256 MB each."""
    from concurrent.futures import ThreadPoolExecutor

    blocks = [np.ones(1 << 26, np.float32) for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            start = time.perf_counter()
            list(pool.map(np.max, blocks))  # a reduction without a second operand: it only reads
            best = max(best, sum(b.nbytes for b in blocks) / (time.perf_counter() - start))
    return best


def decoder_bytes(facts: manifest.Manifest) -> int:
    """Weight bytes that one token reads: every layer and the head, one row of the embeddings."""
    parts = (LAYER.name, HEAD.name)
    return sum(facts.files[p].size for p, entry in facts.weights.items() if entry.part in parts)


class Decoder:
    """One capacity: a cache filled to a number of rows, and steps from there."""

    def __init__(self, bundle: Path, capacity: int, threads: int) -> None:
        self.capacity = capacity
        self.model = Model(bundle, threads=threads, check="size")
        self.cache = self.model.pipeline.new_cache("none")
        noise = np.random.default_rng(0)
        # Only values, not what they mean, matter to the time: the cache is filled with noise.
        for stage in self.cache.stages:
            for array in stage.buffers.arrays.values():
                array[...] = noise.standard_normal(array.shape[-1], np.float32)

    def step_ms(self, rows: int, steps: int) -> float:
        """Median of `steps` tokens decoded with `rows` rows present."""
        times = []
        for _ in range(steps):
            self.cache.rewind((rows, *(rows for _ in self.cache.stages)))
            start = time.perf_counter()
            self.model.pipeline.decode(5, self.cache)
            times.append((time.perf_counter() - start) * 1e3)
        return float(np.median(times))


def measure(decoders: list[Decoder], rows: list[int], rounds: int, steps: int) -> dict[str, Any]:
    """Milliseconds per token, [rows][capacity][round]; capacities take turns."""
    times: dict[int, dict[int, list[float]]] = {
        count: {decoder.capacity: [] for decoder in decoders} for count in rows
    }
    for decoder in decoders:
        decoder.step_ms(rows[0], steps)  # warm-up
    for number in range(rounds):
        for count in rows:
            for decoder in decoders if number % 2 else decoders[::-1]:
                times[count][decoder.capacity].append(decoder.step_ms(count, steps))
    return times


def report(times: dict[int, dict[int, list[float]]], floors: dict[int, float]) -> dict[str, Any]:
    """Print the table and return it as JSON can hold it."""
    capacities = list(next(iter(times.values())))
    small, large = min(capacities), max(capacities)
    head = "".join(f"{f'slots {c}':>14}" for c in capacities)
    print(f"\n{'rows':>6}{'floor ms':>10}{head}{'largest/smallest':>18}")
    found = []
    for rows, by_capacity in times.items():
        medians = {c: float(np.median(v)) for c, v in by_capacity.items()}
        pairs = zip(by_capacity[large], by_capacity[small], strict=True)
        ratio = float(np.median([a / b for a, b in pairs]))
        cells = "".join(f"{medians[c]:14.3f}" for c in capacities)
        print(f"{rows:6}{floors[rows]:10.3f}{cells}{ratio:18.3f}")
        found.append({"rows": rows, "floor_ms": floors[rows], "ms": medians, "ratio": ratio})
    first, last = found[0]["ms"][small], found[-1]["ms"][small]
    print(f"\nfrom {found[0]['rows']} to {found[-1]['rows']} rows: x{last / first:.2f}")
    return {"table": found, "largest_ratio": max(row["ratio"] for row in found)}


def main() -> None:
    """Export, print the floor, measure, print the table."""
    args = _arguments()
    shape = SHAPES[args.shape]
    with tempfile.TemporaryDirectory(prefix="bench_decode-") as folder:
        print(f"exporting {args.shape} for {args.capacities} slots ...", file=sys.stderr)
        with contextlib.redirect_stdout(sys.stderr):
            bundles = make_bundles(shape, args.capacities, Path(folder))
        facts = files.read(bundles[0])
        rate = bandwidth(args.threads)
        weights = decoder_bytes(facts)
        per_row = sum(facts.row_bytes(stage) for stage in facts.stages)
        floors = {rows: (weights + rows * per_row) / rate * 1e3 for rows in args.rows}
        print(f"{args.shape}: {asdict(shape)}, {facts.precision}, {args.threads} threads")
        print(
            f"floor: {weights / 1e6:.1f} MB of weights + {per_row / 1e3:.1f} kB a row "
            f"over {rate / 1e9:.1f} GB/s"
        )
        if weights < 64 << 20:
            print("the weights may lie in the processor's cache: the floor is then no floor")
        decoders = [
            Decoder(bundle, capacity, args.threads)
            for bundle, capacity in zip(bundles, args.capacities, strict=True)
        ]
        found = report(measure(decoders, args.rows, args.rounds, args.steps), floors)
        for decoder in decoders:
            decoder.model.close()
    print(
        json.dumps(
            {
                "benchmark": "decode",
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "machine": machine.facts(),
                "threads": args.threads,
                "shape": asdict(shape),
                "weight_bytes": weights,
                "kv_bytes_per_row": per_row,
                "bandwidth": rate,
                "rounds": args.rounds,
                "steps": args.steps,
            }
            | found
        )
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="default")
    add("--capacities", type=_integers, default=[1024, 4096, 16384], help="slots of each bundle")
    add("--rows", type=_integers, default=[64, 128, 256, 512, 896], help="rows present")
    add("--rounds", type=int, default=5)
    add("--steps", type=int, default=20, help="tokens of each median")
    add("--threads", type=int, default=machine.cpu(machine.Probes())["cores_allowed"])
    args = parser.parse_args()
    if max(args.rows) >= min(args.capacities) or min(args.capacities) <= NEW_TOKENS:
        parser.error("the rows must fit the smallest capacity, and that must exceed 64")
    return args


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
