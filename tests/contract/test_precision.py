"""Tower, decoder and head each in a type of their own, and the sums that need it in float32."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, shape_inference
from safetensors.torch import load_file, save_file

from patchsieve.contract import files as bundle_files
from patchsieve.contract import names, weights
from patchsieve.contract.errors import BundleError, PatchsieveError
from patchsieve.contract.precision import Precision, stored_as
from patchsieve.contract.targets import TARGETS
from patchsieve.export.exporter import ExportOptions, export
from patchsieve.export.families import FAMILIES
from patchsieve.export.source.checkpoint import Checkpoint
from patchsieve.runtime.bundle import Bundle
from patchsieve.runtime.model import Model
from tests.references.masked_llava import MaskedLlava, user_message
from tests.support.bundles import command_json
from tests.support.damage import edit_manifest, refused
from tests.support.models import save_checkpoint
from tests.support.target_bundles import BFLOAT16, MIXED
from tests.support.tiny_bundles import largest_error, pictures, recorded_logits
from tests.support.tolerances import LOGITS_MIXED

pytest_plugins = ["tests.support.target_bundles"]

QUESTION = "What is on the table?"
CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


@pytest.mark.parametrize(
    ("text", "kinds", "short"),
    [
        ("bfloat16", ("bfloat16",) * 3, "bfloat16"),
        ("tower=float16", ("float16", "float32", "float32"), None),
        ("decoder=float16", ("float32", "float16", "float16"), None),
        ("head=float16, decoder=float16,tower=float16", ("float16",) * 3, "float16"),
        ("tower=float16,decoder=bfloat16,head=float32", ("float16", "bfloat16", "float32"), None),
    ],
)
def test_a_precision_is_read_and_written_alike(text: str, kinds: tuple, short: str | None) -> None:
    read = Precision.parse(text)
    assert read.kinds == kinds
    assert Precision.parse(str(read)) == read
    assert short is None or str(read) == short


@pytest.mark.parametrize(
    "text", ["int8", "tower=float8", "eyes=float16", "tower=float16,tower=float32", "tower=", "="]
)
def test_what_is_no_precision_is_refused(text: str) -> None:
    refused(lambda: Precision.parse(text), PatchsieveError, "precision")


@pytest.mark.parametrize("target", ["cpu", "reference", "cuda"])
def test_a_target_without_bfloat16_is_refused_before_any_work(target: str) -> None:
    line = refused(lambda: ExportOptions(targets=("tensorrt", target), precision="tower=bfloat16"))
    assert f"the target {target}" in line and "tower=bfloat16,decoder=float32" in line
    assert f"leave {target} out of --targets" in line


def test_tied_embeddings_have_one_precision_with_the_head(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "tied", "qwen2-tied", layers=2)
    apart = ExportOptions(precision="decoder=float16,head=float32")
    line = refused(lambda: export(str(checkpoint), tmp_path / "bundle", apart))
    assert "the output matrix is the embedding table" in line and "head=float16" in line
    same = ExportOptions(precision="decoder=float16")
    export(str(checkpoint), tmp_path / "bundle", same)
    heads = {w["dtype"] for w in header(tmp_path / "bundle", "head").values()}
    assert heads == {"F16"}
    facts = bundle_files.read(tmp_path / "bundle")
    last = onnx.load(
        tmp_path / "bundle" / facts.targets["cpu"]["stage_0"], load_external_data=False
    )
    table = next(t for t in last.graph.initializer if t.name == "lm_head.weight")
    assert table.data_type == TensorProto.FLOAT16


def test_a_weight_that_float16_cannot_hold_is_refused_with_its_name(
    small_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = Path(shutil.copytree(small_checkpoint, tmp_path / "checkpoint"))
    tensors = load_file(checkpoint / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    tensors[name][3, 5] = -7e4
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    bundle = tmp_path / "bundle"
    half = ExportOptions(precision="tower=float32,decoder=float16")
    line = refused(lambda: export(str(checkpoint), bundle, half))
    assert "layers.1.mlp.up_proj.weight does not fit float16 | found: 70000" in line
    assert "bfloat16 or float32" in line and not bundle.exists()


def header(bundle: Path, file: str) -> dict[str, dict]:
    """The tensors of a weights file."""
    content = (bundle / weights.FOLDER / f"{file}.safetensors").read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


@pytest.mark.parametrize("precision", [*MIXED, BFLOAT16])
def test_each_part_is_stored_once_and_in_its_own_type(bundle_of, precision: str) -> None:
    bundle = bundle_of(precision)
    kinds = Precision.parse(precision)
    files = {path.stem for path in (bundle / weights.FOLDER).iterdir()}
    own = {"vision": kinds.tower, "head": kinds.head}
    tensors: list[str] = []
    for file in files:
        stored = header(bundle, file)
        assert {w["dtype"] for w in stored.values()} == {CODES[own.get(file, kinds.decoder)]}, file
        tensors += stored
    assert len(tensors) == len(set(tensors))
    facts = bundle_files.read(bundle)
    assert facts.precision == kinds
    assert (
        facts.row_bytes(facts.stages[0]) == 2 * 2 * 16 * np.dtype(stored_as(kinds.decoder)).itemsize
    )
    types = {
        (name, tensor.name): tensor.dtype
        for name, graph in facts.graphs.items()
        for tensor in (*graph.inputs, *graph.outputs)
    }
    decoder = {"float32": "float"}.get(kinds.decoder, kinds.decoder)
    assert types[names.VISION, names.PIXEL_VALUES] == types["stage_1", names.LOGITS] == "float"
    assert types[names.VISION, names.IMAGE_FEATURES] == types["stage_0", names.HIDDEN] == decoder
    assert types["stage_0", names.key_cache(0)] == types["stage_1", names.HIDDEN] == decoder
    assert types["decide.fastv.1", names.QUERY] == decoder
    assert types["decide.fastv.1", names.SCORES] == "float"


def in_parts(model: torch.nn.Module, precision: Precision) -> None:
    """Turn a Hugging Face model's parts into their types; the head casts what it gets."""
    tower, decoder, head = (getattr(torch, kind) for kind in precision.kinds)
    model.model.vision_tower.to(tower)
    model.model.multi_modal_projector.to(tower)
    model.model.language_model.to(decoder)
    model.model.language_model.norm.to(head)
    model.lm_head.to(head)
    model.model.language_model.norm.register_forward_pre_hook(
        lambda module, inputs: (inputs[0].to(head),)
    )


