"""The tables of benchmarks/accuracy: marks, plans, what is asked again, what is printed."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from benchmarks.accuracy import asking
from benchmarks.accuracy.__main__ import earlier, only, without_training
from benchmarks.accuracy.asking import Task
from benchmarks.accuracy.figures import draw_curves, draw_kinds
from benchmarks.accuracy.marks import Marks, verdict
from benchmarks.accuracy.places import Costs, acts_in
from benchmarks.accuracy.plans import Budgets, Heads, Row
from benchmarks.accuracy.report import to_dict, to_text, with_earlier
from benchmarks.accuracy.tables import IVTP_TWICE, LEARNED, TABLES, TRAINED, Table
from benchmarks.accuracy.workshop import Training, Workshop, _resuming
from patchsieve.calibration.survivors import geometric_counts
from patchsieve.cost import read_shape
from patchsieve.evaluation.metrics import Interval
from patchsieve.pruning.recipes import Size
from patchsieve.runtime.model import Model
from tests.support.bundles import tiny_bundle, tiny_checkpoint  # noqa: F401  (fixtures)
from tests.support.conversations import make_conversations

PAPER, DEMO = Budgets(Size(576, 32)), Budgets(Size(144, 12), 6)


def marks(
    hits: list[float],
    kinds: list[str] | None = None,
    tokens: float = 9.0,
    per_picture: int = 1,
) -> Marks:
    kinds = kinds or ["count"] * len(hits)
    pictures = tuple(str(number // per_picture) for number in range(len(hits)))
    return Marks(tuple(hits), tuple(kinds), (tokens,) * len(hits), 1000.0, pictures)


def test_a_paired_difference_has_the_interval_of_its_standard_error() -> None:
    """1,000 questions: 60 that only one has right, 30 that only the other has."""
    one = [1.0] * 60 + [0.0] * 30 + [1.0] * 910
    other = [0.0] * 60 + [1.0] * 30 + [1.0] * 910
    away = marks(one).minus(marks(other))
    error = math.sqrt((90 / 1000 - 0.03**2) / 1000)
    assert away.mean == pytest.approx(0.03)
    assert away.low == pytest.approx(0.03 - 1.96 * error, abs=0.002)
    assert away.high == pytest.approx(0.03 + 1.96 * error, abs=0.002)
    assert verdict(away) == "beats"
    assert verdict(marks(other).minus(marks(one))) == "loses to"


def test_questions_of_a_picture_are_drawn_together() -> None:
    """Four questions of a picture that fail or succeed as one are worth one question."""
    alone = marks([1.0, 0.0, 1.0, 1.0, 0.0] * 20).accuracy()
    hits = [hit for hit in [1.0, 0.0, 1.0, 1.0, 0.0] * 20 for _ in range(4)]
    together, apart = marks(hits, per_picture=4).accuracy(), marks(hits).accuracy()
    assert (together.low, together.high) == (alone.low, alone.high)
    assert apart.high - apart.low == pytest.approx((alone.high - alone.low) / 2, rel=0.1)
    with pytest.raises(ValueError, match="paired"):
        marks(hits, per_picture=4).minus(marks(hits))


def test_nothing_is_beaten_where_the_interval_holds_zero() -> None:
    assert verdict(Interval(0.01, 0.0, 0.02)) == "no different from"
    assert verdict(marks([1.0, 0.0]).minus(marks([1.0, 0.0]))) == "no different from"
    with pytest.raises(ValueError, match="paired"):
        marks([1.0], ["count"]).minus(marks([1.0], ["ground"]))


def test_fine_and_coarse_questions_are_counted_apart() -> None:
    kinds = ("count", "shape", "ground", "amount")
    told = Marks((1.0, 0.0, 1.0, 1.0), kinds, (8, 6, 2, 4), 1.0, tuple("abab"))
    assert (told.share("fine"), told.share("coarse"), told.share("ground")) == (0.5, 1.0, 1.0)
    assert (told.mean_tokens("fine"), told.mean_tokens("coarse")) == (7, 3)
    assert told.tokens_between("fine", "coarse").mean == 4
    assert told.accuracy("coarse") == Interval(1.0, 1.0, 1.0)


def test_counts_of_fixed_ratios_are_those_of_the_paper() -> None:
    """ATP-LLaVA, table 2."""
    assert PAPER.falling((1,), 144, 1.0) == (130,)
    assert PAPER.falling((4, 14, 24), 144, 1 / 3) == (162, 54, 18)
    assert PAPER.falling((4, 14, 24), 144, 1 / 2) == (136, 68, 34)
    assert PAPER.sites(144) == (4, 14, 24) and PAPER.sites(88) == (1, 13, 25)
    assert DEMO.sites(36) == (2, 5, 9) and DEMO.sites(16) == (1, 5, 9)


def test_rivals_of_table_2_and_parts_of_table_4_are_trained_with_the_budget_of_atp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their counts are the paper's shares at our sites; what trains them says so."""
    monkeypatch.setattr(Workshop, "questions", lambda *_, **__: tmp_path / "questions.jsonl")
    demo = Path(__file__).parents[2] / "examples" / "demo_model"
    shop = Workshop(demo / "checkpoint", demo / "clip", tmp_path, Training())
    rows = {row.label: row for row in TABLES["atp-ratios"](DEMO).rows if row.trains}
    half = rows["fixed, half kept from site to site"]
    assert half.heads is not None and half.heads.options == ("--counts", "43,21,11")
    assert DEMO.average((43, 21, 11), half.heads.sites) == pytest.approx(36, abs=0.1)
    words = shop._learning(half)
    assert words[words.index("--counts") + 1] == "43,21,11" and "--target-tokens" not in words
    third = rows["fixed, a third kept from site to site"]
    counts = geometric_counts(144, (1, 5, 9), 12, 36)
    pairs = zip(counts, DEMO.falling((1, 5, 9), 36, 1 / 3), strict=True)
    assert third.heads == Heads("fixed", (1, 5, 9), 36)
    assert all(abs(count - paper) <= 1 for count, paper in pairs)
    parts = {row.label: row for row in TABLES["atp-parts"](DEMO).rows if row.trains}
    for part in ("redundant", "spatial"):
        words = shop._learning(parts[f"{part} pruning alone, decoder trained"])
        assert words[words.index("--parts") + 1] == part and "--train-lm" in words
    paths = [shop.trained_path(row) for row in (*rows.values(), *parts.values())]
    assert len(set(paths)) == len(paths) - 1  # both decoders of ATP are the same one


