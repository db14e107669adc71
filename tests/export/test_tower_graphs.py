"""Plans that prune before the decoder: each graph is its paper, and the decoder gets it right."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from patchsieve.contract import names
from patchsieve.contract.plan import Plan
from patchsieve.export.families import family_of
from patchsieve.export.graphs.vision import vision_graph
from patchsieve.export.lowering import lower, lowering
from patchsieve.export.plan_graphs import plan_vision
from patchsieve.export.source.checkpoint import Checkpoint, read_config
from patchsieve.export.weights import weights_of
from patchsieve.runtime.inputs.prompt import expand
from patchsieve.verify.verification import Verification
from tests.references.masked_llava import MaskedLlava
from tests.support.bundles import PHOTO, PROMPT, command, command_json
from tests.support.models import save_checkpoint
from tests.support.tiny_bundles import largest_error, pictures, recorded_logits
from tests.support.tolerances import LOGITS_FLOAT32
from tests.support.tower_bundles import LEFT, PLANS, Towers, method, reference_vision, towers

pytestmark = pytest.mark.slow

__all__ = ["towers"]
FEATURES = 1e-5  # largest difference over the largest entry: float32 against float64
MERGING = ("tome", "pooling")


def run_vision(towers: Towers, plan: str, pixels: np.ndarray, noise: np.ndarray | None) -> Any:
    """The bundle's graph of a plan."""
    model = towers.model
    inputs = {names.PIXEL_VALUES: pixels} | ({} if noise is None else {names.NOISE: noise})
    out = model.backend.run(model.facts.vision_graph(plan), inputs)
    return {name: model.backend.to_numpy(value) for name, value in out.items()}


def noise_for(plan: str, count: int) -> np.ndarray | None:
    """Numbers for the plans that draw."""
    drawn = np.random.default_rng(3).random((count, 36), np.float32)
    return drawn if plan == "draw" else None


@pytest.mark.slow_rows("gtp")
@pytest.mark.parametrize("plan", PLANS)
def test_a_vision_graph_is_what_its_paper_says(towers: Towers, plan: str) -> None:
    pixels = towers.model.preprocess(pictures(3))
    noise = noise_for(plan, 3)
    found = run_vision(towers, plan, pixels, noise)
    features, ids, sources = reference_vision(towers.hugging_face, pixels, PLANS[plan], noise)
    assert found[names.IMAGE_FEATURES].shape[1] == LEFT == towers.model.facts.num_visual(plan)
    np.testing.assert_array_equal(found[names.IMAGE_IDS], ids)
    np.testing.assert_array_equal(found[names.IMAGE_SOURCES], sources)
    error = np.abs(found[names.IMAGE_FEATURES] - features).max() / np.abs(features).max()
    assert error < FEATURES
    assert len({tuple(one) for one in sources.tolist()}) == (1 if plan == "pooling" else 3)
    for image in range(3):  # an image alone is what it is among others
        own = None if noise is None else noise[image : image + 1]
        alone = run_vision(towers, plan, pixels[image : image + 1], own)
        np.testing.assert_array_equal(alone[names.IMAGE_IDS][0], ids[image])
        np.testing.assert_allclose(
            alone[names.IMAGE_FEATURES][0], found[names.IMAGE_FEATURES][image], atol=1e-4
        )


