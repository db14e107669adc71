"""`patchsieve inspect` tells what the manifest and the files say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from patchsieve import inspection
from patchsieve.contract import files as bundle_files
from patchsieve.contract import manifest, model
from patchsieve.contract.errors import BundleError
from patchsieve.contract.weights import HEAD, JOINT, SCORER
from patchsieve.cost import from_bundle
from tests.support.bundles import PLAN, command, command_json

pytest_plugins = ["tests.support.bundles"]


def test_the_slots_and_kv_bytes_are_those_of_the_formula(tiny_bundle: Path) -> None:
    code, said = command_json("inspect", tiny_bundle)
    assert (code, said["schema_version"], said["default_plan"]) == (0, 1, PLAN)
    limits, text = said["limits"], said["text"]
    rows = limits["max_text_tokens"] + limits["max_new_tokens"]
    budgets = {"none": [16, 16, 16], PLAN: [16, 8, 4]}
    for name, plan in said["plans"].items():
        for stage, layers, budget in zip(plan["stages"], (2, 2, 1), budgets[name], strict=True):
            slots = rows + limits["max_images"] * budget
            per_row = layers * 2 * text["num_kv_heads"] * text["head_dim"] * 4
            full = rows + limits["max_images"] * 16
            assert (stage["budget"], stage["slots"]) == (budget, slots)
            assert (stage["kv_bytes"], stage["kv_bytes_unpruned"]) == (
                slots * per_row,
                full * per_row,
            )
        assert plan["kv_bytes"] == sum(stage["kv_bytes"] for stage in plan["stages"])
    assert [site["layer"] for site in said["plans"][PLAN]["sites"]] == [2, 4]
    assert said["plans"][PLAN]["position_rule"] == "original"


def test_sizes_add_up_to_the_files(tiny_bundle: Path) -> None:
    _, said = command_json("inspect", tiny_bundle)
    on_disk = {
        path.relative_to(tiny_bundle).as_posix(): path.stat().st_size
        for path in tiny_bundle.rglob("*")
        if path.is_file() and path.name not in (bundle_files.FILE_NAME, "README.md")
    }
    assert said["files"] == on_disk
    assert said["bytes"] == sum(said["parts"].values()) == sum(on_disk.values())
    graphs = said["targets"]["cpu"]["graphs"]
    assert said["parts"]["graphs"] == sum(graph["bytes"] for graph in graphs.values())
    assert {"vision", "stage_0", "stage_2", "compact", f"decide.{PLAN}.4"} <= set(graphs)
    assert all(size > 0 for size in said["parts"].values())


def test_one_plan_the_tensors_and_the_hashes_on_demand(tiny_bundle: Path) -> None:
    options = ("--plan", "none", "--tensors", "--check")
    code, said = command_json("inspect", tiny_bundle, *options)
    assert (code, list(said["plans"])) == (0, ["none"])
    inputs = {tensor["name"]: tensor for tensor in said["tensors"]["stage_1"]["inputs"]}
    assert inputs["key_cache.2"]["shape"] == [1, 2, "slots", 16]
    assert said["checked_files"] == len(said["files"])


def test_engines_on_disk_are_listed_with_their_record(own_bundle: Path) -> None:
    folder = own_bundle / "engines" / "tensorrt-rtx"
    folder.mkdir(parents=True)
    (folder / "stage_0.engine").write_bytes(b"x" * 100)
    (folder / "engines.json").write_text(json.dumps({"stage_0": {"library": "made up"}}))
    _, said = command_json("inspect", own_bundle)
    engine = said["engines"]["tensorrt-rtx"]
    assert engine["files"]["stage_0.engine"] == 100
    assert engine["record"] == {"stage_0": {"library": "made up"}}
    _, out, _ = command("inspect", own_bundle)
    assert "tensorrt-rtx" in out


def test_check_names_the_altered_file(own_bundle: Path) -> None:
    file = own_bundle / "graphs" / "weights" / "layers.3.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert command("inspect", own_bundle)[0] == 0  # the manifest alone is read
    code, _, err = command("inspect", own_bundle, "--check", "--quiet")
    assert code == 2
    assert "layers.3.safetensors is damaged" in err


def test_the_tables_hold_every_stage_plan_and_file(tiny_bundle: Path) -> None:
    code, out, _ = command("inspect", tiny_bundle, "--files", "--tensors", "--check", "--quiet")
    assert code == 0
    for text in (f"plan {PLAN} (default)", "before layer 2: fastv keep_ratio 0.5", "  2-3"):
        assert text in out
    for text in ("engines: none built", "tokenizer.json", "input keep_indices", "all intact"):
        assert text in out
    assert "FLOPs of 1 image and 64 text tokens: vision " in out  # the bundle's limits
    rules = [line for line in out.splitlines() if set(line) == {" ", "-"}]
    above = [out.splitlines()[out.splitlines().index(line) - 1] for line in rules]
    assert rules and all(
        len(rule) - len(rule.lstrip()) == len(head) - len(head.lstrip())
        for rule, head in zip(rules, above, strict=True)
    )
    assert all(len(line) <= 120 for line in out.splitlines() if str(tiny_bundle) not in line)


def test_the_scorers_files_are_a_part_of_their_own(tiny_bundle: Path) -> None:
    facts = bundle_files.read(tiny_bundle)
    scorer = model.Scorer("clip", "scorer_tokenizer.json", 0, 1, 77, 768)
    sizes = {SCORER: 20, JOINT: 300, HEAD: 4000}
    files = {"scorer_tokenizer.json": 1} | {part.path(): size for part, size in sizes.items()}
    found = {path: manifest.File(size, "") for path, size in files.items()}
    weights = {part.path(): part.entry(facts.precision) for part in sizes}
    parts = inspection.parts(replace(facts, scorer=scorer, files=found, weights=weights))
    assert parts["CLIP scorer"] == 1 + 20 + 300
    assert (parts["output head"], parts["other files"]) == (4000, 0)
    assert "CLIP scorer" not in inspection.parts(facts)


@pytest.mark.parametrize("damage", [b"", b"no header", b"\x02\0\0\0\0\0\0\0{}", None])
def test_a_scorer_that_cannot_be_measured_is_one_line(own_bundle: Path, damage) -> None:
    path = own_bundle / "graphs" / "weights" / "scorer.safetensors"
    if damage is not None:
        path.write_bytes(damage)
    scorer = model.Scorer("clip", "scorer_tokenizer.json", 0, 1, 77, 768)
    facts = replace(bundle_files.read(own_bundle), scorer=scorer)
    with pytest.raises(BundleError, match="measures of the text scorer"):
        from_bundle(own_bundle, facts)
