"""Stop strings end an answer where Hugging Face ends it, and nothing of them is shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.generation.stopping_criteria import StopStringCriteria

from patchsieve.contract.errors import RequestError
from patchsieve.runtime.detokenize import TextStream
from patchsieve.runtime.model import Model
from patchsieve.runtime.result import Result
from patchsieve.runtime.stopping import TokenBytes
from tests.support.tiny_bundles import pictures
from tests.support.tiny_tokenizers import special_tokens, tokenizer

KINDS = ("qwen", "llama", "llama-first")
END = {"qwen": "<|im_end|>", "llama": "</s>", "llama-first": "</s>"}


def hugging_face_stops(kind: str, ids: Sequence[int], stops: Sequence[str]) -> int | None:
    """After how many tokens Hugging Face's criterion ends an answer."""
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer(kind), **special_tokens(kind))
    criterion = StopStringCriteria(fast, list(stops))
    counts = range(1, len(ids) + 1)
    return next((n for n in counts if criterion(torch.tensor([ids[:n]]), None).item()), None)


def stream(
    tok: Tokenizer, ids: Sequence[int], stops: Sequence[str]
) -> tuple[int | None, str, list[str]]:
    """After how many tokens the stream stopped, its text and its pieces."""
    found = TextStream(tok, stops)
    pieces = []
    for number, token in enumerate(ids, 1):
        pieces.append(found.push(token))
        if found.stopped:
            assert found.push(token) == found.finish() == ""
            assert "".join(pieces) == found.text
            return number, found.text, pieces
    return None, found.text + found.finish(), pieces


def said(tok: Tokenizer, ids: Sequence[int]) -> bytes:
    read = TokenBytes(tok)
    return b"".join(read[token] for token in ids)


