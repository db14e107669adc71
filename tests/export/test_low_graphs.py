"""Graphs in int8 and int4: their arithmetic, their kernels in ONNX Runtime, the rows of each."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from patchsieve.contract import files as bundle_files
from patchsieve.contract import names
from patchsieve.contract.plan import Plan, SitePlan
from patchsieve.contract.weights import WeightsFile
from patchsieve.export.families import FAMILIES
from patchsieve.export.graphs.layers import Linear
from patchsieve.export.graphs.trace import Input, bind, fake_weights, trace
from patchsieve.export.lowering import lower, lowering
from patchsieve.export.reuse import reuse
from patchsieve.export.weights import DTYPES, Weight, default_dtype, write
from patchsieve.runtime.model import Model
from patchsieve.runtime.ort import backend as ort_backend
from tests.support.bundles import PHOTO, PROMPT, command_json, export_tiny
from tests.support.low_bundles import INT4, MIXED, tensors_of
from tests.support.test_only_methods import known
from tests.support.tiny_bundles import pictures

pytestmark = pytest.mark.slow

pytest_plugins = ["tests.support.low_bundles"]

Bundle = Callable[[str], Path]
SIZE_IN, SIZE_OUT = 64, 24


class One(nn.Module):
    """One matrix with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.m = Linear(SIZE_IN, SIZE_OUT, bias=True)

    def forward(self, rows: Tensor) -> Tensor:
        return self.m(rows)


class Held:
    """A checkpoint of that matrix, [out, in], and its bias."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        matrix = rng.standard_normal((SIZE_OUT, SIZE_IN)) * rng.uniform(0.1, 2, (SIZE_OUT, 1))
        self.held = {"m.weight": matrix, "m.bias": rng.standard_normal(SIZE_OUT)}

    def read(self, name: str) -> Tensor:
        return torch.from_numpy(self.held[name]).float()


def graph(folder: Path, target: str, form: str, kind: str) -> Path:
    """A target's graph of the product, its weights in a file beside it."""
    (folder / "weights").mkdir(exist_ok=True)
    weights = [
        Weight("m.weight", "m.weight", (SIZE_IN, SIZE_OUT), True, form),
        Weight("m.bias", "m.bias", (SIZE_OUT,)),
    ]
    path = folder / "weights" / "layers.0.safetensors"
    stored = write(path, WeightsFile("layer", 0, kind, form), weights, Held(), lambda _: None)
    with fake_weights() as mode, default_dtype(DTYPES[kind][0]):
        module = One()
    rows = Input(DTYPES[kind][0], (1, "rows", SIZE_IN))
    traced = trace(module, (rows,), ["rows"], ["found"], mode)
    bind(traced, stored)
    onnx.save(ir.to_proto(lower(traced, lowering(target))), folder / "one.onnx")
    return folder / "one.onnx"


def given(kind: str) -> np.ndarray:
    """Rows of very different lengths, one of zeros."""
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((1, 9, SIZE_IN)) * np.logspace(-4, 2, 9)[:, None]
    rows[0, 4] = 0
    return rows.astype(kind)


