"""Positions on a grid: a bundle of a model that was trained with them answers as torch does.

The reference is Hugging Face's own layers, turned by angles that plain NumPy gives them
(tests/references/grid2d.py): nothing is dropped there, only hidden.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gpu.fake_tensorrt import build_fakes
from patchsieve.calibration.rotary import GridRotary
from patchsieve.contract import files
from patchsieve.contract.errors import BundleError, PatchsieveError
from patchsieve.contract.manifest import Limits
from patchsieve.contract.plan import Plan, SitePlan
from patchsieve.contract.targets import WITH_ENGINES
from patchsieve.contract.trained import Trained, sections
from patchsieve.export.exporter import ExportOptions, export
from patchsieve.export.reuse import reuse
from patchsieve.pruning.rotary import angles
from patchsieve.runtime.model import Model
from patchsieve.runtime.positions import number_grid, number_rows
from patchsieve.runtime.rows import Rows
from tests.references import grid2d
from tests.references.masked_llava import MaskedLlava, answer_message, user_message
from tests.support.bundles import PHOTO, command, command_json
from tests.support.models import save_checkpoint
from tests.support.tiny_bundles import largest_error, pictures, recorded_logits
from tests.support.tolerances import LOGITS_FLOAT32

pytest_plugins = ["tests.support.gpu"]

COUNT = 32
ROW = "vicuna-6x6"  # that has every target
TARGETS = ("cpu", "reference", "jetpack6", "tensorrt-rtx")
FASTV = [{"layer": 1, "method": "fastv", "params": {"keep_ratio": 0.5}}]
ATP = [
    {"layer": at, "method": "atp", "params": {"theta_r": theta, "theta_s": 0.95}}
    for at, theta in ((1, 0.35), (2, 0.4))
]
PLANS = {"none": [], "fastv": FASTV, "atp": ATP}
# A row of tests.support.models, and the layout of its sections.
MODELS = {"vicuna-6x6": "mrope", "qwen2": "2d", "clip-full": "mrope"}


def train_on_grid(checkpoint: Path, parts: list[int] | None = None, **more: Any) -> Path:
    """Say in a checkpoint's config that it was trained with positions on a grid."""
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    entry = {"position_rule": "grid2d", "rotary_sections": parts or [2, 3, 3]} | more
    path.write_text(json.dumps(config | {"patchsieve": entry}))
    return checkpoint


def sites_of(row: str, plan: str) -> list[dict[str, Any]]:
    """The sites at which a row's bundle is cut."""
    return PLANS[plan] if row == ROW else PLANS[plan][:1]


@pytest.fixture(scope="module")
def bundle_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Checkpoint and bundle of a row, exported at its first use."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(row: str) -> tuple[Path, Path]:
        if row not in made:
            folder = tmp_path_factory.mktemp(row)
            cuts, targets = ((1, 2), TARGETS) if row == ROW else ((1,), TARGETS[:1])
            checkpoint = save_checkpoint(folder / "checkpoint", row, layers=len(cuts) + 1)
            train_on_grid(checkpoint, list(sections(16, MODELS[row])))
            options = ExportOptions(cuts=cuts, targets=targets, limits=Limits(300, 64, 3))
            export(str(checkpoint), folder / "bundle", options)
            for name in ("fastv", "atp"):
                reuse(folder / "bundle", Plan.from_dict({"sites": sites_of(row, name)}), name)
            made[row] = (checkpoint, folder / "bundle")
        return made[row]

    return get


