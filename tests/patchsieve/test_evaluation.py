"""Marks against known values, and a bundle's evaluation from data to report."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from patchsieve.cli import main
from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.files import read
from patchsieve.contract.manifest import File
from patchsieve.contract.model import Generation
from patchsieve.contract.plan import Plan, SitePlan
from patchsieve.evaluation.answers import Answer, AnswerFile, depends_on
from patchsieve.evaluation.metrics import (
    exact_match,
    interval,
    normalise,
    vqa_accuracy,
    yes_no_scores,
    yes_or_no,
)
from patchsieve.evaluation.questions import Question, questions_of
from patchsieve.evaluation.report import report
from patchsieve.export.reuse import reuse
from patchsieve.runtime.inputs.builder import PromptBuilder
from patchsieve.runtime.records import Records
from tests.runtime.test_prompt import CHATML, LLAVA
from tests.support import damage
from tests.support.bundles import PHOTO, command
from tests.support.conversations import make_conversations
from tests.support.tiny_tokenizers import tokenizer, tokenizer_json

pytest_plugins = ["tests.support.bundles"]


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("A cup.", "cup"),
        (" The  red,\nGreen-blue Cup!", "red green-blue cup"),
        ("three", "3"),
        ("none", "0"),
        ("It's 3.5, not 1,000", "its 3.5 not 1,000"),
        ("Don't", "dont"),
        ("", ""),
        ("the", ""),
    ],
)
def test_answers_are_compared_without_articles_case_and_punctuation(text: str, plain: str) -> None:
    assert normalise(text) == plain


def test_exact_match_takes_any_of_the_references() -> None:
    assert exact_match("Two cups", ["a cup", "2 cups."]) == 1
    assert exact_match("cups", ["a cup", "2 cups."]) == 0


def test_vqa_accuracy_leaves_each_person_out_in_turn() -> None:
    """Three of ten said so: the three see two others, 2/3 each; the seven see three, 1 each."""
    people = ["red"] * 3 + ["blue"] * 7
    assert vqa_accuracy("red", people) == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert vqa_accuracy("blue", people) == 1
    assert vqa_accuracy("green", people) == 0


def test_yes_and_no_are_scored_as_pope_does() -> None:
    said = [yes_or_no(text) for text in ("Yes, it is.", "no", "yes", "a cup", "No.")]
    assert said == [True, False, True, None, False]
    scores = yes_no_scores(said, [True, True, False, True, False])
    assert scores["accuracy"] == 2 / 5
    assert (scores["precision"], scores["recall"]) == (1 / 2, 1 / 3)
    assert scores["f1"] == pytest.approx(2 / 5)
    assert scores["yes_share"] == 2 / 5


def test_an_interval_holds_the_mean_and_narrows_with_more_questions() -> None:
    few, many = interval([0.0, 1.0] * 10), interval([0.0, 1.0] * 1000)
    assert few.low < few.mean == many.mean == 0.5 < few.high
    assert many.high - many.low < (few.high - few.low) / 5
    assert interval([1.0, 1.0]) == interval([1.0, 1.0]) and interval([1.0, 1.0]).low == 1


def test_questions_about_one_image_are_drawn_together() -> None:
    alone = interval([0.0, 1.0] * 10)
    assert interval([0.0, 0.0, 0.0, 1.0, 1.0, 1.0] * 10, [*"aaabbb"] * 10) == interval([0.0, 1.0])
    subjects = [str(number // 3) for number in range(60)]
    assert interval([m for m in [0.0, 1.0] * 10 for _ in range(3)], subjects).mean == alone.mean
    assert interval([0.0, 1.0] * 10, ["a"] * 20) == alone
    shown = Question("7", "", [Path("a"), Path("b")], ("yes",), False, "")
    assert shown.subject == replace(shown, key="8").subject != replace(shown, images=[]).subject


def answer(key: str, plan: str, text: str, tokens: float) -> Answer:
    return Answer(key, plan, text, (1, 2), tokens, 100, 5.0, 9.0)


def test_a_report_sets_plans_side_by_side_and_divides_by_category() -> None:
    def question(key: str, reference: str, category: str) -> Question:
        return Question(key, "?", [], (reference,), False, category)

    questions = [question("0", "yes", "presence"), question("1", "no", "colour")]
    found = report(
        questions,
        {
            "none": [answer("0", "none", "Yes", 36), answer("1", "none", "no", 36)],
            "p": [answer("0", "p", "yes.", 9), answer("1", "p", "red", 18)],
        },
    )
    assert found["none"]["exact_match"]["mean"] == 1 and "difference" not in found["none"]
    pruned = found["p"]
    assert pruned["exact_match"]["mean"] == 0.5 and pruned["difference"]["mean"] == -0.5
    assert pruned["agreement"] == {"text": 0.5, "tokens": 1.0}
    assert pruned["visual_tokens"] == 13.5
    assert pruned["categories"]["colour"]["exact_match"]["mean"] == 0
    assert pruned["categories"]["presence"]["visual_tokens"] == 9
    assert pruned["yes_no"]["accuracy"] == 0.5


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Callable[[], dict[str, Any]]:
    return lambda: json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_bundle_is_evaluated_and_an_interruption_loses_no_answer(
    tiny_bundle: Path, tmp_path: Path, printed
) -> None:
    data, kept = make_conversations(tmp_path / "data", 3), tmp_path / "answers.jsonl"
    argv = ["eval", str(tiny_bundle), "--data", str(data), "--answers", str(kept), "--json"]
    assert main([*argv, "--max-new-tokens", "4"]) == 0
    first = printed()["plans"]
    none, pruned = first.values()
    assert none["questions"] == 4  # one of three records asks twice
    assert pruned["visual_tokens"] < none["visual_tokens"]
    assert pruned["kv_bytes"] < none["kv_bytes"]
    lines = kept.read_text().splitlines()
    assert len(lines) == 1 + 2 * 4
    changed = json.loads(lines[1]) | {"text": "kept, not asked again"}
    kept.write_text("\n".join([lines[0], json.dumps(changed), *lines[2:-1], lines[-1][:30]]))
    assert main([*argv, "--max-new-tokens", "4"]) == 0
    assert printed()["plans"].keys() == first.keys()
    again = kept.read_text().splitlines()
    assert len(again) == len(lines) and json.loads(again[1]) == changed
    assert main([*argv, "--max-new-tokens", "5"]) == 2  # other answers would come
    assert "another max_new_tokens" in printed()["error"]


def test_the_right_answer_is_marked_right(tiny_bundle: Path, tmp_path: Path, printed) -> None:
    """The model's own answers as references: the unpruned plan is always right."""
    from patchsieve.runtime.model import Model

    model = Model(tiny_bundle, threads=1, check="size")
    said = model.generate(str(PHOTO), "What?", plan="none", max_new_tokens=4).text
    model.close()
    turns = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": said}]
    record = {"messages": turns, "images": [str(PHOTO)], "category": "self"}
    (tmp_path / "data.jsonl").write_text(json.dumps(record))
    argv = ["eval", str(tiny_bundle), "--data", str(tmp_path / "data.jsonl"), "--json"]
    assert main([*argv, "--max-new-tokens", "4"]) == 0
    assert printed()["plans"]["none"]["categories"]["self"]["exact_match"]["mean"] == 1