def positions_of(token_ids: list[int], image_token: int, images: list[list[int]], rule: str) -> Any:
    """Positions of each row by the words of the rule, one token at a time."""
    positions, here, left = [], 0, list(images)
    for token in token_ids:
        if token != image_token:
            positions.append(here)
            here += 1
            continue
        ids = left.pop(0)
        if rule == "contiguous" or max(ids) < 0:  # as if the image had that many
            positions += range(here, here + len(ids))
            here += len(ids)
            continue
        further = 0
        for patch in ids:
            positions.append(here + (patch if patch >= 0 else 36 + further))
            further += patch < 0
        here += 36 + further
    return positions, here


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("plan", ["gtp", "draw", "evit", "pooling", "divprune", "visionzip"])
def test_the_decoder_gets_the_rows_and_positions_that_the_rule_says(
    towers: Towers, plan: str, count: int
) -> None:
    model, llava = towers.model, towers.hugging_face
    shown = pictures(count)
    logits = recorded_logits(model)
    result = model.generate(shown, PROMPT, plan=plan, max_new_tokens=3, ignore_eos=True, seed=7)
    assert result.visual_tokens == LEFT * count
    assert [len(image.ids) for image in result.images] == [LEFT] * count
    noise = np.random.default_rng(7).random((count, 36), np.float32) if plan == "draw" else None
    features, ids, _ = reference_vision(llava, model.preprocess(shown), PLANS[plan], noise)
    assert [image.ids for image in result.images] == ids
    prompts = model.bundle.prompts
    prompt = prompts.build([prompts.user_message(PROMPT, count)], count)
    image_token = model.facts.tokens.image_token_id
    rule = PLANS[plan].get("position_rule", "original")
    positions, following = positions_of(prompt.token_ids.tolist(), image_token, ids, rule)
    token_ids = torch.from_numpy(expand(prompt, LEFT).token_ids)
    is_visual = token_ids == image_token
    with torch.no_grad():
        rows = llava.get_input_embeddings()(torch.where(is_visual, 0, token_ids))
        rows[is_visual] = torch.from_numpy(features).reshape(-1, rows.shape[-1])
        said = torch.tensor(result.token_ids[:-1])
        rows = torch.cat((rows, llava.get_input_embeddings()(said)))
        positions += range(following, following + len(said))
        hidden = llava.model.language_model(
            inputs_embeds=rows[None],
            position_ids=torch.tensor([positions]),
            attention_mask=torch.ones(1, len(rows)),  # or gaps are taken for several texts
            use_cache=False,
        ).last_hidden_state
        expected = llava.lm_head(hidden[0, -3:]).numpy()
    del model.pipeline.prefill, model.pipeline.decode  # the recorder's
    assert np.abs(np.stack(logits) - expected).max() < LOGITS_FLOAT32


class ReducedLlava(MaskedLlava):
    """A checkpoint whose tower prunes by the plain NumPy methods, and whose decoder hides rows."""

    def __init__(self, towers: Towers, plan: str) -> None:
        super().__init__(towers.checkpoint)
        self.towers, self.plan, self.num_visual = towers, PLANS[plan], LEFT

    def _embed(self, ids: list[int], is_image: np.ndarray, images: list[Any]) -> torch.Tensor:
        rows = super()._embed(ids, is_image, [])
        pixels = self.towers.model.preprocess(images)
        llava = self.towers.hugging_face
        features, self.image_ids, _ = reference_vision(llava, pixels, self.plan)
        rows[0, is_image] = torch.from_numpy(features).reshape(-1, rows.shape[-1]).to(rows.dtype)
        return rows

    def _patch_ids(self, number: int, places: np.ndarray) -> np.ndarray:
        return np.array(self.image_ids[number])[places]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("plan", ["topk", "tome"])
def test_an_answer_pruned_in_tower_and_decoder_is_that_of_both_papers(
    towers: Towers, plan: str, count: int
) -> None:
    shown, reference = pictures(count), ReducedLlava(towers, plan)
    expected = reference.ask(PROMPT, shown, PLANS[plan]["sites"], max_new_tokens=24)
    model = towers.model
    logits = recorded_logits(model)
    result = model.generate(shown, PROMPT, plan=plan, max_new_tokens=24)
    del model.pipeline.prefill, model.pipeline.decode  # the recorder's
    assert [image.ids for image in result.images] == [list(ids) for ids in reference.image_ids]
    assert [sorted(site.kept) for site in result.sites] == [
        sorted(choice.kept) for choice in expected.choices
    ]
    assert result.token_ids == expected.token_ids
    assert largest_error(logits, expected.logits) < LOGITS_FLOAT32


