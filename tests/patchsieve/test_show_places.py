"""What a page shows of plans that prune before the decoder, merge, or choose words."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from patchsieve.contract.plan import Plan
from patchsieve.export.reuse import reuse
from patchsieve.runtime.model import Model
from patchsieve.runtime.pseudo_cls import Words
from patchsieve.runtime.result import ImageResult, Result, SiteResult
from patchsieve.show.collect import collect, view
from patchsieve.show.html import render
from patchsieve.show.shown import Shown, View, Word
from tests.support.tiny_bundles import PHOTO

ROW = "qwen2"
QUESTION = "What is on the table?"
SITE = {"layer": 2, "method": "fastv", "params": {"keep_ratio": 0.25}}


@pytest.fixture(scope="module")
def shown(tiny: Any) -> Any:
    """Pages of the tiny bundle under plans, by name."""
    made = tiny(ROW)

    def page(name: str, plan: dict[str, Any]) -> tuple[Shown, Result]:
        reuse(made.path, Plan.from_dict(plan), name)
        model = Model(made.path, threads=1, check="size")
        pages = collect(model, [PHOTO], [QUESTION], plan=name, max_new_tokens=2)
        result = model.generate(PHOTO, QUESTION, plan=name, max_new_tokens=2)
        model.close()
        return pages, result

    return page


def made_of(plan: dict[str, Any], result: Result) -> View:
    """A view of a constructed result on a grid of 2 x 2 patches."""
    vision = SimpleNamespace(num_patches=4, num_visual=4)
    facts: Any = SimpleNamespace(plans={"x": Plan.from_dict(plan)}, vision=vision)
    result.plan = "x"
    return view(facts, result, QUESTION, 0)


@pytest.mark.slow
def test_merged_patches_stand_where_a_run_put_them(shown: Any) -> None:
    page, result = shown("tome-fastv", {"encoder": {"method": "tome", "params": {"keep": 6}},
                                        "sites": [SITE]})  # fmt: skip
    early, late = page.asked[0].views[0].places
    (image,), (site,) = result.images, result.sites
    assert (early.name, early.method) == ("before the decoder", "tome")
    assert (early.num_before, early.num_after) == (16, 6) and len(set(early.groups)) == 6
    assert list(early.groups) == image.sources and early.kept == tuple(range(16))
    assert (late.num_before, late.num_after) == (6, 2)
    assert late.kept == tuple(p for p in range(16) if image.sources[p] in site.places)
    # All patches of a token share its score, and the best tokens are those that go on.
    by_token = {token: late.scores[patch] for patch, token in enumerate(image.sources)}
    assert [by_token[token] for token in image.sources] == list(late.scores)
    best = sorted(by_token, key=lambda token: (-by_token[token], token))[:2]
    assert sorted(best) == sorted(site.places)
    assert "Merged patches, 6 tokens" in render(page)


def test_the_words_that_judged_stand_in_the_prompt(shown: Any) -> None:
    plan = {"sites": [{"layer": 2, "method": "ivtp", "params": {"num_keep": 5, "group": 1}}],
            "pseudo_cls": {"text": "all", "tau": 0.0}}  # fmt: skip
    page, result = shown("words", plan)
    (seen,) = page.asked[0].views
    assert "".join(word.text for word in seen.words) == QUESTION
    selected = [word.text for word in seen.words if word.is_selected]
    assert "".join("".join(selected).split()) == "".join(QUESTION.split())
    assert len(selected) == sum(result.words[0].selected)
    assert render(page).count("<mark") == len([text for text in selected if text.strip()])


def test_fused_patches_do_not_go_on_by_themselves() -> None:
    fused = ImageResult(0, [1, 3, -1], [2, 0, 2, 1])  # patches 0 and 2 are the last token
    site = SiteResult(2, 0, 3, [-1, 3], 2, places=[1, 2], scores=[(0, 0.1), (1, 0.2), (2, 0.7)])
    plan = {"encoder": {"method": "evit", "params": {"keep": 3}}, "sites": [SITE]}
    early, late = made_of(plan, Result(images=[fused], sites=[site])).places
    assert early.kept == (1, 3) and early.groups == (2, 0, 2, 1)
    assert late.kept == (3,) and late.scores == (None, 0.1, None, 0.2)
    assert (late.num_before, late.num_after) == (3, 2)


def test_what_the_tower_drops_has_no_score_later() -> None:
    left = ImageResult(0, [0, 2, 3], [0, -1, 1, 2])
    site = SiteResult(2, 0, 3, [2, 3], 2, places=[1, 2], scores=[(0, 0.1), (1, 0.2), (2, 0.7)])
    plan = {"projector": {"method": "topk", "params": {"keep": 3}}, "sites": [SITE]}
    early, late = made_of(plan, Result(images=[left], sites=[site])).places
    assert early.kept == (0, 2, 3) and early.groups is None
    assert late.kept == (2, 3) and late.scores == (0.1, None, 0.2, 0.7)


def test_what_merges_in_the_decoder_goes_on_as_part_of_another_token() -> None:
    sites = [
        SiteResult(1, 0, 4, [1, 3], 2, [1, 3], [(n, n / 10) for n in range(4)], [(0, 3), (2, 1)]),
        SiteResult(2, 0, 2, [3], 1, places=[3], scores=[(1, 0.2), (3, 0.9)], merged=[]),
    ]
    merging = [{"layer": 1, "method": "tome"}, {"layer": 2, "method": "tome"}]
    early, late = made_of({"sites": merging}, Result(sites=sites)).places
    assert early.kept == (0, 1, 2, 3) and early.groups == (3, 1, 1, 3)
    assert early.scores == (0.0, 0.1, 0.2, 0.3)
    assert late.kept == (0, 3) and late.groups == (3, -1, -1, 3)
    assert late.scores == (0.9, 0.2, 0.2, 0.9)


def test_another_image_s_tokens_stay_its_own() -> None:
    sites = [SiteResult(2, n, 4, [n], 1, places=[n], scores=[(n, 0.5)]) for n in range(2)]
    (place,) = made_of({"sites": [SITE]}, Result(sites=sites)).places
    assert place.kept == (0,) and place.scores == (0.5, None, None, None)


@pytest.mark.parametrize(
    ("tokens", "texts"),
    [
        (("What", " is"), ("What", " is", " on the table?")),
        (("What", "is", "table"), ("What", " ", "is", " on the ", "table", "?")),
        (("\u2581What", "is"), ("What ", "is", " on the table?")),  # a piece that is not found
        ((), (QUESTION,)),
    ],
)
def test_tokens_and_what_lies_between_them_make_the_prompt(
    tokens: tuple[str, ...], texts: tuple[str, ...]
) -> None:
    relevance = np.linspace(0.1, 0.3, len(tokens))
    words = Words(0, tokens, relevance, np.ones(len(tokens), bool))
    seen = made_of({"sites": [SITE]}, Result(words=[words])).words
    assert tuple(word.text for word in seen) == texts
    assert {word.text for word in seen if word.is_selected} == set(tokens) & set(texts)


def test_no_word_is_said_so() -> None:
    words = Words(0, ("What",), np.array([-np.inf]), np.zeros(1, bool))
    seen = made_of({"sites": [SITE]}, Result(words=[words]))
    assert seen.words[0] == Word("What", None, False)
    assert seen.told.startswith("No word passed the threshold")
