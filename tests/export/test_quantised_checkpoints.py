"""Checkpoints that come quantised: read exactly, by the published layout of each method."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from patchsieve.calibration.encoder import Encoder
from patchsieve.calibration.options import CalibrationOptions
from patchsieve.calibration.start import begin
from patchsieve.contract.errors import UnsupportedModelError
from patchsieve.contract.formats import FORMATS
from patchsieve.contract.weights import FOLDER, WeightsFile
from patchsieve.cost.config import read_shape
from patchsieve.export.exporter import write_weights
from patchsieve.export.families import FAMILIES
from patchsieve.export.job import ExportOptions, plan_export
from patchsieve.export.quantise.hints import Hints
from patchsieve.export.quantise.rounding import dequantise
from patchsieve.export.source.checkpoint import Checkpoint, read_config
from patchsieve.export.weights import Weight, write
from patchsieve.verify.reference import Reference
from tests.export.test_checkpoint_files import (
    bin_shards,
    in_memory,
    older,
    one_safetensors,
    safetensors_shards,
    saved,
    written,
)
from tests.support.damage import refused
from tests.support.models import save_checkpoint
from tests.support.quantised import CASES, Case, Written, packed, say

LLAVA = FAMILIES["llava"]
NAME = "layers.0.mlp.up_proj"
ROW = {"structure": "llama", "layers": 2, "vision_layers": 2, "text": {"intermediate_size": 128}}
# A method each, with and without zero points, act-order, blocks: for what takes a whole model.
SOME = ("awq-32", "gptq-act-order", "gptq-32", "pack-32", "int8-channel", "modelopt-int4")


def matrix(folder: Path, case: Case, **changes: Any) -> Written:
    """A checkpoint of one quantised matrix, [24, 256], and a bias."""
    weight = np.random.default_rng(1).normal(0, 0.05, (24, 256)).astype(np.float32)
    weight[3] = np.abs(weight[3])
    made = case(weight)
    store(folder, made, case, **changes)
    return made


def store(folder: Path, made: Written, case: Case, **changes: Any) -> None:
    """Write a matrix and its settings."""
    tensors = {f"{NAME}.{end}": tensor for end, tensor in made.tensors.items()}
    save_file({**tensors, f"{NAME}.bias": torch.zeros(24)}, folder / "model.safetensors")
    say(folder, case.settings | changes)


@pytest.mark.parametrize("name", CASES)
def test_a_matrix_is_read_exactly(name: str, tmp_path: Path) -> None:
    made = matrix(tmp_path, CASES[name])
    checkpoint = Checkpoint(tmp_path)
    assert f"{NAME}.weight" in checkpoint
    checkpoint.require({f"{NAME}.weight": (24, 256), f"{NAME}.bias": (24,)})
    found = checkpoint.read(f"{NAME}.weight")
    assert found.dtype == torch.float32 and found.shape == (24, 256)
    assert np.array_equal(found.numpy(), made.weight)
    assert checkpoint.read(f"{NAME}.bias").shape == (24,)


@pytest.mark.parametrize("name", CASES)
def test_a_grid_holds_every_number_exactly(name: str, tmp_path: Path) -> None:
    made = matrix(tmp_path, CASES[name])
    grid = Checkpoint(tmp_path).grid(f"{NAME}.weight")
    if made.scale is None:
        assert grid is None
        return
    assert grid is not None and grid.bits == made.bits
    scale = grid.scale.numpy()
    expected = np.asarray(made.scale, np.float32)
    assert np.array_equal(scale, expected[:, 0] if scale.ndim == 1 else expected.T)
    assert scale.ndim == (1 if grid.bits == 8 and expected.shape[1] == 1 else 2)
    blocks = scale[None] if scale.ndim == 1 else scale  # [G, out]
    steps = np.repeat(blocks, 256 // len(blocks), axis=0).T  # [out, in]
    whole = np.round(made.weight / steps)
    assert whole.min() >= -(2 ** (grid.bits - 1)) and whole.max() < 2 ** (grid.bits - 1)
    assert len(np.unique(whole)) > 8
    assert np.array_equal((whole * steps).astype(np.float32), made.weight)


def test_float_tensors_have_no_grid(tmp_path: Path) -> None:
    matrix(tmp_path, CASES["gptq-32"])
    assert Checkpoint(tmp_path).grid(f"{NAME}.bias") is None


@pytest.mark.parametrize("name", ["gptq-128", "pack-128"])
def test_scales_in_bfloat16_are_exact_too(name: str, tmp_path: Path) -> None:
    made = matrix(tmp_path, CASES[name])
    end = "scales" if "scales" in made.tensors else "weight_scale"
    full, made.tensors[end] = made.tensors[end], made.tensors[end].to(torch.bfloat16)
    store(tmp_path, made, CASES[name])
    ratio = (made.tensors[end].float() / full.float()).numpy()  # [2, 24], or [24, 2]
    ratio = ratio.T if end == "scales" else ratio
    expected = made.weight.reshape(24, 2, 128) * ratio[..., None]
    found = Checkpoint(tmp_path).read(f"{NAME}.weight").numpy()
    assert np.allclose(found, expected.reshape(24, 256), rtol=1e-6)


def test_a_borrowed_one_of_a_zero_point_is_given_back(tmp_path: Path) -> None:
    """GPTQModel takes 1 from whole integers, so that a zero of 0 borrows from the next field."""
    case = CASES["gptq-v2-asymmetric"]
    made = matrix(tmp_path, case)
    zeros = np.random.default_rng(0).integers(0, 16, (8, 24))
    zeros[:, ::3] = 0
    made.tensors["qzeros"] = torch.from_numpy(packed(zeros, 4))
    store(tmp_path, made, case)
    expected = Checkpoint(tmp_path).read(f"{NAME}.weight")
    made.tensors["qzeros"] -= 0x11111111
    store(tmp_path, made, case, checkpoint_format="gptq")
    assert torch.equal(Checkpoint(tmp_path).read(f"{NAME}.weight"), expected)


def test_gptq_without_indices_or_with_padded_ones(tmp_path: Path) -> None:
    for name, end in (("gptq-32", "g_idx"), ("pack-32", "weight_g_idx")):
        made = matrix(tmp_path, CASES[name])
        made.tensors.pop(end, None)
        if name == "pack-32":
            made.tensors[end] = torch.full((256,), -1, dtype=torch.int32)
        store(tmp_path, made, CASES[name])
        assert np.array_equal(Checkpoint(tmp_path).read(f"{NAME}.weight").numpy(), made.weight)


# Whole models.


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("stored") / "checkpoint", **ROW)


Spelling = Callable[[str], str]


def quantised(
    stored: Path,
    folder: Path,
    case: Case,
    spelling: Spelling = saved,
    write: Callable[[Path, dict[str, Tensor]], None] = one_safetensors,
) -> Path:
    """A LLaVA checkpoint whose decoder layers are quantised; the same as floats in `floats`."""
    for name in ("quantised", "floats"):
        shutil.copytree(stored, folder / name, ignore=shutil.ignore_patterns("*.safetensors"))
    packed, floats = {}, {}
    for name, tensor in load_file(stored / "model.safetensors").items():
        floats[name] = tensor
        if "language_model" in name and "_proj.weight" in name:
            made = case(tensor.float().numpy())
            base = spelling(name).removesuffix("weight")
            packed |= {base + end: part for end, part in made.tensors.items()}
            floats[name] = torch.from_numpy(made.weight)
        else:
            packed[spelling(name)] = tensor
    assert len(packed) > len(floats) + 10
    write(folder / "quantised", packed)
    one_safetensors(folder / "floats", floats)
    say(folder / "quantised", case.settings)
    return folder / "quantised"


@pytest.mark.parametrize("name", SOME)
def test_an_export_has_the_weights_of_the_dequantised_checkpoint(
    name: str, stored: Path, tmp_path: Path
) -> None:
    made = quantised(stored, tmp_path, CASES[name])
    assert written(made, tmp_path / "a") == written(tmp_path / "floats", tmp_path / "b")


@pytest.mark.parametrize("spelling", [in_memory, older])
@pytest.mark.parametrize("write", [safetensors_shards, bin_shards])
def test_quantised_tensors_are_found_in_every_spelling_and_file(
    spelling: Spelling, write: Any, stored: Path, tmp_path: Path
) -> None:
    made = quantised(stored, tmp_path, CASES["awq-32"], spelling, write)
    found, floats = Checkpoint(made, LLAVA), Checkpoint(tmp_path / "floats", LLAVA)
    assert found.quantised_with is not None
    names = found.quantised_with.matrices
    assert len(names) == 14 and "layers.1.self_attn.o_proj" in names
    for name in names:
        assert torch.equal(found.read(f"{name}.weight"), floats.read(f"{name}.weight"))
    tower = "vision_tower.encoder.layers.0.mlp.fc1.weight"
    assert torch.equal(found.read(tower), floats.read(tower))


SOURCE = "layers.1.mlp.down_proj.weight"  # [64, 128]
INT8S = {"int8", "int8-weights"}
HELD = {  # case -> formats that hold the numbers of this matrix exactly
    "gptq-32": {"int4-32"},
    "pack-32": {"int4-32"},
    "awq-symmetric": {"int4-32"},
    "modelopt-int4": {"int4-32"},
    "gptq-one": {"int4-32", "int4-64", "int4-128"} | INT8S,
    "pack-channel": {"int4-32", "int4-64", "int4-128"} | INT8S,
    "gptq-8-one": INT8S,
    "int8-channel": INT8S,
    "int8-tensor": INT8S,
    "modelopt-int8": INT8S,
    "gptq-8": set(),
    "gptq-64": set(),
    "gptq-act-order": set(),
    "int8-asymmetric": set(),
    "fp8-channel": set(),
}


@pytest.mark.parametrize("name", HELD)
def test_a_format_that_fits_holds_the_numbers_exactly(
    name: str, stored: Path, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(quantised(stored, tmp_path, CASES[name]), LLAVA)
    expected = Checkpoint(tmp_path / "floats", LLAVA).read(SOURCE).t()
    for form in (name for name, row in FORMATS.items() if not row.is_float):
        said = str(checkpoint.report([(SOURCE, FORMATS[form], torch.float32)]))
        found = in_bundle(checkpoint, form, tmp_path / f"{form}.safetensors")
        if form == "float":
            assert torch.equal(found, expected) and said.endswith(": 1 stored in floating point")
        elif form in HELD[name]:
            assert torch.equal(found, expected) and said.endswith(": 1 held exactly")
        else:
            error = (found - expected).abs().max() / expected.abs().max()
            assert 1e-4 < error < 0.3, form
            assert said.endswith(": 1 rounded again")


@pytest.mark.parametrize("form", ["fp8", "nvfp4"])
def test_a_format_of_floats_is_not_said_to_hold_whole_numbers(form: str, tmp_path: Path) -> None:
    for name in ("gptq-one", "int8-channel"):
        matrix(tmp_path, CASES[name])
        said = Checkpoint(tmp_path).report([(f"{NAME}.weight", FORMATS[form], torch.float32)])
        assert str(said).endswith(": 1 rounded again")


def in_bundle(checkpoint: Checkpoint, form: str, path: Path) -> Tensor:
    """The numbers [in, out] that a bundle's file means, of a matrix stored in a format."""
    hints = Hints(grid=checkpoint.grid(SOURCE))
    weight = Weight(SOURCE, SOURCE, (128, 64), True, form)
    entry = WeightsFile("layer", 1, "float32", form)
    write(path, entry, [weight], checkpoint, lambda _: None, lambda _: hints)
    tensors = load_file(path)
    return meant(tensors, SOURCE, form)