def test_an_unknown_plan_or_a_missing_image_is_one_line(
    tiny_bundle: Path, tmp_path: Path, printed
) -> None:
    data = make_conversations(tmp_path / "data", 2)
    argv = ["eval", str(tiny_bundle), "--data", str(data), "--json"]
    assert main([*argv, "--plan", "nope"]) == 2
    assert "no such plan" in printed()["error"]
    (tmp_path / "data" / "1.png").unlink()
    assert main(argv) == 2
    assert "image that is not there" in printed()["error"]


TURNS = {"user": "What?", "assistant": "A cup.", "system": "Be brief."}


@pytest.mark.parametrize(
    "roles",
    [
        ["assistant", "user", "assistant"],
        ["user", "user", "assistant"],
        ["user", "assistant", "assistant"],
        ["system", "system", "user", "assistant"],
        ["user", "assistant", "system", "user", "assistant"],
        ["system", "assistant"],
    ],
)
def test_turns_that_are_no_questions_and_answers_are_refused(
    roles: list[str], tmp_path: Path
) -> None:
    turns = [{"role": role, "content": TURNS[role]} for role in roles]
    (tmp_path / "data.json").write_text(json.dumps([{"messages": turns}]))
    with pytest.raises(PatchsieveError, match="record 0 is not questions and answers in turn"):
        questions_of(Records(tmp_path / "data.json"), "<image>")


def llava(*values: str, system: str | None = None, **more: object) -> dict[str, object]:
    turns = [{"from": "system", "value": system}] if system is not None else []
    for value in values:
        turns += [{"from": "human", "value": value}, {"from": "gpt", "value": "A cup."}]
    return {"conversations": turns, "image": "a.png"} | more


