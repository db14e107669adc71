"""The count of bytes from a model's measures is what export writes, to the byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from patchsieve.contract import files, sizes, stored
from patchsieve.contract.errors import BundleError
from patchsieve.contract.formats import parse
from patchsieve.contract.model import TextModel
from patchsieve.contract.plan import Plan, SitePlan
from patchsieve.contract.precision import Precision
from patchsieve.cost import MODELS, measures_of_config
from patchsieve.export.exporter import ExportOptions, export
from patchsieve.export.job import Job, plan_export
from patchsieve.export.source.checkpoint import read_config
from tests.support.models import make_checkpoint, save_checkpoint, tiny_llava
from tests.support.tiny_clip import save_clip

PRECISIONS = [
    "float32",
    "tower=float16,decoder=float32",
    "int8",
    "int4",
    "int4:float16,head=float16",
    "mixed",
    "int4-64,projector=int8,scorer=float,layers.0=float,*.down_proj=int8-weights",
    "decoder=int4,head=int4",
    "fp8",
    "nvfp4,projector=int4",
]
ROWS = ["llama-biases", "qwen2-tied", "qwen2-siglip-two-layers", "llama-gqa-tied-linear-rope"]


def counted(job: Job, found: list[sizes.Group]) -> dict[tuple[str, int | None], int]:
    """Bytes of each weights file of a job, by the count from the model's measures."""
    chosen = job.options.chosen
    total: dict[tuple[str, int | None], int] = {}
    for group in found:
        key = (group.part.name, group.layer)
        counts = group.num_bytes(chosen.types, chosen.formats)
        total[key] = total.get(key, 0) + sum(counts.values())
    return total


def groups_of(job: Job, scorer: sizes.TextTower | None = None) -> list[sizes.Group]:
    return sizes.groups(
        TextModel("", **vars(job.spec)),
        job.vision,
        scorer=scorer,
        has_step=job.formats.has_step,
        has_own_head=job.has_own_head,
    )


def planned(job: Job) -> dict[tuple[str, int | None], int]:
    """Bytes of each weights file that a job is to write."""
    return {(file.entry.part, file.entry.layer): file.num_bytes for file in job.weights}


@pytest.fixture(scope="module", params=ROWS)
def checkpoint(request, tmp_path_factory) -> Path:
    """A tiny checkpoint whose sizes blocks of 32 and 64 divide, in part."""
    folder = tmp_path_factory.mktemp(request.param)
    return save_checkpoint(folder, request.param, layers=2)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_files_are_of_the_size_that_is_counted(checkpoint: Path, precision: str) -> None:
    target = "tensorrt-rtx" if "fp" in precision else "reference"
    plan = Plan((SitePlan(1, "fastv", {"keep_ratio": 0.5}),))  # int4: layer 0 is int8
    options = ExportOptions(plan, "half", precision=precision, targets=(target,))
    job = plan_export(checkpoint, read_config(checkpoint), options)
    found = groups_of(job)
    assert counted(job, found) == planned(job)
    names = [
        weight.name.removesuffix(".weight")
        for file in job.weights
        for weight in file.weights
        if weight.transposed and weight.name != "lm_head.weight"
    ]
    assert [name for name in sizes.names(found) if name != "lm_head"] == names


def test_a_scorer_is_of_the_size_that_is_counted(tmp_path: Path) -> None:
    llava, processor = tiny_llava(layers=2)
    checkpoint = make_checkpoint.save_llava(tmp_path / "tiny", llava, processor)
    clip = save_clip(tmp_path / "clip", llava)
    options = ExportOptions(precision="int8", scorer=str(clip), targets=("reference",))
    job = plan_export(checkpoint, read_config(checkpoint), options)
    assert job.clip is not None
    assert counted(job, groups_of(job, job.clip.text.measures)) == planned(job)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    """A bundle that holds every kind of format."""
    folder = tmp_path_factory.mktemp("bundle")
    checkpoint = save_checkpoint(folder / "tiny", layers=2)
    precision = "mixed,projector=int4,layers.0.mlp.up_proj=float"
    export(str(checkpoint), folder / "bundle", ExportOptions(precision=precision))
    return folder / "bundle"


def test_what_a_bundle_holds_is_what_is_counted(bundle: Path) -> None:
    facts = files.read(bundle)
    chosen = parse("mixed,projector=int4,layers.0.mlp.up_proj=float")
    found = sizes.groups(facts.text, facts.vision, has_step=True)
    read = stored.shares(bundle, facts)
    assert read == sizes.shares(found, chosen.types, chosen.formats)
    on_disk = sum((bundle / path).stat().st_size for path in facts.weights)
    headers = on_disk - sizes.total(read)
    assert 0 < headers < 4096 * len(facts.weights)
    by_part = {(row.part, row.format) for row in read}
    assert by_part >= {("projector", "int4-32"), ("output head", "int8-weights")}
    assert by_part >= {("decoder layers", "int8"), ("decoder layers", "float")}
    assert ("decoder layers for single rows", "int4-32") in by_part
    assert ("vision tower", "int8") in by_part and ("embeddings", "float") in by_part


@pytest.mark.parametrize("damage", [b"", b"no header", b"\x02\0\0\0\0\0\0\0[]", None])
def test_a_file_without_tensors_is_one_line(damage: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "layers.0.safetensors"
    if damage is not None:
        path.write_bytes(damage)
    with pytest.raises(BundleError, match="cannot read the tensors of .*copy or export"):
        stored.header(path)


# Numbers by hand: 32 layers x (4 x 4096 x 4096 + 3 x 4096 x 11008) of the decoder, and so on.
LAYERS_7B, LAYERS_13B = 32 * 202_375_168, 40 * 317_194_240
SCALED = 0.5 + 2 / 128  # bytes of a number of int4-128 with its share of a float16 scale


@pytest.mark.parametrize(
    ("model", "layers", "width", "most"),
    [("llava-1.5-7b", LAYERS_7B, 4096, 4.3e9), ("llava-1.5-13b", LAYERS_13B, 5120, 7.7e9)],
)
def test_llava_in_int4_has_the_bytes_of_the_arithmetic(
    model: str, layers: int, width: int, most: float
) -> None:
    chosen = parse("int4", is_for_gpus=True, int4="int4-128")
    assert chosen.types == Precision("float16", "float16", "float16")
    measured = measures_of_config(MODELS[model])
    found = sizes.groups(measured.text, measured.vision, has_own_head=not measured.is_tied)
    rows = {
        (row.part, row.format): row.bytes
        for row in sizes.shares(found, chosen.types, chosen.formats)
    }
    assert rows["decoder layers", "int4-128"] == layers * SCALED
    assert rows["embeddings", "float"] == 32064 * width * 2
    assert rows["output head", "int8-weights"] == 32064 * width + 2 * 32064
    matrices = 23 * (4 * 1024 * 1024 + 2 * 1024 * 4096)
    assert rows["vision tower", "int8"] == matrices + 2 * 23 * (5 * 1024 + 4096)
    assert rows["projector", "float"] == 2 * (1024 * width + width * width + 2 * width)
    assert sum(rows.values()) < most