def meant(tensors: dict[str, Tensor], name: str, form: str) -> Tensor:
    """The numbers [in, out] that a file's tensors mean."""
    if form == "float":
        return tensors[name]
    numbers = tensors[f"{name}.{form}"]
    if FORMATS[form].bits == 4:
        halves = torch.stack((numbers & 15, numbers >> 4), -1).flatten(1).to(torch.int8)
        numbers = torch.where(halves > 7, halves - 16, halves)
    return dequantise(numbers, tensors[f"{name}.scale"])


@pytest.mark.parametrize(
    ("name", "precision", "form", "is_exact"),
    [
        ("gptq-32", "decoder=int4", "int4-32", True),
        ("pack-channel", "decoder=int4", "int4-32", True),
        ("int8-channel", "decoder=int8", "int8", True),
        ("awq-32", "decoder=int4", "int4-32", False),
        ("gptq-act-order", "decoder=int4", "int4-32", False),
    ],
)
def test_an_export_keeps_the_numbers_that_its_format_holds(
    name: str, precision: str, form: str, is_exact: bool, stored: Path, tmp_path: Path, caplog
) -> None:
    """Nothing is folded into them, where matrices that are rounded again are smoothed."""
    made = quantised(stored, tmp_path, CASES[name])
    job = plan_export(made, read_config(made), ExportOptions(precision=precision))
    write_weights(job, tmp_path, lambda *_: None)
    floats = Checkpoint(tmp_path / "floats", LLAVA)
    what = "held exactly" if is_exact else "rounded again"
    method = CASES[name].settings["quant_method"]
    assert f"14 matrices came quantised with {method}: 14 {what}" in caplog.messages
    for layer in range(2):
        tensors = load_file(tmp_path / FOLDER / f"layers.{layer}.safetensors")
        norm = f"layers.{layer}.input_layernorm.weight"
        assert torch.equal(tensors[norm], floats.read(norm)) == is_exact
        for matrix in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"):
            source = f"layers.{layer}.{matrix}.weight"
            found, expected = meant(tensors, source, form), floats.read(source).t()
            assert torch.equal(found, expected) == is_exact


