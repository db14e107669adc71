"""A method before the decoder whose number of survivors depends on the image, against NumPy."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from patchsieve.contract import names
from patchsieve.contract.errors import BundleError, PatchsieveError
from patchsieve.contract.manifest import Limits
from patchsieve.contract.plan import Plan
from patchsieve.doors.account import Account
from patchsieve.export.exporter import ExportOptions, export
from patchsieve.export.reuse import reuse
from patchsieve.runtime.inputs.prompt import expand
from patchsieve.runtime.model import Model
from patchsieve.show.collect import collect
from patchsieve.verify.verification import Verification
from tests.export.test_tower_graphs import (
    FEATURES,
    ReducedLlava,
    positions_of,
    run_session,
    tower_session,
)
from tests.support import adaptive
from tests.support.bundles import PROMPT, command_json
from tests.support.damage import edit_manifest
from tests.support.models import save_checkpoint
from tests.support.tiny_bundles import largest_error, pictures, recorded_logits
from tests.support.tolerances import LOGITS_FLOAT32
from tests.support.tower_bundles import ATP, SHAPE, Towers, method, reference_image


def inside(layer: int, count: int, **options: Any) -> dict[str, Any]:
    return {"encoder": method("above", [layer], [count], **options)}


def after(count: int, **options: Any) -> dict[str, Any]:
    return {"projector": {"method": "above", "params": {"keep": count} | options}}


GRAPHS = {
    "inside": inside(1, 36),
    "inside, capped": inside(0, 9),
    "after": after(36),
    "after, capped": after(10),
    "after, fused": after(30, fuse=True),
    "after, fused and capped": after(6, fuse=True),
    "inside, one row": inside(2, 4, factor=30.0),
    "prumerge": {"projector": {"method": "prumerge", "params": {"keep": 36}}},
    "prumerge-plus, capped": {"projector": {"method": "prumerge-plus", "params": {"keep": 12}}},
    "after topk": {"encoder": method("topk", [1], [20])} | after(20),
}
# What the bundle holds. The bound of "capped" is less than what some pictures want.
PLANS = {
    "inside": inside(1, 30) | {"sites": [ATP], "position_rule": "contiguous"},
    "fused": after(30, fuse=True),
    "capped": after(12) | {"position_rule": "contiguous"},
}


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    with adaptive.known():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Towers:
    """A tiny checkpoint, and its bundle with three plans whose count adapts before the decoder."""
    folder = tmp_path_factory.mktemp("adaptive")
    checkpoint = save_checkpoint(folder / "checkpoint", **SHAPE)
    plans = {name: Plan.from_dict(plan) for name, plan in PLANS.items()}
    options = ExportOptions(
        plan=plans["inside"],
        plan_name="inside",
        targets=("cpu", "tensorrt-rtx"),
        limits=Limits(200, 32, 3),
    )
    with adaptive.known():
        export(str(checkpoint), folder / "bundle", options)
        for name in ("fused", "capped"):
            reuse(folder / "bundle", plans[name], name)
    return Towers(checkpoint, folder / "bundle")


@pytest.mark.parametrize("plan", GRAPHS)
def test_a_graph_gives_the_tokens_of_each_image_and_padding_up_to_the_bound(
    made: Towers, plan: str
) -> None:
    pixels = made.model.preprocess(pictures(4))
    found = run_session(tower_session(made.checkpoint, GRAPHS[plan], torch.float32), pixels)
    bound = found[names.IMAGE_FEATURES].shape[1]
    counts = np.minimum(found[names.NUM_WANTED], bound)
    for image in range(4):
        features, ids, sources = reference_image(made.hugging_face, pixels[image], GRAPHS[plan])
        assert counts[image] == len(features)
        ours = found[names.IMAGE_FEATURES][image]
        assert np.isfinite(ours).all()
        error = np.abs(ours[: len(features)] - features).max() / np.abs(features).max()
        assert error < FEATURES
        np.testing.assert_array_equal(found[names.IMAGE_IDS][image][: len(ids)], ids)
        np.testing.assert_array_equal(found[names.IMAGE_IDS][image][len(ids) :], -1)
        np.testing.assert_array_equal(found[names.IMAGE_SOURCES][image], sources)
    is_capped = (found[names.NUM_WANTED] > bound).any()
    assert is_capped == ("capped" in plan)
    assert is_capped or len(set(counts.tolist())) > 1 or plan.endswith("one row")


@pytest.mark.parametrize("plan", ["fused", "capped"])
def test_the_decoder_gets_the_rows_and_positions_of_each_image(made: Towers, plan: str) -> None:
    model, llava, shown = made.model, made.hugging_face, pictures(3)
    logits = recorded_logits(model)
    result = model.generate(shown, PROMPT, plan=plan, max_new_tokens=3, ignore_eos=True)
    del model.pipeline.prefill, model.pipeline.decode  # the recorder's
    seen = [reference_image(llava, pixels, PLANS[plan]) for pixels in model.preprocess(shown)]
    ids = [each[1] for each in seen]
    counts = [len(each) for each in ids]
    assert [image.ids for image in result.images] == ids
    assert [image.sources for image in result.images] == [each[2].tolist() for each in seen]
    assert result.visual_tokens == sum(counts)
    assert set(counts) == {12} if plan == "capped" else len(set(counts)) > 1
    prompts, image_token = model.bundle.prompts, model.facts.tokens.image_token_id
    prompt = prompts.build([prompts.user_message(PROMPT, 3)], 3)
    rule = PLANS[plan].get("position_rule", "original")
    token_ids = expand(prompt, counts).token_ids
    assert (token_ids == image_token).sum() == sum(counts)
    positions, following = positions_of(prompt.token_ids.tolist(), image_token, ids, rule)
    with torch.no_grad():
        tokens = torch.from_numpy(token_ids)
        is_visual = tokens == image_token
        rows = llava.get_input_embeddings()(torch.where(is_visual, 0, tokens))
        rows[is_visual] = torch.from_numpy(np.concatenate([each[0] for each in seen]))
        said = torch.tensor(result.token_ids[:-1])
        rows = torch.cat((rows, llava.get_input_embeddings()(said)))
        positions += range(following, following + len(said))
        hidden = llava.model.language_model(
            inputs_embeds=rows[None],
            position_ids=torch.tensor([positions]),
            attention_mask=torch.ones(1, len(rows)),
            use_cache=False,
        ).last_hidden_state
        expected = llava.lm_head(hidden[0, -3:]).numpy()
    assert np.abs(np.stack(logits) - expected).max() < LOGITS_FLOAT32


class Adapted(ReducedLlava):
    """The masked reference, on an image of as many tokens as NumPy leaves of it."""

    def __init__(self, made: Towers, picture: Any) -> None:
        super().__init__(made, "gtp")
        self.plan = PLANS["inside"]
        (pixels,) = made.model.preprocess([picture])
        self.num_visual = len(reference_image(made.hugging_face, pixels, self.plan)[1])


@pytest.mark.parametrize("number", [0, 1, 2])
def test_an_answer_pruned_in_tower_and_decoder_is_that_of_the_masked_reference(
    made: Towers, number: int
) -> None:
    picture = pictures(3)[number]
    reference = Adapted(made, picture)
    expected = reference.ask(PROMPT, [picture], PLANS["inside"]["sites"], max_new_tokens=24)
    logits = recorded_logits(made.model)
    result = made.model.generate([picture], PROMPT, plan="inside", max_new_tokens=24)
    del made.model.pipeline.prefill, made.model.pipeline.decode  # the recorder's
    assert result.token_ids == expected.token_ids
    assert largest_error(logits, expected.logits) < LOGITS_FLOAT32
    (site,) = result.sites
    assert site.num_visual_before == reference.num_visual == result.visual_tokens
    assert sorted(site.kept) == sorted(expected.choices[0].kept)


def test_a_conversation_goes_on_and_chooses_again(made: Towers) -> None:
    first, second = pictures(2)
    chat = made.model.chat(plan="inside")
    one = chat.ask(PROMPT, first, max_new_tokens=3)
    two = chat.ask("And this?", second, max_new_tokens=3)
    assert [len(image.ids) for image in two.images] == [one.visual_tokens, two.visual_tokens]
    assert chat.cache.stages[0].length < chat.cache.stages[0].slots
    again = chat.ask("Which?", max_new_tokens=3, repick=True)
    assert again.visual_tokens == one.visual_tokens + two.visual_tokens
    chat.close()


def test_a_bound_reserves_and_a_result_says_what_it_cut(made: Towers) -> None:
    facts = made.model.facts
    assert facts.num_visual("capped") == 12 and facts.budgets("capped") == [12, 12]
    assert facts.has_fixed_count("none") and not facts.has_fixed_count("capped")
    assert facts.slots("capped") == [200 + 32 + 3 * 12] * 2
    result = made.model.generate(pictures(3), PROMPT, plan="capped", max_new_tokens=2)
    told = result.to_dict()["images"]
    assert any(image["capped"] for image in told)
    for image in told:
        assert image["num_visual"] == min(image["num_wanted"], 12)
        note = f"capped image {image['image']}: {image['num_wanted']} tokens wanted, 12 kept"
        assert any(note in each for each in result.notes) == image["capped"]


def test_every_report_takes_the_count_of_each_image(made: Towers) -> None:
    shown = collect(
        made.model, pictures(2), [PROMPT], plan="inside", max_new_tokens=2, timed_runs=0
    )
    result = made.model.generate(pictures(2), PROMPT, plan="inside", max_new_tokens=2)
    for image, view in zip(result.images, shown.asked[0].views, strict=True):
        early, site = view.places
        assert early.num_after == site.num_before == len(image.ids) == len(early.kept)
    account = Account()
    account.add(made.model.facts, result)
    assert account.visual_tokens_full == 2 * 36
    left = sum(len(site.kept) for site in result.sites)  # in the second of two layers
    assert account.visual_tokens == (result.visual_tokens + left) / 2
    code, facts = command_json("inspect", made.bundle, "--text-tokens", "40")
    assert code == 0
    assert {name: plan["is_upper_bound"] for name, plan in facts["plans"].items()} == {
        "none": False,
        "inside": True,
        "fused": True,
        "capped": True,
    }


@pytest.mark.parametrize("plan", PLANS)
def test_verify_passes_what_adapts(made: Towers, plan: str) -> None:
    verification = Verification(made.bundle, str(made.checkpoint), threads=1)
    parts = list(verification.compare(pictures(3), PROMPT, plan, count=4))
    verification.close()
    assert not [part for part in parts if part.departs]
    assert "survivors of the tower" in {part.name for part in parts}


@pytest.mark.parametrize(
    ("plan", "match"),
    [
        (inside(1, 20) | {"projector": {"method": "topk", "params": {"keep": 9}}}, "cannot prune"),
        ({"encoder": method("above", [1, 2], [20, 9])}, "at several layers"),
        ({"encoder": method("topk", [1], [9])} | after(10), "would remove no tokens"),
    ],
)
def test_what_would_prune_padding_is_refused_by_export_and_by_cost(
    made: Towers, tmp_path: Path, plan: dict[str, Any], match: str
) -> None:
    with pytest.raises(PatchsieveError, match=match):
        reuse(made.bundle, Plan.from_dict(plan), "wrong")


def test_a_count_of_another_shape_is_refused(made: Towers, tmp_path: Path) -> None:
    bundle = shutil.copytree(made.bundle, tmp_path / "bundle")

    def damage(data: dict[str, Any]) -> None:
        outputs = data["graphs"]["vision.inside"]["outputs"]
        next(each for each in outputs if each["name"] == names.NUM_WANTED)["shape"] = [2, 3]

    edit_manifest(bundle, damage)
    with pytest.raises(BundleError, match="num_wanted of vision.inside does not fit"):
        Model(bundle)


@pytest.mark.tensorrt
def test_such_a_graph_builds_in_tensorrt_rtx(made: Towers, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    from patchsieve.runtime.building.compile import build_engine
    from patchsieve.runtime.building.profiles import profiles

    for plan in ("inside", "fused"):
        graph = names.vision(plan)
        path = made.bundle / made.model.facts.targets["tensorrt-rtx"][graph]
        needs = profiles(made.model.facts, graph, "tensorrt-rtx")
        report = build_engine(path, tmp_path / plan, needs, target="tensorrt-rtx")
        assert report.engine_bytes and not report.warnings
