"""Checkpoints of a given shape with random weights, written tensor by tensor."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_LAYERS_PER_SHARD = 12
_STD = 0.02


@dataclass(frozen=True)
class Shape:
    """Measures of a LLaVA model with a CLIP tower and a Llama decoder.

    Attributes:
        plans: By name, the layers before which tokens are dropped and how many are left after
            each.
    """

    name: str
    layers: int
    hidden: int
    inner: int
    heads: int
    vocabulary: int
    tower_hidden: int
    tower_inner: int
    tower_layers: int
    tower_heads: int
    image_size: int
    patch_size: int
    plans: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)

    @property
    def num_visual(self) -> int:
        """Visual tokens of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def cuts(self) -> tuple[int, ...]:
        """Layers at which a bundle that holds all plans is divided."""
        return tuple(sorted({layer for sites, _ in self.plans.values() for layer in sites}))


# ATP-LLaVA's table 2: what is left after each site.
LLAVA_7B = Shape(
    name="7b",
    layers=32,
    hidden=4096,
    inner=11008,
    heads=32,
    vocabulary=32064,
    tower_hidden=1024,
    tower_inner=4096,
    tower_layers=24,
    tower_heads=16,
    image_size=336,
    patch_size=14,
    plans={
        "atp-144": ((4, 14, 24), (126, 88, 20)),
        "atp-88": ((1, 13, 25), (98, 79, 16)),
    },
)
# The same in small: every function of the benchmark runs on it, and its times mean nothing.
TINY = Shape(
    name="tiny",
    layers=5,
    hidden=64,
    inner=128,
    heads=4,
    vocabulary=1216,
    tower_hidden=32,
    tower_inner=64,
    tower_layers=3,
    tower_heads=2,
    image_size=32,
    patch_size=8,
    plans={"atp-144": ((1, 3, 4), (9, 6, 2)), "atp-88": ((1, 3, 4), (7, 5, 1))},
)


def tensor_shapes(shape: Shape) -> list[dict[str, tuple[int, ...]]]:
    """Tensors by the names that `save_pretrained` writes, one dict per shard."""
    width, inner, vocabulary = shape.hidden, shape.inner, shape.vocabulary
    tower, tower_inner = shape.tower_hidden, shape.tower_inner
    vision = "vision_tower.vision_model."
    first: dict[str, tuple[int, ...]] = {
        f"{vision}embeddings.class_embedding": (tower,),
        f"{vision}embeddings.patch_embedding.weight": (
            tower,
            3,
            shape.patch_size,
            shape.patch_size,
        ),
        f"{vision}embeddings.position_embedding.weight": (shape.num_visual + 1, tower),
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
    for i in range(shape.tower_layers):
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
    for i in range(shape.layers):
        block = f"language_model.model.layers.{i}."
        if i % _LAYERS_PER_SHARD == 0:
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


def config_of(base: dict[str, Any], shape: Shape) -> dict[str, Any]:
    """A config.json of that shape, from that of a small checkpoint."""
    text, vision = base["text_config"], base["vision_config"]
    text = text | {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "head_dim": shape.hidden // shape.heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
    vision = vision | {
        "hidden_size": shape.tower_hidden,
        "intermediate_size": shape.tower_inner,
        "num_hidden_layers": shape.tower_layers,
        "num_attention_heads": shape.tower_heads,
        "image_size": shape.image_size,
        "patch_size": shape.patch_size,
    }
    whole = {"image_seq_length": shape.num_visual, "tie_word_embeddings": False}
    return base | whole | {"text_config": text, "vision_config": vision}


def write_checkpoint(folder: Path, shape: Shape) -> int:
    """Write config, tokenizer, processor and random float16 shards; return the bytes of weights."""
    subprocess.run(  # tokenizer, processor and template of a small checkpoint serve
        [sys.executable, str(ROOT / "examples" / "make_checkpoint.py"), str(folder)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config_of(config, shape)), encoding="utf-8")
    side = shape.image_size
    for path in folder.glob("*processor_config.json"):
        text = json.loads(path.read_text(encoding="utf-8"))
        made = text.get("image_processor", text)
        made |= {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        told = text | {"patch_size": shape.patch_size}
        path.write_text(json.dumps(told), encoding="utf-8")
    return _write_shards(folder, shape)


def _write_shards(folder: Path, shape: Shape) -> int:
    import torch
    from safetensors.torch import save_file

    noise = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * _STD
    total, weight_map = 0, {}
    shards = tensor_shapes(shape)
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for key, size in shard.items():
            count = math.prod(size)
            # No two alike: TensorRT stores equal weights once, and engines would be too small.
            flat = noise.roll(len(weight_map)).repeat(-(-count // noise.numel()))[:count]
            if "norm" in key and key.endswith("weight"):
                flat = 1 + flat  # a norm near 0 would make every row alike
            tensors[key] = flat.to(torch.float16).view(size)
            total += 2 * count
            weight_map[key] = name
        save_file(tensors, folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total
