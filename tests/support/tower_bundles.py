"""One tiny checkpoint with a tower of five layers, and one bundle with a plan for each method.

A test file takes the fixture by `from tests.support.tower_bundles import towers`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from patchsieve.contract.manifest import Limits
from patchsieve.contract.plan import Plan
from patchsieve.export.exporter import ExportOptions, export
from patchsieve.export.reuse import reuse
from patchsieve.runtime.model import Model
from tests.references import after_tower
from tests.references import tower as reference
from tests.support.models import save_checkpoint
from tests.support.once import once

SHAPE: dict[str, Any] = {"layers": 2, "vision_layers": 5, "image_size": 48}  # 36 patches, 4 layers
FASTV = {"layer": 1, "method": "fastv", "params": {"keep_ratio": 0.5}}
ATP = {"layer": 1, "method": "atp", "params": {"theta_r": 0.6, "theta_s": 0.97}}


def method(name: str, layers: list[int], counts: list[int], **options: Any) -> dict[str, Any]:
    """A method inside the tower, its schedule spelt out."""
    return {"method": name, "params": {"layers": layers, "counts": counts} | options}


PLANS: dict[str, dict[str, Any]] = {
    "gtp": {"encoder": method("gtp", [1, 3], [20, 9])},
    "topk": {
        "encoder": method("topk", [0, 3], [22, 9], score="cosine"),
        "sites": [FASTV],
        "position_rule": "contiguous",
    },
    "draw": {
        "encoder": method("random", [1], [20]),
        "projector": {"method": "topk", "params": {"keep": 9}},
        "position_rule": "contiguous",
    },
    "evit": {"encoder": method("evit", [1, 2], [16, 9])},
    "tome": {"encoder": method("tome", [0, 2], [18, 9]), "sites": [ATP]},
    "pooling": {"projector": {"method": "pooling", "params": {"keep": 9}}},
    "divprune": {"projector": {"method": "divprune", "params": {"keep": 9}}},
    "visionzip": {"projector": {"method": "visionzip", "params": {"keep": 9}}},
}
LEFT = 9  # tokens that every plan lets into the decoder
TARGETS = ("cpu", "tensorrt-rtx")


@dataclass
class Towers:
    """The checkpoint, its bundle, and both loaded."""

    checkpoint: Path
    bundle: Path

    @cached_property
    def model(self) -> Model:
        """The bundle in ONNX Runtime."""
        return Model(self.bundle, threads=1, check="size")

    @cached_property
    def hugging_face(self) -> Any:
        """The checkpoint in Hugging Face, in float64."""
        return LlavaForConditionalGeneration.from_pretrained(
            self.checkpoint, dtype=torch.float64, attn_implementation="eager"
        ).eval()


def make_towers(folder: Path) -> Towers:
    """Export the first plan, and give the bundle the others."""
    checkpoint = save_checkpoint(folder / "checkpoint", **SHAPE)
    plans = {name: Plan.from_dict(plan) for name, plan in PLANS.items()}
    first = next(iter(plans))
    options = ExportOptions(
        plan=plans[first], plan_name=first, cuts=(1,), targets=TARGETS, limits=Limits(200, 32, 3)
    )
    export(str(checkpoint), folder / "bundle", options)
    for name in list(plans)[1:]:
        reuse(folder / "bundle", plans[name], name)
    return Towers(checkpoint, folder / "bundle")


@pytest.fixture(scope="session")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Towers:
    """Made once for all tests."""
    made = once(tmp_path_factory, "towers", make_towers)
    own = tmp_path_factory.mktemp("towers") / "bundle"
    shutil.copytree(made / "bundle", own)
    return Towers(made / "checkpoint", own)


@torch.no_grad()
def reference_vision(
    llava: Any, pixels: np.ndarray, plan: dict[str, Any], noise: np.ndarray | None = None
) -> tuple[np.ndarray, list[list[int]], np.ndarray]:
    """Features [B, N, C], ids and sources of a plan, by Hugging Face's modules and plain NumPy."""
    features, ids, sources = [], [], []
    for number, one in enumerate(pixels):
        drawn = None if noise is None else noise[number]
        made, its_ids, its_sources = reference_image(llava, one, plan, drawn)
        features.append(made)
        ids.append(its_ids)
        sources.append(its_sources)
    return np.stack(features), ids, np.stack(sources)


