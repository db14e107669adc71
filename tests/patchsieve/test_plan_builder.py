"""`patchsieve.plans.build`: the plans of the command line, from Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from patchsieve import plans
from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.plan import MethodPlan, Plan, PseudoCls, SitePlan
from patchsieve.pruning.counts import left_by_sites

LLAVA = plans.Size(num_patches=576, num_layers=32)


def test_nothing_asked_is_no_pruning() -> None:
    assert plans.build() == plans.build("none") == Plan()
    assert plans.name_of(Plan()) == "none"


def test_values_are_one_for_all_sites_or_one_each() -> None:
    one = plans.build("fastv", [2, 4], keep_ratio=0.5, rows="mean", budget=300)
    params = {"keep_ratio": 0.5, "rows": "mean"}
    assert one == Plan((SitePlan(2, "fastv", params, 300), SitePlan(4, "fastv", params, 300)))
    each = plans.build("random", (2, 4), keep_ratio=[0.5, 0.25], budget=[300, 200])
    assert [site.params["keep_ratio"] for site in each.sites] == [0.5, 0.25]
    assert [site.budget for site in each.sites] == [300, 200]
    assert plans.name_of(each) == "random-2-4-50-25"


def test_places_before_the_decoder_take_their_prefix() -> None:
    plan = plans.build(
        encoder="gtp", encoder_keep=120, encoder_value_heads="summed", projector="topk",
        projector_keep=64, projector_score="cosine", positions="contiguous",
    )  # fmt: skip
    assert plan.encoder == MethodPlan("gtp", {"keep": 120, "value_heads": "summed"})
    assert plan.projector == MethodPlan("topk", {"keep": 64, "score": "cosine"})
    assert (plan.sites, plan.position_rule) == ((), "contiguous")


def test_methods_that_judge_by_the_pseudo_cls_bring_their_own() -> None:
    judged = plans.build("topk", [3], num_keep=9, visual_cls="penultimate")
    assert judged.pseudo_cls == PseudoCls("none", cls="penultimate")
    assert judged.sites[0].params == {"num_keep": 9}
    assert plans.build("topk", [3], row="last").pseudo_cls is None


def test_a_recipe_is_fitted_to_a_size() -> None:
    plan = plans.build("ivtp", size=LLAVA, num_keep=32, text="all", group_layers=4)
    assert (plan.layers, plan.pseudo_cls) == ([4, 8, 12], PseudoCls("all"))
    assert plans.name_of(plan) == "ivtp-32"


def test_a_method_without_sites_gets_those_of_its_paper_in_proportion() -> None:
    ratios = [0.5, 0.25, 0.125]
    for depth, sites in ((32, [8, 16, 24]), (40, [10, 20, 30]), (4, [1, 2, 3])):
        plan = plans.build("pyramiddrop", size=plans.Size(576, depth))
        assert plan.layers == sites
        assert [site.params["keep_ratio"] for site in plan.sites] == ratios
    sparse = plans.build("sparsevlm", size=LLAVA)
    assert sparse.layers == [3, 7, 16]
    assert [left.count for left in left_by_sites(sparse.sites, 576)] == [300, 200, 118]
    assert plans.build("sparsevlm", size=plans.Size(576, 4)).layers == [1, 2, 3]
    own = plans.build("pyramiddrop", [4, 9, 12])  # as many sites, and no ratios of one's own
    assert [site.params["keep_ratio"] for site in own.sites] == ratios
    given = plans.build("pyramiddrop", size=LLAVA, keep_ratio=0.3)
    assert [site.params["keep_ratio"] for site in given.sites] == [0.3] * 3
    assert plans.build("pyramiddrop", [4]).sites[0].params == {}
    assert plans.needs_size("pyramiddrop", None) and not plans.needs_size("pyramiddrop", [4])
    with pytest.raises(PatchsieveError, match="do not fit this decoder.*3 layers"):
        plans.build("pyramiddrop", size=plans.Size(576, 3))


def test_the_same_plan_keeps_its_name_and_another_gets_one() -> None:
    half, mean = plans.build("fastv", [2]), plans.build("fastv", [2], rows="mean")
    stored = {"fastv-2": half.with_positions("original")}
    assert plans.free_name(half, stored) == "fastv-2"
    assert plans.free_name(mean, stored) == "fastv-2-v2"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "fastv", "sites": [2], "keep": 3}, "no method has such options.*keep_ratio"),
        ({"method": "fastvv", "sites": [2]}, "unknown method in the decoder"),
        ({"method": "fastv"}, "needs --sites"),
        ({"method": "pyramiddrop"}, "needs --sites"),
        ({"method": "fastv", "sites": [2], "num_keep": 3}, "remove them, or take --method ivtp"),
        ({"method": "fastv", "sites": [2, 3], "keep_ratio": [0.5] * 3}, "one value, or one per"),
        ({"method": "atp", "heads": Path("absent")}, "cannot read the heads"),
        ({"sites": [2]}, "but no method"),
        ({"encoder_keep": 64}, "add --encoder gtp"),
        ({"encoder": "topk", "encoder_fusion": "mean"}, "take --encoder gtp"),
        ({"projector": "gtp"}, "unknown method between tower and decoder"),
        ({"method": "ivtp"}, "the model's size"),
        ({"method": "ivtp", "sites": [3], "size": LLAVA}, "ivtp chooses its sites"),
        ({"method": "ivtp", "num_keep": 0, "size": LLAVA}, "num_keep"),
        ({"positions": "contiguous"}, "has no effect"),
    ],
)
def test_what_makes_no_plan_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PatchsieveError, match=message) as refused:
        plans.build(**options)
    assert "what to do" in str(refused.value)