def test_ivtp_ends_with_the_number_whose_average_is_nearest() -> None:
    plan = DEMO.ivtp_at(36)
    assert abs(DEMO.ivtp_average(plan) - 36) < 1
    assert plan.layers == [3, 6, 9]
    assert DEMO.ivtp_average(DEMO.ivtp(16)) == pytest.approx((30 + 24 + 20 + 16) / 4)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_well_formed(name: str) -> None:
    table = TABLES[name](DEMO)
    assert not table.rows[0].plan.prunes
    for part in table.parts:
        labels = [row.label for row in part.rows]
        assert len(set(labels)) == len(labels), part.title
        assert set(part.champions) <= set(labels)
    for row in table.rows:
        assert row.heads is None or row.heads.sites == tuple(row.plan.layers)


def test_plans_of_fixed_numbers_keep_the_average_of_their_part() -> None:
    checked = 0
    for part, target in zip(TABLES["main"](DEMO).parts[1:], (36, 16), strict=True):
        for row in part.rows:
            if row.label.startswith("FastV"):
                counts = [round(site.params["keep_ratio"] * 144) for site in row.plan.sites]
                assert DEMO.average(counts, row.plan.layers) == pytest.approx(target, abs=0.5)
                checked += 1
            elif not row.plan.sites:
                place = row.plan.encoder or row.plan.projector
                assert place is not None and place.params["keep"] == target
                checked += 1
    assert checked >= 14


def task(bundle: Path, folder: Path, limit: int, plan: str = "none") -> Task:
    data = folder / "data" / "data.json"
    if not data.exists():
        make_conversations(data.parent, 3)
    return Task(bundle, plan, data, limit, folder / f"{plan}.jsonl", "a model")


