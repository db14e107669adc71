"""Whatever ONNX Runtime can run gives the numbers and the survivors of the reference graphs."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, shape_inference

from patchsieve.contract import files, names
from patchsieve.contract.errors import BundleError, PatchsieveError
from patchsieve.contract.plan import NO_PRUNING, Plan, SitePlan
from patchsieve.contract.targets import TARGETS
from patchsieve.export.exporter import ExportOptions
from patchsieve.export.reuse import reuse
from patchsieve.runtime.building.compile import build_engine
from patchsieve.runtime.building.profiles import profiles
from patchsieve.runtime.model import Model
from patchsieve.runtime.ort.backend import OrtBackend
from tests.support.bundles import command, command_json
from tests.support.networks import parse_network
from tests.support.target_bundles import BFLOAT16, MIXED
from tests.support.tiny_bundles import largest_error, pictures, recorded_logits
from tests.support.tolerances import LOGITS_MIXED, LOWERED_FLOAT32

pytest_plugins = ["tests.support.target_bundles"]

# Caches in place. Those with rows of their own are compared where their runtime is tested.
SAME_CACHES = ("cpu", "tensorrt", "tensorrt10", "tensorrt-rtx")
ATP = Plan((SitePlan(1, "atp", {"theta_r": 0.4, "theta_s": 0.9}),))
PLANS = (NO_PRUNING, "fastv", "atp")


class FullSlots(OrtBackend):
    """Caches as long as an engine's, whatever the plan reserves."""

    def allocate(self, stage: int, slots: int) -> Any:
        return super().allocate(stage, self.facts.stages[stage].slots)


