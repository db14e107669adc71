"""The manifest of a bundle: what it holds, how large, and the hash of each file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from patchsieve.errors import BundleError
from patchsieve.plan import NO_PRUNING, Plan

SCHEMA_VERSION = 1
FILE_NAME = "manifest.json"
_LARGEST_MANIFEST = 16 << 20
_CHUNK = 4 << 20


@dataclass(frozen=True)
class TextModel:
    """The decoder's measures: H query heads, G KV heads, D head dim, C hidden size, V vocabulary."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class VisionModel:
    """The tower's measures. `num_visual` tokens enter the decoder for each image."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_layers_run: int
    num_heads: int
    image_size: int
    patch_size: int
    grid: tuple[int, int]
    num_visual: int


@dataclass(frozen=True)
class Limits:
    """What a request may ask for."""

    max_text_tokens: int
    max_new_tokens: int
    max_images: int

    def slots(self, budget: int) -> int:
        """Slots of a stage's cache: text, new tokens, and `budget` visual tokens per image."""
        return self.max_text_tokens + self.max_new_tokens + self.max_images * budget


@dataclass(frozen=True)
class Stage:
    """Decoder layers `first` to `last - 1`, and the slots that engines of fixed size reserve."""

    first: int
    last: int
    slots: int

    @property
    def num_layers(self) -> int:
        """Layers in the stage."""
        return self.last - self.first


@dataclass(frozen=True)
class Embeddings:
    """The embedding table [V, C] inside a weights file, gathered outside the graphs."""

    file: str
    offset: int
    dtype: str
    shape: tuple[int, int]


@dataclass(frozen=True)
class Tokens:
    """What the runtime needs to turn a chat into token ids and back."""

    tokenizer: str
    chat_template: str | None
    image_token: str
    image_token_id: int
    eos_token_ids: tuple[int, ...]
    special_tokens: dict[str, str]