def chat(*content: object, system: object = None, **more: object) -> dict[str, object]:
    turns = [{"role": "system", "content": system}] if system is not None else []
    for each in content:
        turns += [{"role": "user", "content": each}, {"role": "assistant", "content": "A cup."}]
    return {"messages": turns} | more


WORDS, IMAGE = {"type": "text", "text": "What is it?"}, {"type": "image", "path": "a.png"}
RECORDS = [
    llava("<image>\nWhat is it?"),
    llava("What is it?\n<image>"),
    llava("  What <image> is it? "),
    llava("What is it?"),
    llava("<image>"),
    llava("<image>\nWhat is it?", "And why?", system="Be brief."),
    llava("Is <image> like <image>?", image=["a.png", "b.png"]),
    llava("Alike?\n<image>\n<image>", image=["a.png", "b.png"], system="Be brief."),
    llava("What is a cup?", image=[]),
    chat([IMAGE, WORDS]),
    chat([WORDS, IMAGE]),
    chat([WORDS, IMAGE, WORDS], system=[{"type": "text", "text": "Be brief."}]),
    chat("What is it?<image>", image="a.png", system="Be brief."),
    chat([IMAGE, WORDS], [{"type": "text", "text": "And why?"}], system="Be brief."),
    llava("<image>\nWhat is it?", "And why?") | {"system": "Be brief."},  # as ShareGPT has it
]


@pytest.mark.parametrize("template", [LLAVA, CHATML])
def test_eval_asks_the_prompt_that_calibrate_trains_on(template: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer_json("qwen"), encoding="utf-8")
    number = tokenizer("qwen").token_to_id("<image>")
    prompts = PromptBuilder(path, template, image_token="<image>", image_token_id=number)
    for name in ("a.png", "b.png"):
        (tmp_path / name).touch()
    (tmp_path / "data.json").write_text(json.dumps(RECORDS))
    records = Records(tmp_path / "data.json")
    first = [q for q in questions_of(records, "<image>") if not q.key.endswith(".1")]
    assert len(first) == len(records) == len(RECORDS)
    for question, record in zip(first, map(records.__getitem__, range(len(records))), strict=True):
        count = len(record.images)
        asked = [message["role"] for message in record.messages].index("assistant")
        begin = [] if question.system is None else [prompts.system_message(question.system)]
        found = prompts.build([*begin, prompts.user_message(question.content, count)], count)
        trained = prompts.build(record.messages[:asked], count)
        assert found.text == trained.text
        assert found.instruction.tolist() == trained.instruction.tolist()


def test_one_image_of_llavas_json_comes_first_wherever_its_words_place_it(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps(RECORDS[:8]))
    contents = [Records(path)[number].messages[-2]["content"] for number in (0, 1, 2, 4)]
    first, words = {"type": "image"}, [WORDS, WORDS, {"type": "text", "text": "What  is it?"}]
    assert contents == [*([first, word] for word in words), [first]]
    several = Records(path)[6].messages[0]["content"]
    assert [part["type"] for part in several] == ["text", "image", "text", "image", "text"]


def test_a_system_turn_is_asked_with_and_one_with_an_image_is_refused(
    tiny_bundle: Path, tmp_path: Path, printed
) -> None:
    from patchsieve.runtime.model import Model

    model = Model(tiny_bundle, threads=1, check="size")
    asked = {"system": "Be brief.", "plan": "none", "max_new_tokens": 4}
    expected = model.generate(str(PHOTO), "What is it?", **asked)
    model.close()
    kept, data = tmp_path / "answers.jsonl", tmp_path / "data.json"
    argv = ["eval", str(tiny_bundle), "--data", str(data), "--answers", str(kept), "--json"]
    for record in (
        llava("What is it? <image>", system="Be brief.", image=PHOTO),
        chat("What is it?", system="Be brief.", image=PHOTO),
        llava("What is it? <image>", image=PHOTO) | {"system": "Be brief."},
    ):
        data.write_text(json.dumps([record]))
        assert main([*argv, "--plan", "none", "--max-new-tokens", "4"]) == 0
        said = json.loads(kept.read_text().splitlines()[1])
        assert said["token_ids"] == expected.token_ids
        kept.unlink()
    data.write_text(json.dumps([llava("What?", system="<image>", image=PHOTO)]))
    assert main(argv) == 2
    assert "has an image in its system turn" in printed()["error"]


