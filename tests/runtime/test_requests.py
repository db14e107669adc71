"""Requests that cannot be answered are refused in one line, and the next one is answered."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import patchsieve
from patchsieve.contract.errors import BundleError, CapacityError, PatchsieveError, RequestError
from patchsieve.runtime.model import Model
from patchsieve.runtime.result import Result
from tests.support import damage
from tests.support.damage import PHOTO, QUESTION, refused

ROOT = Path(__file__).resolve().parents[2]
FEW = {"max_new_tokens": 3}


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    """The tiny bundle, loaded once: whatever a test asks, the next one must find it whole."""
    loaded = patchsieve.load(damage.bundle(), threads=1)
    yield loaded
    loaded.close()


@pytest.fixture(autouse=True)
def answers_after(model: Model) -> Iterator[None]:
    """Each refusal leaves the model as it was."""
    yield
    assert model.generate(PHOTO, QUESTION, **FEW).token_ids == expected()


def expected() -> list[int]:
    """What a fresh model answers."""
    if not _EXPECTED:
        fresh = patchsieve.load(damage.bundle(), threads=1)
        _EXPECTED.append(fresh.generate(PHOTO, QUESTION, **FEW).token_ids)
    return _EXPECTED[0]


_EXPECTED: list[list[int]] = []


@pytest.mark.parametrize(
    ("image", "prompt", "options", "match"),
    [
        (None, "", {}, "."),
        (None, "   \n\t ", {}, "."),
        (None, "", {"raw": True}, "."),
        (None, "<image> what is it?", {}, "placeholder but no image"),
        (None, "<image>", {"raw": True}, "placeholder but no image"),
        (PHOTO, "<image>", {"raw": True}, "no token after its last image"),
        (PHOTO, "what is it?", {"raw": True}, "fewer placeholders than images"),
        (PHOTO, "<image> <image> both", {}, "more placeholders than images"),
        ([PHOTO, PHOTO], "<image> only one", {}, "fewer placeholders than images"),
        ([PHOTO, PHOTO], "<image><image><image>", {"raw": True}, "more placeholders"),
        (PHOTO, QUESTION, {"unknown": 1}, "unknown option"),
        (PHOTO, QUESTION, {"plan": "absent"}, "no such plan.*none, fastv"),
        (PHOTO, QUESTION, {"max_new_tokens": 0}, "max_new_tokens"),
        (PHOTO, QUESTION, {"max_new_tokens": -1}, "max_new_tokens"),
        (PHOTO, QUESTION, {"max_new_tokens": 1.5}, "max_new_tokens"),
        (PHOTO, QUESTION, {"max_new_tokens": True}, "max_new_tokens"),
        (PHOTO, QUESTION, {"max_new_tokens": "3"}, "max_new_tokens"),
        (PHOTO, QUESTION, {"temperature": -1}, "temperature"),
        (PHOTO, QUESTION, {"temperature": float("nan")}, "temperature"),
        (PHOTO, QUESTION, {"top_p": 0}, "top_p"),
        (PHOTO, QUESTION, {"top_k": -1}, "top_k"),
        (PHOTO, QUESTION, {"repetition_penalty": 0}, "repetition_penalty"),
        (PHOTO, QUESTION, {"seed": -1}, "seed"),
        (PHOTO, QUESTION, {"stop": ("",)}, "stop"),
        (PHOTO, QUESTION, {"stop": "abc"}, "stop"),
        ("/absent.jpg", QUESTION, {}, "."),
        (b"not an image", QUESTION, {}, "."),
        (b"", QUESTION, {}, "."),
        (7, QUESTION, {}, "."),
        (np.zeros((0, 4, 3), np.uint8), QUESTION, {}, "."),
        (np.zeros((4, 4, 7), np.uint8), QUESTION, {}, "."),
        ([PHOTO, None], QUESTION, {}, "."),
        ([PHOTO, "/absent.jpg"], QUESTION, {}, "."),
    ],
)
def test_a_request_that_cannot_be_is_refused(
    image: Any, prompt: str, options: dict[str, Any], match: str, model: Model
) -> None:
    refused(lambda: model.generate(image, prompt, **{**FEW, **options}), RequestError, match)


@pytest.mark.parametrize(
    ("image", "options", "match"),
    [
        ([PHOTO] * 3, {}, "too many images.*--max-images"),
        ([PHOTO] * 100, {}, "too many images.*--max-images"),
        (PHOTO, {"max_new_tokens": 17}, "too many new tokens.*--max-new-tokens"),
        (PHOTO, {"max_new_tokens": 2**40}, "too many new tokens.*--max-new-tokens"),
    ],
)
def test_a_request_beyond_the_limits_names_the_option_to_raise(
    image: Any, options: dict[str, Any], match: str, model: Model
) -> None:
    refused(lambda: model.generate(image, QUESTION, **{**FEW, **options}), CapacityError, match)


@pytest.mark.parametrize("word", ["word ", "a", "\u6f22", "\U0001f642", "<image>", "</s>", "\0"])
def test_an_enormous_prompt_is_refused_quickly(word: str, model: Model) -> None:
    start = time.perf_counter()
    refused(lambda: model.generate(None, word * 100_000, **FEW), RequestError)
    assert time.perf_counter() - start < 30  # not for hours; no benchmark


def test_a_prompt_that_just_fits_is_answered_and_one_token_more_is_not(model: Model) -> None:
    limit = model.facts.limits.max_text_tokens
    prompts = model.bundle.prompts

    def text_tokens(count: int) -> int:
        return len(prompts.build_raw("a " * count, 0).token_ids)

    count = next(n for n in range(1, 500) if text_tokens(n + 1) > limit)
    model.generate(None, "a " * count, raw=True, max_new_tokens=16)
    refused(
        lambda: model.generate(None, "a " * (count + 1), raw=True, **FEW),
        CapacityError,
        "too many text tokens.*--max-text-tokens",
    )


def test_what_is_odd_but_possible_is_answered(model: Model) -> None:
    for image, prompt, options in (
        (None, "Hello", {}),
        (None, "Hello", {"raw": True}),
        (PHOTO, "<image> x", {"raw": True}),
        (PHOTO, "What is <image> this?", {}),
        ([PHOTO, PHOTO], "Both?", {}),
        ([PHOTO, PHOTO], "<image> and <image>", {"raw": True}),
        ([], "Hello", {}),
        ((PHOTO,), "Hello", {}),
        (np.zeros((1, 1, 3), np.uint8), "x", {}),
        (np.zeros((1, 3000, 3), np.uint8), "x", {}),
        (Image.new("CMYK", (5, 5)), "x", {}),
        (PHOTO, QUESTION, {"plan": "none"}),
        (PHOTO, "\u6f22\u5b57 \U0001f642 \u202e \ufeff \x00", {}),
        (PHOTO, "{{ 7 * 7 }} {% for %}", {}),
    ):
        result = model.generate(image, prompt, **{**FEW, **options})
        assert 1 <= len(result.token_ids) <= 3
        assert len(result.sites) == (0 if options.get("plan") else result.visual_tokens // 16)


def test_an_empty_prompt_beside_an_image_is_answered_or_one_line(model: Model) -> None:
    try:
        assert model.generate(PHOTO, "", **FEW).token_ids
    except RequestError as error:
        assert "\n" not in str(error)


def test_a_conversation_that_is_full_is_refused_and_goes_on_afterwards(model: Model) -> None:
    chat = model.chat()
    first = chat.ask("Hi", PHOTO, **FEW)
    refused(lambda: chat.ask("word " * 200, **FEW), CapacityError)
    refused(lambda: chat.ask("x", [PHOTO] * 2, **FEW), CapacityError, "too many images")
    refused(lambda: chat.ask("x", raw=True, **FEW), RequestError, "raw prompt")
    refused(lambda: chat.ask("", **FEW), RequestError)
    again = chat.ask("And?", **FEW)
    chat.close()
    refused(lambda: chat.ask("x"), RequestError, "closed")
    other = model.chat()
    assert other.ask("Hi", PHOTO, **FEW).token_ids == first.token_ids
    assert other.ask("And?", **FEW).token_ids == again.token_ids
    other.close()


def test_a_conversation_fills_up_turn_by_turn_until_one_clear_line(model: Model) -> None:
    chat = model.chat()
    turns = 0
    with pytest.raises(CapacityError) as caught:
        for turns in range(100):  # noqa: B007  (counted)
            chat.ask("How many?", PHOTO if turns == 0 else None, **FEW)
    assert turns >= 2 and "\n" not in str(caught.value)
    chat.close()


def test_an_answer_that_nobody_finishes_reading_leaves_the_model_whole(model: Model) -> None:
    stream = model.stream(PHOTO, QUESTION, max_new_tokens=16)
    next(stream)
    stream.close()
    chat = model.chat()
    stream = chat.stream(QUESTION, PHOTO, max_new_tokens=16)
    next(stream)
    stream.close()
    assert chat.ask(QUESTION, PHOTO, **FEW).token_ids == expected()
    chat.close()


def test_a_failing_backend_leaves_the_model_whole(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = model.backend.run

    def fails(graph: str, inputs: Any) -> Any:
        if graph.startswith("decide"):
            raise BundleError("the decision fails")
        return run(graph, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(model.backend, "run", fails)
        refused(lambda: model.generate(PHOTO, QUESTION, **FEW), PatchsieveError, "decision fails")


def test_a_result_says_what_was_done(model: Model) -> None:
    result = Result()
    for _ in model.stream(PHOTO, QUESTION, result=result, **FEW):
        pass
    data = json.loads(json.dumps(result.to_dict()))
    assert data["prompt_tokens"] > 16 and data["visual_tokens"] == 16
    assert [site["num_kept"] for site in data["sites"]] == [8]


# Through the command line: one line on stderr, exit code 2.


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `patchsieve run` on the tiny bundle."""
    return subprocess.run(
        [sys.executable, "-m", "patchsieve", "run", str(damage.bundle()), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_command_line_refuses_in_one_line_with_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("not an image")
    Image.fromarray(PHOTO).save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:400])
    photo, few = str(tmp_path / "whole.jpg"), ("--max-new-tokens", "3")
    for arguments in (
        ("--prompt", "", *few),
        ("--prompt", "x " * 5000, *few),
        ("--prompt", "<image> x", *few),
        ("--prompt", "x", "--raw", "--image", photo, *few),
        ("--prompt", "x", "--image", str(tmp_path / "absent.jpg"), *few),
        ("--prompt", "x", "--image", str(tmp_path / "text.jpg"), *few),
        ("--prompt", "x", "--image", str(tmp_path / "half.jpg"), *few),
        ("--prompt", "x", "--image", str(tmp_path), *few),
        ("--prompt", "x", *("--image", photo) * 3, *few),
        ("--prompt", "x", "--plan", "absent", *few),
        ("--prompt", "x", "--max-new-tokens", "0"),
        ("--prompt", "x", "--max-new-tokens", "x"),
        ("--prompt", "x", "--unknown", *few),
        ("--prompt", "x", "--target", "abacus", *few),
    ):
        done = command(*arguments)
        assert done.returncode == 2, (arguments, done)
        assert done.stdout == "" and len(done.stderr.splitlines()) == 1, (arguments, done.stderr)


def test_the_command_line_gives_errors_as_json_too() -> None:
    done = command("--prompt", "", "--json", "--max-new-tokens", "3")
    assert done.returncode == 2
    printed = json.loads(done.stdout)
    assert set(printed) == {"schema_version", "error", "what", "found", "expected", "do"}
    assert done.stderr == f"patchsieve: {printed['error']}\n"


def test_the_command_line_answers_with_one_json_object(tmp_path: Path) -> None:
    Image.fromarray(PHOTO).save(tmp_path / "photo.png")
    done = command(
        "--prompt", QUESTION, "--image", str(tmp_path / "photo.png"), "--json",
        "--max-new-tokens", "3",
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert json.loads(done.stdout)["token_ids"] == expected()
