"""Bundles in low precision: every engine of TensorRT-RTX keeps its matrices as they are stored."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from patchsieve.contract import files, names
from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.formats import FORMATS
from patchsieve.contract.manifest import Limits, Manifest
from patchsieve.contract.plan import Plan, SitePlan
from patchsieve.contract.targets import TARGETS
from patchsieve.export.exporter import ExportOptions, export
from patchsieve.export.operators import load
from patchsieve.export.quantise.statistics import InputStatistics, Statistics
from patchsieve.runtime.building.compile import build_engine
from patchsieve.runtime.building.profiles import profiles
from patchsieve.runtime.trt.engines import Options
from tests.support.bundles import command
from tests.support.models import save_checkpoint
from tests.support.networks import parse_network
from tests.support.once import once

pytestmark = pytest.mark.slow

RTX = "tensorrt-rtx"
FASTV = Plan((SitePlan(1, "fastv", {"keep_ratio": 0.5}),))
# Each format somewhere, beside float and with the exceptions that a user may name.
# The MLP's 352 columns do not fit blocks of 64 or 128, so that int8 weights are there too.
INTEGERS = "tower=int8:float16,decoder=int4-64:float16,layers.1=int4-128,*.v_proj=float,head=int8"
FLOATS = "nvfp4:float16,decisions=nvfp4,layers.1.mlp=fp8"
WIDE = ("FLOAT", "HALF")
OVERHEAD = 4e6  # bytes that an engine of a stage may have besides its weights
STORED = {"int8": "INT8", "int8-weights": "INT8", "fp8": "FP8", "nvfp4": "FP4"}


SIZES = {"layers": 2, "vision_layers": 2, "hidden": 128, "vision_hidden": 128}


def statistics() -> Statistics:
    """Of every matrix of the tower and the decoder; what multiplies the same rows has the same."""
    rng = np.random.default_rng(0)
    wide = {"down_proj": 352, "fc2": 512}
    alike = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    held: dict[str, InputStatistics] = {}
    tower = "vision_tower.encoder.layers"
    own = {"layers": ("q", "k", "v", "o"), tower: ("q", "k", "v", "out")}
    mlp = {"layers": ("gate_proj", "up_proj", "down_proj"), tower: ("fc1", "fc2")}
    for prefix, heads in own.items():
        for layer in range(2):
            parts = [f"self_attn.{head}_proj" for head in heads]
            for part in (*parts, *(f"mlp.{name}" for name in mlp[prefix])):
                kind = part.rpartition(".")[2]
                size = wide.get(kind, 128)
                drawn = torch.from_numpy(rng.uniform(0.5, 1, size)).float()
                name = f"{prefix}.{layer}.{part}"
                same = held.get(name.replace(kind, alike.get(kind, kind)))
                mean = drawn if same is None else same.mean.clone()
                held[name] = InputStatistics(mean, 2 * mean**2, 4 * mean)
    return Statistics("tiny", 1, 1, 0, held)


def exported(
    factory: pytest.TempPathFactory,
    name: str,
    precision: str,
    *targets: str,
    measured: Statistics | None = None,
) -> Path:
    """A bundle whose matrices are wide enough for blocks of 128."""

    def make(folder: Path) -> None:
        checkpoint = save_checkpoint(folder / "checkpoint", "llama", **SIZES)
        if measured is not None:
            measured.write(folder / "statistics.safetensors")
        options = ExportOptions(
            plan=FASTV,
            plan_name="fastv",
            targets=targets,
            precision=precision,
            limits=Limits(64, 16, 2),
            statistics=None if measured is None else folder / "statistics.safetensors",
        )
        export(str(checkpoint), folder / "bundle", options)

    return once(factory, f"low-{name}", make) / "bundle"


@pytest.fixture(scope="session")
def integers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory, "integers", INTEGERS, RTX, "tensorrt10", "jetpack6", "cuda")


@pytest.fixture(scope="session")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory, "floats", FLOATS, RTX, "tensorrt", "tensorrt10")


Shape = tuple[int, ...]


def stored(bundle: Path, facts: Manifest, graph: str) -> tuple[list[tuple[str, Shape]], set[str]]:
    """Of the files that a graph reads: format and shape of each quantised matrix; the floats."""
    low, floats = [], set()
    for path in facts.graphs[graph].weights:
        content = (bundle / path).read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        for name, entry in header.items():
            form, shape = name.rpartition(".")[2], entry["shape"]
            if form in FORMATS:
                width = 2 if FORMATS[form].bits == 4 else 1
                low.append((form, (*shape[:-1], shape[-1] * width)))
            elif entry["dtype"] in ("F16", "F32") and len(shape) == 2:
                floats.add(name)
    return low, floats


def type_of(form: str) -> str:
    """What TensorRT calls the numbers of a format."""
    return STORED.get(form, "INT4")


def check_network(bundle: Path, graph: str, *formats: str) -> None:
    """Every matrix of a graph is a constant as it is stored, and is nowhere a float."""
    facts = files.read(bundle)
    low, floats = stored(bundle, facts, graph)
    assert {form for form, _ in low} == set(formats)
    network = parse_network(bundle / facts.targets[RTX][graph])
    levels = [(rows // 16, columns) for form, (rows, columns) in low if form == "nvfp4"]
    for kind in sorted({type_of(form) for form in formats}):
        found = [one.shape for one in network.constants if one.dtype == kind]
        expected = [shape for form, shape in low if type_of(form) == kind]
        assert sorted(found) == sorted(expected + levels * (kind == "FP8")), kind
    assert network.count("DEQUANTIZE") == len(low) + len(levels)
    wide = [one for one in network.constants if one.dtype in WIDE and len(one.shape) > 1]
    matrix = {one.name.removesuffix("_output") for one in wide if len(one.shape) == 2}
    assert matrix <= floats, "a float that no file holds"


@pytest.mark.tensorrt
@pytest.mark.parametrize(
    ("graph", "formats"),
    [
        (names.VISION, ["int8"]),
        (names.stage(0), ["int4-64", "int8-weights"]),
        (names.stage(1), ["int4-128", "int8-weights", "int8"]),
    ],
)
def test_a_network_holds_integers_as_they_are_stored(
    integers: Path, graph: str, formats: list[str]
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    check_network(integers, graph, *formats)


@pytest.mark.slow
@pytest.mark.tensorrt
@pytest.mark.parametrize(
    ("graph", "formats"),
    [
        (names.VISION, ["fp8"]),
        (names.stage(0), ["nvfp4"]),
        (names.stage(1), ["nvfp4", "fp8"]),
    ],
)
def test_a_network_holds_small_floats_as_they_are_stored(
    floats: Path, graph: str, formats: list[str]
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    check_network(floats, graph, *formats)


@pytest.mark.tensorrt
@pytest.mark.parametrize("graph", [names.VISION, names.stage(0), names.stage(1)])
def test_every_engine_of_a_bundle_in_integers_builds(
    integers: Path, graph: str, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    build(integers, graph, tmp_path, "8.6", "8.9", "12.0")


@pytest.mark.slow
@pytest.mark.tensorrt
@pytest.mark.parametrize("graph", [names.VISION, names.stage(0), names.stage(1)])
def test_every_engine_of_a_bundle_in_small_floats_builds_for_blackwell(
    floats: Path, graph: str, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    build(floats, graph, tmp_path, "12.0")
    if graph != names.VISION:
        with pytest.raises(PatchsieveError, match="HW-specific datatypes: .*fp4_e2m1"):
            build(floats, graph, tmp_path, "8.9")


def build(bundle: Path, graph: str, folder: Path, *capabilities: str) -> int:
    """Bytes of a graph's engine."""
    facts = files.read(bundle)
    report = build_engine(
        bundle / facts.targets[RTX][graph],
        folder / f"{graph}.engine",
        profiles(facts, graph, RTX),
        target=RTX,
        options=Options(compute_capabilities=capabilities),
    )
    return report.engine_bytes