def test_scales_that_their_type_cannot_keep_are_not_called_exact(
    stored: Path, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(quantised(stored, tmp_path, CASES["pack-32"]), LLAVA)
    names = [f"{name}.weight" for name in checkpoint.quantised_with.matrices]
    for dtype, said in ((torch.float16, "14 held exactly"), (torch.bfloat16, "14 rounded again")):
        line = checkpoint.report((name, FORMATS["int4-32"], dtype) for name in names)
        assert line == f"14 matrices came quantised with compressed-tensors: {said}"


def test_a_float_checkpoint_has_nothing_to_report(stored: Path) -> None:
    checkpoint = Checkpoint(stored, LLAVA)
    assert checkpoint.quantised_with is None and checkpoint.dequantised() is None
    assert checkpoint.report([]) is None


def test_a_quantised_head_is_no_tied_one(stored: Path, tmp_path: Path) -> None:
    made = quantised(stored, tmp_path, CASES["gptq-32"])
    tensors = load_file(made / "model.safetensors")
    name = next(name for name in tensors if name.endswith("lm_head.weight"))
    head = CASES["gptq-32"](tensors.pop(name).float().numpy())
    base = name.removesuffix("weight")
    tensors |= {base + end: part for end, part in head.tensors.items()}
    save_file(tensors, made / "model.safetensors")
    found = Checkpoint(made, LLAVA)
    assert "lm_head.weight" in found
    assert np.array_equal(found.read("lm_head.weight").numpy(), head.weight)


def test_the_config_is_read_as_without_a_quantisation(stored: Path, tmp_path: Path) -> None:
    made = quantised(stored, tmp_path, CASES["modelopt-int4"])
    assert read_config(made).to_dict() == read_config(stored).to_dict()


OLDER_FILES = {
    "quantize_config.json": ("gptq-32", lambda s: s),
    "quant_config.json": (
        "awq-32",
        lambda s: {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"},
    ),
    "hf_quant_config.json": (
        "modelopt-int4",
        lambda s: {"producer": {"name": "modelopt"}, "quantization": s},
    ),
}


@pytest.mark.parametrize("file", OLDER_FILES)
def test_settings_beside_a_config_that_says_nothing(file: str, tmp_path: Path) -> None:
    name, content = OLDER_FILES[file]
    made = matrix(tmp_path, CASES[name])
    say(tmp_path, None)
    settings = {k: v for k, v in CASES[name].settings.items() if k != "quant_method"}
    (tmp_path / file).write_text(json.dumps(content(settings)))
    assert np.array_equal(Checkpoint(tmp_path).read(f"{NAME}.weight").numpy(), made.weight)


# The other readers.


@pytest.mark.parametrize("spelling", [in_memory, older])
def test_verify_and_calibrate_compute_with_the_dequantised_weights(
    spelling: Spelling, stored: Path, tmp_path: Path
) -> None:
    """transformers alone would ask for the method's library, or fill the layers with noise."""
    made = quantised(stored, tmp_path, CASES["awq-32"], spelling, safetensors_shards)
    expected = Reference(str(tmp_path / "floats")).model.state_dict()
    options = CalibrationOptions(method="quantile", sites=(1,), counts=(8.0,))
    calibrated = begin(Encoder(str(made)), options)[0].llava.state_dict()
    for found in (Reference(str(made)).model.state_dict(), calibrated):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_cost_reads_the_config_of_a_quantised_checkpoint(stored: Path, tmp_path: Path) -> None:
    made = quantised(stored, tmp_path, CASES["pack-32"])
    assert read_shape(made / "config.json") == read_shape(stored / "config.json")


# Damage.


def without(end: str) -> Callable[[Written], object]:
    return lambda made: made.tensors.pop(end)


def changed(end: str, change: Callable[[Tensor], Tensor]) -> Callable[[Written], object]:
    return lambda made: made.tensors.update({end: change(made.tensors[end]).contiguous()})


def index_of(value: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.index_fill(0, torch.tensor([7]), value)


DAMAGE: dict[str, tuple[str, Callable[[Written], object], str]] = {
    "awq-no-scales": ("awq-32", without("scales"), f"{NAME} lacks scales"),
    "awq-no-zeros": ("awq-32", without("qzeros"), f"{NAME} lacks qzeros"),
    "awq-no-values": ("awq-32", without("qweight"), "are quantised with awq"),
    "awq-rows": ("awq-32", changed("qweight", lambda t: t[:-32]), "groups|group size"),
    "awq-odd-rows": ("awq-32", changed("qweight", lambda t: t[:-3]), "do not divide"),
    "awq-columns": ("awq-32", changed("qweight", lambda t: t[:, :-1]), "scales does not fit"),
    "awq-zeros": ("awq-32", changed("qzeros", lambda t: t[:-1]), "qzeros does not fit"),
    "awq-half": ("awq-32", changed("scales", lambda t: t[::2]), "qzeros does not fit"),
    "awq-type": ("awq-32", changed("qweight", lambda t: t.to(torch.int64)), "found: I64"),
    "awq-scales-type": ("awq-32", changed("scales", lambda t: t.to(torch.int8)), "found: I8"),
    "awq-axes": ("awq-32", changed("scales", lambda t: t[None]), "another shape"),
    "awq-empty": ("awq-32", changed("scales", lambda t: t[:0]), "none of them empty"),
    "gemv-narrow": ("awq-gemv-32", changed("scales", lambda t: t[:, :4]), "does not fit"),
    "gptq-no-scales": ("gptq-32", without("scales"), f"{NAME} lacks scales"),
    "gptq-no-index": ("gptq-act-order", without("g_idx"), f"{NAME} lacks g_idx"),
    "gptq-rows": ("gptq-32", changed("qweight", lambda t: t[:-1]), "g_idx does not fit"),
    "gptq-columns": ("gptq-32", changed("qweight", lambda t: t[:, :-1]), "qweight does not fit"),
    "gptq-bits": ("gptq-32", changed("qzeros", lambda t: t.repeat(1, 2)), "have the bits of"),
    "gptq-odd-bits": ("gptq-32", changed("qzeros", lambda t: t[:, :2]), "4 or 8 bits"),
    "gptq-index-high": ("gptq-act-order", changed("g_idx", index_of(8)), "0 to 7"),
    "gptq-index-low": ("gptq-act-order", changed("g_idx", index_of(-1)), "0 to 7"),
    "gptq-float-index": ("gptq-32", changed("g_idx", lambda t: t.float()), "found: F32"),
    "pack-no-scale": ("pack-32", without("weight_scale"), f"{NAME} lacks weight_scale"),
    "pack-no-shape": ("pack-32", without("weight_shape"), f"{NAME} lacks weight_shape"),
    "pack-shape": ("pack-32", changed("weight_shape", lambda t: t * 3), "does not fit its matrix"),
    "pack-scale": ("pack-32", changed("weight_scale", lambda t: t[:-1]), "scale does not fit"),
    "pack-groups": ("pack-32", changed("weight_scale", lambda t: t[:, :4]), "group size"),
    "pack-uneven": ("pack-32", changed("weight_scale", lambda t: t[:, :3]), "do not divide"),
    "pack-zeros": ("pack-64", changed("weight_zero_point", lambda t: t[:, :1]), "does not fit"),
    "pack-index": ("pack-act-order", changed("weight_g_idx", index_of(8)), "0 to 7"),
    "pack-type": ("pack-32", changed("weight_packed", lambda t: t.view(torch.uint8)), "found: U8"),
    "int8-no-scale": ("int8-channel", without("weight_scale"), f"{NAME} lacks weight_scale"),
    "int8-type": ("int8-channel", changed("weight", lambda t: t.to(torch.int16)), "found: I16"),
    "modelopt-no-scale": ("modelopt-int8", without("weight_scale"), f"{NAME} lacks weight_scale"),
    "modelopt-scale": ("modelopt-int4", changed("weight_scale", lambda t: t[:-1]), "does not fit"),
    "modelopt-type": ("modelopt-fp8", changed("weight", lambda t: t.view(torch.int8)), "in I8"),
    "modelopt-before": (
        "modelopt-int4-before",
        changed("pre_quant_scale", lambda t: t[1:]),
        "pre_quant_scale does not fit",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_matrices_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    case, damage, match = DAMAGE[name]
    made = matrix(tmp_path, CASES[case])
    damage(made)
    store(tmp_path, made, CASES[case])
    line = refused(
        lambda: Checkpoint(tmp_path).read(f"{NAME}.weight"), UnsupportedModelError, match
    )
    assert "what to do: " in line


# What is not read.

GROUP = {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "tensor_group"}}
UNREAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "awq-bits": ("awq-32", {"bits": 3}, "3 bits"),
    "llm-awq": ("awq-32", {"version": "llm-awq"}, "layout llm-awq.*gemm or gemv"),
    "gemv-fast": ("awq-32", {"version": "gemv_fast"}, "layout gemv_fast"),
    "awq-marlin": ("awq-32", {"version": "marlin"}, "layout marlin"),
    "gemv-size": ("awq-gemv-32", {"group_size": None}, "group size of None"),
    "awq-group": ("awq-32", {"group_size": 64}, "do not fit the group size"),
    "gptq-bits": ("gptq-32", {"bits": 8}, "have the bits of the settings"),
    "gptq-group": ("gptq-32", {"group_size": 128}, "do not fit the group size"),
    "gptq-marlin": ("gptq-32", {"checkpoint_format": "marlin"}, "checkpoint_format marlin"),
    "gptq-old-marlin": ("gptq-32", {"is_marlin_format": True}, "checkpoint_format marlin"),
    "marlin": ("gptq-32", {"quant_method": "marlin"}, "quantised with marlin"),
    "marlin-24": ("pack-32", {"format": "marlin-24"}, "format marlin-24"),
    "nvfp4": ("pack-32", {"format": "nvfp4-pack-quantized"}, "nvfp4"),
    "of-a-group": ("pack-32", {"config_groups": {"a": {"format": "marlin-24"}}}, "marlin-24"),
    "blocks": ("pack-32", {"config_groups": {"a": GROUP}}, "tensor_group"),
    "sparse": ("pack-32", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24"),
    "turned": ("pack-32", {"transform_config": {"config_groups": {"a": 1}}}, "transform_config"),
    "modelopt-nvfp4": ("modelopt-int4", {"quant_algo": "NVFP4"}, "NVFP4.*in U8"),
    "modelopt-unsaid": ("modelopt-int4", {"quant_algo": None}, "None"),
    "auto-round": ("gptq-32", {"quant_method": "auto-round"}, "quantised with auto-round"),
    "hqq": ("gptq-32", {"quant_method": "hqq"}, "quantised with hqq"),
    "another": ("gptq-32", {"quant_method": "compressed-tensors"}, "compressed-tensors.*g_idx"),
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_is_not_read_is_refused_with_the_way_out(name: str, tmp_path: Path) -> None:
    case, changes, match = UNREAD[name]
    matrix(tmp_path, CASES[case], **changes)
    line = refused(lambda: Checkpoint(tmp_path), UnsupportedModelError, match)
    assert "the checkpoint that it was quantised from" in line


def test_a_second_scale_of_modelopt_is_refused(tmp_path: Path) -> None:
    made = matrix(tmp_path, CASES["modelopt-int4"])
    made.tensors["weight_scale_2"] = torch.ones(())
    store(tmp_path, made, CASES["modelopt-int4"])
    refused(lambda: Checkpoint(tmp_path), UnsupportedModelError, "W4A16_AWQ")


def test_bits_may_differ_by_layer_where_the_settings_say_so(tmp_path: Path) -> None:
    made = matrix(tmp_path, CASES["gptq-8"], bits=4, dynamic={"+:.*up_proj": {"bits": 8}})
    assert np.array_equal(Checkpoint(tmp_path).read(f"{NAME}.weight").numpy(), made.weight)