@pytest.mark.slow_rows("vicuna-6x6-none")
@pytest.mark.slow_rows(
    "qwen2-none", "qwen2-fastv", "qwen2-atp", "clip-full-none", "clip-full-fastv", "clip-full-atp"
)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("row", MODELS)
def test_a_conversation_about_several_images_is_that_of_torch(
    bundle_of, row: str, plan: str
) -> None:
    """Tokens and survivors exactly, logits closely: two images, another one, then none."""
    checkpoint, bundle = bundle_of(row)
    reference, model = MaskedLlava(checkpoint), Model(bundle, threads=1, check="size")
    chat, images = model.chat(plan=plan), pictures(3)
    turns = [("What is on the table?", images[:2]), ("And in this one?", images[2:]), ("Why?", [])]
    messages: list[dict[str, Any]] = []
    choices: list[Any] = []
    logits = recorded_logits(model)
    for question, shown in turns:
        messages.append(user_message(question, len(shown)))
        expected = reference.ask(
            question, shown, sites_of(row, plan), messages=messages, max_new_tokens=COUNT
        )
        choices += expected.choices
        logits.clear()
        result = chat.ask(question, shown, max_new_tokens=COUNT)
        kept = {(site.layer, site.image): site.kept for site in result.sites}
        assert kept == {(one.layer, one.image): one.kept for one in choices}
        assert result.token_ids == expected.token_ids
        assert largest_error(logits, expected.logits) < LOGITS_FLOAT32
        assert chat.cache.position == reference.position
        messages.append(answer_message())
    assert plan == "none" or any(len(one.kept) < len(one.alive) for one in choices)
    model.close()


@pytest.mark.parametrize("target", TARGETS[1:])
def test_other_targets_answer_alike(bundle_of, machine, target: str) -> None:
    """Those of GPUs through the GPU runtime, captured steps and all, on a simulated one."""
    _, bundle = bundle_of(ROW)
    options: dict[str, Any] = {"target": target, "check": "size"}
    if target in WITH_ENGINES:
        gpu = machine(is_rtx=target == "tensorrt-rtx")
        build_fakes(bundle, target, gpu.trt)
        options["backend"] = gpu.backend
    found = []
    for given in ({"check": "size"}, options):
        model = Model(bundle, **given)
        chat, images = model.chat(plan="atp"), pictures(2)
        for shown in (images, []):
            result = chat.ask("What is it?", shown, max_new_tokens=COUNT)
            found.append((result.token_ids, [site.kept for site in result.sites]))
        chat.close()
        model.close()
    assert found[:2] == found[2:]


@pytest.mark.parametrize("mistake", ("time", "row", "column", "following", "flat"))
def test_a_wrong_position_answers_otherwise(bundle_of, monkeypatch, mistake: str) -> None:
    """The comparison above can fail."""
    _, bundle = bundle_of(ROW)
    model = Model(bundle, threads=1, check="size")
    logits = recorded_logits(model)
    model.generate(pictures(2), "What is it?", max_new_tokens=1)
    from patchsieve.runtime import positions

    number = positions.number_grid

    def wrong(ids: np.ndarray, vision: Any) -> tuple[np.ndarray, int]:
        found, taken = number(ids, vision)
        if mistake == "following":
            return found, taken + 1
        if mistake == "flat":
            return np.repeat(np.arange(len(ids))[:, None], 3, axis=1), len(ids)
        axis = ("time", "row", "column").index(mistake)
        found[:, axis] = found[::-1, axis] + 1
        return found, taken

    monkeypatch.setattr(positions, "number_grid", wrong)
    model.generate(pictures(2), "What is it?", max_new_tokens=1)
    assert largest_error(logits[:1], logits[1:]) > 10 * LOGITS_FLOAT32
    model.close()


def vision(grid: tuple[int, int], **more: Any) -> Any:
    """What numbering asks of a tower."""
    from types import SimpleNamespace

    count = grid[0] * grid[1]
    return SimpleNamespace(**{"grid": grid, "num_patches": count, "num_visual": count} | more)