@pytest.mark.parametrize("target", ["cpu", "reference"])
@pytest.mark.parametrize("precision", MIXED)
def test_mixed_parts_answer_as_hugging_face_in_the_same_types(
    bundle_of, small_checkpoint: Path, precision: str, target: str
) -> None:
    reference = MaskedLlava(small_checkpoint)
    in_parts(reference.model, Precision.parse(precision))
    text = reference.prompt([user_message(QUESTION, 1)])
    expected, expected_logits = reference.generate(text, pictures(1), 4)
    model = Model(bundle_of(precision), target=target, threads=1, check="size")
    logits = recorded_logits(model)
    found = model.generate(pictures(1), QUESTION, max_new_tokens=4, plan="none")
    model.close()
    error = largest_error(logits, expected_logits)
    print(f"largest error of a logit: {error:.1e}")
    assert found.token_ids == expected
    assert error < LOGITS_MIXED


# Which sums are in float32.

WIDE = {"Softmax", "ReduceMean", "ReduceSum", "ReduceMax", "CumSum", "TopK", "Pow", "Sqrt"}
WIDE |= {"Cos", "Sin", "Exp"}
MOVES = {"Cast", "Reshape", "Transpose", "Gather", "Slice", "Shape", "Squeeze", "Unsqueeze"}
MOVES |= {"Expand", "Concat", "Identity"}


def typed(file: Path) -> tuple[onnx.GraphProto, dict[str, int]]:
    """A graph, and the type of each value that inference or export knows."""
    model = shape_inference.infer_shapes(onnx.load(file, load_external_data=False))
    values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return model.graph, types | {t.name: t.data_type for t in model.graph.initializer}


