"""A decision may judge by the layer that its survivors enter, with that layer's own weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from patchsieve.contract import files, manifest, names, reads
from patchsieve.contract.errors import BundleError, PatchsieveError
from patchsieve.contract.graphs import Tensor
from patchsieve.contract.plan import Plan, SitePlan
from patchsieve.export.exporter import ExportOptions, export
from patchsieve.export.reuse import reuse
from patchsieve.runtime.building.compile import build_engine
from patchsieve.runtime.building.profiles import profiles
from patchsieve.runtime.model import Model
from patchsieve.verify.verification import Verification
from tests.support.models import save_checkpoint
from tests.support.test_only_methods import known
from tests.support.tiny_bundles import pictures

LIMITS = manifest.Limits(64, 16, 2)
RATIOS = {2: 0.5, 3: 0.25}
AHEAD = Plan(tuple(SitePlan(at, "pyramiddrop", {"keep_ratio": r}) for at, r in RATIOS.items()))
TARGETS = ("cpu", "reference", "jetpack6", "tensorrt-rtx")
ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


@pytest.fixture(scope="module", autouse=True)
def methods() -> Iterator[None]:
    """The test-only methods, among those of the product."""
    with known():
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Biases, KV heads that query heads share, and scaled angles."""
    folder = tmp_path_factory.mktemp("ahead") / "checkpoint"
    return save_checkpoint(folder, "qwen2", text={"rope_parameters": ROPE})


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    """The plan on all targets that this machine can check."""
    out = checkpoint.parent / "bundle"
    export(str(checkpoint), out, options(plan=AHEAD, plan_name="ahead"))
    return out


@pytest.fixture(scope="module")
def sparse(bundle: Path) -> Path:
    """The same bundle with a plan whose decisions read the rows as they entered the decoder."""
    out = Path(shutil.copytree(bundle, bundle.parent / "sparse"))
    last = SitePlan(3, "sparsevlm", {"keep_ratio": 0.3, "over_heads": "all"})
    reuse(out, Plan((SitePlan(2, "sparsevlm", {"keep_ratio": 0.6}), last)), "sparse")
    return out


def options(**changes: Any) -> ExportOptions:
    return ExportOptions(**{"targets": TARGETS, "limits": LIMITS, "cuts": (2, 3)} | changes)


def departures(
    bundle: Path, checkpoint: Path, target: str, images: int = 1, plan: str = "ahead"
) -> list[str]:
    """What departs from Hugging Face, which computes the layer's queries and keys by itself."""
    both = Verification(bundle, str(checkpoint), target=target, threads=1)
    asked = (pictures(images), "What is on the table?", plan)
    parts = list(both.compare(*asked, count=4))
    both.close()
    survivors = [part for part in parts if part.name.startswith("survivors")]
    assert len(survivors) == images * len(both.facts.plans[asked[2]].sites)
    return [part.name for part in parts if part.departs]


@pytest.mark.parametrize(("target", "images"), [("cpu", 2), ("reference", 1), ("jetpack6", 1)])
def test_the_survivors_are_those_of_hugging_face(bundle, checkpoint, target, images) -> None:
    assert departures(bundle, checkpoint, target, images) == []


@pytest.mark.parametrize(("target", "images"), [("cpu", 2), ("reference", 1), ("jetpack6", 1)])
def test_rows_as_they_entered_the_decoder_judge_as_in_hugging_face(
    sparse, checkpoint, target, images
) -> None:
    facts = files.read(sparse)
    for layer in (2, 3):
        graph = facts.graphs[names.decide("sparse", layer)]
        read = graph.input(names.EMBEDDINGS)
        assert read is not None
        assert read.shape == (1, names.AXIS_ROWS, facts.text.hidden_size)
        assert graph.input(names.HIDDEN) is None
    assert departures(sparse, checkpoint, target, images, "sparse") == []


def test_a_later_turn_is_judged_by_the_rows_of_its_own_prefill(bundle: Path) -> None:
    model = Model(bundle, threads=1, check="size")
    chat, (one, other) = model.chat(), pictures(2)
    turns = [chat.ask("What is this?", [image], max_new_tokens=2) for image in (one, other)]
    model.close()
    # A conversation's sites are all of its images'.
    assert [[len(site.kept) for site in turn.sites] for turn in turns] == [[8, 4], [8, 4, 8, 4]]


@pytest.mark.slow
def test_positions_on_a_grid_turn_the_next_layer_too(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "checkpoint", "llama")
    config = json.loads((checkpoint / "config.json").read_text())
    grid = {"position_rule": "grid2d", "rotary_sections": [2, 3, 3]}
    (checkpoint / "config.json").write_text(json.dumps(config | {"patchsieve": grid}))
    out = tmp_path / "bundle"
    export(str(checkpoint), out, options(targets=("cpu",), plan=AHEAD, plan_name="ahead"))
    read = files.read(out).graphs[names.decide("ahead", 2)].input(names.POSITION_IDS)
    assert read is not None and read.shape == (names.AXIS_ROWS, 3)
    assert departures(out, checkpoint, "cpu", images=2) == []


