"""`verify` in int8 and int4: what rounding does passes, and a defect is named where it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patchsieve.contract.formats import FORMATS
from patchsieve.contract.manifest import Limits
from patchsieve.export import job
from patchsieve.export.exporter import ExportOptions, export
from patchsieve.verify.allowed import Allowed
from patchsieve.verify.parts import Alone, compare_alone, compare_next, compare_survivors
from tests.support.bundles import PHOTO, PLAN, PROMPT, command, command_json
from tests.support.low_bundles import INT4, MIXED, store, tensors_of
from tests.support.models import save_checkpoint
from tests.support.outliers import scaled_channels

pytestmark = pytest.mark.slow

pytest_plugins = ["tests.support.bundles", "tests.support.low_bundles"]

Bundle = Callable[[str], Path]
FLOAT32 = 1e-4


def verify(bundle: Path, checkpoint: Path, *options: object) -> tuple[int, dict[str, Any]]:
    arguments = ("verify", bundle, "--against", checkpoint, "--image", PHOTO, "--prompt", PROMPT)
    return command_json(*arguments, "--max-new-tokens", 5, "--threads", 1, *options)


@pytest.mark.parametrize("precision", [MIXED, INT4])
def test_a_sound_bundle_passes_and_says_how_much_rounding_did(
    low_bundle: Bundle, low_checkpoint: Path, precision: str
) -> None:
    code, said = verify(low_bundle(precision), low_checkpoint)
    assert code == 0, said["first_departure"]
    parts = {part["name"]: part for part in said["parts"] if part["plan"] == PLAN}
    prompt = 0.5 if precision == INT4 else 0.1
    for layer in (0, 2, 3, 4):
        rows = parts[f"layer {layer} hidden rows"]
        assert rows["tolerance"] == prompt
        assert 1e-3 < rows["own_error"] < prompt / 2
        assert rows["relative_error"] > rows["mean_error"] > 1e-3
        single = parts[f"single rows, layer {layer} hidden rows"]
        assert 0.05 < single["own_error"] < 0.25 and single["tolerance"] == 0.5
    last, first = parts["layer 4 hidden rows"], parts["layer 0 hidden rows"]
    assert last["mean_error"] > 1.5 * first["mean_error"]  # what a float tolerance would meet
    assert last["own_error"] < first["own_error"] * 1.1
    assert parts["survivors at layer 2"]["in_common"] >= 0.5
    assert "by the same rows 8 in common of 8 and 8" in parts["survivors at layer 2"]["note"]
    assert 0 <= parts["greedy tokens"]["in_common"] <= 1
    assert parts["greedy tokens"]["note"].startswith(
        f"{round(5 * parts['greedy tokens']['in_common'])} of 5 next tokens agree"
    )


def test_a_part_is_held_to_its_own_format(low_bundle: Bundle, low_checkpoint: Path) -> None:
    """The excepted layer 1 is float but for its down_proj, the projector is float."""
    _, said = verify(low_bundle(INT4), low_checkpoint, "--plan", "none")
    allowed = {part["name"]: part["tolerance"] for part in said["parts"]}
    assert allowed["layers.1.self_attn.q_proj"] == allowed["layer 1 keys"] == FLOAT32
    assert allowed["layer 1 hidden rows"] == FORMATS["int8"].error
    assert allowed["layers.2.self_attn.q_proj"] == FORMATS["int4-32"].error
    assert allowed["image_features"] == allowed["embeddings"] == FLOAT32
    assert allowed["logits"] == FORMATS["int8-weights"].error
    errors = {part["name"]: part["own_error"] for part in said["parts"]}
    assert errors["layers.1.self_attn.q_proj"] < 1e-6 < errors["layers.1.mlp.down_proj"]


def doubled(bundle: Path, file: str, matrix: str) -> None:
    """Scales twice as large as they should be."""
    name = f"{matrix}.weight.scale"
    store(bundle, file, {name: 2 * tensors_of(bundle, file)[name]})


def swapped(bundle: Path, file: str, matrix: str) -> None:
    """The upper half of each byte first."""
    name = f"{matrix}.weight.int4-32"
    packed = tensors_of(bundle, file)[name]
    store(bundle, file, {name: (packed >> 4) | (packed << 4)})


def of_another_layer(bundle: Path, file: str, matrix: str) -> None:
    """The numbers of the layer before it."""
    part, _, layer = file.partition(".")
    before = int(layer) - 1
    changed = {
        name.replace(f"layers.{before}.", f"layers.{layer}."): values
        for name, values in tensors_of(bundle, f"{part}.{before}").items()
    }
    store(bundle, file, changed)


def clipped(bundle: Path, file: str, matrix: str) -> None:
    """One row of blocks lost."""
    name = f"{matrix}.weight.scale"
    scale = tensors_of(bundle, file)[name].copy()
    scale[0] = 0
    store(bundle, file, {name: scale})


FAULTS = [
    (MIXED, "layers.3", "layers.3.self_attn.k_proj", doubled, "layers.3.self_attn.k_proj"),
    (MIXED, "layers.3", "layers.3.self_attn.q_proj", doubled, "layers.3.self_attn.q_proj"),
    (MIXED, "layers.2", "", of_another_layer, "layers.2.self_attn.q_proj"),
    (MIXED, "steps.3", "layers.3.mlp.gate_proj", swapped, "single rows, layers.3.mlp.gate_proj"),
    (MIXED, "steps.3", "", of_another_layer, "single rows, layers.3.self_attn.q_proj"),
    (MIXED, "steps.4", "layers.4.mlp.down_proj", doubled, "single rows, layers.4.mlp.down_proj"),
    (MIXED, "steps.0", "layers.0.mlp.up_proj", swapped, "single rows, layers.0.mlp.down_proj"),
    (
        MIXED,
        "vision",
        "vision_tower.encoder.layers.1.mlp.fc1",
        doubled,
        "vision_tower.encoder.layers.1.mlp.fc1",
    ),
    (MIXED, "head", "lm_head", doubled, "logits"),
    (INT4, "layers.3", "layers.3.self_attn.q_proj", doubled, "layers.3.self_attn.q_proj"),
    (INT4, "layers.2", "layers.2.self_attn.o_proj", swapped, "layers.2.self_attn.o_proj"),
    (INT4, "layers.4", "layers.4.mlp.up_proj", doubled, "layers.4.mlp.down_proj"),
    (INT4, "layers.4", "layers.4.self_attn.v_proj", clipped, "layers.4.self_attn.v_proj"),
]


@pytest.mark.parametrize(("precision", "file", "matrix", "harm", "named"), FAULTS)
def test_a_defect_is_named_where_it_is(
    own_low: Bundle,
    low_checkpoint: Path,
    precision: str,
    file: str,
    matrix: str,
    harm: Callable[[Path, str, str], None],
    named: str,
) -> None:
    bundle = own_low(precision)
    harm(bundle, file, matrix)
    code, said = verify(bundle, low_checkpoint, "--plan", "none")
    first = said["first_departure"]
    assert (code, first["name"]) == (1, named)
    assert first["own_error"] > first["tolerance"]
    layers = {part["layer"] for part in said["parts"] if part["departs"]}
    assert len(layers) == 1  # no layer after it departs, for each is fed what the bundle's was


def test_the_first_part_that_departs_is_one_line(own_low: Bundle, low_checkpoint: Path) -> None:
    bundle = own_low(INT4)
    doubled(bundle, "layers.2", "layers.2.self_attn.k_proj")
    arguments = ("--against", low_checkpoint, "--plan", "none", "--max-new-tokens", 2, "--quiet")
    code, out, _ = command("verify", bundle, *arguments)
    assert code == 1
    line = out.strip().splitlines()[-1]
    assert line.startswith("first to depart: layers.2.self_attn.k_proj, plan none: own error ")
    assert line.endswith("its format allows 5.0e-01")
    shown = [row.split("  ")[0] for row in out.splitlines()]
    assert "layers.2.self_attn.k_proj" in shown  # other single matrices are in their layers' lines
    assert "layers.2.self_attn.q_proj" not in shown


def test_survivors_count_by_the_same_rows_and_are_shown_by_the_checkpoints() -> None:
    scores = np.array([3.0, 2.0, 1.0, 0.5])
    ours, carried = np.array([1, 0, 1, 0], bool), np.array([1, 1, 0, 0], bool)
    part = compare_survivors("fastv", 2, ours, ours, scores, 0.0, carried=carried)
    assert not part.departs and part.in_common == 0.5
    assert part.note == "50.0% in common; by the same rows 2 in common of 2 and 2"
    part = compare_survivors("fastv", 2, ours, carried, scores, 0.0, carried=ours)
    assert part.departs and part.in_common == 1.0


def test_next_tokens_are_compared_after_the_same_text() -> None:
    logits = np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]], np.float32)
    part = compare_next("none", [1, 1, 1], [1, 1], logits, "x")
    assert not part.departs and part.note == "2 of 3 next tokens agree, x"
    assert part.in_common == pytest.approx(2 / 3)
    wrong = compare_next("none", [1, 1, 1], [1, 0], logits, "x")
    assert wrong.departs and "not those of its own logits" in wrong.note


def test_a_residual_layer_is_measured_by_what_it_adds() -> None:
    before = np.full((1, 2, 4), 1e3)
    rows = before + 1.0
    ours = before + 1.2
    part = compare_alone("none", "layer 0 hidden rows", ours, Alone(rows, 0.1, before), 0)
    assert part.departs and part.own_error == pytest.approx(0.2)
    assert not compare_alone("none", "x", ours, Alone(rows, 0.1)).departs
    broken = compare_alone("none", "x", np.full_like(rows, np.nan), Alone(rows, 0.1))
    assert broken.departs and broken.note == "not finite"
    other = compare_alone("none", "x", rows[:, :1], Alone(rows, 0.1))
    assert other.departs and other.note == "shape [1, 1, 4], not [1, 2, 4]"


def test_a_bundle_in_floating_point_has_no_own_errors(tiny_bundle: Path) -> None:
    from patchsieve.contract import files as bundle_files

    facts = bundle_files.read(tiny_bundle)
    assert Allowed(facts, lambda path: tiny_bundle / path).formats == {}


@pytest.mark.slow
def test_what_is_too_hard_to_round_departs_and_smoothing_mends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Channels 30 times larger than others: int8 loses the others unless factors move."""
    plain = save_checkpoint(tmp_path / "plain", layers=2, kv_heads=2)
    checkpoint = scaled_channels(plain, tmp_path / "checkpoint")
    options = ExportOptions(precision="int8", limits=Limits(64, 32, 1))
    export(str(checkpoint), tmp_path / "smooth", options)
    smoothed = job.guide

    def without(weights: Any, source: Any, *given: Any, **named: Any) -> Any:
        return replace(smoothed(weights, source, *given, **named), source=source)

    monkeypatch.setattr(job, "guide", without)
    export(str(checkpoint), tmp_path / "rough", options)
    assert verify(tmp_path / "smooth", checkpoint)[0] == 0
    code, said = verify(tmp_path / "rough", checkpoint)
    first = said["first_departure"]
    assert code == 1 and first["name"].endswith("layers.0.self_attn.q_proj")
    assert 0.1 < first["own_error"] < 0.5  # less than a wrong matrix makes
