"""`patchsieve verify` passes a sound bundle and names the first part of a broken one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from patchsieve.contract import files as bundle_files
from patchsieve.contract import model
from patchsieve.contract.names import decide
from patchsieve.contract.precision import BYTES
from patchsieve.verify.parts import TOLERANCE
from patchsieve.verify.reference import cache_name
from patchsieve.verify.verification import compare_tokens
from tests.support.bundles import PHOTO, PLAN, PROMPT, command, command_json, export_tiny
from tests.support.models import save_checkpoint

pytest_plugins = ["tests.support.bundles"]


def change_weight(bundle: Path, file: str, tensor: str, change) -> None:
    """Rewrite a stored tensor and its file's hash, as a faulty export would have."""
    name = f"graphs/weights/{file}.safetensors"
    data = bytearray((bundle / name).read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    entry = json.loads(data[8:start])[tensor]
    a, b = (start + offset for offset in entry["data_offsets"])
    values = np.frombuffer(data[a:b], np.float32).copy()
    change(values)
    data[a:b] = values.tobytes()
    (bundle / name).write_bytes(data)
    facts = bundle_files.read(bundle)
    files = facts.files | {name: bundle_files.hash_file(bundle / name)}
    bundle_files.write(bundle, replace(facts, files=files))


def verify(bundle: Path, checkpoint: Path, *options: object):
    arguments = ("verify", bundle, "--against", checkpoint, "--image", PHOTO, "--prompt", PROMPT)
    return command_json(*arguments, *options)


def test_a_sound_bundle_passes_with_and_without_pruning(tiny_bundle, tiny_checkpoint) -> None:
    code, said = verify(tiny_bundle, tiny_checkpoint)
    assert (code, said["passed"], said["first_departure"]) == (0, True, None)
    assert said["plans"] == ["none", PLAN]
    names = [part["name"] for part in said["parts"] if part["plan"] == PLAN]
    order = ["pixel_values", "token ids", "vision layer 0", "image_features", "embeddings"]
    order += ["layer 0 keys", "layer 1 queries", "layer 1 hidden rows", "survivors at layer 2"]
    order += ["layer 2 keys", "layer 3 hidden rows", "survivors at layer 4", "layer 4 values"]
    order += ["layer 4 hidden rows", "logits", "greedy tokens"]
    places = [names.index(name) for name in order]
    assert places == sorted(places)
    notes = {part["name"]: part["note"] for part in said["parts"] if part["plan"] == PLAN}
    assert notes["survivors at layer 2"] == "8 in common of 8 and 8"
    assert notes["survivors at layer 4"] == "4 in common of 4 and 4"
    assert notes["greedy tokens"].startswith("32 equal of 32 and 32")
    exact = {"token ids", "greedy tokens", "survivors at layer 2", "survivors at layer 4"}
    for part in said["parts"]:
        assert (part["relative_error"] is None) == (part["name"] in exact)


@pytest.mark.parametrize(
    ("tensor", "part"),
    [
        ("self_attn.k_proj.weight", "layer 3 keys"),
        ("self_attn.v_proj.weight", "layer 3 values"),
        ("self_attn.q_proj.weight", "layer 3 queries"),
        ("mlp.down_proj.weight", "layer 3 hidden rows"),
    ],
)
def test_a_corrupted_weight_of_layer_3_is_named_first(
    own_bundle, tiny_checkpoint, tensor: str, part: str
) -> None:
    def corrupt(values: np.ndarray) -> None:
        values[17] += 0.5

    change_weight(own_bundle, "layers.3", f"layers.3.{tensor}", corrupt)
    code, said = verify(own_bundle, tiny_checkpoint, "--max-new-tokens", 2)
    assert code == 1
    assert said["first_departure"]["name"] == part
    assert said["first_departure"]["layer"] == 3
    earlier = [p for p in said["parts"] if p["plan"] == "none" and (p["layer"] or 0) < 3]
    assert not any(p["departs"] for p in earlier if p["name"] not in ("logits", "greedy tokens"))


def test_a_corrupted_tower_is_named_before_the_decoder(own_bundle, tiny_checkpoint) -> None:
    def corrupt(values: np.ndarray) -> None:
        values += 0.5

    tensor = "vision_tower.encoder.layers.1.mlp.fc1.bias"
    change_weight(own_bundle, "vision", tensor, corrupt)
    code, out, _ = command("verify", own_bundle, "--against", tiny_checkpoint, "--quiet")
    assert code == 1
    assert out.strip().splitlines()[-1] == "first to depart: vision layer 1, plan none"


def test_a_weight_that_is_not_a_number_is_found_and_not_raised(own_bundle, tiny_checkpoint) -> None:
    def corrupt(values: np.ndarray) -> None:
        values[5] = np.nan

    change_weight(own_bundle, "layers.3", "layers.3.mlp.up_proj.weight", corrupt)
    code, said = verify(own_bundle, tiny_checkpoint)
    assert code == 1
    assert said["first_departure"]["name"] == "layer 3 hidden rows"
    assert said["first_departure"]["note"] == "not finite"


def test_a_decision_graph_of_another_method_is_named(own_bundle, tiny_checkpoint) -> None:
    """The manifest says FastV keeps half; the graph that lies there keeps others."""
    facts = bundle_files.read(own_bundle)
    graphs = dict(facts.targets["cpu"])
    # Graphs of the two sites change places: a quarter is kept where the plan says half.
    first, second = decide(PLAN, 2), decide(PLAN, 4)
    graphs[first], graphs[second] = graphs[second], graphs[first]
    bundle_files.write(own_bundle, replace(facts, targets=facts.targets | {"cpu": graphs}))
    code, said = verify(own_bundle, tiny_checkpoint)
    assert code == 1
    assert said["first_departure"]["name"] == "survivors at layer 2"
    assert said["first_departure"]["plan"] == PLAN


def test_another_preprocessor_is_named_first(own_bundle, tiny_checkpoint) -> None:
    file = own_bundle / "preprocessor.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"image_mean": [0.5, 0.5, 0.5]}))
    facts = bundle_files.read(own_bundle)
    files = facts.files | {"preprocessor.json": bundle_files.hash_file(file)}
    bundle_files.write(own_bundle, replace(facts, files=files))
    code, said = verify(own_bundle, tiny_checkpoint, "--max-new-tokens", 2)
    assert (code, said["first_departure"]["name"]) == (1, "pixel_values")


@pytest.mark.slow
def test_another_structure_and_the_reference_target_pass(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "checkpoint", "qwen2-siglip-two-layers", layers=5)
    bundle = export_tiny(checkpoint, tmp_path / "bundle", targets=("reference",))
    code, said = verify(bundle, checkpoint, "--target", "reference")
    assert code == 0, said["first_departure"]


@pytest.mark.slow
def test_a_float16_bundle_is_held_to_its_own_tolerance(tmp_path: Path, tiny_checkpoint) -> None:
    bundle = export_tiny(tiny_checkpoint, tmp_path / "bundle", precision="float16")
    _, said = verify(bundle, tiny_checkpoint)
    parts = {p["name"]: p for p in said["parts"] if p["plan"] == "none"}
    assert not parts["layer 4 hidden rows"]["departs"]
    assert parts["layer 4 hidden rows"]["relative_error"] > 1e-5


def test_every_type_of_a_bundle_has_a_tolerance() -> None:
    assert TOLERANCE.keys() == BYTES.keys()


def test_what_the_checkpoint_asks_of_answers_does_not_change_what_is_compared(
    own_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    asked = {"repetition_penalty": 0.3, "no_repeat_ngram_size": 2}
    facts = bundle_files.read(own_bundle)
    bundle_files.write(own_bundle, replace(facts, generation=model.Generation(**asked)))
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    settings = json.loads((checkpoint / "generation_config.json").read_text())
    more = {"num_beams": 2, "eos_token_id": list(range(300))}
    (checkpoint / "generation_config.json").write_text(json.dumps(settings | asked | more))
    code, found = verify(own_bundle, checkpoint, "--plan", "none", "--max-new-tokens", 8)
    assert code == 0 and not any(part["departs"] for part in found["parts"])


def test_another_models_checkpoint_is_refused(tiny_bundle, tmp_path: Path) -> None:
    other = save_checkpoint(tmp_path / "other", layers=4)
    code, _, err = command("verify", tiny_bundle, "--against", other)
    assert code == 2
    assert err.splitlines()[-1].startswith("patchsieve: the bundle was not made from")


def test_a_grey_image_goes_the_same_way_on_both_sides(
    tiny_bundle, tiny_checkpoint, tmp_path: Path
) -> None:
    path = tmp_path / "grey.png"
    noise = np.random.default_rng(0).integers(0, 256, (50, 90), np.uint8)
    Image.fromarray(noise).save(path)
    arguments = ("verify", tiny_bundle, "--against", tiny_checkpoint, "--image", path)
    code, said = command_json(*arguments, "--max-new-tokens", 2)
    assert code == 0, said["first_departure"]


def test_the_cache_goes_by_the_name_that_this_transformers_has_for_it() -> None:
    """5.40 removes `past_key_values`, and the first of 5.x know no `cache`."""

    class Newer(torch.nn.Module):
        def forward(self, hidden_states: Any, cache: Any = None, **kwargs: Any) -> None: ...

    class Older(torch.nn.Module):
        def forward(self, hidden_states: Any, past_key_values: Any = None, **k: Any) -> None: ...

    assert cache_name(Newer()) == "cache"
    assert cache_name(Older()) == "past_key_values"


def test_tokens_that_differ_in_a_tie_do_not_depart() -> None:
    logits = np.array([[0.0, 1.0, 4.0], [0.0, 4.0, 3.9], [4.0, 0.0, 1.0]], np.float32)
    assert not compare_tokens("none", [2, 1, 0], logits, "x", 1e-4).departs
    assert compare_tokens("none", [2, 2, 1], logits, "x", 1e-4).departs
    tie = compare_tokens("none", [2, 2, 1], logits, "x", 3e-2)
    assert not tie.departs
    assert tie.note.startswith("1 equal of 3 and 3") and tie.note.endswith("a tie")
    assert compare_tokens("none", [2, 1], logits, "x", 3e-2).departs


@pytest.mark.parametrize(
    ("field", "value", "rows"),
    [("vision_feature_select_strategy", "full", 17), ("num_additional_image_tokens", 0, 15)],
)
def test_a_processor_that_disagrees_with_the_model_is_refused_in_one_line(
    tiny_bundle, tiny_checkpoint, tmp_path: Path, field: str, value: object, rows: int
) -> None:
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    file = checkpoint / "processor_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    assert settings[field] != value
    file.write_text(json.dumps(settings | {field: value}), encoding="utf-8")
    arguments = ("--against", checkpoint, "--image", PHOTO, "--prompt", PROMPT)
    code, out, errors = command("verify", tiny_bundle, *arguments)
    assert code == 2
    line = errors.strip().splitlines()[-1]
    assert "Traceback" not in out + errors
    assert "processor_config.json and config.json disagree" in line
    assert f"{rows} rows by the processor" in line and "rows by the model" in line
    assert f"{field} {value}" in line and "what to do" in line
