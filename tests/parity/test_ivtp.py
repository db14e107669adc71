"""IVTP as a bundle answers as Hugging Face does when what it drops is masked (masked_ivtp.py)."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.gpu.fake_tensorrt import build_fakes
from patchsieve.contract import names
from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.manifest import Limits
from patchsieve.contract.plan import MethodPlan, Plan, PseudoCls, SitePlan
from patchsieve.export.exporter import ExportOptions, export
from patchsieve.export.reuse import check_queries, reuse
from patchsieve.pruning.recipes import Size, ivtp
from patchsieve.runtime.model import Model
from patchsieve.runtime.ort.backend import OrtBackend
from patchsieve.runtime.rows import Rows
from patchsieve.verify.verification import Verification
from tests.parity.test_pruned import compare
from tests.references.masked_ivtp import MaskedIvtp
from tests.references.masked_llava import answer_message, user_message
from tests.support.models import make_checkpoint, tiny_llava
from tests.support.tiny_bundles import largest_error, pictures, recorded_logits
from tests.support.tiny_clip import save_clip
from tests.support.tolerances import LOGITS_FLOAT32

pytestmark = pytest.mark.slow

pytest_plugins = ["tests.support.gpu"]

COUNT = 64
QUESTION = "What is on the table, and is there a cat or a dog next to the cup?"
TAU = -0.15  # random towers agree on nothing: some words of each image lie above it
SIZE = Size(num_patches=36, num_layers=7)
PLANS = {
    "ivtp": ivtp(SIZE, 6, pseudo_cls=PseudoCls(tau=TAU)),
    "ablation": ivtp(
        SIZE,
        7,
        fusion="max",
        block="prefix",
        pseudo_cls=PseudoCls(tau=TAU, cls="penultimate"),
    ),
    # TopK+ of table 7: IVTP's two stages, each judged by one layer's attention of the visual CLS.
    "topk": Plan(
        tuple(SitePlan(layer, "topk", {"num_keep": n}) for layer, n in ((3, 9), (6, 6))),
        encoder=MethodPlan("topk", {"keep": 12, "group_layers": 3, "curve": "geometric"}),
        pseudo_cls=PseudoCls("none"),
    ),
}


class Bundle:
    """One checkpoint, its CLIP, and a bundle of the plans above."""

    def __init__(self, folder: Path) -> None:
        llava, processor = tiny_llava("llama", layers=7, vision_layers=5, image_size=48)
        make_checkpoint.save_llava(folder / "checkpoint", llava, processor)
        save_clip(folder / "clip", llava)
        self.checkpoint, self.path = folder / "checkpoint", folder / "bundle"
        options = ExportOptions(
            plan=PLANS["ivtp"],
            plan_name="ivtp",
            limits=Limits(400, 80, 3),
            targets=("cpu", "tensorrt-rtx", "jetpack6", "cuda"),
            scorer=str(folder / "clip"),
            cuts=(2,),  # within a group: queries of several stages are read
        )
        export(str(folder / "checkpoint"), self.path, options)
        for plan in ("ablation", "topk"):
            reuse(self.path, PLANS[plan], plan)
        keeping = SitePlan(3, "ivtp", {"num_keep": 99})
        reuse(self.path, Plan((keeping,), pseudo_cls=PseudoCls("all")), "keep-all")
        self.hugging_face = MaskedIvtp(folder / "checkpoint", folder / "clip")

    def model(self, plan: str = "ivtp", judge: PseudoCls | None = None) -> Model:
        """The bundle, loaded; another pseudo-CLS needs no other graph."""
        model = Model(self.path, threads=1, check="size")
        model.facts = replace(model.facts, default_plan=plan)
        if judge is not None:
            model.facts.plans[plan] = replace(model.facts.plans[plan], pseudo_cls=judge)
        return model

    def reference(self, plan: str, judge: PseudoCls | None = None) -> MaskedIvtp:
        reference = self.hugging_face
        reference.start()
        given = PLANS[plan] if judge is None else replace(PLANS[plan], pseudo_cls=judge)
        reference.plan = given.to_dict()
        return reference


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    logging.getLogger("torch.__trace").propagate = False  # pytest would keep its every step
    return Bundle(tmp_path_factory.mktemp("ivtp"))


def words(result: Any) -> list[list[str]]:
    """The words that judged each image."""
    return [
        [text.strip() for text, chosen in zip(w.tokens, w.selected, strict=True) if chosen]
        for w in result.words
    ]


CASES = {
    "one-image": ("ivtp", 1, None),
    "three-images": ("ivtp", 3, None),
    "ablation": ("ablation", 2, None),
    "topk": ("topk", 3, None),
    "similarity": ("ivtp", 1, PseudoCls("similarity", tau=0.05)),
    "all-words": ("ivtp", 1, PseudoCls("all")),
    "no-words": ("ivtp", 2, PseudoCls("none")),
    "no-word-passes": ("ivtp", 1, PseudoCls(tau=0.99)),
}


@pytest.mark.parametrize("case", CASES)
def test_dropping_equals_masking(bundle: Bundle, case: str) -> None:
    plan, num_images, judge = CASES[case]
    images, reference = pictures(num_images), bundle.reference(plan, judge)
    expected = reference.ask(QUESTION, images, reference.plan["sites"], max_new_tokens=COUNT)
    model = bundle.model(plan, judge)
    logits = recorded_logits(model)
    result = model.generate(images, QUESTION, max_new_tokens=COUNT)
    alive = [np.flatnonzero(patches).tolist() for patches in reference.alive_patches]
    assert [sorted(image.ids) for image in result.images] == alive
    assert words(result) == reference.chosen
    if (judge or PLANS[plan].pseudo_cls).text in ("clip", "similarity"):
        assert all(np.ptp(one.relevance) > 0.01 for one in result.words)
    compare(expected, result, expected.choices, reference.num_visual)
    if result.token_ids == expected.token_ids:
        assert largest_error(logits, expected.logits) < LOGITS_FLOAT32


def test_later_turns_continue_and_new_images_are_judged_by_their_own_question(bundle) -> None:
    reference, images = bundle.reference("ivtp"), pictures(2)
    chat = bundle.model().chat()
    turns = [(QUESTION, images[:1]), ("And in this one?", images[1:]), ("Explain why.", [])]
    messages: list[dict[str, Any]] = []
    choices: list[Any] = []
    for question, shown in turns:
        messages.append(user_message(question, len(shown)))
        sites = reference.plan["sites"]
        expected = reference.ask(question, shown, sites, messages=messages, max_new_tokens=COUNT)
        choices += expected.choices
        result = chat.ask(question, shown, max_new_tokens=COUNT)
        compare(expected, result, choices, reference.num_visual)
        messages.append(answer_message())
    assert [stage.length for stage in chat.cache.stages] == [
        int(reference.seen[stage.stage.first].sum()) for stage in chat.cache.stages
    ]
    chat.close()


@pytest.mark.parametrize("num_images", (1, 3))
@pytest.mark.parametrize("target", ("cuda", "jetpack6", "jetpack6 on a GPU", "tensorrt-rtx"))
def test_side_rows_on_other_targets_give_the_tokens_of_the_cpu(
    bundle: Bundle, machine, target: str, num_images: int
) -> None:
    """Graphs with caches of rows in ONNX Runtime; engines on a GPU of byte arrays."""
    images, options = pictures(num_images), {"max_new_tokens": COUNT, "ignore_eos": True}
    expected = bundle.model().generate(images, QUESTION, **options)
    target, _, on_a_gpu = target.partition(" ")
    backend: Any = lambda opened: OrtBackend(opened, threads=1, device="cpu")  # noqa: E731 - short
    if on_a_gpu or target == "tensorrt-rtx":
        gpu = machine(is_rtx=target == "tensorrt-rtx")
        build_fakes(bundle.path, target, gpu.trt)
        backend = gpu.backend
    model = Model(bundle.path, target=target, check="size", backend=backend)
    for _ in range(2):  # the second finds caches that side rows lay in
        result = model.generate(images, QUESTION, plan="ivtp", **options)
        assert result.token_ids == expected.token_ids
        assert result.sites == expected.sites
        assert words(result) == words(expected)
    assert len(result.token_ids) == COUNT and len(result.sites) == 2 * num_images
    model.close()


@pytest.mark.parametrize("plan", ["ivtp", "ablation", "topk"])
def test_verify_follows_pseudo_cls_rows_through_the_decoder(bundle: Bundle, plan: str) -> None:
    verification = Verification(bundle.path, str(bundle.checkpoint), threads=1)
    parts = list(verification.compare(pictures(2), QUESTION, plan, count=8))
    verification.close()
    assert not [part for part in parts if part.departs]
    notes = {part.name: part.note for part in parts}
    order = ["survivors of the tower", "embeddings", "pseudo-CLS", "layer 0 keys"]
    order += ["layer 2 hidden rows", "survivors at layer 3 of image 1", "layer 3 keys"]
    order += ["survivors at layer 6 of image 0", "layer 6 hidden rows", "logits", "greedy tokens"]
    places = [list(notes).index(name) for name in order]
    assert places == sorted(places)
    kept = PLANS[plan].sites[1].params["num_keep"]
    assert notes["survivors at layer 6 of image 0"] == f"{kept} in common of {kept} and {kept}"
    chosen = "0 and 0 of" if plan == "topk" else "which the bundle's scorer chose"
    assert chosen in notes["pseudo-CLS"]


def test_verify_names_the_layer_where_a_pseudo_cls_sees_too_much(bundle, monkeypatch) -> None:
    monkeypatch.setattr(Rows, "last_seen", lambda rows: np.arange(len(rows)))
    verification = Verification(bundle.path, str(bundle.checkpoint), threads=1)
    parts = verification.compare(pictures(1), QUESTION, "ivtp", count=2)
    first = next(part for part in parts if part.departs)
    verification.close()
    assert first.name == "layer 0 hidden rows"


def test_pseudo_cls_rows_are_seen_by_nobody_and_leave_no_trace(bundle: Bundle) -> None:
    plain, pruned = bundle.model("none"), bundle.model("keep-all")
    seen = [recorded_logits(model) for model in (plain, pruned)]
    images = pictures(2)
    results = [m.generate(images, QUESTION, max_new_tokens=COUNT) for m in (plain, pruned)]
    assert results[0].token_ids == results[1].token_ids
    assert largest_error(*seen) < LOGITS_FLOAT32
    used = [[s["slots_used"] for s in r.kv_bytes["per_stage"]] for r in results]
    assert used[0] == used[1]  # their slots were written over
    assert [len(site.kept) for site in results[1].sites] == [36] * 2


def test_a_pseudo_cls_sees_its_own_image_and_itself(bundle: Bundle) -> None:
    """Inputs of stage 0, and what changes when they do."""
    model, image = bundle.model(), pictures(2)
    right = scores(model, image)
    run = model.backend.run_stage
    fed: dict[str, Any] = {}

    def keep(stage: int, inputs: Any, cache: Any) -> Any:
        if stage == 0 and not fed:
            fed.update(inputs)
        return run(stage, inputs, cache)

    model.backend.run_stage = keep  # type: ignore[method-assign]
    assert scores(model, image) == right
    seen, positions = fed[names.LAST_KEY], fed[names.POSITION_IDS]
    count = len(seen) - 2
    assert seen[:count].tolist() == list(range(count))
    last = seen[count:]
    gaps = np.flatnonzero(np.diff(positions[:count]) > 1)
    assert last[0] < last[1] < count - 1 and len(gaps)
    assert (positions[count:] == positions[last + 1]).all()  # the text's ids are not shifted


def scores(model: Model, images: list[Any]) -> list[list[int]]:
    """Survivors of every decision."""
    return [s.kept for s in model.generate(images, QUESTION, max_new_tokens=1).sites]


def judged(model: Model, images: list[Any]) -> np.ndarray:
    """Scores of the first decision, of all tokens of all images."""
    first, *_ = model.facts.plans[model.facts.default_plan].layers
    result = model.generate(images, QUESTION, max_new_tokens=1, scores=True)
    told = [site.scores for site in result.sites if site.layer == first]
    return np.array([score for scores in told for _, score in scores or ()])


@pytest.mark.parametrize("mistake", ["sees-the-question", "other-position", "other-words", "blind"])
def test_a_mistake_in_a_pseudo_cls_changes_the_scores(bundle, monkeypatch, mistake: str) -> None:
    right, images = judged(bundle.model(), pictures(3)), pictures(3)
    seen, side = Rows.last_seen, Rows.with_side_rows
    broken = bundle.model(judge=PseudoCls("all") if mistake == "other-words" else None)
    if mistake == "sees-the-question":
        monkeypatch.setattr(Rows, "last_seen", lambda rows: np.arange(len(rows)))
    elif mistake == "blind":
        monkeypatch.setattr(
            Rows, "last_seen", lambda rows: np.where(rows.side_of >= 0, 0, seen(rows))
        )
    elif mistake == "other-position":
        monkeypatch.setattr(
            Rows,
            "with_side_rows",
            lambda rows: replace(
                side(rows), position_ids=side(rows).position_ids + 9 * (side(rows).side_of >= 0)
            ),
        )
    wrong = judged(broken, images)
    assert wrong.shape == right.shape
    assert np.abs(wrong - right).max() > 1e-3 * right.max()


@pytest.mark.tensorrt
def test_the_graphs_of_ivtp_build_in_tensorrt_rtx(bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    from patchsieve.runtime.building.compile import build_engine
    from patchsieve.runtime.building.profiles import profiles
    from tests.support.networks import parse_network

    facts = bundle.model().facts
    graphs = {
        "scorer": {names.TEXT_FEATURES},
        "vision.ivtp": {names.IMAGE_FEATURES, names.CLS_JOINT, names.CLS_FEATURES},
        "stage_0": {names.query(0), names.query(1)},
        "stage_1": {names.query(2)},
        "decide.ivtp.3": {names.KEEP_OUT, names.SCORES},
    }
    for graph, outputs in graphs.items():
        path = bundle.path / facts.targets["tensorrt-rtx"][graph]
        network = parse_network(path)
        assert outputs <= {tensor.name for tensor in network.outputs}, graph
        if graph.startswith("decide"):
            read = {names.SIDE_ROW, names.VALUE, names.query(0), names.key(0), names.key(1)}
            assert read <= {tensor.name for tensor in network.inputs}
        report = build_engine(
            path, tmp_path / graph, profiles(facts, graph, "tensorrt-rtx"), target="tensorrt-rtx"
        )
        assert report.engine_bytes and not report.warnings, graph


def test_stages_reserve_a_slot_for_each_side_row_up_to_the_last_site(bundle: Bundle) -> None:
    facts = bundle.model().facts
    rows = [facts.limits.slots(budget) for budget in facts.budgets("ivtp")]
    assert [a - b for a, b in zip(facts.slots("ivtp"), rows, strict=True)] == [3, 3, 3, 0]
    assert [stage.slots for stage in facts.stages] == facts.slots("ivtp")
    assert facts.slots("none") == [facts.limits.slots(36)] * 4


def test_a_prompt_that_asks_nothing_is_judged_by_the_visual_cls(bundle: Bundle) -> None:
    result = bundle.model().generate(pictures(1), "", max_new_tokens=4)
    assert [one.tokens for one in result.words] == [()]
    assert result.to_dict()["words"] == [{"image": 0, "is_visual_cls": True, "tokens": []}]
    assert len(result.sites) == 2


def test_a_group_over_stages_of_other_lengths_is_refused_with_the_group_that_fits(bundle) -> None:
    plan = Plan((SitePlan(3, "ivtp", {"group": 3}),), pseudo_cls=PseudoCls("all"))
    facts = bundle.model().facts
    short = replace(facts.stages[1], slots=facts.stages[1].slots - 9)
    other = replace(facts, stages=(facts.stages[0], short, *facts.stages[2:]))
    with pytest.raises(PatchsieveError) as error:
        check_queries(other, plan)
    line = str(error.value)
    assert f"found: {short.slots + 9} in layers 0 to 1, {short.slots} in layers 2 to 2" in line
    assert "which tensorrt-rtx fixes" in line and line.endswith("a group of at most 1")
    check_queries(replace(other, targets={"cpu": {}}), plan)
    check_queries(other, Plan((SitePlan(3, "ivtp", {"group": 1}),), pseudo_cls=PseudoCls("all")))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan((SitePlan(6, "ivtp", {"group": 7}),), pseudo_cls=PseudoCls()), "only 6 exist"),
        (Plan((SitePlan(3, "ivtp", {}),)), "pseudo_cls do not belong"),
        (Plan((SitePlan(3, "fastv", {}),), pseudo_cls=PseudoCls()), "pseudo_cls do not belong"),
        (
            Plan((SitePlan(2, "fastv", {}), SitePlan(3, "ivtp", {})), pseudo_cls=PseudoCls("all")),
            "reaches over another site",
        ),
    ],
)
def test_plans_that_do_not_fit_are_refused(bundle: Bundle, plan: Plan, message: str) -> None:
    before = (bundle.path / "manifest.json").read_bytes()
    with pytest.raises(PatchsieveError, match=message) as error:
        reuse(bundle.path, plan, "wrong")
    assert "\n" not in str(error.value)
    assert (bundle.path / "manifest.json").read_bytes() == before