def test_an_image_after_the_first_question_is_refused_as_calibrate_refuses_it(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "data.json").write_text(json.dumps([llava("What?", "And <image>?")]))
    with pytest.raises(PatchsieveError, match="record 0 shows an image after its first question"):
        questions_of(Records(tmp_path / "data.json"), "<image>")


def test_answers_stay_when_a_plan_comes_to_the_bundle_and_go_when_their_plan_changes(
    own_bundle: Path, tmp_path: Path, printed
) -> None:
    data, kept = make_conversations(tmp_path / "data", 1), tmp_path / "answers.jsonl"
    argv = ["eval", str(own_bundle), "--data", str(data), "--answers", str(kept), "--json"]
    argv += ["--max-new-tokens", "3", "--limit", "1"]

    def keep(ratio: float, name: str) -> None:
        reuse(own_bundle, Plan((SitePlan(2, "fastv", {"keep_ratio": ratio}),)), name)

    def answers(*plans: str) -> list[tuple[str, str]]:
        """Plan and text of each line after asking these plans; lines so far say "kept"."""
        if kept.exists():
            head, *lines = kept.read_text().splitlines()
            marked = [json.dumps(json.loads(line) | {"text": "kept"}) for line in lines]
            kept.write_text("\n".join([head, *marked]) + "\n")
        assert main([*argv, *(f"--plan={plan}" for plan in plans)]) == 0
        printed()
        said = [json.loads(line) for line in kept.read_text().splitlines()[1:]]
        return [(line["plan"], "kept" if line["text"] == "kept" else "new") for line in said]

    assert answers("half") == [("none", "new"), ("half", "new")]
    keep(0.25, "quarter")
    so_far = [("none", "kept"), ("half", "kept")]
    assert answers("half", "quarter") == [*so_far, ("quarter", "new")]
    keep(0.75, "half")
    so_far.append(("quarter", "kept"))
    assert answers("half", "quarter") == [*so_far, ("half", "new")]
    manifest = read(own_bundle)
    shared, own = depends_on(manifest, "cpu")
    weights = next(path for path in manifest.files if path.startswith("graphs/weights/layer"))
    other = replace(manifest, files=manifest.files | {weights: File(1, "0" * 64)})
    assert depends_on(other, "cpu")[0] != shared and depends_on(other, "cpu")[1] == own
    other = replace(manifest, generation=Generation(no_repeat_ngram_size=2))
    assert depends_on(other, "cpu")[0] != shared and depends_on(other, "cpu")[1] == own


def test_eval_asks_for_no_more_new_tokens_than_the_bundle_holds(tmp_path: Path, printed) -> None:
    assert damage.LIMITS.max_new_tokens == 16
    data = make_conversations(tmp_path / "data", 1)
    argv = ["eval", str(damage.bundle()), "--data", str(data), "--limit", "1"]
    assert main([*argv, "--json"]) == 0
    assert printed()["max_new_tokens"] == 16
    code, said, _ = command(*argv, "--quiet")
    assert code == 0 and "at most 16 new tokens (what the bundle reserves)" in said
    assert main([*argv, "--json", "--max-new-tokens", "17"]) == 2
    line = printed()["error"]
    assert "give --max-new-tokens 16" in line and "--max-new-tokens 17" in line


def test_a_question_that_does_not_fit_is_named(tiny_bundle: Path, tmp_path: Path, printed) -> None:
    data = tmp_path / "data.json"
    data.write_text(json.dumps([chat("x"), chat("word " * 90)]))
    assert main(["eval", str(tiny_bundle), "--data", str(data), "--json"]) == 2
    assert printed()["error"].startswith("question 1 of the data: the request has too many text")


@pytest.mark.parametrize("content", [b"", b"[1]\n", b'"a"\n', b"\xff\xfe\n", b'{"a": 1}\n[2]\n'])
def test_a_file_that_holds_no_answers_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(content)
    with pytest.raises(PatchsieveError, match="holds no answers of an evaluation") as refused:
        AnswerFile(path, {"a": 1})
    assert "\n" not in str(refused.value)


def test_answers_that_cannot_be_kept_are_refused_before_the_first_question(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "no" / "answers.jsonl"):
        with pytest.raises(PatchsieveError, match="cannot write"):
            AnswerFile(path, {})


@pytest.mark.parametrize("option", ["--limit", "--max-new-tokens"])
@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many"])
def test_a_count_below_one_is_refused(option: str, value: str) -> None:
    code, _, said = command("eval", "bundle", "--data", "data.json", f"{option}={value}")
    assert code == 2 and "at least 1" in said and said.count("\n") == 1