@dataclass(frozen=True)
class File:
    """Size and hash of a file, by which damage is found."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """All that a bundle says of itself.

    Attributes:
        checkpoint: Name of the checkpoint it was made from.
        precision: dtype of weights, hidden rows and caches.
        cuts: Layers at which the decoder is divided.
        plans: Each plan by name; "none" prunes nothing.
        default_plan: The plan of a request that names none.
        targets: For each target the file of each graph, and the inputs and outputs of each.
    """

    patchsieve_version: str
    checkpoint: str
    precision: str
    text: TextModel
    vision: VisionModel
    tokens: Tokens
    embeddings: Embeddings
    limits: Limits
    stages: tuple[Stage, ...]
    plans: dict[str, Plan]
    default_plan: str
    preprocessor: str
    targets: dict[str, dict[str, str]]
    tensors: dict[str, dict[str, list[dict[str, Any]]]]
    files: dict[str, File] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def cuts(self) -> list[int]:
        """Layers at which the decoder is divided."""
        return [stage.first for stage in self.stages[1:]]

    def budgets(self, plan: str) -> list[int]:
        """Visual tokens per image that each stage reserves slots for under a plan."""
        at = {site.layer: site.budget for site in self.plans[plan].sites}
        budget, budgets = self.vision.num_visual, []
        for stage in self.stages:
            budget = min(budget, at.get(stage.first) or budget)
            budgets.append(budget)
        return budgets

    def slots(self, plan: str) -> list[int]:
        """Slots that each stage's cache reserves under a plan."""
        return [self.limits.slots(budget) for budget in self.budgets(plan)]

    def row_bytes(self, stage: Stage) -> int:
        """KV bytes of one row in a stage: layers x 2 x KV heads x head dim x bytes."""
        width = {"float32": 4, "float16": 2}[self.precision]
        return stage.num_layers * 2 * self.text.num_kv_heads * self.text.head_dim * width

    def to_json(self) -> str:
        """The manifest as it is stored."""
        data = asdict(self)
        data["plans"] = {name: plan.to_dict() for name, plan in self.plans.items()}
        data["cuts"] = self.cuts
        return json.dumps(data, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read a manifest, refusing what is not one."""
        try:
            data = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise BundleError("the manifest is not JSON", found=error) from error
        version = data.get("schema_version") if isinstance(data, dict) else None
        if not isinstance(version, int) or version < 1:
            raise BundleError(
                "the manifest has no schema_version", expected=f"a bundle of schema {SCHEMA_VERSION}"
            )
        if version > SCHEMA_VERSION:
            raise BundleError(
                "the bundle is newer than this patchsieve",
                found=f"schema {version}",
                expected=f"at most {SCHEMA_VERSION}",
                do="upgrade patchsieve, or export the bundle again with this version",
            )
        try:
            data.pop("cuts", None)
            manifest = cls(
                **{
                    **data,
                    "text": _record(TextModel, data["text"]),
                    "vision": _record(VisionModel, data["vision"]),
                    "tokens": _record(Tokens, data["tokens"]),
                    "embeddings": _record(Embeddings, data["embeddings"]),
                    "limits": _record(Limits, data["limits"]),
                    "stages": tuple(_record(Stage, stage) for stage in data["stages"]),
                    "plans": {k: Plan.from_dict(v) for k, v in data["plans"].items()},
                    "files": {k: _record(File, v) for k, v in data["files"].items()},
                }
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise BundleError(
                "the manifest is not well formed", found=f"{type(error).__name__}: {error}"
            ) from error
        manifest._check()
        return manifest

    def _check(self) -> None:
        """Refuse contradictions that would surface later as crashes."""
        stages = self.stages
        joined = all(a.last == b.first for a, b in zip(stages, stages[1:], strict=False))
        if not (
            stages
            and stages[0].first == 0
            and stages[-1].last == self.text.num_layers
            and joined
            and all(stage.num_layers > 0 for stage in stages)
        ):
            raise BundleError(
                "the stages do not cover the decoder's layers",
                found=[(stage.first, stage.last) for stage in stages],
                expected=f"0 to {self.text.num_layers} without a gap",
            )
        if NO_PRUNING not in self.plans or self.default_plan not in self.plans:
            raise BundleError(
                "the manifest lacks a plan", found=", ".join(self.plans), expected=self.default_plan
            )
        for name, plan in self.plans.items():
            if not set(plan.layers) <= set(self.cuts):
                raise BundleError(
                    f"the plan {name} prunes where the decoder is not divided",
                    found=plan.layers,
                    expected=self.cuts,
                )
        for path in (*self.files, self.tokens.tokenizer, self.preprocessor, self.embeddings.file):
            check_inside(path)
        for path in (path for graphs in self.targets.values() for path in graphs.values()):
            check_inside(path)
            if path not in self.files:
                raise BundleError("a graph is not among the bundle's hashed files", found=path)
        sizes = [self.text.hidden_size, self.text.vocab_size, self.vision.num_visual]
        sizes += [self.text.num_kv_heads, self.text.head_dim, self.limits.max_text_tokens]
        sizes += [self.limits.max_new_tokens, self.limits.max_images]
        sizes += [stage.slots for stage in stages]
        if not all(type(size) is int and 0 < size < 1 << 31 for size in sizes):
            raise BundleError("the manifest holds a size that cannot be", found=sizes)
        if self.precision not in ("float32", "float16"):
            raise BundleError("unknown precision", found=self.precision)


def check_inside(path: Any) -> str:
    """Refuse a path that would leave the bundle."""
    pure = PurePosixPath(path) if isinstance(path, str) else None
    if pure is None or pure.is_absolute() or ".." in pure.parts or "\\" in path or not pure.parts:
        raise BundleError(
            "the manifest names a file outside the bundle",
            found=repr(path),
            expected="a relative path without ..",
            do="do not use this bundle unless you know who made it",
        )
    return path


def hash_file(path: Path) -> File:
    """Size and sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return File(path.stat().st_size, digest.hexdigest())


def read(bundle: Path) -> Manifest:
    """Read a bundle's manifest without touching its other files."""
    path = bundle / FILE_NAME
    if not bundle.is_dir() or not path.is_file():
        raise BundleError(
            "this is not a bundle",
            found=bundle,
            expected=f"a directory with {FILE_NAME}",
            do="make one with: patchsieve export CHECKPOINT -o BUNDLE",
        )
    if path.stat().st_size > _LARGEST_MANIFEST:
        raise BundleError("the manifest is too large to be one", found=path.stat().st_size)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"cannot read {path}", found=error) from error
    return Manifest.from_json(text)


def check_files(
    bundle: Path,
    manifest: Manifest,
    *,
    paths: list[str] | None = None,
    hashes: bool = True,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Refuse a bundle with a missing, truncated or altered file.

    Args:
        bundle: The directory.
        manifest: Its manifest.
        paths: Which files; all by default.
        hashes: Compare contents too, not only sizes.
        progress: Told each file's path before it is read.
    """
    root = bundle.resolve()
    for name in manifest.files if paths is None else paths:
        expected = manifest.files[name]
        path = bundle / name
        if not path.resolve().is_relative_to(root):
            raise BundleError("a file of the bundle is a link that leaves it", found=name)
        size = path.stat().st_size if path.is_file() else None
        if size != expected.size:
            raise BundleError(
                f"the bundle's file {name} is damaged",
                found="no such file" if size is None else f"{size} bytes",
                expected=f"{expected.size} bytes",
                do="copy or export the bundle again",
            )
        if progress is not None:
            progress(name)
        if hashes and hash_file(path) != expected:
            raise BundleError(
                f"the bundle's file {name} is damaged",
                found="another sha256",
                expected=expected.sha256,
                do="copy or export the bundle again",
            )


def write(bundle: Path, manifest: Manifest) -> None:
    """Write the manifest under a temporary name, then rename it: it is whole or as before."""
    temporary = bundle / f".{FILE_NAME}.{os.getpid()}"
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(manifest.to_json())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(bundle / FILE_NAME)
    finally:
        temporary.unlink(missing_ok=True)


def _record(kind: type, data: dict[str, Any]) -> Any:
    """Build a dataclass, lists becoming tuples where its fields are tuples."""
    tuples = {f.name for f in fields(kind) if str(f.type).startswith("tuple")}
    return kind(**{k: tuple(v) if k in tuples else v for k, v in data.items()})
