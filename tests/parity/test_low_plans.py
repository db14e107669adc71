"""Every kind of plan on one bundle in `mixed`: tied embeddings, a scorer, plans given later."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPModel

from patchsieve.contract import files as bundle_files
from patchsieve.contract import names
from patchsieve.contract.manifest import Limits
from patchsieve.contract.plan import MethodPlan, Plan, PseudoCls, SitePlan
from patchsieve.export.exporter import ExportOptions, export
from patchsieve.export.reuse import reuse
from patchsieve.pruning.recipes import Size, ivtp
from patchsieve.runtime.model import Model
from patchsieve.verify.verification import Verification
from tests.support.models import make_checkpoint, tiny_llava
from tests.support.once import once
from tests.support.test_only_methods import known
from tests.support.tiny_bundles import pictures
from tests.support.tiny_clip import save_clip, text_features

pytestmark = pytest.mark.slow

QUESTION = "What is on the table, and is there a cat or a dog next to the cup?"
TIED = {"tie_word_embeddings": True, "intermediate_size": 192}
PLANS = {
    "ivtp": ivtp(Size(36, 4), 6, pseudo_cls=PseudoCls(tau=-0.15)),
    "fastv": Plan((SitePlan(2, "fastv", {"keep_ratio": 0.5}),)),
    "atp": Plan((SitePlan(1, "atp", {"theta_r": 0.6, "theta_s": 0.97}),)),
    "tome": Plan((SitePlan(2, "tome", {"num_keep": 20}),)),
    "tower": Plan(
        encoder=MethodPlan("topk", {"layers": [0, 2], "counts": [22, 9], "score": "cosine"})
    ),
    "ahead": Plan((SitePlan(2, "ahead", {"num_keep": 9}), SitePlan(3, "ahead", {"num_keep": 4}))),
}


@pytest.fixture(scope="module", autouse=True)
def methods() -> Iterator[None]:
    """The test-only methods, among those of the product."""
    with known():
        yield


def make(folder: Path) -> None:
    """One export, and plans given to it afterwards."""
    llava, processor = tiny_llava("llama", layers=4, vision_layers=4, image_size=48, text=TIED)
    make_checkpoint.save_llava(folder / "checkpoint", llava, processor)
    save_clip(folder / "clip", llava)
    options = ExportOptions(
        plan=PLANS["ivtp"],
        plan_name="ivtp",
        limits=Limits(400, 80, 2),
        scorer=str(folder / "clip"),
        cuts=(1, 2, 3),
        precision="mixed",
    )
    export(str(folder / "checkpoint"), folder / "bundle", options)
    for name in list(PLANS)[1:]:
        reuse(folder / "bundle", PLANS[name], name)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    logging.getLogger("torch.__trace").propagate = False  # pytest would keep its every step
    return once(tmp_path_factory, "low-plans", make)


@pytest.fixture(scope="module")
def both(made: Path) -> Iterator[Verification]:
    opened = Verification(made / "bundle", str(made / "checkpoint"), threads=1)
    yield opened
    opened.close()


@pytest.mark.parametrize("plan", ["none", *PLANS])
def test_each_part_agrees_by_the_same_rows(both: Verification, plan: str) -> None:
    parts = list(both.compare(pictures(2), QUESTION, plan, count=6))
    assert not [part for part in parts if part.departs]
    named = {part.name: part for part in parts}
    for name, part in named.items():
        if name.startswith("survivors"):
            assert part.in_common is not None and part.in_common >= 0.5, part
    sites = both.facts.plans[plan].sites
    assert sum(name.startswith("survivors at") for name in named) == 2 * len(sites)
    for layer in range(4):
        assert named[f"layer {layer} hidden rows"].tolerance == 0.1
        assert 0.01 < (named[f"single rows, layer {layer} hidden rows"].own_error or 0) < 0.4
    assert "next tokens agree" in named["greedy tokens"].note


def test_a_head_of_its_own_is_stored_beside_the_table(made: Path) -> None:
    """The table of tied embeddings stays float for what it gives; the head is rounded."""
    facts = bundle_files.read(made / "bundle")
    head = {entry.part: entry.format for entry in facts.weights.values()}
    assert (head["embeddings"], head["head"], head["scorer"]) == ("float", "int8-weights", "int8")


def test_a_rounded_scorer_finds_the_same_words(made: Path) -> None:
    clip = CLIPModel.from_pretrained(made / "clip").eval()
    model = Model(made / "bundle", threads=1, check="size")
    scorer = model.facts.scorer
    assert scorer is not None
    ids = torch.randint(0, 300, (2, scorer.window), generator=torch.manual_seed(0))
    found = model.backend.run(names.SCORER, {names.TEXT_IDS: ids.numpy()})[names.TEXT_FEATURES]
    ours, theirs = model.backend.to_numpy(found), text_features(clip, ids).numpy()
    model.close()
    error = np.linalg.norm(ours - theirs, axis=-1) / np.linalg.norm(theirs, axis=-1)
    assert 1e-4 < error.mean() < 0.05


@pytest.mark.parametrize("plan", PLANS)
def test_several_turns_are_answered(made: Path, plan: str) -> None:
    model = Model(made / "bundle", threads=1, check="size")
    chat, (one, other) = model.chat(plan=plan), pictures(2)
    turns = [
        chat.ask(QUESTION, [one], max_new_tokens=4, ignore_eos=True),
        chat.ask("And?", max_new_tokens=3, ignore_eos=True),
        chat.ask("What is this?", [other], max_new_tokens=3, ignore_eos=True),
    ]
    again = model.generate([one], QUESTION, plan=plan, max_new_tokens=4, ignore_eos=True)
    model.close()
    assert [len(turn.token_ids) for turn in turns] == [4, 3, 3]
    assert again.token_ids == turns[0].token_ids
    sites = len(PLANS[plan].sites)
    assert [len(turn.sites) for turn in turns] == [sites, sites, 2 * sites]