@pytest.mark.parametrize(("grid", "has_cls"), [((3, 3), False), ((2, 4), False), ((4, 2), True)])
def test_rows_are_numbered_as_the_reference_numbers_them(
    grid: tuple[int, int], has_cls: bool
) -> None:
    count = grid[0] * grid[1]
    ids = np.arange(-has_cls, count)
    image = np.concatenate(([-1, -1], np.full(len(ids), 0), [-1], np.full(len(ids), 1), [-1] * 3))
    spans = [slice(2, 2 + len(ids)), slice(3 + len(ids), 3 + 2 * len(ids))]
    raster = np.full(len(image), -1)
    for span in spans:
        raster[span] = ids
    tower = vision(grid, num_visual=len(ids))
    expected, following = grid2d.number(image, raster, grid)
    found = number_rows(len(image), [(span, ids) for span in spans], tower, "grid2d", 3)
    assert found[:-1].tolist() == expected.tolist()
    assert found[-1].tolist() == [following] * 3
    flat = number_rows(len(image), [(span, ids) for span in spans], tower, "grid2d", 2)
    assert flat.tolist() == found[:, 1:].tolist()


def test_what_was_dropped_leaves_its_gaps_and_merged_tokens_follow_the_grid() -> None:
    tower = vision((3, 3))
    kept = np.array([1, 5, -1])  # two patches and a token that is none
    found = number_rows(6, [(slice(1, 4), kept)], tower, "grid2d", 3).tolist()
    # Text, patches at (0, 1) and (1, 2), the other token behind the grid, text, text, and the next.
    expected = [[0, 0, 0], [1, 1, 2], [1, 2, 3], [4, 4, 4], [5, 5, 5], [6, 6, 6], [7, 7, 7]]
    assert found == expected
    pooled = number_rows(5, [(slice(1, 4), np.full(3, -1))], tower, "grid2d", 3)
    assert pooled.tolist() == [[n] * 3 for n in range(6)]


def test_a_side_row_stands_where_the_text_behind_its_image_does() -> None:
    ids = np.array([0, 1, 2, 3])
    image = np.array([-1, 0, 0, 0, 0, -1, -1])
    positions = number_rows(7, [(slice(1, 5), ids)], vision((2, 2)), "grid2d", 3)
    none = np.full(7, -1)
    known = (positions[:-1], image, none, none, image < 0, np.ones(len(image), np.float32))
    rows = Rows(*known, none, int(positions[-1].max()))
    assert rows.with_side_rows().position_ids[7:].tolist() == [[3, 3, 3]]
    ends = rows.take(np.arange(5)).with_side_rows()  # no text behind: that of the next row
    assert ends.position_ids[5:].tolist() == [[5, 5, 5]]


@pytest.mark.parametrize("parts", [(2, 3, 3), (4, 4)])
def test_each_section_turns_by_its_axis(parts: tuple[int, ...]) -> None:
    ids = np.random.default_rng(0).integers(0, 50, (7, 3))
    inv_freq = (10000.0 ** -(np.arange(8) / 8)).astype(np.float32)
    cos, sin = grid2d.tables(ids, inv_freq, parts)
    turned = angles(torch.from_numpy(ids[:, 3 - len(parts) :]), torch.from_numpy(inv_freq), parts)
    assert np.abs(turned.cos().numpy() - cos[:, :8]).max() < 1e-6
    assert np.abs(turned.sin().numpy() - sin[:, 8:]).max() < 1e-6


def test_positions_and_angles_are_those_of_qwen2_vl() -> None:
    from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig

    theirs = qwen.Qwen2VLModel.get_vision_position_ids(None, 5, torch.tensor([1, 3, 4]))  # [3, 12]
    ours, taken = number_grid(np.arange(12), vision((3, 4)))
    assert (ours + 5).T.tolist() == theirs.tolist()
    assert taken + 5 == int(theirs.max()) + 1
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [16, 24, 24]}
    config = Qwen2VLTextConfig(hidden_size=256, num_attention_heads=2, rope_parameters=rope)
    rotary, rows = qwen.Qwen2VLRotaryEmbedding(config), torch.zeros(1, 12, 256)
    cos, sin = rotary(rows, theirs[:, None])  # [1, 12, 128]
    turned = GridRotary(rotary, sections(128))(rows, theirs.T[None])
    assert torch.equal(turned[0], cos) and torch.equal(turned[1], sin)