@pytest.mark.slow
@pytest.mark.tensorrt
@pytest.mark.parametrize(("precision", "capability"), [("int8", "8.6"), ("fp8", "8.9")])
def test_with_statistics_rows_are_rounded_too(
    precision: str, capability: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    targets = (RTX, "tensorrt10", "jetpack6")
    given = f"tower={precision}:float16,decoder={precision}:float16,head=int8-weights"
    bundle = exported(
        tmp_path_factory, f"static-{precision}", given, *targets, measured=statistics()
    )
    facts = files.read(bundle)
    for graph in (names.VISION, names.stage(0), names.stage(1)):  # each of one layer
        network = parse_network(bundle / facts.targets[RTX][graph])
        # Of q, k and v together, what follows attention, what begins the MLP, and what ends it.
        assert network.count("QUANTIZE") == 4, graph
        low, _ = stored(bundle, facts, graph)
        assert network.count("DEQUANTIZE") == 4 + len(low), graph
        build(bundle, graph, tmp_path, capability)


@pytest.mark.slow
@pytest.mark.tensorrt
@pytest.mark.parametrize("precision", ["int8", "int4-128"])
def test_a_stage_has_the_size_of_its_files(precision: str, tmp_path: Path) -> None:
    """A layer as wide as the benchmark's: a float copy of one matrix in it would be 8 MB."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    sizes = {"layers": 1, "vision_layers": 1, "hidden": 1024, "heads": 16, "kv_heads": 16}
    checkpoint = save_checkpoint(tmp_path / "checkpoint", "llama", **sizes)
    options = ExportOptions(targets=(RTX,), precision=f"decoder={precision}:float16")
    facts = export(str(checkpoint), tmp_path / "bundle", options)
    graph = names.stage(0)
    weights = sum(facts.files[path].size for path in facts.graphs[graph].weights)
    assert weights > 4e6
    assert 0 < build(tmp_path / "bundle", graph, tmp_path, "8.9") - weights < OVERHEAD


def test_a_bundle_says_what_its_quantised_graphs_need(integers: Path) -> None:
    facts = files.read(integers)
    for target, graphs in facts.targets.items():
        opsets = set()
        for path in graphs.values():
            model = onnx.load(integers / path, load_external_data=False)
            opsets |= {entry.version for entry in model.opset_import if not entry.domain}
        assert max(opsets) == facts.needs[target].opset, target
    assert facts.needs["cuda"].versions == ">=1.25"
    assert facts.needs["jetpack6"].versions == TARGETS["jetpack6"].versions


@pytest.mark.slow
def test_export_says_which_formats_no_gpu_has_run(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "checkpoint", "llama", **SIZES)
    for precision, said in (("nvfp4:float16", "nvfp4: unproven, no GPU"), ("int8", "")):
        out = tmp_path / f"{precision[:4]}"
        given = ("--targets", RTX, "--precision", precision)
        code, text, _ = command("export", checkpoint, "-o", out, *given)
        assert code == 0
        assert ("unproven" in text) == bool(said) and said in text


# What a target refuses, before any work.


@pytest.mark.parametrize(
    ("targets", "formats"),
    [
        (("cpu",), "int4-32"),
        (("cpu", "cuda", "tensorrt-rtx", "reference"), "int4-32"),
        (("cpu", "jetpack6"), "int4-128"),
        (("cpu", "tensorrt"), "int4-128"),
        (("tensorrt-rtx",), "int4-128"),
        (("cuda", "jetpack6"), "int4-128"),
    ],
)
def test_int4_has_blocks_that_every_target_takes(targets: tuple[str, ...], formats: str) -> None:
    chosen = ExportOptions(targets=targets, precision="int4").chosen
    assert chosen.formats.parts["decoder"] == formats


@pytest.mark.parametrize(
    ("target", "precision"),
    [
        ("cpu", "fp8"),
        ("cpu", "nvfp4"),
        ("cuda", "fp8"),
        ("reference", "decoder=nvfp4"),
        ("jetpack6", "nvfp4"),
        ("jetpack6", "decoder=int4-32"),
        ("tensorrt10", "decoder=int4-32"),
        ("tensorrt", "decoder=int4-32"),
    ],
)
def test_a_format_that_a_target_does_not_take_is_refused(target: str, precision: str) -> None:
    with pytest.raises(PatchsieveError, match=rf"{target} does not take .*leave {target} out"):
        ExportOptions(targets=(target,), precision=precision)


def test_every_table_and_row_agree_about_the_size_of_blocks() -> None:
    for target, row in TARGETS.items():
        if row.operators:
            taken = load(row.operators).operators["DequantizeLinear"].attributes["block_size"]
            blocks = {FORMATS[form].block for form in row.formats}
            assert blocks <= set(taken), target


@pytest.mark.parametrize("target", TARGETS)
def test_int8_caches_are_refused_with_the_reason(target: str) -> None:
    with pytest.raises(PatchsieveError) as refused:
        ExportOptions(targets=(target,), precision="decoder=float32,cache=int8")
    said = str(refused.value)
    assert "\n" not in said
    assert re.search("int8 caches do not pay.*3 times slower.*leave cache= out", said)