def test_the_weights_are_stored_once_and_shared_with_the_stage(bundle: Path) -> None:
    facts = files.read(bundle)
    for target in TARGETS:
        graphs = facts.targets[target]
        decision, stage = (
            places(bundle / graphs[graph]) for graph in (names.decide("ahead", 2), names.stage(1))
        )
        assert set(decision) == {
            "layers.2.input_layernorm.weight",
            *(f"layers.2.self_attn.{p}_proj.{w}" for p in "qk" for w in ("weight", "bias")),
        }
        assert decision.items() <= stage.items()


def places(file: Path) -> dict[str, dict[str, str]]:
    """Where each weight of a graph lies."""
    model = onnx.load(file, load_external_data=False)
    return {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in model.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }


def test_another_queries_matrix_of_the_next_layer_changes_who_survives(
    bundle: Path, checkpoint: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(bundle, tmp_path / "own"))
    path = "graphs/weights/layers.2.safetensors"
    data = bytearray((own / path).read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    a, b = json.loads(data[8:start])["layers.2.self_attn.q_proj.weight"]["data_offsets"]
    values = -np.frombuffer(data[start + a : start + b], np.float32)
    data[start + a : start + b] = values.tobytes()
    (own / path).write_bytes(data)
    facts = files.read(own)
    files.write(own, replace(facts, files=facts.files | {path: files.hash_file(own / path)}))
    assert departures(own, checkpoint, "cpu")[0] == "survivors at layer 2"


@pytest.mark.tensorrt
@pytest.mark.parametrize("plan", ["ahead", "sparse"])
def test_such_a_decision_builds_in_tensorrt_rtx(sparse: Path, tmp_path: Path, plan: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    facts, target = files.read(sparse), "tensorrt-rtx"
    graph = names.decide(plan, 2)
    shapes = profiles(facts, graph, target)
    file = sparse / facts.targets[target][graph]
    report = build_engine(file, tmp_path / "engine", shapes, target=target)
    assert report.engine_bytes and not report.warnings


@pytest.mark.slow
def test_reuse_makes_the_same_decisions_from_the_bundle_alone(
    bundle: Path, checkpoint: Path, tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    export(str(checkpoint), plain, options())
    old = files.read(plain)
    reuse(plain, AHEAD, "ahead")
    for target in TARGETS:
        for site in AHEAD.layers:
            graph = names.decide("ahead", site)
            made, expected = (
                each / files.read(each).targets[target][graph] for each in (plain, bundle)
            )
            assert made.read_bytes() == expected.read_bytes(), (target, graph)
    before = replace(old, text=replace(old.text, inv_freq=()))  # as schema 3 has it
    files.write(plain, before)
    with pytest.raises(PatchsieveError, match="does not describe its decoder.*sites \\[2, 3\\]"):
        reuse(plain, AHEAD, "again")
    reuse(plain, Plan((SitePlan(2, "fastv", {"keep_ratio": 0.5}),)), "half")


@pytest.mark.slow
def test_a_decision_that_reads_hidden_rows_need_not_merge_them(
    bundle: Path, checkpoint: Path, tmp_path: Path
) -> None:
    plan = Plan((SitePlan(2, "longest", {"num_keep": 5}),))
    out = tmp_path / "longest"
    export(str(checkpoint), out, options(targets=("cpu",), plan=plan, plan_name="longest"))
    graph = files.read(out).graphs[names.decide("longest", 2)]
    assert graph.input(names.HIDDEN) is not None
    assert graph.output(names.HIDDEN_OUT) is None
    model = Model(out, threads=1)
    result = model.generate(pictures(2), "What is on the table?", max_new_tokens=2)
    model.close()
    assert [site.merged for site in result.sites] == [None, None]
    assert departures(out, checkpoint, "cpu", plan="longest") == []


def test_a_decision_that_reads_what_is_not_in_the_table_is_refused(bundle: Path) -> None:
    facts = files.read(bundle)
    graph = names.decide("ahead", 2)
    for name in ("weather", "hidden.1", "query.x", "query.0"):
        entry = facts.graphs[graph]
        changed = replace(entry, inputs=(*entry.inputs, Tensor(name, "int64", (1,))))
        wrong = replace(facts, graphs=facts.graphs | {graph: changed})
        with pytest.raises(BundleError, match="reads what no stage gives"):
            files.parse(wrong.to_json())


def test_every_row_of_the_table_names_a_source_and_known_axes() -> None:
    for name, read in reads.TABLE.items():
        assert read.name == name
        assert read.source in (reads.STAGE, reads.CACHE, reads.HOST)
        assert reads.named(name) == (read, None)