@pytest.mark.parametrize(
    ("plan", "count"),
    [("topk", 3), ("tome", 3), ("tome", 1), ("draw", 1), ("visionzip", 1), ("none", 3)],
)
def test_verify_passes_what_prunes_on_both_sides(towers: Towers, plan: str, count: int) -> None:
    verification = Verification(towers.bundle, str(towers.checkpoint), threads=1)
    parts = list(verification.compare(pictures(count), PROMPT, plan, count=8))
    verification.close()
    assert not [part for part in parts if part.departs]
    told = {part.name for part in parts}
    assert names.IMAGE_FEATURES in told and "logits" in told
    assert ("survivors of the tower" in told) == (plan != "none")


def test_a_decoder_site_reports_tokens_that_are_no_patches_by_their_place(towers: Towers) -> None:
    result = towers.model.generate(PHOTO, PROMPT, plan="tome", max_new_tokens=2)
    (site,), (image,) = result.sites, result.images
    assert site.num_visual_before == LEFT
    assert site.kept == [-1] * len(site.places) and site.places == sorted(set(site.places))
    assert set(site.places) <= set(image.sources)
    ratio = towers.model.generate(PHOTO, PROMPT, plan="topk", max_new_tokens=2)
    assert len(ratio.sites[0].kept) == 5  # half of the nine that entered, rounded up
    ids = ratio.images[0].ids
    assert ratio.sites[0].kept == [ids[place] for place in ratio.sites[0].places]
    assert json.loads(json.dumps(result.to_dict()))["images"][0]["num_visual"] == LEFT


def test_a_later_turn_continues_behind_the_gaps(towers: Towers) -> None:
    chat = towers.model.chat(plan="gtp")
    chat.ask(PROMPT, PHOTO, max_new_tokens=3)
    before = chat.cache.position
    assert chat.cache.stages[0].length < before  # what was dropped left its positions
    again = chat.ask("And now?", max_new_tokens=3)
    assert again.visual_tokens == 0 and again.images[0].ids
    repicked = chat.ask("And now?", max_new_tokens=3, repick=True)
    assert repicked.visual_tokens == LEFT
    chat.close()


def tower_session(checkpoint: Path, plan: dict[str, Any], dtype: torch.dtype) -> Any:
    """A vision graph alone, its weights inside, in ONNX Runtime."""
    config: Any = read_config(checkpoint)
    family = family_of(config)
    facts, stored = family.vision(config), Checkpoint(checkpoint, family)
    before = Plan.from_dict(plan)
    module = plan_vision(before, facts, config.text_config.hidden_size, None, dtype)
    state = {}
    for weight in weights_of(module):
        tensor = stored.read(weight.source).float()
        state[weight.name] = tensor.t() if weight.transposed else tensor
    module.load_state_dict(state)
    graph = lower(vision_graph(module.to(dtype)), lowering("cpu"))
    model = ir.to_proto(graph).SerializeToString()
    return ort.InferenceSession(model, providers=["CPUExecutionProvider"])


