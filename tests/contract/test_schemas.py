"""Bundles of schemas 1 to 3, written by the code of their time, answer as they did then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

import patchsieve
from patchsieve.contract import files, names, weights
from patchsieve.contract.engine_memory import weight_bytes
from patchsieve.contract.errors import BundleError, PatchsieveError
from patchsieve.contract.graphs import STAGE
from patchsieve.contract.manifest import SCHEMA_VERSION
from patchsieve.contract.plan import MethodPlan, Plan, SitePlan
from patchsieve.export.reuse import reuse
from patchsieve.inspection import inspect

FOLDER = Path(__file__).resolve().parents[1] / "recorded" / "bundles"
SCHEMAS = range(1, SCHEMA_VERSION)
PHOTO = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
RANDOM = Plan((SitePlan(1, "random", {"keep_ratio": 0.5}),))


def answers(path: Path, plans: list[str]) -> dict[str, list[int]]:
    """What a bundle says under each plan."""
    model = patchsieve.load(path, threads=1, target="cpu")
    question = "What is on the table?"
    try:
        return {
            plan: model.generate(PHOTO, question, max_new_tokens=8, plan=plan).token_ids
            for plan in plans
        }
    finally:
        model.close()


@pytest.fixture(params=SCHEMAS)
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, list[int]]]:
    """A copy of a stored bundle, and what it answered when it was made."""
    expected = json.loads((FOLDER / f"schema_{request.param}.json").read_text())
    path = tmp_path / "bundle"
    shutil.copytree(FOLDER / f"schema_{request.param}", path)
    assert files.read(path).schema_version == request.param
    return path, expected


def external(path: Path) -> set[str]:
    """The weights files that an ONNX graph names."""
    model = onnx.load(path, load_external_data=False)
    return {
        f"graphs/{entry.value}"
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }


def test_an_older_bundle_answers_the_same_token_for_token(stored) -> None:
    path, expected = stored
    assert len(set(map(tuple, expected.values()))) == 2
    assert answers(path, list(expected)) == expected


def test_an_older_bundle_takes_another_plan_and_keeps_its_answers(stored) -> None:
    path, expected = stored
    facts = reuse(path, RANDOM, "random")
    assert json.loads((path / files.FILE_NAME).read_text())["schema_version"] == SCHEMA_VERSION
    assert files.read(path).graphs == facts.graphs
    assert answers(path, list(expected)) == expected
    assert len(answers(path, ["random"])["random"]) == 8


def test_an_older_manifest_says_which_graph_reads_which_weights(stored) -> None:
    path, _ = stored
    facts = files.read(path)
    for target, graphs in facts.targets.items():
        for graph, file in graphs.items():
            assert set(facts.graphs[graph].weights) == external(path / file), (target, graph)
    assert set(facts.weights) == {name for name in facts.files if "/weights/" in name}
    assert {entry.format for entry in facts.weights.values()} == {weights.FLOAT}
    assert facts.cache_type == facts.precision.decoder
    assert set(facts.cache_forms.values()) == {names.IN_PLACE}
    stages = [name for name, graph in facts.graphs.items() if graph.kind == STAGE]
    assert stages == ["stage_0", "stage_1"]
    assert weight_bytes(facts, "stage_1") > weight_bytes(facts, names.COMPACT) == 0
    assert inspect(path)["bundle_schema"] == facts.schema_version


def test_a_bundle_from_before_the_choice_of_attention_stays_fused(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    shutil.copytree(FOLDER / "schema_2", path)
    assert files.read(path).attention == names.FUSED
    tower = Plan(encoder=MethodPlan("gtp", {"keep": 8}))
    facts = reuse(path, tower, "gtp")
    assert facts.attention == names.FUSED
    graph = onnx.load(
        path / facts.targets["tensorrt-rtx"][names.vision("gtp")], load_external_data=False
    )
    assert "Attention" in {node.op_type for node in graph.graph.node}


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("value", [None, "x", -1, 1.5, True, [], {}, [[]]])
def test_an_older_manifest_with_any_entry_replaced_is_one_line_or_read(schema: int, value) -> None:
    original = json.loads((FOLDER / f"schema_{schema}" / files.FILE_NAME).read_text())
    for key in original:
        try:
            files.parse(json.dumps(original | {key: value}))
        except BundleError as error:
            assert "\n" not in str(error), key


def test_a_bundle_that_does_not_describe_its_tower_takes_no_plan_that_prunes_there(
    tmp_path: Path,
) -> None:
    path = tmp_path / "bundle"
    shutil.copytree(FOLDER / "schema_1", path)
    before = (path / files.FILE_NAME).read_bytes()
    tower = Plan(encoder=MethodPlan("gtp", {"keep": 8}))
    with pytest.raises(PatchsieveError, match="does not describe its vision tower.*export a new"):
        reuse(path, tower, "gtp")
    assert (path / files.FILE_NAME).read_bytes() == before
