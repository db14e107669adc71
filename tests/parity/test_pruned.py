"""A pruned bundle answers as Hugging Face does when the dropped tokens are masked.

Tokens and survivors are compared with a run in which nothing is dropped, only hidden, and whose
decisions are plain NumPy (tests/references/masked_llava.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from patchsieve.contract.errors import PatchsieveError
from patchsieve.pruning.heads import HeadsConfig, save_heads
from tests.references.masked_llava import Choice, Turn, answer_message, user_message
from tests.support.tiny_bundles import TinyBundle, largest_error, pictures, recorded_logits
from tests.support.tolerances import LOGITS_FLOAT32, NEAR_TIE

COUNT = 64
ROWS = ("llama-gqa-tied-linear-rope", "qwen2", "siglip", "clip-full")
QUESTION = "What is on the table?"


def site(layer: int, method: str, budget: int | None = None, **params: Any) -> dict[str, Any]:
    return {"layer": layer, "method": method, "params": params, "budget": budget}


# Thresholds that keep neither nearly all nor nearly nothing, which `compare` asserts.
ATP = {"theta_r": 0.4, "theta_s": 0.9}
PLANS: dict[str, list[dict[str, Any]]] = {
    "fastv-last": [site(2, "fastv", keep_ratio=0.5, rows="last")],
    "fastv-mean": [site(1, "fastv", keep_ratio=0.25, rows="mean")],
    "fastv-all": [site(2, "fastv", keep_ratio=0.5, rows="all")],
    "fastv-two-sites": [
        site(1, "fastv", keep_ratio=0.75, rows="mean"),
        site(3, "fastv", keep_ratio=0.25, rows="last"),
    ],
    "fastv-budget": [site(2, "fastv", budget=5, keep_ratio=0.5)],
    "random": [site(1, "random", keep_ratio=0.5), site(3, "random", keep_ratio=0.2)],
    "atp": [site(2, "atp", **ATP)],
    "atp-two-sites": [
        site(1, "atp", theta_r=0.35, theta_s=0.9),
        site(3, "atp", theta_r=0.4, theta_s=0.99),
    ],
    "atp-causal": [site(2, "atp", causal=True, **ATP)],
    "atp-rank": [site(2, "atp", normalisation="rank", theta_r=0.6, theta_s=0.9)],
    "atp-softmax": [site(2, "atp", normalisation="softmax", theta_r=0.5, theta_s=0.9)],
    "atp-none": [site(2, "atp", normalisation="none", theta_r=-0.05, theta_s=0.9)],
    "atp-spatial": [site(2, "atp", theta_r=0.8, theta_s=0.2)],
    "atp-budget": [site(2, "atp", budget=4, theta_r=0.3, theta_s=0.9)],
    "topk-last": [site(1, "topk", num_keep=9, row="last"), site(3, "topk", num_keep=4, row="last")],
    "pyramiddrop": [
        site(1, "pyramiddrop", keep_ratio=0.5),
        site(2, "pyramiddrop", keep_ratio=0.25),
        site(3, "pyramiddrop", keep_ratio=0.125),
    ],
    "sparsevlm": [site(1, "sparsevlm", keep_ratio=0.6), site(3, "sparsevlm", keep_ratio=0.3)],
    "sparsevlm-all-heads": [site(2, "sparsevlm", over_heads="all")],
    "tome": [site(2, "tome", num_keep=9)],
    "tome-two-sites": [site(1, "tome", num_keep=10), site(3, "tome", num_keep=6)],
    "mixed": [site(1, "fastv", keep_ratio=0.75), site(2, "atp", **ATP), site(3, "random")],
}


def compare(expected: Turn, result: Any, choices: list[Choice], total: int) -> None:
    """Same survivors and the same tokens; near-ties are told, and end the comparison."""
    found = {(one.layer, one.image): one for one in result.sites}
    assert found.keys() == {(one.layer, one.image) for one in choices}
    near_ties = 0
    for choice in choices:
        one = found[choice.layer, choice.image]
        differ = set(one.kept) ^ set(choice.kept)
        if differ:
            kept = min(choice.scores[token] for token in choice.kept)
            gaps = [abs(choice.scores[token] - kept) for token in differ]
            assert max(gaps) < NEAR_TIE, f"layer {choice.layer}: {one.kept} != {choice.kept}"
            near_ties += len(differ)
            continue
        assert one.num_visual_before == len(choice.alive)
        assert one.num_wanted == choice.num_wanted
    for layer in {one.layer for one in result.sites}:
        shares = [len(one.kept) / total for one in result.sites if one.layer == layer]
        assert 0.1 <= np.mean(shares) <= 0.9  # else nothing would be proven
    print(f"near-ties: {near_ties}")
    assert near_ties or result.token_ids == expected.token_ids
    assert len(result.token_ids) == COUNT or result.finish_reason == "eos"


def check(
    bundle: TinyBundle,
    sites: list[dict[str, Any]],
    question: str = QUESTION,
    num_images: int = 1,
    target: str = "cpu",
    raw: bool = False,
) -> None:
    images, reference = pictures(num_images), bundle.hugging_face
    reference.start()
    expected = reference.ask(question, images, sites, raw=raw, seed=3)
    model = bundle.model(sites, target)
    logits = recorded_logits(model)
    result = model.generate(images, question, max_new_tokens=COUNT, seed=3, raw=raw)
    compare(expected, result, expected.choices, reference.num_visual)
    if result.token_ids == expected.token_ids:
        error = largest_error(logits, expected.logits)
        print(f"largest error of a logit: {error:.1e}")
        assert error < LOGITS_FLOAT32
    assert result.selection == "picked"
    capped = [one.is_capped for one in result.sites]
    assert any(capped) == any(one["budget"] for one in sites)


@pytest.mark.parametrize("plan", PLANS)
def test_dropping_equals_masking_with_one_image(tiny, plan: str) -> None:
    check(tiny(ROWS[0]), PLANS[plan])


@pytest.mark.slow
@pytest.mark.parametrize("plan", ("fastv-two-sites", "atp-two-sites"))
@pytest.mark.parametrize("row", ROWS[2:])
def test_dropping_equals_masking_with_other_towers(tiny, row: str, plan: str) -> None:
    check(tiny(row), PLANS[plan], num_images=2)


@pytest.mark.parametrize(
    "plan",
    ("fastv-two-sites", "atp-two-sites", "mixed", "tome-two-sites", "pyramiddrop", "sparsevlm"),
)
@pytest.mark.parametrize(
    ("question", "num_images"),
    [
        (QUESTION, 3),
        ("Is the cat in <image> or in <image> and why not in both?", 2),
        ("Describe this photo. <image>", 1),
    ],
    ids=("three-images", "images-within-the-text", "image-behind-the-text"),
)
def test_each_image_is_judged_alone_by_the_question_behind_it(
    tiny, plan: str, question: str, num_images: int
) -> None:
    check(tiny("qwen2"), PLANS[plan], question, num_images)


@pytest.mark.parametrize("plan", ("fastv-two-sites", "atp-two-sites"))
def test_raw_prompt_may_end_with_an_image(tiny, plan: str) -> None:
    check(tiny("qwen2"), PLANS[plan], "In the first, <image>, and here <image>", 2, raw=True)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ("fastv-two-sites", "atp-two-sites", "mixed"))
def test_reference_graphs_prune_alike(tiny, plan: str) -> None:
    check(tiny("qwen2"), PLANS[plan], num_images=2, target="reference")


@pytest.mark.slow
@pytest.mark.parametrize(("row", "activation"), [(ROWS[0], None), (ROWS[1], "relu")])
def test_learned_thresholds_prune_alike(tiny, tmp_path, row: str, activation: str | None) -> None:
    noise = torch.Generator().manual_seed(5)
    tensors = {}
    for layer in (1, 3):
        shapes = {
            "trunk.weight": (8, 2 * 6 * 6),
            "trunk.bias": (8,),
            "head_r.weight": (1, 8),
            "head_r.bias": (1,),
            "head_s.weight": (1, 8),
            "head_s.bias": (1,),
        }
        for name, shape in shapes.items():
            tensors[f"layer.{layer}.{name}"] = 0.1 * torch.randn(shape, generator=noise)
        tensors[f"layer.{layer}.head_r.bias"] -= 0.7
        tensors[f"layer.{layer}.head_s.bias"] += 3.0
    config = HeadsConfig((1, 3), grid=(6, 6), hidden=8, activation=activation)
    save_heads(tmp_path / "heads", config, tensors)
    heads = str(tmp_path / "heads")
    check(tiny(row), [site(1, "atp", heads=heads), site(3, "atp", heads=heads)], num_images=2)


@pytest.mark.parametrize(
    ("row", "plan"),
    [
        (ROWS[0], "fastv-two-sites"),
        (ROWS[0], "atp-two-sites"),
        (ROWS[1], "mixed"),
        (ROWS[1], "pyramiddrop"),
        (ROWS[1], "sparsevlm"),
        (ROWS[1], "none"),
    ],
)
def test_later_turns_continue_with_the_survivors_of_the_first(tiny, row: str, plan: str) -> None:
    bundle, sites = tiny(row), PLANS.get(plan, [])
    reference, images = bundle.hugging_face, pictures(2)
    reference.start()
    chat = bundle.model(sites).chat()
    turns = [(QUESTION, images[:1]), ("And in this one?", images[1:]), ("Explain why.", [])]
    messages: list[dict[str, Any]] = []
    choices: list[Choice] = []
    for number, (question, shown) in enumerate(turns):
        messages.append(user_message(question, len(shown)))
        expected = reference.ask(question, shown, sites, messages=messages, seed=number)
        choices += expected.choices
        result = chat.ask(question, shown, max_new_tokens=COUNT, seed=number)
        compare(expected, result, choices, reference.num_visual)
        if sites:
            assert result.selection == ("kept" if not shown else "picked")
        messages.append(answer_message())
    chat.close()


@pytest.mark.parametrize("plan", ("fastv-two-sites", "atp-two-sites"))
def test_repicking_prefills_as_a_fresh_conversation_would(tiny, plan: str) -> None:
    bundle, sites = tiny("qwen2"), PLANS[plan]
    reference, images = bundle.hugging_face, pictures(1)
    chat = bundle.model(sites).chat()
    first = chat.ask(QUESTION, images, max_new_tokens=COUNT)
    result = chat.ask("Is there a dog?", repick=True, max_new_tokens=COUNT)
    chat.close()
    reference.start()
    messages = [user_message(QUESTION, 1), answer_message(first.text)]
    messages.append(user_message("Is there a dog?", 0))
    expected = reference.ask("Is there a dog?", images, sites, messages=messages)
    assert result.selection == "repicked"
    compare(expected, result, expected.choices, reference.num_visual)


def test_what_merged_is_told_and_counts_for_its_patches(tiny) -> None:
    result = tiny("qwen2").model(PLANS["tome-two-sites"]).generate(pictures(2), QUESTION)
    for image in range(2):
        first, second = (one for one in result.sites if one.image == image)
        assert len(first.kept) == 10 and len(second.kept) == 6
        assert {a for a, _ in first.merged} == set(range(16)) - set(first.places)
        assert {b for _, b in first.merged} <= set(first.places)
        assert {a for a, _ in second.merged} == set(first.places) - set(second.places)
        assert first.to_dict()["merged"] == first.merged
    plain = tiny("qwen2").model(PLANS["fastv-last"]).generate(pictures(1), QUESTION)
    assert "merged" not in plain.sites[0].to_dict()


def test_a_site_that_would_merge_more_than_half_is_refused(tiny) -> None:
    bundle = tiny("qwen2")
    before = (bundle.path / "manifest.json").read_bytes()
    for sites, found in (
        ([site(1, "tome", num_keep=7)], "16 to 7"),
        ([site(1, "tome", num_keep=12, budget=5)], "16 to 5"),
        ([site(1, "atp", **ATP), site(2, "tome", num_keep=7)], "16 to 7"),
        ([site(1, "fastv", keep_ratio=0.6), site(3, "tome", num_keep=4)], "10 to 4"),
    ):
        with pytest.raises(PatchsieveError, match="at most every other token") as error:
            bundle.model(sites)
        assert f"found: {found}" in str(error.value) and "--plan" in str(error.value)
    assert (bundle.path / "manifest.json").read_bytes() == before