def run_session(session: Any, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """All outputs by name."""
    found = session.run(None, {names.PIXEL_VALUES: pixels})
    return dict(zip([out.name for out in session.get_outputs()], found, strict=True))


def same_tokens(one: np.ndarray, other: np.ndarray) -> float:
    """Share of an image's tokens made of the same patches, from the sources of two runs."""
    made = [
        {frozenset(np.flatnonzero(sources == token)) for token in range(LEFT)}
        for sources in (one, other)
    ]
    return len(made[0] & made[1]) / LEFT


@pytest.mark.parametrize("plan", ["gtp", "topk", "evit", "tome"])
def test_float16_keeps_the_same_patches(towers: Towers, plan: str) -> None:
    pixels = towers.model.preprocess(pictures(64))
    half = run_session(tower_session(towers.checkpoint, PLANS[plan], torch.float16), pixels)
    full = run_vision(towers, plan, pixels, None)
    told = [run[names.IMAGE_SOURCES] for run in (full, half)]
    share = np.mean([same_tokens(*both) for both in zip(*told, strict=True)])
    print(f"the same tokens: {share:.4f}")
    assert share >= 0.99
    assert half[names.IMAGE_FEATURES].dtype == np.float16


def test_a_tower_without_a_class_token_prunes_by_received_attention(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(
        tmp_path / "siglip", "siglip", layers=1, vision_layers=3, image_size=48
    )
    plan = {"encoder": method("gtp", [1, 2], [20, 9])}
    pixels = np.random.default_rng(0).standard_normal((2, 3, 48, 48), np.float32)
    found = run_session(tower_session(checkpoint, plan, torch.float32), pixels)
    from transformers import LlavaForConditionalGeneration

    llava = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float64).eval()
    features, ids, sources = reference_vision(llava, pixels, plan)
    np.testing.assert_array_equal(found[names.IMAGE_IDS], ids)
    np.testing.assert_array_equal(found[names.IMAGE_SOURCES], sources)
    error = np.abs(found[names.IMAGE_FEATURES] - features).max() / np.abs(features).max()
    assert error < FEATURES


@pytest.mark.slow
@pytest.mark.tensorrt
def test_every_vision_graph_builds_in_tensorrt_rtx(towers: Towers, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    from patchsieve.runtime.building.compile import build_engine
    from patchsieve.runtime.building.profiles import profiles
    from tests.support.networks import parse_network

    facts = towers.model.facts
    for plan in PLANS:
        graph = names.vision(plan)
        path = towers.bundle / facts.targets["tensorrt-rtx"][graph]
        network = parse_network(path)
        shapes = {tensor.name: tensor.shape for tensor in network.outputs}
        assert shapes[names.IMAGE_FEATURES][1:] == (LEFT, facts.text.hidden_size)
        assert shapes[names.IMAGE_SOURCES][1:] == (36,)
        assert {tensor.name for tensor in network.inputs} == {names.PIXEL_VALUES} | (
            {names.NOISE} if plan == "draw" else set()
        )
        report = build_engine(
            path, tmp_path / plan, profiles(facts, graph, "tensorrt-rtx"), target="tensorrt-rtx"
        )
        assert report.engine_bytes and not report.warnings


def test_the_command_line_makes_and_inspects_such_plans(towers: Towers, tmp_path: Path) -> None:
    out = shutil.copytree(towers.bundle, tmp_path / "bundle")
    words = ["export", "--reuse", out, "--quiet", "--encoder", "gtp", "--encoder-keep", "12"]
    words += ["--encoder-group", "2", "--positions", "contiguous"]
    code, told = command_json(*words, "--method", "fastv", "--sites", "1")
    assert code == 0 and told["plan"] == "gtp12-fastv-1" and told["num_visual"] == 12
    assert told["budgets"] == [12, 6]
    code, facts = command_json("inspect", out, "--text-tokens", "40")
    plan = facts["plans"]["gtp12-fastv-1"]
    assert plan["encoder"] == {"method": "gtp", "params": {"keep": 12, "group_layers": 2}}
    assert plan["flops"]["vision"] < plan["flops_unpruned"]["vision"]
    assert facts["plans"]["none"]["flops"] == plan["flops_unpruned"]
    code, text, _ = command("inspect", out)
    assert "inside the tower: gtp keep 12" in text and "FLOPs of 3 images" in text


@pytest.mark.parametrize(
    "wrong",
    [
        "--encoder nonsense",
        "--encoder-keep 3",
        "--encoder gtp --encoder-keep 99",
        "--encoder topk --encoder-fusion mean",
        "--encoder gtp --projector pooling",
        "--encoder gtp --encoder-keep 4 --projector topk --projector-keep 9",
        "--projector pooling --projector-keep 7",
        "--positions contiguous",
    ],
)
def test_a_plan_that_cannot_be_is_refused_in_one_line(
    towers: Towers, tmp_path: Path, wrong: str
) -> None:
    out = tmp_path / "bundle"
    code, _, err = command("export", towers.checkpoint, "-o", out, "--quiet", *wrong.split())
    assert code == 2 and len(err.strip().splitlines()) == 1, err
    assert not out.exists()
