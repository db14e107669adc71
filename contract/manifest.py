"""The manifest of a bundle: what it holds, how large, and the hash of each file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from patchsieve.contract import names
from patchsieve.contract.consistency import check
from patchsieve.contract.errors import BundleError, PatchsieveError
from patchsieve.contract.links import locate
from patchsieve.contract.plan import GRID2D, TRAINED_RULES, Plan
from patchsieve.contract.precision import BYTES, Precision
from patchsieve.contract.reading import read_as
from patchsieve.contract.verified import Verified

# 2 added `needs` and `target_tensors`, 3 `text.rotary_sections`; the older ones are still read.
SCHEMA_VERSION = 3
FILE_NAME = "manifest.json"
WEIGHTS = "graphs/weights/"
_LARGEST_MANIFEST = 16 << 20
_CHUNK = 4 << 20

# Inputs and outputs of each graph, each with name, dtype and shape.
Tensors = dict[str, dict[str, list[dict[str, Any]]]]


@dataclass(frozen=True)
class TextModel:
    """The decoder: all that its graphs depend on besides weights.

    H query heads, G KV heads, D head dim, C hidden, V vocabulary.

    Attributes:
        norm_eps: Of the layers' norms. This and what follows it is empty in bundles of schemas 1
            to 3, whose decisions hold nothing of the decoder.
        inv_freq: Rotary frequencies in radians per position, D / 2 of them, scaling included.
        rotary_scale: Factor on cosines and sines (1 but for YaRN).
        max_rows: Longest sequence for which the structure holds: positions, or a sliding window.
        rotary_sections: Rotary frequencies that turn by each axis of a position, where the decoder
            was trained with the position rule "grid2d"; empty otherwise.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_sections: tuple[int, ...] = ()
    norm_eps: float = 0.0
    activation: str = ""
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    inv_freq: tuple[float, ...] = ()
    rotary_scale: float = 1.0
    max_rows: int = 0

    @property
    def trained_rule(self) -> str:
        """The position rule that the decoder was trained with."""
        return GRID2D if self.rotary_sections else TRAINED_RULES[0]


@dataclass(frozen=True)
class VisionModel:
    """The tower and the projector: all that their graphs depend on besides weights.

    Attributes:
        num_layers_run: Layers up to the last whose rows the projector reads.
        num_visual: Tokens that enter the decoder for each image where nothing prunes before it.
        num_dropped: Rows that the model drops from the front of the tower's, before the projector:
            the class token, usually.
        has_cls: A class token stands before the patches.
        has_pre_norm: A layer norm follows the embeddings.
        patch_bias: The patch embedding has a bias.
        feature_layers: Layers whose rows the projector reads side by side, 0 for the embeddings.
    """

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
    num_dropped: int
    has_cls: bool
    has_pre_norm: bool
    patch_bias: bool
    norm_eps: float
    activation: str
    feature_layers: tuple[int, ...]
    projector_activation: str
    projector_bias: bool

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def raster_ids(self) -> range:
        """Raster index of each token where nothing prunes before the decoder, -1 for CLS."""
        return range(self.num_dropped - self.has_cls, self.num_patches)


@dataclass(frozen=True)
class Limits:
    """What a request may ask for."""

    max_text_tokens: int
    max_new_tokens: int
    max_images: int

    def slots(self, budget: int, has_side_rows: bool = False) -> int:
        """Slots of a stage's cache: text, new tokens, and per image `budget` visual tokens.

        A side row of each image joins them in the stages that feed such rows.
        """
        per_image = budget + has_side_rows
        return self.max_text_tokens + self.max_new_tokens + self.max_images * per_image


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
class Generation:
    """What the checkpoint's generation_config.json asks of every answer; a request may override it.

    Attributes:
        stop: `stop_strings` there; the others have their names of there, and its meaning.
        not_followed: Its entries that change answers in transformers but not here, "name = value".
    """

    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    min_length: int = 0
    min_new_tokens: int = 0
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    stop: tuple[str, ...] = ()
    not_followed: tuple[str, ...] = ()

    def options(self) -> dict[str, Any]:
        """Options of a request that say the same, those that change something."""
        plain = Generation(not_followed=self.not_followed)
        return {key: value for key, value in vars(self).items() if value != getattr(plain, key)}


@dataclass(frozen=True)
class Scorer:
    """The text tower that compares the question's words with an image.

    Attributes:
        source: Where it came from.
        tokenizer: Its tokenizer's file.
        bos_id: Begins each window of text.
        eos_id: Ends it, and fills the rest.
        window: Tokens of a window, both marks included.
        width: Of the space that text and image share, E.
    """

    source: str
    tokenizer: str
    bos_id: int
    eos_id: int
    window: int
    width: int