@torch.no_grad()
def reference_image(
    llava: Any, pixels: np.ndarray, plan: dict[str, Any], noise: np.ndarray | None = None
) -> tuple[np.ndarray, list[int], np.ndarray]:
    """Features [N, C], ids and sources of one image [3, h, w], of which each has its own N."""
    rows, ids, sources = _one(llava, torch.from_numpy(pixels)[None].double(), plan, noise)
    return _project(llava)(rows), ids, sources


def _one(llava: Any, pixels: Any, plan: dict[str, Any], noise: Any) -> Any:
    tower = llava.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    has_cls = hasattr(tower.embeddings, "class_embedding")
    x = tower.embeddings(pixels)
    x = tower.pre_layrnorm(x) if has_cls else x
    image = reference.Image(x[0].numpy(), has_cls, noise)
    image.project = _project(llava)
    encoder = plan.get("encoder") or method("topk", [], [])
    params = dict(encoder["params"])
    places = dict(zip(params.pop("layers"), params.pop("counts"), strict=True))
    prune = reference.METHODS[encoder["method"]]
    layers = tower.encoder.layers
    run = len(layers) - 1 if has_cls else len(layers)
    for index, layer in enumerate(layers[:run]):
        before = torch.from_numpy(image.rows)
        mixed = _attend(image, layer, before, encoder["method"] == "tome")
        image.rows = image.rows + mixed
        if index in places and encoder["method"] in ("evit", "tome"):
            prune(image, places[index], **params)
        rows = torch.from_numpy(image.rows)
        image.rows = (rows + layer.mlp(layer.layer_norm2(rows))).numpy()
        if index in places and encoder["method"] not in ("evit", "tome"):
            top = image.maps[-1]
            prune(image, places[index], **params)
            image.last = top
    return _behind(image, plan, encoder["method"], has_cls)


def _attend(image: Any, layer: Any, rows: Any, is_proportional: bool) -> np.ndarray:
    attn = layer.self_attn
    normed = layer.layer_norm1(rows)
    split = [
        project(normed).numpy().reshape(len(rows), attn.num_heads, -1).transpose(1, 0, 2)
        for project in (attn.q_proj, attn.k_proj, attn.v_proj)
    ]
    bias = np.log(image.sizes) if is_proportional else None
    attention = image.see(*split, attn.scale, bias)
    mixed = (attention @ split[2]).transpose(1, 0, 2).reshape(len(rows), -1)
    return attn.out_proj(torch.from_numpy(mixed)).numpy()


def _behind(image: Any, plan: dict[str, Any], name: str, has_cls: bool) -> Any:
    """What acts between tower and decoder, then raster order without the class token."""
    projector = plan.get("projector")
    first = int(has_cls)
    if projector and projector["method"] in after_tower.METHODS:
        params = dict(projector["params"])
        after_tower.METHODS[projector["method"]](image, params.pop("keep"), **params)
    if projector and projector["method"] == "pooling":
        side, k = int(len(image.rows) ** 0.5), int(projector["params"]["keep"] ** 0.5)
        grid = torch.from_numpy(image.rows[first:]).T.reshape(1, -1, side, side)
        pooled = torch.nn.functional.adaptive_avg_pool2d(grid, k)[0].flatten(1).T
        step = side // k
        cells = [(p // side // step) * k + p % side // step for p in range(side * side)]
        return pooled.numpy(), [-1] * (k * k), np.array(cells)
    order, ids = image.finish()
    num_patches = max(p for group in image.members for p in group) + 1
    sources = image.sources(max(num_patches, 36))
    sources = np.where(sources < 0, -1, sources - first)
    ids = [-1] * len(ids) if name == "tome" else ids
    return image.rows[order][first:], ids[first:], sources


def _project(llava: Any) -> Callable[[np.ndarray], np.ndarray]:
    return lambda rows: llava.model.multi_modal_projector(torch.from_numpy(rows)).numpy()
