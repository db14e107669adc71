"""Bundles of the tiny models, each exported once for all tests, and what they answer."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.gpu.recording import recorded_logits as recorded_logits
from patchsieve.contract.manifest import Limits
from patchsieve.contract.plan import NO_PRUNING, Plan
from patchsieve.export.exporter import ExportOptions, export
from patchsieve.export.reuse import reuse
from patchsieve.runtime.model import Model
from tests.references.masked_llava import MaskedLlava
from tests.support.models import save_checkpoint
from tests.support.once import once

PHOTO = Path(__file__).resolve().parents[2] / "examples" / "photo.jpg"
LIMITS = Limits(max_text_tokens=400, max_new_tokens=80, max_images=3)
PRUNED_ROWS = ("llama-gqa-tied-linear-rope", "qwen2", "siglip", "clip-full")
# Rows that only the unpruned tests ask for are shallower, because each layer costs export a second.
SHALLOW = {"layers": 2}
REFERENCE_ROWS = PRUNED_ROWS[:2]


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    """The photograph, then smooth noise: images that differ in every patch."""
    rng = np.random.default_rng(seed)
    out = [Image.open(PHOTO).convert("RGB")]
    while len(out) < count:
        small = Image.fromarray(rng.integers(0, 256, (7, 7, 3), np.uint8))
        out.append(small.resize((90, 70), Image.Resampling.BICUBIC))
    return out[:count]


@dataclass
class TinyBundle:
    """A tiny model as checkpoint, as bundle and under Hugging Face.

    Attributes:
        checkpoint: The Hugging Face directory.
        path: The bundle, with a cut before every layer where pruning is tested.
    """

    checkpoint: Path
    path: Path
    _models: dict[tuple[str, str], Model] = field(default_factory=dict)

    @cached_property
    def hugging_face(self) -> MaskedLlava:
        """The reference run."""
        return MaskedLlava(self.checkpoint)

    def model(self, sites: list[dict[str, Any]] | None = None, target: str = "cpu") -> Model:
        """The bundle, loaded, with a plan of these sites as its default."""
        if not sites:
            return self._load(NO_PRUNING, target)
        key = json.dumps(sites, sort_keys=True).encode()
        name = "plan-" + hashlib.sha256(key).hexdigest()[:12]
        if (name, target) not in self._models:
            reuse(self.path, Plan.from_dict({"sites": sites}), name)
        return self._load(name, target)

    def _load(self, plan: str, target: str) -> Model:
        if (plan, target) not in self._models:
            model = Model(self.path, target=target, threads=1, check="size")
            model.facts = replace(model.facts, default_plan=plan)
            self._models[plan, target] = model
        return self._models[plan, target]


def make_bundle(folder: Path, row: str, **overrides: Any) -> TinyBundle:
    """Export a row of TINY."""
    is_pruned = row in PRUNED_ROWS
    overrides = ({} if is_pruned else SHALLOW) | overrides
    checkpoint = save_checkpoint(folder / "checkpoint", row, **overrides)
    options = ExportOptions(
        cuts=(1, 2, 3) if is_pruned else (),
        targets=("cpu", "reference", "jetpack6", "tensorrt-rtx", "tensorrt")
        if row in REFERENCE_ROWS
        else ("cpu",),
        limits=LIMITS,
    )
    export(str(checkpoint), folder / "bundle", options)
    return TinyBundle(checkpoint, folder / "bundle")


def own_bundle(factory: pytest.TempPathFactory, row: str) -> TinyBundle:
    """A copy of a row's bundle, exported once a run; the copy may be given more plans."""
    made = once(factory, f"tiny-{row}", lambda folder: make_bundle(folder, row))
    own = factory.mktemp(row) / "bundle"
    shutil.copytree(made / "bundle", own)
    return TinyBundle(made / "checkpoint", own)


def largest_error(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """Largest difference of a logit, over all tokens of an answer."""
    return float(np.abs(np.stack(found) - np.stack(expected)).max())