@dataclass(frozen=True)
class Needs:
    """What builds or runs the graphs of a target.

    Attributes:
        library: The Python package, as pip calls it.
        versions: Which of its versions, as pip spells a range.
        where: The machines, for the eye.
        opset: Of standard ONNX in the target's graphs.
    """

    library: str
    versions: str
    where: str
    opset: int

    def __str__(self) -> str:
        """One line."""
        return f"{self.library} {self.versions} ({self.where}), opset {self.opset}"


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
        precision: Type of each part; hidden rows and caches have the decoder's.
        cuts: Layers at which the decoder is divided.
        plans: Each plan by name; "none" prunes nothing.
        default_plan: The plan of a request that names none.
        targets: For each target the file of each graph.
        tensors: Inputs and outputs of each graph, as most targets have them.
        target_tensors: The same for each target and graph that departs from `tensors`.
        needs: For each target what builds or runs it; bundles of schema 1 do not say.
        scorer: The text tower of plans that compare the question with an image; None without.
        generation: What the checkpoint asks of every answer. It and `attention` are written only
            if they say something, so that an older patchsieve reads all other bundles.
        attention: How TensorRT's graphs spell half-precision attention, one of
            `names.ATTENTION_FORMS`; None where no graph has a choice, and in bundles from before
            there was one, which are fused.
    """

    patchsieve_version: str
    checkpoint: str
    precision: Precision
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
    tensors: Tensors
    target_tensors: dict[str, Tensors] = field(default_factory=dict)
    needs: dict[str, Needs] = field(default_factory=dict)
    files: dict[str, File] = field(default_factory=dict)
    scorer: Scorer | None = None
    generation: Generation = Generation()
    attention: str | None = None
    schema_version: int = SCHEMA_VERSION

    @property
    def cuts(self) -> list[int]:
        """Layers at which the decoder is divided."""
        return [stage.first for stage in self.stages[1:]]

    def vision_graph(self, plan: str) -> str:
        """The graph that makes a plan's visual tokens."""
        return names.vision(plan) if self.plans[plan].has_vision else names.VISION

    def position_rule(self, plan: str) -> str:
        """How a plan numbers the tokens of an image."""
        return self.plans[plan].position_rule or self.text.trained_rule

    def num_visual(self, plan: str) -> int:
        """Visual tokens of an image that enter the decoder under a plan, or the most of them."""
        outputs = self.tensors[self.vision_graph(plan)]["outputs"]
        return next(t["shape"][1] for t in outputs if t["name"] == names.IMAGE_FEATURES)

    def has_fixed_count(self, plan: str) -> bool:
        """Whether every image has `num_visual` tokens; else it decides, and they are the most."""
        outputs = self.tensors[self.vision_graph(plan)]["outputs"]
        return all(tensor["name"] != names.NUM_WANTED for tensor in outputs)

    def budgets(self, plan: str) -> list[int]:
        """Visual tokens per image that each stage reserves slots for under a plan."""
        at = {site.layer: site.budget for site in self.plans[plan].sites}
        budget, budgets = self.num_visual(plan), []
        for stage in self.stages:
            budget = min(budget, at.get(stage.first) or budget)
            budgets.append(budget)
        return budgets

    def slots(self, plan: str) -> list[int]:
        """Slots that each stage's cache reserves under a plan."""
        last = self.side_layer(plan)
        return [
            self.limits.slots(budget, stage.last <= last)
            for stage, budget in zip(self.stages, self.budgets(plan), strict=True)
        ]

    def side_layer(self, plan: str) -> int:
        """The last site whose decision reads side rows: they are fed up to there. 0 for none."""
        reading = [
            site.layer
            for site in self.plans[plan].sites
            for tensor in self.tensors.get(names.decide(plan, site.layer), {}).get("inputs", [])
            if tensor.get("name") == names.SIDE_ROW
        ]
        return max(reading, default=0)

    def tensors_of(self, target: str) -> Tensors:
        """Inputs and outputs of each graph of a target."""
        return self.tensors | self.target_tensors.get(target, {})

    def caches(self, target: str) -> str:
        """How a target's stages take their caches: `names.IN_PLACE` or `names.NEW_ROWS`."""
        outputs = self.tensors_of(target).get(names.stage(0), {}).get("outputs", [])
        has_rows = any(str(tensor.get("name")).endswith(names.NEW) for tensor in outputs)
        return names.NEW_ROWS if has_rows else names.IN_PLACE

    def has_fused_attention(self, target: str, graph: str) -> bool:
        """Whether a target's graph holds attention as one operator, which some TensorRTs refuse."""
        tower = names.is_vision(graph) or graph == names.SCORER
        kind = self.precision.tower if tower else self.precision.decoder
        has_choice = target.startswith("tensorrt") and kind != "float32"
        if not has_choice or not (tower or graph.startswith("stage_")):
            return False
        form = self.attention or names.FUSED  # a bundle that does not say is from before the choice
        return form == names.FUSED or (form == names.FUSED_TOWER and names.is_vision(graph))

    def row_bytes(self, stage: Stage) -> int:
        """KV bytes of one row in a stage: layers x 2 x KV heads x head dim x bytes."""
        numbers = stage.num_layers * 2 * self.text.num_kv_heads * self.text.head_dim
        return numbers * BYTES[self.precision.decoder]

    def to_json(self) -> str:
        """The manifest as it is stored."""
        data = asdict(self)
        data["plans"] = {name: plan.to_dict() for name, plan in self.plans.items()}
        data["precision"] = str(self.precision)
        data["cuts"] = self.cuts
        for name, plain in (("generation", Generation()), ("attention", None)):
            if getattr(self, name) == plain:
                del data[name]
        data["schema_version"] = SCHEMA_VERSION  # of what is written, whatever was read
        return json.dumps(data, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read a manifest, refusing what is not one."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:  # ValueError: also a number of 5000 digits
            raise BundleError("the manifest is not JSON", found=str(error)[:120]) from error
        version = data.get("schema_version") if isinstance(data, dict) else None
        if type(version) is not int or version < 1:
            raise BundleError(
                "the manifest has no schema_version",
                expected=f"a bundle of schema {SCHEMA_VERSION}",
            )
        if version > SCHEMA_VERSION:
            raise BundleError(
                "the bundle is newer than this patchsieve",
                found=f"schema {version}" if version < 1 << 53 else "a huge schema number",
                expected=f"at most {SCHEMA_VERSION}",
                do="upgrade patchsieve, or export the bundle again with this version",
            )
        data.pop("cuts", None)
        plans, precision = data.pop("plans", None), data.get("precision")
        if not isinstance(plans, dict):
            raise BundleError("the manifest's plans are not an object", found=repr(plans)[:60])
        if not isinstance(precision, str):
            raise BundleError("the manifest's precision is no text", found=repr(precision)[:60])
        try:
            data["precision"] = asdict(Precision.parse(precision))
            read = {name: Plan.from_dict(plan) for name, plan in plans.items()}
            manifest = replace(
                read_as(cls, data | {"plans": {}}, "the manifest's content"), plans=read
            )
            check(manifest)
        except BundleError:
            raise
        except PatchsieveError as error:  # a plan's or a precision's own complaints
            raise BundleError(f"the manifest's content cannot be used: {error}") from error
        return manifest


def hash_file(path: Path) -> File:
    """Size and sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return File(path.stat().st_size, digest.hexdigest())


def read(bundle: Path) -> Manifest:
    """Read a bundle's manifest without touching its other files."""
    path = locate(bundle).file(FILE_NAME)
    if not is_there(path):
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
    again: bool = False,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Refuse a bundle with a missing, truncated or altered file.

    Args:
        bundle: The directory.
        manifest: Its manifest.
        paths: Which files; all by default.
        hashes: Compare contents too, not only sizes. A file that was found whole before, and that
            nobody has written to since, is not read again (`patchsieve.contract.verified`).
        again: Read those too.
        progress: Told each file's path before it is read.
    """
    _check_unlisted(bundle, manifest)
    place = locate(bundle)
    verified = Verified(place.root)
    try:
        for name in manifest.files if paths is None else paths:
            expected = manifest.files[name]
            path = place.file(name)
            size = path.stat().st_size if is_there(path) else None
            if size != expected.size:
                raise BundleError(
                    f"the bundle's file {name} is damaged",
                    found="no such file" if size is None else f"{size} bytes",
                    expected=f"{expected.size} bytes",
                    do="copy or export the bundle again",
                )
            try:
                if not hashes or (not again and verified.knows(path, expected.sha256)):
                    continue
                if progress is not None:
                    progress(name)
                is_same = has_hash(path, expected, verified)
            except OSError as error:
                raise BundleError(f"cannot read the bundle's file {name}", found=error) from error
            if not is_same:
                raise BundleError(
                    f"the bundle's file {name} is damaged",
                    found="another sha256",
                    expected=expected.sha256,
                    do="copy or export the bundle again",
                )
    finally:
        verified.save()  # what was read before an interrupt, too


def has_hash(path: Path, expected: File, verified: Verified) -> bool:
    """Read a file and compare it; `verified` learns that it is whole."""
    before = verified.look(path)
    is_same = hash_file(path) == expected
    if is_same:
        verified.learn(path, before, expected.sha256)
    else:
        verified.forget(path)
    return is_same


def _check_unlisted(bundle: Path, manifest: Manifest) -> None:
    """Refuse weights without a hash: graphs point to files that the manifest must answer for."""
    folder = bundle / WEIGHTS
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if f"{WEIGHTS}{path.name}" not in manifest.files:
            raise BundleError(
                "the bundle holds a weights file that its manifest does not list",
                found=path.name,
                do="do not use this bundle unless you know who made it; else export it again",
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


def is_there(path: Path) -> bool:
    """Whether a file is there; a path that the system refuses is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, a directory that may not be entered
        return False