def test_sections_scale_with_the_width_of_a_head() -> None:
    assert sections(128) == (16, 24, 24) and sections(128, "2d") == (32, 32)
    assert sections(64) == (8, 12, 12) and sections(16) == (2, 3, 3)
    assert sections(20) == (4, 3, 3) and sections(10, "2d") == (3, 2)
    assert all(sum(sections(width)) == width // 2 for width in range(6, 300, 2))
    with pytest.raises(PatchsieveError, match="too narrow"):
        sections(4)


def test_the_bundle_says_its_positions(bundle_of) -> None:
    _, bundle = bundle_of(ROW)
    facts = files.read(bundle)
    assert facts.text.rotary_sections == (2, 3, 3)
    assert {plan.position_rule for plan in facts.plans.values()} == {"grid2d"}
    code, said = command_json("inspect", bundle)
    assert code == 0 and said["plans"]["none"]["position_rule"] == "grid2d"
    assert facts.graphs["stage_0"].inputs[2].shape[1] == 3


@pytest.mark.parametrize("row", ("vicuna-6x6", "qwen2"))
def test_verify_follows_every_plan(bundle_of, row: str) -> None:
    checkpoint, bundle = bundle_of(row)
    words = ("verify", bundle, "--against", checkpoint, "--image", PHOTO, "--max-new-tokens", 8)
    code, said = command_json(*words)
    assert code == 0 and said["passed"]
    plain = save_checkpoint(checkpoint.parent / "plain", row, layers=3 if row == ROW else 2)
    code, said = command_json("verify", bundle, "--against", plain)
    assert code == 2 and "was not made from" in said["error"]


def test_positions_that_the_model_does_not_know_are_refused(bundle_of, tmp_path: Path) -> None:
    grid, bundle = bundle_of(ROW)
    plain = save_checkpoint(tmp_path / "plain", "llama", layers=2)
    for checkpoint, rule in ((grid, "original"), (plain, "grid2d")):
        code, _, said = command(
            "export", checkpoint, "-o", tmp_path / "bundle", "--positions", rule
        )
        assert code == 2 and "not trained with these positions" in said
        assert not (tmp_path / "bundle").exists()
    with pytest.raises(PatchsieveError, match="not trained with these positions"):
        reuse(bundle, Plan((SitePlan(1, "random"),), position_rule="original"), "other")
    fitting = Plan((SitePlan(1, "random"),), position_rule="grid2d")
    assert fitting.with_positions("grid2d") == fitting


@pytest.mark.parametrize(
    "entry",
    [
        [],
        {"position_rule": "spiral"},
        {"position_rule": "grid2d"},
        {"position_rule": "grid2d", "rotary_sections": [2, 3, 4]},
        {"position_rule": "grid2d", "rotary_sections": [8]},
        {"position_rule": "grid2d", "rotary_sections": [-1, 5, 4]},
        {"position_rule": "original", "rotary_sections": [2, 3, 3]},
        {"heads": "../elsewhere"},
        {"heads": ".."},
        {"rotary_theta": 3},
    ],
)
def test_an_entry_that_cannot_be_is_refused_in_one_line(entry: Any) -> None:
    from types import SimpleNamespace

    text = SimpleNamespace(head_dim=16)
    with pytest.raises(PatchsieveError, match="the entry patchsieve"):
        Trained.of(SimpleNamespace(text_config=text, patchsieve=entry))
    assert Trained.of(SimpleNamespace(text_config=text)) == Trained()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data["text"].update(rotary_sections=[1, 3, 3]),
        lambda data: data["text"].update(rotary_sections=[4, 4]),  # the graphs take three axes
        lambda data: data["text"].update(rotary_sections=[]),
        lambda data: data["text"].update(rotary_sections="mrope"),
    ],
)
def test_a_manifest_that_contradicts_its_positions_is_refused(bundle_of, damage) -> None:
    _, bundle = bundle_of(ROW)
    data = json.loads((bundle / files.FILE_NAME).read_text())
    damage(data)
    with pytest.raises(BundleError):
        files.parse(json.dumps(data))
