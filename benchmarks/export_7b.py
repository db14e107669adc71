"""Export (and, if asked, build) at LLaVA-1.5-7B's real shape with random weights: time and memory.

    python benchmarks/export_7b.py WORKDIR [--layers 32] [--build] [--keep]

Writes a checkpoint of that shape in float16 shards (13.5 GB at 32 layers), exports it in float16 in
a process of its own and prints that process's peak resident memory beside the promise: 2 GB plus
the largest tensor. With --build it compiles every TensorRT-RTX engine, one process per graph.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
PROMISE = 2e9  # bytes beside the largest tensor
# Not ru_maxrss: a child process starts with its parent's.
MEASURED = "import sys; from patchsieve.cli import main; from patchsieve.cli.output import "
MEASURED += "peak_memory; code = main(sys.argv[1:]); print('PEAK', peak_memory()); sys.exit(code)"


def shapes(layers: int) -> list[dict[str, tuple[int, ...]]]:
    """Tensors of LLaVA-1.5-7B by the names that `save_pretrained` writes, one dict per shard."""
    width, inner, vocabulary = 4096, 11008, 32064
    tower, tower_inner = 1024, 4096
    vision = "vision_tower.vision_model."
    first: dict[str, tuple[int, ...]] = {
        f"{vision}embeddings.class_embedding": (tower,),
        f"{vision}embeddings.patch_embedding.weight": (tower, 3, 14, 14),
        f"{vision}embeddings.position_embedding.weight": (577, tower),
        "language_model.model.embed_tokens.weight": (vocabulary, width),
        "language_model.model.norm.weight": (width,),
        "language_model.lm_head.weight": (vocabulary, width),
    }
    for norm in ("pre_layrnorm", "post_layernorm"):
        first |= {f"{vision}{norm}.weight": (tower,), f"{vision}{norm}.bias": (tower,)}
    for name, size in (("linear_1", (width, tower)), ("linear_2", (width, width))):
        first |= {
            f"multi_modal_projector.{name}.weight": size,
            f"multi_modal_projector.{name}.bias": (width,),
        }
    for i in range(24):
        block = f"{vision}encoder.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            first[f"{block}self_attn.{name}.weight"] = (tower, tower)
            first[f"{block}self_attn.{name}.bias"] = (tower,)
        for name in ("layer_norm1", "layer_norm2"):
            first |= {f"{block}{name}.weight": (tower,), f"{block}{name}.bias": (tower,)}
        first |= {
            f"{block}mlp.fc1.weight": (tower_inner, tower),
            f"{block}mlp.fc1.bias": (tower_inner,),
            f"{block}mlp.fc2.weight": (tower, tower_inner),
            f"{block}mlp.fc2.bias": (tower,),
        }
    shards = [first]
    for i in range(layers):
        block = f"language_model.model.layers.{i}."
        if i % 12 == 0:
            shards.append({})
        shards[-1] |= {
            f"{block}self_attn.{name}.weight": (width, width)
            for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        }
        shards[-1] |= {
            f"{block}mlp.gate_proj.weight": (inner, width),
            f"{block}mlp.up_proj.weight": (inner, width),
            f"{block}mlp.down_proj.weight": (width, inner),
            f"{block}input_layernorm.weight": (width,),
            f"{block}post_attention_layernorm.weight": (width,),
        }
    return shards


def write_checkpoint(folder: Path, layers: int) -> int:
    """Write config, tokenizer, processor and random shards; return the bytes of weights."""
    subprocess.run(  # tokenizer, processor and template of a small checkpoint serve
        [sys.executable, str(ROOT / "examples" / "make_checkpoint.py"), str(folder)], check=True
    )
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["text_config"] |= {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "vocab_size": 32064,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
    config["vision_config"] |= {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    }
    config |= {"image_seq_length": 576, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for path in folder.glob("*processor_config.json"):
        text = json.loads(path.read_text(encoding="utf-8"))
        made = text.get("image_processor", text)
        made |= {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
        path.write_text(json.dumps(text | {"patch_size": 14}), encoding="utf-8")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 22, generator=generator)
    total, weight_map = 0, {}
    shards = shapes(layers)
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for key, shape in shard.items():
            count = math.prod(shape)
            flat = noise.repeat(-(-count // noise.numel()))[:count]
            tensors[key] = (flat * 0.02).to(torch.float16).view(shape)
            total += 2 * count
            weight_map[key] = name
        save_file(tensors, folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


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
    parser.add_argument("--build", action="store_true")
    parser.add_argument("--keep", action="store_true", help="leave checkpoint and bundle there")
    args = parser.parse_args()
    checkpoint, bundle = args.workdir / "checkpoint", args.workdir / "bundle"
    weights = write_checkpoint(checkpoint, args.layers)
    largest = 2 * 32064 * 4096
    print(f"weights {weights / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB")
    sites = [site for site in (4, 14, 24) if site < args.layers]
    options = f"--method atp --theta-r 0.5 --theta-s 0.9 --sites {','.join(map(str, sites))}"
    options += f" --budget {','.join(map(str, [144, 96, 24][: len(sites)]))}"
    options += " --precision float16 --targets cpu,tensorrt-rtx --quiet --json"
    command = ["export", str(checkpoint), "-o", str(bundle), *options.split()]
    seconds, peak, _ = measured(command)
    limit = PROMISE + largest
    print(f"export: {seconds:.0f} s, peak {peak / 1e9:.2f} GB, promised under {limit / 1e9:.2f} GB")
    result = {
        "layers": args.layers,
        "weights_bytes": weights,
        "export_seconds": round(seconds, 1),
        "export_peak_bytes": peak,
        "export_limit_bytes": limit,
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