def encode(tok: Tokenizer, text: str) -> list[int]:
    return tok.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("The cup{end} is white", "{end}", "The cup"),
        ("The cup{end} is white", "cup{end} ", "The "),
        ("The cup{end} is white", "p{end}", "The cu"),
        ("The cup{end} is white", "{part}", "The cup"),  # inside a special token
        ("The cup### is white", "###", "The cup"),
        ("The cup is white", "The", ""),
        ("The cup is white", " is w", "The cup"),
        ("The cup is white", "hit", "The cup is w"),
        ("It is 中文字 here", "文", "It is 中"),
        ("It is 中文字 here", "中文字 h", "It is "),
        ("a 😀😀 b", "😀 b", "a 😀"),
        ("one\n\ntwo", "\n\n", "one"),
        ("a real \ufffd\ufffd end", "\ufffd end", "a real \ufffd"),
    ],
)
def test_a_stop_string_of_any_text_ends_the_answer_as_hugging_face_does(
    kind: str, text: str, stop: str, shown: str
) -> None:
    tok, end = tokenizer(kind), END[kind]
    fill = {"{end}": end, "{part}": end[1:-1]}
    for name, value in fill.items():
        text, stop = text.replace(name, value), stop.replace(name, value)
    ids = encode(tok, text)
    count, found, pieces = stream(tok, ids, [stop])
    assert count == hugging_face_stops(kind, ids, [stop]) is not None
    assert found == shown and "".join(pieces) == shown
    assert stop.encode() not in said(tok, ids[: count - 1])


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_token_of_an_answer_may_hold_the_stop_string_with_its_space(kind: str) -> None:
    tok = tokenizer(kind)
    ids = encode(tok, "x is white")[-2:]
    assert stream(tok, ids, [" is"])[:2] == (1, "")
    assert hugging_face_stops(kind, ids, [" is"]) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_of_several_stop_strings_the_first_to_be_complete_ends_the_answer(kind: str) -> None:
    tok = tokenizer(kind)
    ids = encode(tok, "The cup is white and it stands on a table.")
    for stops, shown in (
        (["stands", "white and", "white"], "The cup is "),
        (["and it stands on", "it", "zzz"], "The cup is wh"),
        (["white and it falls", "and it stands", "stands on a"], "The cup is white "),
        (["is is", "is white"], "The cup "),
    ):
        count, found, _ = stream(tok, ids, stops)
        assert (count, found) == (hugging_face_stops(kind, ids, stops), shown)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_that_completes_two_stop_strings_is_cut_at_the_one_that_begins_first(
    kind: str,
) -> None:
    tok = tokenizer(kind)
    ids = encode(tok, "The cup is white")
    white = next(i for i in range(len(ids)) if b"whi" in said(tok, [ids[i]]))
    for stops in (["hit", "whi"], ["whi", "hit"], ["hit", "s whi"], ["s whi", "hit"]):
        count, found, _ = stream(tok, ids, stops)
        assert count == white + 1
        assert found == "The cup is white"[: min("The cup is white".find(s) for s in stops)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_random_answers_stop_where_hugging_face_stops_and_show_what_came_before(
    kind: str, seed: int
) -> None:
    tok, rng = tokenizer(kind), np.random.default_rng(seed)
    words = encode(tok, "It is 中文字 and 😀😀 stands {end} on it\n\n".replace("{end}", END[kind]))
    ids = rng.choice(words, 60).tolist()  # byte tokens break apart: broken UTF-8 comes, too
    whole = said(tok, ids).decode(errors="ignore")
    stopped = 0
    for _ in range(12):
        start = int(rng.integers(len(whole)))
        stops = [whole[start : start + 1 + int(rng.integers(6))], "stands on zzz"]
        count, found, _ = stream(tok, ids, stops)
        assert count == hugging_face_stops(kind, ids, stops)
        assert tok.decode(ids).startswith(found) or "\ufffd" in found
        if count is None:
            assert found == tok.decode(ids)
            continue
        stopped += 1
        before = said(tok, ids[:count]).find(stops[0].encode())
        kept = next(n for n in range(count + 1) if len(said(tok, ids[: n + 1])) > before)
        assert found.startswith(tok.decode(ids[:kept]))
        if len(said(tok, ids[:kept])) == before:
            assert found == tok.decode(ids[:kept])
    assert stopped > 3


# With a model


@pytest.mark.slow
@pytest.mark.parametrize("row", ["llama-gqa-tied-linear-rope", "qwen2"])
def test_a_model_says_the_tokens_that_generate_says_and_stops_in_later_turns_too(
    row: str, tiny: Any
) -> None:
    model: Model = tiny(row).model()
    reference = tiny(row).hugging_face
    few: dict[str, Any] = {"max_new_tokens": 12, "ignore_eos": True}

    def generate(messages: list[dict[str, Any]], stop: str | None) -> list[int]:
        inputs = reference.hugging_face_inputs(reference.prompt(messages), pictures(1))
        given = {"stop_strings": [stop], "tokenizer": reference.processor.tokenizer}
        out = reference.model.generate(
            **inputs, max_new_tokens=12, do_sample=False, eos_token_id=None,
            **(given if stop else {}),
        )  # fmt: skip
        return out[0, inputs.input_ids.shape[1] :].tolist()

    first = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    answer = model.generate(pictures(1), "What?", **few)
    read = TokenBytes(model.bundle.prompts.tokenizer)
    words = [text for text in (read[t].decode(errors="ignore") for t in answer.token_ids) if text]
    for stop in (words[0], words[2][-1] + words[3], words[4][:-1] or words[4], words[-1]):
        chat, found = model.chat(), Result()
        pieces = list(chat.stream("What?", pictures(1), result=found, stop=[stop], **few))
        assert found.token_ids == generate(first, stop)
        assert found.finish_reason == "stop" and "".join(pieces) == found.text
        said = {"role": "assistant", "content": [{"type": "text", "text": found.text}]}
        then = [*first, said, {"role": "user", "content": [{"type": "text", "text": "Why?"}]}]
        later = chat.ask("Why?", **few)
        assert later.token_ids == generate(then, None)
        chat.close()
    stop = next(text for t in later.token_ids[2:] if (text := read[t].decode(errors="ignore")))
    chat = model.chat()
    assert chat.ask("What?", pictures(1), stop=[words[-1]], **few).text == found.text
    stopped = chat.ask("Why?", stop=[stop], **few)
    assert stopped.token_ids == generate(then, stop) and stopped.finish_reason == "stop"
    chat.close()


def test_a_stop_string_of_the_prompt_does_not_stop_and_an_empty_one_is_refused(tiny: Any) -> None:
    model: Model = tiny("llama-gqa-tied-linear-rope").model()
    expected = model.generate(pictures(1), "What is on the table?", max_new_tokens=4)
    for stop in ("table", "ASSISTANT:", "What is on the table? ASSISTANT:"):
        found = model.generate(pictures(1), "What is on the table?", max_new_tokens=4, stop=[stop])
        assert found.token_ids == expected.token_ids and found.finish_reason != "stop"
    for stop in (("",), ("a", "")):
        with pytest.raises(RequestError, match="bad stop.*none empty"):
            model.generate(pictures(1), "What?", stop=stop)
