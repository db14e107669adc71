"""A bundle asked with a system prompt answers as Hugging Face does, in every turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from patchsieve.contract.errors import RequestError
from tests.references.masked_llava import answer_message, user_message
from tests.support.bundles import PHOTO, PROMPT, command, command_json
from tests.support.tiny_bundles import pictures

pytest_plugins = ["tests.support.bundles"]

ROW = "llama-gqa-tied-linear-rope"
SYSTEM = "Be brief, and name the table."
QUESTION = "What is on the table?"
FASTV = [{"layer": 1, "method": "fastv", "params": {"keep_ratio": 0.5, "rows": "mean"}}]


def system_turn(text: str) -> dict[str, Any]:
    return {"role": "system", "content": [{"type": "text", "text": text}]}


@pytest.mark.parametrize("system", [SYSTEM, ""])
def test_both_turns_say_what_hugging_face_says_and_the_users_words_alone_judge(
    system: str, tiny: Any
) -> None:
    """The reference finds the question from the right: the system prompt repeats its words."""
    model, reference = tiny(ROW).model(FASTV), tiny(ROW).hugging_face
    reference.start()
    messages = [system_turn(system), user_message(QUESTION, 1)]
    theirs = reference.ask(QUESTION, pictures(1), FASTV, messages=messages, max_new_tokens=12)
    chat = model.chat(system=system)
    ours = chat.ask(QUESTION, pictures(1), max_new_tokens=12)
    assert ours.token_ids == theirs.token_ids
    assert [site.kept for site in ours.sites] == [choice.kept for choice in theirs.choices]
    one = model.generate(pictures(1), QUESTION, system=system, max_new_tokens=12)
    assert one.token_ids == ours.token_ids
    assert one.token_ids != model.generate(pictures(1), QUESTION, max_new_tokens=12).token_ids
    messages += [answer_message(), user_message("And why?", 0)]
    theirs = reference.ask("And why?", [], FASTV, messages=messages, max_new_tokens=12)
    assert chat.ask("And why?", max_new_tokens=12).token_ids == theirs.token_ids
    chat.close()


def test_a_refused_system_prompt_leaves_the_model_whole(tiny: Any) -> None:
    model = tiny(ROW).model()
    expected = model.generate(pictures(1), QUESTION, max_new_tokens=4).token_ids
    for options, match in (
        ({"system": "<image>"}, "system prompt cannot hold an image"),
        ({"system": b"Be brief."}, "system prompt is not text"),
        ({"system": "Be brief.", "raw": True}, "a raw prompt takes no system prompt"),
    ):
        with pytest.raises(RequestError, match=match) as caught:
            model.generate(pictures(1), QUESTION, max_new_tokens=4, **options)
        assert "\n" not in str(caught.value)
    assert model.generate(pictures(1), QUESTION, max_new_tokens=4).token_ids == expected


def test_run_show_and_profile_take_a_system_prompt(tiny_bundle: Path, tmp_path: Path) -> None:
    from patchsieve.runtime.model import Model

    model = Model(tiny_bundle, threads=1, check="size")
    asked = {"system": SYSTEM, "max_new_tokens": 4}
    expected = model.generate(PHOTO, PROMPT, **asked)
    plain = model.generate(PHOTO, PROMPT, max_new_tokens=4)
    model.close()
    assert expected.prompt_tokens > plain.prompt_tokens
    request = ("--image", PHOTO, "--prompt", PROMPT, "--system", SYSTEM, "--no-hash")
    few = ("--max-new-tokens", 4)
    code, said = command_json("run", tiny_bundle, *request, *few)
    assert (code, said["token_ids"]) == (0, expected.token_ids)
    code, said = command_json("profile", tiny_bundle, *request, *few, "--runs", 1, "--warmup", 0)
    assert {p["prompt_tokens"] for p in said["plans"].values()} == {expected.prompt_tokens}
    code, said = command_json("show", tiny_bundle, *request, *few, "-o", tmp_path / "a.png")
    assert code == 0 and expected.text in json.dumps(said, ensure_ascii=False)
    code, _, line = command("run", tiny_bundle, "--prompt", "x", "--system", "a <image>")
    assert code == 2 and "cannot hold an image" in line and line.count("\n") == 1
