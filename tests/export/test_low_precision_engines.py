"""What TensorRT-RTX 1.7 makes of each low-precision spelling, ahead of time, without a GPU.

Each graph is one product, so that a weight that was widened would show in the parsed network and
in the engine's size. docs/targets.md has the same as a table.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from onnx import TensorProto

from patchsieve.contract.errors import PatchsieveError
from patchsieve.runtime.building.compile import build_engine
from patchsieve.runtime.trt.engines import Options
from tests.support.low_precision import Form, spelt
from tests.support.networks import parse_network

pytestmark = [pytest.mark.tensorrt, pytest.mark.slow]
pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")

TARGET = "tensorrt-rtx"
SHAPE = (1024, 2048)
FLOAT, HALF, BRAIN = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
NAMES = {FLOAT: "FLOAT", HALF: "HALF", BRAIN: "BF16"}
STORED = {"int8": "INT8", "int4": "INT4", "fp8": "FP8", "nvfp4": "FP4"}
KERNELS = 0.7e6  # bytes that an engine of one product may have besides; less than int4 takes
ROWS = [(1, 64, 512), (1, 1, 2)]  # prefill and decode, as a stage's engine has them
ONE_ROW = [(1, 64, 512), (1, 1, 1)]


def size(
    folder: Path,
    form: Form,
    type_: int = HALF,
    capability: str = "8.9",
    rows: list[tuple[int, int, int]] = ROWS,
) -> int:
    """Bytes of the engine of a product."""
    spelt(form, type_, shape=SHAPE, folder=folder)
    profiles = [{"x": tuple((1, count, SHAPE[0]) for count in profile)} for profile in rows]
    options = Options(compute_capabilities=(capability,))
    out = folder / "product.engine"
    report = build_engine(folder / "product.onnx", out, profiles, target=TARGET, options=options)
    return report.engine_bytes


FORMS = (
    Form("int8"),
    Form("int8", is_static=True),
    *(Form(f"int4-{block}") for block in (32, 64, 128)),
)
FLOATS = (Form("fp8"), Form("fp8", is_static=True), Form("nvfp4"))


@pytest.mark.parametrize("type_", NAMES)
@pytest.mark.parametrize("form", (*FORMS, *FLOATS), ids=str)
def test_the_network_holds_the_weight_as_it_is_stored(
    form: Form, type_: int, tmp_path: Path
) -> None:
    spelt(form, type_, shape=SHAPE, folder=tmp_path)
    network = parse_network(tmp_path / "product.onnx")
    numbers = SHAPE[0] * SHAPE[1]
    assert network.stored(STORED[form.name.partition("-")[0]]) == numbers
    assert network.stored(NAMES[type_]) <= numbers // 32, "the scales alone are floats"
    assert network.count("QUANTIZE") == form.is_static
    assert network.count("DEQUANTIZE") == 1 + form.is_static + (form.name == "nvfp4")


@pytest.mark.parametrize("capability", ["8.6", "8.9", "12.0"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_integers_build_for_every_card_and_keep_their_size(
    form: Form, capability: str, tmp_path: Path
) -> None:
    weights = form.num_bytes(SHAPE, HALF)
    assert weights < size(tmp_path, form, capability=capability) < weights + KERNELS


@pytest.mark.parametrize("form", FLOATS, ids=str)
def test_small_floats_build_for_blackwell_and_keep_their_size(form: Form, tmp_path: Path) -> None:
    weights = form.num_bytes(SHAPE, HALF)
    assert weights < size(tmp_path, form, capability="12.0") < weights + KERNELS


@pytest.mark.parametrize("type_", NAMES)
def test_scales_have_the_type_of_the_rows(type_: int, tmp_path: Path) -> None:
    form = Form("int4-64")
    weights = form.num_bytes(SHAPE, type_)
    assert weights < size(tmp_path, form, type_) < weights + KERNELS


@pytest.mark.parametrize(
    ("form", "capability", "said"),
    [
        ("fp8", "8.6", "fp8_e4m3"),
        ("nvfp4", "8.9", "fp4_e2m1"),
        ("int4-128", "7.5", "int4"),
    ],
)
def test_a_card_without_the_type_is_refused_in_its_name(
    form: str, capability: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(PatchsieveError, match=rf"HW-specific datatypes: .*{said}"):
        size(tmp_path, Form(form), capability=capability)


@pytest.mark.parametrize(
    ("form", "is_doubled"),
    [
        (Form("float"), True),
        (Form("int8", is_static=True), True),
        (Form("fp8", is_static=True), True),
        (Form("int8"), False),
        (Form("int4-128"), False),
        (Form("fp8"), False),
    ],
    ids=str,
)
def test_a_decode_profile_of_one_row_alone_stores_some_weights_twice(
    form: Form, is_doubled: bool, tmp_path: Path
) -> None:
    """Hence the two rows of runtime/building/profiles.py: those that compute in their own type."""
    weights = form.num_bytes(SHAPE, HALF)
    times = 2 if is_doubled else 1
    assert times * weights <= size(tmp_path, form, rows=ONE_ROW) < times * weights + KERNELS
