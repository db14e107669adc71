"""What `run` makes of its --image and --prompt options, and of stdin."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from patchsieve.cli.inputs import images_of_turns
from patchsieve.contract.errors import RequestError
from tests.references.masked_llava import user_message
from tests.support import damage
from tests.support.bundles import PHOTO, PROMPT, command, command_json
from tests.support.tiny_bundles import pictures

pytest_plugins = ["tests.support.bundles"]

ROW = "llama-gqa-tied-linear-rope"
FEW = ("--max-new-tokens", 6, "--no-hash", "--threads", 1)


def one_line(code: int, out: str, line: str) -> str:
    """The line of a refusal."""
    assert (code, out, line.count("\n")) == (2, "", 1), (code, out, line)
    return line


# Images


@pytest.mark.parametrize(
    ("prompts", "images", "expected"),
    [
        (["a"], "", [""]),
        (["a"], "12", ["12"]),
        (["<image> a <image>"], "12", ["12"]),
        (["a", "b"], "12", ["12", ""]),
        (["<image> a", "<image> b"], "12", ["1", "2"]),
        (["a", "<image> b"], "12", ["1", "2"]),
        (["a", "<image> b"], "1", ["", "1"]),
        (["a", "<image> b <image>", "c", "<image>"], "12345", ["12", "34", "", "5"]),
        (["<image> a", "b", "<image><image>"], "123", ["1", "", "23"]),
    ],
)
def test_images_go_to_the_marks_in_order_and_the_rest_before_the_first_question(
    prompts: list[str], images: str, expected: list[str]
) -> None:
    assert images_of_turns(prompts, images, "<image>") == [list(each) for each in expected]


@pytest.mark.parametrize(
    ("prompts", "images", "fault"),
    [
        (["<image> a"], "", "more"),
        (["a", "<image> b"], "", "more"),
        (["<image> a", "<image> b"], "1", "more"),
        (["<image> a", "b"], "12", "fewer"),
        (["<image> a", "<image> b"], "123", "fewer"),
    ],
)
def test_too_few_or_too_many_images_are_one_line(
    prompts: list[str], images: str, fault: str
) -> None:
    match = rf"\Athe prompts have {fault} <image> marks than images.*what to do: [^\n]*\Z"
    with pytest.raises(RequestError, match=match):
        images_of_turns(prompts, images, "<image>")


def test_images_of_later_turns_are_answered_as_in_python_and_by_hugging_face(
    tiny: Any, tmp_path: Path
) -> None:
    bundle, reference = tiny(ROW), tiny(ROW).hugging_face
    files = [str(tmp_path / f"{number}.png") for number in range(3)]
    for picture, file in zip(pictures(3), files, strict=True):
        picture.save(file)
    chat, answers = bundle.model().chat(), []
    for prompt, images in (("What?", [0]), ("And <image> this?", [1]), ("<image>Why?", [2])):
        given = [files[number] for number in images]
        answers.append(chat.ask(prompt, given, max_new_tokens=6, ignore_eos=False))
    chat.close()
    first, second, third = files
    code, said = command_json(
        "run", bundle.path, "--plan", "none", *FEW, "--image", first, "--prompt", "What?",
        "--image", second, "--prompt", "And <image> this?", "--prompt", "<image>Why?",
        "--image", third,
    )  # fmt: skip
    assert code == 0
    assert [turn["token_ids"] for turn in said["turns"]] == [each.token_ids for each in answers]
    reference.start()
    messages: list[dict[str, Any]] = []
    for number, prompt in enumerate(("What?", "And <image> this?", "<image>Why?")):
        messages.append(user_message(prompt, 1))
        inputs = reference.hugging_face_inputs(
            reference.prompt(messages), pictures(3)[: number + 1]
        )
        out = reference.model.generate(**inputs, max_new_tokens=6, do_sample=False)
        assert out[0, inputs.input_ids.shape[1] :].tolist() == answers[number].token_ids
        said_text = [{"type": "text", "text": answers[number].text}]
        messages.append({"role": "assistant", "content": said_text})


def test_what_a_later_turn_cannot_use_is_refused_before_the_first_answer(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    ask = ("run", tiny_bundle, *FEW, "--prompt", PROMPT)
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(PHOTO).read_bytes()[:300])
    for arguments, fault in (
        (("--prompt", "<image> and this?"), "more <image> marks than images"),
        (("--prompt", ""), "the prompt is empty"),
        (("--image", broken, "--prompt", "<image> and this?"), "the image"),
        (("--image", "none.png", "--prompt", "<image> and this?"), "does not exist"),
        (("--raw", "--prompt", "and this?"), "a raw prompt cannot be continued"),
    ):
        assert fault in one_line(*command(*ask, *arguments))


def test_a_prompt_that_is_empty_or_too_long_is_one_line(tiny_bundle: Path) -> None:
    for arguments, fault in (
        (("--prompt", ""), "the prompt is empty"),
        (("--prompt", " \n"), "the prompt is empty"),
        (("--prompt", "word " * 90), "too many text tokens"),
        (("--prompt", "x", "--system", "word " * 90), "too many text tokens"),
        (("--prompt", "x", "--system", "see <image>", "--image", PHOTO), "cannot hold an image"),
        (("--prompt", "x", "--raw", "--system", "y"), "takes no system prompt"),
        (("--prompt", "<image> x", "--raw"), "more <image> marks than images"),
        (("--prompt", "x", "--raw", "--image", PHOTO), "fewer <image> marks than images"),
        (("--prompt", "x", "--stop", ""), "none empty"),
    ):
        assert fault in one_line(*command("run", tiny_bundle, *FEW, *arguments))


def test_profile_asks_for_no_more_new_tokens_than_the_bundle_holds() -> None:
    given = ("--runs", 1, "--warmup", 0, "--alone", "--no-hash", "--threads", 1)
    code, said = command_json("profile", damage.bundle(), *given)
    assert code == 0
    assert [p["new_tokens"] for p in said["plans"].values()] == [damage.LIMITS.max_new_tokens]


# Stdin


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def give(content: bytes, is_terminal: bool = False) -> None:
        stream = io.TextIOWrapper(io.BytesIO(content), encoding="ascii")
        monkeypatch.setattr(stream, "isatty", lambda: is_terminal, raising=False)
        monkeypatch.setattr("sys.stdin", stream)

    return give


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_prompt_is_read_from_stdin_without_its_last_newline(
    tiny_bundle: Path, stdin: Callable[..., None], end: str
) -> None:
    prompt = "What is this?\n\n \u6f22\u5b57"
    expected = command_json("run", tiny_bundle, *FEW, "--prompt", prompt)
    stdin((prompt + end).encode())
    found = command_json("run", tiny_bundle, *FEW, "--prompt", "-")
    assert found[1]["token_ids"] == expected[1]["token_ids"] and found[0] == 0
    assert found[1]["prompt_tokens"] == expected[1]["prompt_tokens"]
    stdin(prompt.encode() + b"\n\n")  # one newline is removed, not two
    found = command_json("run", tiny_bundle, *FEW, "--prompt", "-")
    assert found[1]["prompt_tokens"] > expected[1]["prompt_tokens"]


def test_an_image_is_read_from_stdin_by_every_command_that_takes_one(
    tiny_bundle: Path, tmp_path: Path, stdin: Callable[..., None]
) -> None:
    content = Path(PHOTO).read_bytes()
    asked = (*FEW, "--prompt", PROMPT)
    expected = command_json("run", tiny_bundle, *asked, "--image", PHOTO)[1]["token_ids"]
    stdin(content)
    assert command_json("run", tiny_bundle, *asked, "--image", "-")[1]["token_ids"] == expected
    stdin(content)
    code, said = command_json(
        "profile", tiny_bundle, *asked, "--image", "-", "--runs", 1, "--warmup", 0
    )
    assert code == 0 and said["plans"]["none"]["visual_tokens"] == 16
    stdin(content)
    out = tmp_path / "page.html"
    assert command("show", tiny_bundle, *asked, "--image", "-", "-o", out)[0] == 0
    assert out.is_file()


def test_what_stdin_cannot_give_is_one_line_before_the_bundle_is_read(
    tmp_path: Path, stdin: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for content, arguments, fault in (
        (b"x", ("--prompt", "-", "--image", "-"), "--prompt - and --image -"),
        (b"x", ("--prompt", "-", "--prompt", "-"), "stdin cannot be read twice"),
        (b"x", ("--prompt", "x", "--image", "-", "--image", "-"), "stdin cannot be read twice"),
        (b"\xff\xfe", ("--prompt", "-"), "bytes that are not UTF-8"),
        (b"", ("--prompt", "x", "--image", "-"), "stdin holds no image"),
    ):
        stdin(content)
        assert fault in one_line(*command("run", tmp_path, *arguments))
    stdin(b"x", is_terminal=True)
    line = one_line(*command("run", tmp_path, "--prompt", "x", "--image", "-"))
    assert "an image cannot be typed on a terminal" in line and "--image - < photo.jpg" in line
    code, _, said = command("run", tmp_path, "--prompt", "-")
    assert code == 2 and said.startswith("type the prompt; end it with Ctrl-D")
    monkeypatch.setattr("sys.stdin", None)
    assert "stdin is closed" in one_line(*command("run", tmp_path, "--prompt", "-"))


def test_an_address_is_refused_in_words_of_the_command_line(tmp_path: Path) -> None:
    for command_name, rest in (
        ("run", ()),
        ("profile", ()),
        ("show", ("-o", tmp_path / "page.html")),
    ):
        for address in ("https://example.com/a.jpg", "http://a/b.png", "data:image/png;base64,AA"):
            line = one_line(
                *command(command_name, tmp_path, "--prompt", "x", "--image", address, *rest)
            )
            assert "download it first, then name the file: --image FILE" in line
            assert "bytes" not in line and "array" not in line