def test_only_new_questions_are_asked(
    tiny_bundle: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(asking, "MAX_NEW_TOKENS", 2)
    asked: list[Any] = []
    generate = Model.generate

    def counted(self: Model, *args: Any, **options: Any) -> Any:
        asked.append(options["seed"])
        return generate(self, *args, **options)

    monkeypatch.setattr(Model, "generate", counted)
    first = asking.answer(task(tiny_bundle, tmp_path, 2))
    again = asking.answer(task(tiny_bundle, tmp_path, 4))
    assert again[:2] == first and len(again) == 4
    assert asked == [0, 1, 2, 3]  # each once, and a seed of its own
    monkeypatch.setattr(asking, "Model", None)  # nothing left to ask: no model is loaded
    assert asking.answer(task(tiny_bundle, tmp_path, 3)) == again[:3]


def test_one_grey_picture_stands_in_for_all(
    tiny_bundle: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []

    def generate(self: Model, images: list[str], *args: Any, **options: Any) -> Any:
        seen.extend(images)
        raise KeyboardInterrupt

    monkeypatch.setattr(Model, "generate", generate)
    one = task(tiny_bundle, tmp_path, 1)
    picture = one.data.parent / "2.png"
    with pytest.raises(KeyboardInterrupt):
        asking.answer(replace(one, image=picture))
    assert seen == [str(picture)]


def test_an_image_is_seen_once_for_all_its_questions(
    tiny_bundle: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Model(tiny_bundle, threads=1, check="size")
    side = model.preprocess([np.zeros((40, 40, 3), np.uint8)]).shape[-1]
    one, other = (np.full((1, 3, side, side), value, np.float32) for value in (0.1, 0.4))
    pipeline, runs, rng = model.pipeline, [], np.random.default_rng(0)
    run = pipeline.backend.run
    monkeypatch.setattr(pipeline.backend, "run", lambda *a: (runs.append(a[0]), run(*a))[1])
    plain = pipeline.see(one, "none", rng)[0].features
    pipeline.see(one, "none", rng)
    assert len(runs) == 2  # every request pays for its own, unless told otherwise
    pipeline.spare_images = 1
    for pixels, expected in ((one, 3), (one, 3), (other, 4), (other, 4), (one, 5)):
        features = pipeline.see(pixels.copy(), "none", rng)[0].features
        assert len(runs) == expected
        assert np.array_equal(features, plain) == (pixels is one)
    model.close()


DEMO_MODEL = Path(__file__).parents[2] / "examples" / "demo_model"
COSTS = Costs(read_shape(DEMO_MODEL / "checkpoint"), 30)


def synthetic(name: str, table: Table | None = None, date: str = "2026-01-01") -> dict[str, Any]:
    """A table whose rows have half of the questions right, the first one all."""
    table = table or TABLES[name](DEMO)
    kinds = ["count", "ground"] * 20
    given = {}
    for number, row in enumerate(table.rows):
        if not row.not_run:
            hits = [1.0] * 40 if not number else [1.0, 0.0] * 20
            given[row] = marks(hits, kinds, tokens=40.0 + number)
    return to_dict(table, given, COSTS, date) | {"date": date}


def test_a_report_tells_marks_differences_and_what_was_not_run() -> None:
    found = synthetic("options")
    full, *_ = found["parts"][0]["rows"]
    assert "difference" not in full and full["accuracy"]["all"]["mean"] == 1
    row = found["parts"][1]["rows"][0]
    assert row["kept"] == 0.5 and row["difference"]["coarse"]["mean"] == -1
    one = found["parts"][1]["comparisons"][0]
    assert one["verdict"] == "no different from"
    text = to_text(json.loads(json.dumps(found)))
    assert "carry alone" in text and "50.0 %" in text and "no different from" in text
    header, rule, line = text.split("\n\n")[3].splitlines()[:3]
    assert len(header) == len(rule) == len(line)


@pytest.mark.slow
def test_rows_say_where_they_act_and_what_they_cost() -> None:
    """Inside the tower a method saves there too; a plan that adapts costs what it keeps."""
    rows = {row["label"]: row for row in synthetic("main")["parts"][1]["rows"]}
    inside, after = rows["random in the tower"], rows["random after the tower"]
    assert (inside["acts_in"], after["acts_in"]) == ("tower", "after the tower")
    assert inside["flops"] < after["flops"] < 1
    assert inside["flops"] == rows["TopK in the tower"]["flops"]
    assert rows["FastV at layer 2"]["acts_in"] == "decoder layer 2"
    assert rows["random at layer 1"]["flops"] == rows["FastV at layer 1"]["flops"]
    assert acts_in(DEMO.ivtp(16, group=1)) == "tower and decoder layers 1 to 11"
    assert rows["IVTP"]["acts_in"] == "tower and decoder layers 3, 6, 9"
    plan = next(row.plan for row in TABLES["main"](DEMO).rows if row.label == LEARNED)
    few, some, more = (COSTS.share(plan, average) for average in (36.0, 36.5, 37.0))
    assert few < some < more and some - few == pytest.approx(more - some, rel=0.2)
    fixed = DEMO.fixed((2, 5, 9), 36, 1 / 2)
    counts = [site.budget for site in fixed.sites]
    adaptive = COSTS.share(plan, DEMO.average(counts, (2, 5, 9)))
    assert COSTS.share(fixed, 0) == pytest.approx(adaptive, rel=0.01)  # attention alone differs
    text = to_text(synthetic("main"))
    assert "tower and decoder layers 3, 6, 9" in text and "30 text tokens" in text


def test_rows_that_are_not_asked_again_keep_numbers_and_date() -> None:
    """And comparisons with what was asked now are left out, for their answers are not there."""
    before = synthetic("main")
    for row in before["parts"][1]["rows"]:
        row["accuracy"]["all"]["mean"] = 0.123
    inside = "random in the tower"
    before["parts"][1]["rows"] = [r for r in before["parts"][1]["rows"] if r["label"] != inside]
    before["parts"][1]["comparisons"] = [
        one for one in before["parts"][1]["comparisons"] if inside not in (one["of"], one["to"])
    ]
    table = only(TABLES["main"](DEMO), "random in, EViT")
    found = with_earlier(synthetic("", table, "2026-02-02"), before, TABLES["main"](DEMO), COSTS)
    rows = {row["label"]: row for row in found["parts"][1]["rows"]}
    assert (rows[inside]["date"], rows[inside]["accuracy"]["all"]["mean"]) == ("2026-02-02", 0.5)
    assert rows["EViT"]["accuracy"]["all"]["mean"] == 0.5
    assert (rows["ToMe"]["date"], rows["ToMe"]["accuracy"]["all"]["mean"]) == ("2026-01-01", 0.123)
    assert rows["ToMe"]["acts_in"] == "tower" and 0 < rows["ToMe"]["flops"] < 1
    pairs = {(one["of"], one["to"]) for one in found["parts"][1]["comparisons"]}
    assert (inside, "EViT") in pairs and ("IVTP", "ToMe") in pairs
    assert (inside, "ToMe") not in pairs
    text = to_text(found)
    assert "Asked on 2026-02-02: random in the tower; EViT." in text and "2026-01-01: " in text
    assert "not run" not in text.split("**89 %")[0]
    assert "Asked on" not in to_text(before)


def test_results_of_another_model_or_of_fewer_questions_are_not_kept(tmp_path: Path) -> None:
    path, run = tmp_path / "accuracy-main.json", {"checkpoint": "one"}
    assert earlier(path, run, 4000) is None
    path.write_text(json.dumps({"checkpoint": "one", "questions": 4000}))
    assert earlier(path, run, 4000)
    assert earlier(path, run, 1000) is None and earlier(path, {"checkpoint": "two"}, 4000) is None


def test_rows_whose_decoder_is_not_trained_yet_are_left_out_if_asked(tmp_path: Path) -> None:
    """A part of which nothing is left is printed too, and a figure takes the next best row."""
    shop = SimpleNamespace(trained_path=lambda row: tmp_path / "absent")
    found = synthetic("", without_training(TABLES["atp-ratios"](DEMO), shop))
    last = found["parts"][-1]
    assert all("--no-training" in row["not_run"] for row in last["rows"])
    assert not last["comparisons"] and last["title"] in to_text(found)
    assert LEARNED in draw_kinds(found, (TRAINED, LEARNED))


def test_a_tower_learns_before_the_decoder_that_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoder goes on from the tower's checkpoint, on choices of that checkpoint's bundle."""
    launched: list[list[str]] = []
    made: list[str] = []
    exported: list[tuple[Path, Path]] = []

    def launch(_: Workshop, words: list[str], path: Path) -> None:
        launched.append(words)
        made.append(str(path))
        path.mkdir()
        (path / "model.safetensors").write_bytes(bytes(path))

    def export(_: Workshop, checkpoint: Path, bundle: Path, *words: str) -> None:
        exported.append((checkpoint, bundle))
        bundle.mkdir(parents=True)

    monkeypatch.setattr(Workshop, "_launch", launch)
    monkeypatch.setattr(Workshop, "_export", export)
    monkeypatch.setattr(Workshop, "questions", lambda *_: tmp_path / "questions.jsonl")
    demo = Path(__file__).parents[2] / "examples" / "demo_model"
    shop = Workshop(demo / "checkpoint", demo / "clip", tmp_path, Training())
    row = Row(IVTP_TWICE, shop.budgets.ivtp(16), trains=True, trains_tower=True, finishes=1)
    work = shop.prepare(row)
    tower, again, chosen, decoder, longer = launched
    assert tower[:2] == ["examples.demo_model.train_tower_plan", str(demo / "checkpoint")]
    starts = [words[1] for words in launched]
    assert len(set(starts)) == 5 and starts[1:] == made[:4]
    assert "--falls" not in again and chosen[chosen.index("--falls") + 1] == "plan"
    for words, (own, base) in zip((decoder, longer), exported[:2], strict=True):
        assert words[:2] == ["examples.demo_model.train_pruned", str(own)]
        assert words[words.index("--bundle") + 1] == str(base)
    assert len({path for pair in exported for path in pair}) == 6
    assert exported[-1] == (shop.trained_path(work.row), work.bundle)


def test_an_interrupted_calibration_goes_on(tmp_path: Path) -> None:
    path, words = tmp_path / "heads", ["patchsieve", "calibrate", "checkpoint"]
    assert _resuming(words, path) == []
    (tmp_path / "heads.partial").mkdir()
    assert _resuming(words, path) == ["--resume"]
    assert _resuming(["examples.demo_model.train_pruned"], path) == []


def test_a_folder_of_another_clip_is_refused(tmp_path: Path) -> None:
    demo = Path(__file__).parents[2] / "examples" / "demo_model"
    Workshop(demo / "checkpoint", demo / "clip", tmp_path, Training())
    with pytest.raises(SystemExit, match="another CLIP"):
        Workshop(demo / "checkpoint", demo / "checkpoint", tmp_path, Training())


def test_tokens_by_kind_are_a_figure_with_a_bar_each() -> None:
    root = ElementTree.fromstring(draw_kinds(synthetic("atp-ratios"), (TRAINED, LEARNED)))
    bars = [e for e in root.iter("{http://www.w3.org/2000/svg}rect") if e.get("height") == "17"]
    assert len(bars) == 2  # count and ground
    assert bars[0].get("fill") != bars[1].get("fill")


def test_curves_are_a_figure_for_light_and_dark_pages() -> None:
    drawn = draw_curves(synthetic("curves"))
    root = ElementTree.fromstring(drawn)
    named = SimpleNamespace(svg="{http://www.w3.org/2000/svg}")
    lines = root.findall(f"{named.svg}polyline")
    texts = [text.text for text in root.iter(f"{named.svg}text")]
    assert len(lines) >= 7 and "IVTP" in texts
    assert len({line.get("stroke") for line in lines}) == len(lines)
    assert "prefers-color-scheme:dark" in drawn and "nan" not in drawn
    few = draw_curves(synthetic("", only(TABLES["curves"](DEMO), "random")))
    assert len(ElementTree.fromstring(few).findall(f"{named.svg}polyline")) == 2
