"""The tables of benchmarks/precision: survivors in common, what is lost, what is asked again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.precision import asking, bundles
from benchmarks.precision.accuracy import compare
from benchmarks.precision.asking import Given, GivenFile, in_common
from benchmarks.precision.bundles import CASES, Bundles, size
from benchmarks.precision.report import into_page, misses, to_text
from patchsieve.evaluation.answers import Answer
from patchsieve.evaluation.questions import Question


def given(key: str, text: str = "red", **kept: list[int]) -> Given:
    return Given(Answer(key, "fastv", text, (1, 2), 9.0, 1000, 1.0, 2.0), kept)


def question(key: str, picture: str) -> Question:
    return Question(key, "Which colour?", [Path(picture)], ("red",), False, "colour")


def test_a_share_is_of_the_longer_list_at_each_place() -> None:
    floats = [given("a", tower=[1, 2, 3, 4], six=[1, 2]), given("b", tower=[1, 2, 3, 4], six=[3])]
    low = [given("a", tower=[1, 2, 3, 5], six=[1]), given("b", tower=[1, 2, 3, 4], six=[3, 4])]
    assert in_common(low, floats) == {"all": 9 / 12, "tower": 7 / 8, "six": 2 / 4}
    assert in_common(floats, floats) == {"all": 1.0, "tower": 1.0, "six": 1.0}
    assert in_common([given("a")], [given("a")]) == {}


def test_what_is_lost_is_float32_less_the_other_in_points_of_the_same_questions() -> None:
    questions = [question(str(number), str(number // 2)) for number in range(8)]
    floats = [given(asked.key, six=[1, 2]) for asked in questions]
    low = [replace(one, answer=replace(one.answer, text="blue")) for one in floats[:1]] + floats[1:]
    found = compare(questions, low, floats)
    assert found["lost"]["mean"] == pytest.approx(1 / 8)
    assert found["lost"]["low"] <= 1 / 8 <= found["lost"]["high"]
    assert found["answers_in_common"] == 7 / 8
    assert found["survivors_in_common"] == {"all": 1.0, "six": 1.0}


def test_answers_that_were_kept_are_not_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, questions = tmp_path / "answers.jsonl", [question(key, key) for key in "abc"]
    file = GivenFile(path)
    for key in "ab":
        file.add(given(key, six=[1, 2]))
    with path.open("a", encoding="utf-8") as cut:
        cut.write('{"answer": {"key": "c"')  # an interruption
    assert GivenFile(path).known == {key: given(key, six=[1, 2]) for key in "ab"}
    asked: list[str] = []

    def ask(model: Any, plan: str, one: Question) -> Given:
        asked.append(one.key)
        return given(one.key, six=[3])

    model = SimpleNamespace(pipeline=SimpleNamespace(), close=lambda: None)
    monkeypatch.setattr(asking, "Model", lambda *_, **__: model)
    monkeypatch.setattr(asking, "_ask", ask)
    monkeypatch.setattr(asking, "load_questions", lambda *_: questions)
    task = asking.Task(tmp_path, "fastv", tmp_path, 3, path, "about")
    for _ in range(2):
        assert [one.kept["six"] for one in asking.answer(task)] == [[1, 2], [1, 2], [3]]
    assert asked == ["c"]


def test_bars_that_are_missed_are_named() -> None:
    interval = {"mean": 0.008, "low": -0.001, "high": 0.02}
    row = {"plan": "FastV", "lost": interval, "survivors_in_common": {"all": 0.97, "6": 0.99}}
    rows = [row | {"precision": each} for each in ("int8", "int4")]
    found = misses({"rows": rows})
    assert found == [
        "int8, FastV: 0.80 points lost, at most 0.5",
        "int8, FastV: 97.0 % of the survivors in common",
        "int4, FastV: 97.0 % of the survivors in common",
    ]


def test_both_tables_are_printed() -> None:
    interval = {"mean": 0.87, "low": 0.86, "high": 0.88}
    row = {"plan": "FastV", "precision": "int8", "bytes": 5_000_000, "accuracy": interval}
    row |= {"lost": {"mean": 0.004, "low": -0.002, "high": 0.01}, "answers_in_common": 0.99}
    accuracy = {
        "questions": 8,
        "rows": [row | {"survivors_in_common": {"all": 0.99, "tower": 1.0, "6": 0.985}}],
    }
    ms = dict.fromkeys(("vision", "scorer", "prefill", "decide", "ttft", "decode_per_token"), 7.0)
    timed = {"plan": "ivtp", "precision": "int4", "ms": ms, "bytes": 4e8, "peak_bytes": 5e8}
    shape = {"image_size": 336, "patch_size": 14, "layers": 16, "hidden": 1024}
    speed = {"shape": shape | {"vision_layers": 24, "vision_hidden": 1024}, "rows": [timed]}
    speed |= {"rounds": 7, "text_tokens": 64}
    when = {"date": "2026-11-30T18:00:00", "machine": {"cpu": {"model": "a CPU"}}}
    text = to_text({"accuracy": accuracy | when, "speed": speed | when})
    cells = "5.0 | 87.0 | 0.40 [-0.20, 1.00] | 99.0 % | all 99.0, tower 100.0, layer 6 98.5 |"
    assert f"| FastV | int8 | {cells}" in text
    assert "| IVTP to 64 | int4 | 7 | 7 | 14 | 7 | 7.0 | 400 | 500 |" in text
    assert "576 visual and 64 text tokens" in text
    page = "# A\n\n<!-- answers -->\nold\n<!-- end -->\n\n<!-- speed -->\n<!-- end -->\nLimits\n"
    made = into_page(page, {"accuracy": accuracy | when})
    assert (
        "old" not in made and cells in made and "\n<!-- speed -->\n<!-- end -->\nLimits\n" in made
    )
    assert into_page(made, {"accuracy": accuracy | when}) == made
    assert "| IVTP to 64 |" in into_page(made, {"speed": speed | when})


def test_each_plan_has_a_bundle_of_its_own_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[list[str]] = []

    def run(words: list[str]) -> str:
        said.append(words)
        Path(words[words.index("-o") + 1]).mkdir(parents=True)
        return ""

    monkeypatch.setattr(bundles, "run", run)
    shop: Any = SimpleNamespace(folder=tmp_path)
    made = Bundles(shop, Path("demo_model"), has_statistics=False)
    paths = {made.of(case, "int8,layers.0=float") for case in (*CASES, *CASES)}
    assert {path.name for path in paths} == {case.name for case in CASES}
    assert [words[words.index("--plan-name") + 1] for words in said] == [c.name for c in CASES]
    assert made.of(CASES[0], "int8") not in paths


def test_a_file_under_two_names_counts_once(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "b").hardlink_to(tmp_path / "a")
    assert size(tmp_path) == 5
