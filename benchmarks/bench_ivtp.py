"""IVTP beside no pruning on the CPU: vision, prefill, and what its decisions cost.

    python benchmarks/bench_ivtp.py                   # CLIP-L/336's measures, 1024 wide, 16 layers
    python benchmarks/bench_ivtp.py --shape tiny      # seconds, to see that it works

A random LLaVA with a CLIP of its own is exported once; 576 tokens go down to 64. Both plans answer
the same request of one image and `--text-tokens` tokens and take turns in every round, so that the
machine's mood falls on both alike. Printed: medians of the vision graph, the prefill with all
decisions, the scorer (the text tower and the choice of words) and the decisions, each beside no
pruning and as a share of the time to the first token. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import make_checkpoint  # noqa: E402  (beside this folder)
from transformers import CLIPConfig, CLIPModel, LlavaForConditionalGeneration  # noqa: E402

from patchsieve.contract.manifest import Limits  # noqa: E402
from patchsieve.contract.plan import PseudoCls  # noqa: E402
from patchsieve.export.exporter import ExportOptions, export  # noqa: E402
from patchsieve.pruning.recipes import Size, ivtp  # noqa: E402
from patchsieve.runtime.board import machine  # noqa: E402
from patchsieve.runtime.model import Model  # noqa: E402

PARTS = ("vision", "scorer", "prefill", "decide", "ttft")


@dataclass(frozen=True)
class Shape:
    """A random LLaVA and CLIP's text tower."""

    image_size: int
    patch_size: int
    vision_layers: int
    vision_hidden: int
    hidden: int
    layers: int
    text_hidden: int
    text_layers: int
    num_keep: int
    vocab_size: int = 1216


SHAPES = {
    "default": Shape(336, 14, 24, 1024, 1024, 16, 768, 12, 64),
    "tiny": Shape(48, 8, 5, 64, 128, 7, 64, 2, 6),
}


def make_models(shape: Shape, folder: Path) -> tuple[Path, Path]:
    """A LLaVA and its CLIP, as directories."""
    tokenizer = make_checkpoint.make_tokenizer("llama")
    config = make_checkpoint.make_config(
        "llama",
        layers=shape.layers,
        hidden=shape.hidden,
        heads=shape.hidden // 64,
        kv_heads=shape.hidden // 64,
        vision_layers=shape.vision_layers,
        vision_hidden=shape.vision_hidden,
        image_size=shape.image_size,
        patch_size=shape.patch_size,
        vocab_size=shape.vocab_size,
    )
    config.vision_config.num_attention_heads = shape.vision_hidden // 64
    config.vision_config.projection_dim = shape.text_hidden
    for part in ("bos", "eos", "pad"):
        token = f"{part}_token_id"
        setattr(config.text_config, token, getattr(tokenizer, token))
    llava = LlavaForConditionalGeneration(config).eval()
    make_checkpoint.set_random_weights(llava, 0, 0.02)
    processor = make_checkpoint.make_processor(config, tokenizer)
    checkpoint = make_checkpoint.save_llava(folder / "checkpoint", llava, processor)
    text = {
        "hidden_size": shape.text_hidden,
        "intermediate_size": 4 * shape.text_hidden,
        "num_hidden_layers": shape.text_layers,
        "num_attention_heads": shape.text_hidden // 64,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 77,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = config.vision_config.to_dict()
    clip = CLIPModel(
        CLIPConfig(text_config=text, vision_config=vision, projection_dim=shape.text_hidden)
    )
    make_checkpoint.set_random_weights(clip, 1, 0.02)
    clip.save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")  # any tokenizer: words here mean nothing
    return checkpoint, folder / "clip"


def question(model: Model, text_tokens: int) -> str:
    """Words that make a prompt of that many text tokens."""
    words = " ".join(make_checkpoint.SENTENCES.split()).split(" ")
    prompts = model.bundle.prompts
    for count in range(len(words)):
        text = " ".join(words[:count])
        prompt = prompts.build([prompts.user_message(text, 1)], 1)
        if len(prompt.token_ids) - 1 >= text_tokens:
            return text
    raise SystemExit("too many text tokens for the words at hand")


def measure(model: Model, shape: Shape, text: str, rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of each part under both plans, which take turns."""
    noise = np.random.default_rng(0)
    image = noise.integers(0, 256, (shape.image_size, shape.image_size, 3), np.uint8)
    times: dict[str, dict[str, list[float]]] = {
        plan: {part: [] for part in PARTS} for plan in ("none", "ivtp")
    }
    for number in range(rounds + 1):  # the first warms up
        for plan in ("none", "ivtp") if number % 2 else ("ivtp", "none"):
            result = model.generate(image, text, plan=plan, max_new_tokens=1)
            for part in PARTS if number else ():
                times[plan][part].append(result.timings_ms.get(part, 0.0))
    return {p: {k: float(np.median(v)) for k, v in parts.items()} for p, parts in times.items()}


def report(times: dict[str, dict[str, float]]) -> dict[str, float]:
    """Print the medians and return the ratios."""
    print(f"{'ms':10}" + "".join(f"{part:>10}" for part in PARTS))
    for plan, parts in times.items():
        print(f"{plan:10}" + "".join(f"{parts[part]:10.1f}" for part in PARTS))
    none, pruned = times["none"], times["ivtp"]
    prefill = pruned["prefill"] + pruned["decide"]  # decisions included
    ratios = {
        "vision": pruned["vision"] / none["vision"],
        "prefill": prefill / none["prefill"],
        "ttft": pruned["ttft"] / none["ttft"],
        "scorer_of_ttft": pruned["scorer"] / pruned["ttft"],
        "decide_of_ttft": pruned["decide"] / pruned["ttft"],
    }
    print(", ".join(f"{name} {100 * value:.1f} %" for name, value in ratios.items()))
    return ratios


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description="IVTP beside no pruning, on the CPU.")
    parser.add_argument("--shape", choices=SHAPES, default="default")
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint, clip = make_models(shape, folder)
        patches = (shape.image_size // shape.patch_size) ** 2
        plan = ivtp(Size(patches, shape.layers), shape.num_keep, pseudo_cls=PseudoCls(tau=0.0))
        options = ExportOptions(
            plan=plan, plan_name="ivtp", limits=Limits(512, 64, 1), scorer=str(clip)
        )
        export(str(checkpoint), folder / "bundle", options)
        model = Model(folder / "bundle", threads=args.threads, check="size")
        text = question(model, args.text_tokens)
        times = measure(model, shape, text, args.rounds)
        model.close()
    ratios = report(times)
    told: dict[str, Any] = {
        "benchmark": "ivtp",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine.facts(),
        "shape": asdict(shape),
        "text_tokens": args.text_tokens,
        "rounds": args.rounds,
        "ms": times,
        "ratios": ratios,
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