@pytest.fixture(scope="module")
def bundle(bundle_of, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lowerings") / "bundle"
    shutil.copytree(bundle_of("float32"), out)
    reuse(out, ATP, "atp")
    return out


def answers(
    bundle: Path, target: str, plans: tuple[str, ...] = PLANS
) -> list[tuple[list[int], list[list[int]], list[Any]]]:
    """Tokens, survivors and logits for each plan, with one image and with two."""
    model = Model(bundle, target=target, check="size", backend=lambda b: FullSlots(b, threads=1))
    found = []
    for plan in plans:
        for images in (1, 2):
            logits = recorded_logits(model)
            result = model.generate(
                pictures(images), "What is on the table?", max_new_tokens=8, plan=plan
            )
            kept = [site.kept for site in result.sites]
            found.append((result.token_ids, kept, logits))
    model.close()
    return found


@pytest.fixture(scope="module")
def expected(bundle: Path) -> list[tuple[list[int], list[list[int]], list[Any]]]:
    return answers(bundle, "reference")


@pytest.mark.parametrize("target", SAME_CACHES)
def test_a_lowering_gives_what_the_reference_gives(bundle: Path, expected, target: str) -> None:
    errors = []
    for (tokens, kept, logits), (same_tokens, same_kept, others) in zip(
        answers(bundle, target), expected, strict=True
    ):
        assert tokens == same_tokens
        assert kept == same_kept
        errors.append(largest_error(logits, others))
    assert max(errors) < LOWERED_FLOAT32
    assert any(len(one) < 16 for _, kept, _ in expected for one in kept)


@pytest.mark.parametrize("precision", ("float32", MIXED[1], BFLOAT16))
def test_full_tensorrt_reads_the_graphs_that_tensorrt_rtx_is_built_from(
    bundle_of, precision: str
) -> None:
    path = bundle_of(precision)
    targets = files.read(path).targets
    built = {name: (path / file).read_bytes() for name, file in targets["tensorrt-rtx"].items()}
    for target in ("tensorrt", "tensorrt10"):
        graphs = {name: (path / file).read_bytes() for name, file in targets[target].items()}
        assert graphs == built, target


HALF_DECODER, OWN_PLANS = MIXED[1], (NO_PRUNING, "fastv")
HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


@pytest.mark.parametrize("form", [None, names.FUSED])
def test_half_precision_attention_gives_what_the_reference_gives(
    bundle_of, form: str | None
) -> None:
    expected = answers(bundle_of(HALF_DECODER), "reference", OWN_PLANS)
    found = answers(bundle_of(HALF_DECODER, form), "tensorrt-rtx", OWN_PLANS)
    assert [one[:2] for one in found] == [one[:2] for one in expected]
    errors = [largest_error(a[2], b[2]) for a, b in zip(found, expected, strict=True)]
    print(f"largest error of a logit: {max(errors):.1e}")
    assert max(errors) < LOGITS_MIXED


@pytest.mark.parametrize("precision", (HALF_DECODER, BFLOAT16))
def test_half_precision_scores_are_products_summed_in_float32(bundle_of, precision: str) -> None:
    """What softmax reads was never half precision, nor were the numbers that it is made of."""
    path = bundle_of(precision)
    for target in ("tensorrt", "tensorrt10", "tensorrt-rtx"):
        for name in ("stage_0", "stage_1"):
            file = path / files.read(path).targets[target][name]
            model = shape_inference.infer_shapes(onnx.load(file, load_external_data=False))
            graph = model.graph
            assert not [node for node in graph.node if node.op_type == "Attention"]
            made = {output: node for node in graph.node for output in node.output}
            values = (*graph.value_info, *graph.input, *graph.output)
            types = {value.name: value.type.tensor_type.elem_type for value in values}
            softmax = [node for node in graph.node if node.op_type == "Softmax"]
            assert len(softmax) == 1  # a stage is one layer here
            front, products = [softmax[0].input[0]], 0
            while front:
                node = made[front.pop()]
                assert types[node.output[0]] == TensorProto.FLOAT, node
                if node.op_type == "MatMul":
                    products += 1
                    casts = [made[value] for value in node.input]
                    assert [types[one.input[0]] in HALF for one in casts] == [True, True]
                elif node.op_type in ("Add", "Reshape"):
                    front.append(node.input[0])
                else:
                    raise AssertionError(node)
            assert products == 1
            # Keys and values are read as they lie in the cache, never repeated for query heads.
            assert not {"Expand", "Tile"} & {node.op_type for node in graph.node}


@pytest.mark.tensorrt
def test_a_fused_stage_builds_with_its_mask_and_says_so(bundle_of, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    path, target = bundle_of(HALF_DECODER, names.FUSED), "tensorrt-rtx"
    facts = files.read(path)
    file = path / facts.targets[target]["stage_1"]
    assert [one.has_mask for one in parse_network(file).attentions] == [True]
    assert build_engine(
        file, tmp_path / "engine", profiles(facts, "stage_1", target), target=target
    ).engine_bytes
    _, said = command_json("inspect", path)
    assert said["attention"] == names.FUSED
    _, out, _ = command("inspect", path)
    assert "half-precision attention for TensorRT: fused" in out
    fused = {graph for graph in facts.targets[target] if facts.has_fused_attention(target, graph)}
    assert fused == {"stage_0", "stage_1"}  # the tower is float32


def test_a_bundle_says_how_its_attention_is_spelt(bundle_of) -> None:
    facts = files.read(bundle_of(HALF_DECODER))
    assert facts.attention == names.DECOMPOSED
    assert not any(facts.has_fused_attention("tensorrt", graph) for graph in facts.graphs)
    other = replace(facts, attention=names.FUSED)
    fused = [graph for graph in facts.graphs if other.has_fused_attention("tensorrt", graph)]
    assert fused == ["stage_0", "stage_1"]
    assert not any(other.has_fused_attention("jetpack6", graph) for graph in facts.graphs)
    assert files.read(bundle_of("float32")).attention is None
    wrong = replace(facts, attention="flash").to_json()
    with pytest.raises(BundleError, match="found: flash"):
        files.parse(wrong)


@pytest.mark.parametrize(
    ("targets", "precision"), [(("tensorrt",), "float32"), (("cpu", "jetpack6"), "float16")]
)
def test_a_form_of_attention_without_effect_is_refused(targets: tuple, precision: str) -> None:
    with pytest.raises(PatchsieveError, match="--attention has no effect"):
        ExportOptions(targets=targets, precision=precision, attention=names.FUSED)
    with pytest.raises(PatchsieveError, match="unknown --attention.*decomposed, fused-tower"):
        ExportOptions(targets=("tensorrt",), precision="float16", attention="flash")


def test_every_target_of_this_version_is_compared() -> None:
    assert set(TARGETS) == {"reference", "jetpack6", "cuda", *SAME_CACHES}