@pytest.mark.parametrize("precision", [*MIXED, BFLOAT16])
def test_norms_angles_and_decisions_are_summed_in_float32(bundle_of, precision: str) -> None:
    bundle = bundle_of(precision)
    seen = dict.fromkeys(("norm", "Softmax", "Cos", "attention", "decision"), 0)
    for target, graphs in bundle_files.read(bundle).targets.items():
        for name, path in graphs.items():
            graph, types = typed(bundle / path)
            for node in graph.node:
                halves = [one for one in node.input if types.get(one) in HALF]
                where = (target, name, node.op_type, node.output[0])
                assert node.op_type not in WIDE or not halves, where
                attributes = {a.name: a.i for a in node.attribute}
                if node.op_type in ("LayerNormalization", "RMSNormalization"):
                    assert attributes.get("stash_type", 1) == TensorProto.FLOAT, where
                    seen["norm"] += 1
                if node.op_type == "Attention" and target == "reference" and halves:
                    assert attributes["softmax_precision"] == TensorProto.FLOAT, where
                    seen["attention"] += 1
                if names.decided(name):
                    assert not halves or node.op_type in MOVES, where
                    seen["decision"] += 1
                seen[node.op_type] = seen.get(node.op_type, 0) + 1
    assert seen["norm"] and seen["Softmax"] and seen["Cos"] and seen["decision"]
    assert seen["attention"] or precision == BFLOAT16  # which the reference does not take


# bfloat16, which nothing here can run.


def test_the_runtime_hands_bfloat16_over_as_its_bits(bundle_of, small_checkpoint: Path) -> None:
    bundle = Bundle(bundle_of(BFLOAT16), "tensorrt-rtx", check="size")
    found = bundle.embed(np.array([3, 1]))
    table = Checkpoint(small_checkpoint, FAMILIES["llava"]).read("embed_tokens.weight")[[3, 1]]
    assert found.dtype == np.uint16
    expected = table.to(torch.bfloat16).view(torch.uint16)
    assert np.array_equal(found, expected.numpy())


@pytest.mark.tensorrt
def test_tensorrt_rtx_parses_and_builds_bfloat16(bundle_of, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    from patchsieve.runtime.building.compile import build_engine
    from patchsieve.runtime.building.profiles import profiles
    from tests.support.networks import parse_network

    bundle = bundle_of(BFLOAT16)
    facts = bundle_files.read(bundle)
    paths = {name: bundle / path for name, path in facts.targets["tensorrt-rtx"].items()}
    network = parse_network(paths["stage_1"])
    types = {tensor.name: tensor.dtype for tensor in (*network.inputs, *network.outputs)}
    cache = names.key_cache(1)
    assert {types[n] for n in (names.HIDDEN, cache, cache + names.OUT)} == {"BF16"}
    assert types[names.LOGITS] == "FLOAT"
    assert len(network.cache_updates) == 2 and network.attentions == ()
    vision = parse_network(paths[names.VISION])
    (features,) = (t.dtype for t in vision.outputs if t.name == names.IMAGE_FEATURES)
    assert features == "BF16"
    target = "tensorrt-rtx"
    for name in (names.VISION, "stage_1", "decide.fastv.1"):
        shapes = profiles(facts, name, target)
        report = build_engine(paths[name], tmp_path / "engine", shapes, target=target)
        assert report.engine_bytes, name


def test_a_manifest_tells_the_precision_of_each_part(bundle_of, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(bundle_of(MIXED[0]), tmp_path / "bundle"))
    code, said = command_json("inspect", bundle)
    assert code == 0 and MIXED[0] in json.dumps(said)
    for wrong in ("tower=float8", 16, {"tower": "float16"}):
        edit_manifest(bundle, lambda data, wrong=wrong: data.update(precision=wrong))
        refused(lambda: bundle_files.read(bundle), BundleError, "precision")


def test_targets_that_a_cpu_runs_are_the_ones_without_bfloat16() -> None:
    without = {name for name, one in TARGETS.items() if "bfloat16" not in one.precisions}
    assert without == {"cpu", "reference", "cuda"}