def dynamic(rows: np.ndarray, numbers: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The product as int8 on a CPU is defined: unsigned rows of one scale, each first divided by
    its largest entry; sums of whole numbers."""
    rows = rows.astype(np.float32)
    largest = np.maximum(np.abs(rows).max(axis=-1, keepdims=True), np.float32(1e-30))
    even = rows / largest
    low, high = min(even.min(), 0.0), max(even.max(), 0.0)
    step = np.float32((high - low) / 255)
    zero = np.clip(np.rint(-low / step), 0, 255)
    whole = np.clip(np.rint(even / step) + zero, 0, 255)  # uint8
    sums = (whole.astype(np.int64) - int(zero)) @ numbers.astype(np.int64)
    return sums * step.astype(np.float64) * scale * largest


@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_int8_on_a_cpu_is_the_product_of_whole_numbers(kind: str, tmp_path: Path) -> None:
    path = graph(tmp_path, "cpu", "int8", kind)
    rows = given(kind)
    (found,) = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(
        None, {"rows": rows}
    )
    assert found.dtype == np.dtype(kind)
    stored = load_file(tmp_path / "weights" / "layers.0.safetensors")
    numbers, scale, bias = (
        stored[f"m.{name}"].float().numpy() for name in ("weight.int8", "weight.scale", "bias")
    )
    expected = dynamic(rows, numbers, scale)  # [1, 9, out]
    size = np.abs(expected).max(axis=-1, keepdims=True) + np.abs(bias).max()
    error = np.abs(found.astype(np.float64) - (expected + bias)) / size
    assert error.max() < {"float32": 1e-6, "float16": 2e-3}[kind]
    assert np.array_equal(found[0, 4].astype(np.float32), bias)  # a row of zeros stays one
    # Each row keeps its digits, beside one that is a million times longer.
    exact = rows.astype(np.float64) @ (numbers * scale).astype(np.float64)
    lengths = np.linalg.norm(exact, axis=-1)
    far = np.linalg.norm(expected - exact, axis=-1)[lengths > 0] / lengths[lengths > 0]
    assert far.max() < 0.02


# Whole bundles.

FUSED = {"MatMulNBits", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"}
PLAIN = {"MatMul", "FusedMatMul", "Gemm"}


def optimised(path: Path, out: Path) -> onnx.GraphProto:
    """A graph as ONNX Runtime runs it, with the options of our backend."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(*ort_backend._ACCURACY)
    options.optimized_model_filepath = str(out)
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return onnx.load(out, load_external_data=False).graph


def packed_in(path: Path) -> int:
    """Matrices of a graph in int8 or int4."""
    stored = onnx.load(path, load_external_data=False).graph.initializer
    return sum(tensor.name.partition(".weight.")[2].startswith("int") for tensor in stored)


@pytest.mark.parametrize("target", ["cpu", "reference"])
@pytest.mark.parametrize("precision", [MIXED, INT4])
def test_every_packed_matrix_runs_in_a_fused_kernel(
    low_bundle: Bundle, precision: str, target: str, tmp_path: Path
) -> None:
    bundle = low_bundle(precision)
    facts = bundle_files.read(bundle)
    kinds: Counter[str] = Counter()
    for name, path in facts.targets[target].items():
        count = packed_in(bundle / path)
        if not facts.graphs[name].identity.is_large:
            assert not count
            continue
        nodes = optimised(bundle / path, tmp_path / "optimised.onnx").node
        found = Counter(node.op_type for node in nodes)
        assert sum(found[kind] for kind in FUSED) == count > 0, (name, found)
        assert not {"DequantizeLinear", "QuantizeLinear", "MatMulInteger"} & set(found), name
        held = [i for n in nodes if n.op_type in PLAIN for i in n.input if ".weight." in i]
        assert not held, (name, held)
        kinds += found
    is_dynamic = target == "cpu"
    assert bool(kinds["DynamicQuantizeMatMul"]) == is_dynamic
    assert kinds["MatMulNBits"]


def stored_matrices(bundle: Path) -> dict[str, np.ndarray]:
    """Each tensor of the layers, the tower and the head as its format says it, [out, in]."""
    found = {}
    for file in ("vision", "head", *(f"layers.{i}" for i in range(5))):
        tensors = tensors_of(bundle, file)
        for name, values in tensors.items():
            base, mark, form = name.partition(".weight.")
            if not mark:
                turned = values.ndim == 2 and "embed" not in name
                found[name] = values.T if turned else values
                continue
            if form not in ("int8", "int8-weights", "int4-32"):
                continue
            scale = tensors[f"{base}.weight.scale"]
            if form == "int4-32":
                halves = np.stack([values & 15, values >> 4], -1).reshape(len(values), -1)
                values = (halves.astype(np.int8) ^ 8) - 8
                scale = scale.repeat(32, axis=0)
            found[f"{base}.weight"] = (values * scale).astype(np.float32).T
    return found


def as_float_checkpoint(bundle: Path, checkpoint: Path, out: Path) -> Path:
    """The checkpoint with the bundle's numbers in place of its own."""
    shutil.copytree(checkpoint, out)
    tensors = load_file(out / "model.safetensors")
    ours, canonical = stored_matrices(bundle), FAMILIES["llava"].canonical
    taken = {name for name in tensors if canonical(name) in ours}
    assert len(taken) >= len(ours) - 1
    for name in taken:
        values = ours[canonical(name)]
        assert values.shape == tuple(tensors[name].shape), name
        tensors[name] = torch.from_numpy(values.copy())
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def test_a_bundle_computes_with_the_numbers_that_it_stores(
    low_bundle: Bundle, low_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against Hugging Face on the stored numbers; without fused kernels int4 rounds no rows."""
    bundle = low_bundle(INT4)
    checkpoint = as_float_checkpoint(bundle, low_checkpoint, tmp_path / "checkpoint")
    make = ort.SessionOptions

    def plain() -> Any:
        options = make()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        return options

    monkeypatch.setattr(ort_backend.ort, "SessionOptions", plain)
    arguments = ("--image", PHOTO, "--prompt", PROMPT, "--threads", 1, "--max-new-tokens", 4)
    code, said = command_json(
        "verify", bundle, "--against", checkpoint, "--target", "reference", *arguments
    )
    assert code == 0
    errors = {part["name"]: part for part in said["parts"] if part["plan"] == "none"}
    assert errors["logits"]["relative_error"] < 1e-4
    assert errors["greedy tokens"]["in_common"] == 1
    assert max(part["own_error"] or 0.0 for part in errors.values()) < 1e-4
    code, said = command_json(
        "verify", bundle, "--against", checkpoint, "--target", "cpu", *arguments
    )
    assert code == 0  # int8 rounds its rows there
    errors = {part["name"]: part["own_error"] for part in said["parts"] if part["plan"] == "none"}
    assert errors["layers.2.self_attn.q_proj"] < 1e-5 < errors["layers.2.mlp.down_proj"] < 0.02


def test_only_single_rows_are_fed_to_the_copy_for_single_rows(
    low_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[str, int]] = []
    plain = ort_backend.OrtBackend.run_stage

    def run_stage(self: Any, stage: int, inputs: Any, cache: Any) -> Any:
        asked: list[str] = []
        session = self._session
        with monkeypatch.context() as patch:
            patch.setattr(self, "_session", lambda name: asked.append(name) or session(name))
            out = plain(self, stage, inputs, cache)
        ran.append((asked[0], len(inputs[names.KEEP_INDICES])))
        return out

    monkeypatch.setattr(ort_backend.OrtBackend, "run_stage", run_stage)
    model = Model(low_bundle(MIXED), threads=1, check="size")
    chat = model.chat()
    answers = [
        chat.ask(PROMPT, pictures(1), max_new_tokens=4, ignore_eos=True),
        chat.ask("And?", max_new_tokens=3, ignore_eos=True),
    ]
    model.close()
    assert [len(answer.token_ids) for answer in answers] == [4, 3]
    assert {graph.partition("_")[0] for graph, count in ran if count == 1} == {"step"}
    assert {graph.partition("_")[0] for graph, count in ran if count > 1} == {"stage"}
    assert sum(graph == "step_2" for graph, _ in ran) == 3 + 2


def test_a_decision_by_the_next_layer_reads_the_layers_own_copy(own_low: Bundle) -> None:
    """Layer 2 is stored twice, in int8 and in int4: the prompt runs in int8."""
    bundle = own_low(MIXED)
    with known():
        reuse(bundle, Plan((SitePlan(2, "ahead", {"num_keep": 9}),)), "ahead")
    for target in ("cpu", "reference"):
        path = bundle / bundle_files.read(bundle).targets[target][names.decide("ahead", 2)]
        stored = onnx.load(path, load_external_data=False).graph.initializer
        read = {
            tensor.name: entry.value
            for tensor in stored
            for entry in tensor.external_data
            if entry.key == "location"
        }
        assert set(read.values()) == {"weights/layers.2.safetensors"}
        assert {f"layers.2.self_attn.{p}_proj.weight.int8" for p in "qk"} <= set(read)
    model = Model(bundle, threads=1, check="size")
    answer = model.generate(pictures(1), PROMPT, plan="ahead", max_new_tokens=2)
    model.close()
    assert [len(site.kept) for site in answer.sites] == [9]
    facts = bundle_files.read(bundle)
    assert "graphs/weights/steps.2.safetensors" not in facts.graphs["decide.ahead.2"].weights


@pytest.mark.slow
def test_float16_parts_hold_packed_matrices_on_every_target_that_runs_here(
    low_checkpoint: Path, tmp_path: Path
) -> None:
    bundle = export_tiny(
        low_checkpoint,
        tmp_path / "bundle",
        precision="mixed:float16,layers.1=float,*.up_proj=int4-64",
        targets=("cpu", "reference", "cuda"),
    )
    arguments = ("--image", PHOTO, "--prompt", PROMPT, "--threads", 1, "--max-new-tokens", 6)
    for target in ("cpu", "reference", "cuda"):
        code, said = command_json(
            "verify", bundle, "--against", low_checkpoint, "--target", target, *arguments
        )
        assert code == 0, (target, said["first_departure"])
