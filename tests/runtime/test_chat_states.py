"""What a conversation is between its turns: busy, interrupted, closed; and what it refuses."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from patchsieve.contract.errors import PatchsieveError, RequestError
from patchsieve.runtime.bundle import Bundle
from patchsieve.runtime.chat import Chat
from patchsieve.runtime.model import Model
from patchsieve.runtime.ort.backend import OrtBackend
from patchsieve.runtime.sampling_options import SamplingOptions
from tests.support.tiny_bundles import pictures

ROW = "llama-gqa-tied-linear-rope"
QUESTION = "What is on the table?"
FASTV = [{"layer": 1, "method": "fastv", "params": {"keep_ratio": 0.5}}]
FEW: dict[str, Any] = {"max_new_tokens": 12, "ignore_eos": True}


@pytest.fixture
def model(tiny: Any) -> Model:
    """One bundle for all tests: each closes its conversations."""
    return tiny(ROW).model(FASTV)


def refused(match: str) -> Any:
    """The block raises one line that matches."""
    return pytest.raises(RequestError, match=rf"\A[^\n]*{match}[^\n]*\Z")


# Requests


@pytest.mark.parametrize("prompt", (None, 7, b"bytes", ["a", "b"], {"role": "user"}))
@pytest.mark.parametrize("is_raw", (False, True))
def test_a_prompt_that_is_no_string_is_refused_by_its_type(model, prompt, is_raw: bool) -> None:
    kind = type(prompt).__name__
    with refused(f"the prompt is not text.*type {kind}"):
        model.generate(None if is_raw else pictures(1), prompt, raw=is_raw)


@pytest.mark.parametrize("image", (7, {"image": 1}, {1}, object(), [[1]], iter(())))
def test_an_image_that_is_none_is_refused_by_its_type(model, image) -> None:
    inner = image[0] if isinstance(image, list) else image
    with refused(f"cannot read an image.*type {type(inner).__name__}"):
        model.generate(image, QUESTION)


def test_an_unknown_option_is_answered_with_the_known_ones(model) -> None:
    known = ", ".join(option.name for option in fields(SamplingOptions))
    with refused(f"unknown option of a request.*found: foo, bar.*expected: {known}"):
        model.generate(None, QUESTION, foo=1, max_new_tokens=3, bar=2)


def test_a_bundle_is_checked_by_hash_or_by_size_and_a_typo_is_refused(model) -> None:
    for check in ("hashes", "Hash", "", None, True, ["size"]):
        with refused("bad check.*'full' or 'hash' or 'size'"):
            Bundle(model.bundle.path, "cpu", check=check)
    for check in ("full", "hash", "size"):
        Bundle(model.bundle.path, "cpu", check=check)


def test_threads_below_one_are_refused(model) -> None:
    for threads in (0, -3, 1.5, True, "2"):
        with refused("bad threads.*a whole number >= 1"):
            OrtBackend(model.bundle, threads=threads)
    assert OrtBackend(model.bundle).options.intra_op_num_threads >= 1


def test_no_graph_keeps_its_threads_spinning_when_it_has_run(model) -> None:
    model.generate(None, QUESTION, max_new_tokens=1)
    sessions = model.backend._sessions.values()
    told = [s.get_session_options() for s in sessions]
    assert len(told) >= 3  # tower, compaction, a stage
    stop = {options.get_session_config_entry("session.force_spinning_stop") for options in told}
    assert stop == {"1"}


# Turns


def agree(chat: Chat, twin: Chat, *turns: str) -> None:
    """Both answer alike from here on; then both are closed."""
    for question in turns:
        found, expected = (one.ask(question, **FEW) for one in (chat, twin))
        assert found.token_ids == expected.token_ids and found.sites == expected.sites
        assert (found.selection, found.notes) == (expected.selection, expected.notes)
        assert found.kv_bytes == expected.kv_bytes
    chat.close()
    twin.close()


@pytest.mark.parametrize("is_first", (True, False))
def test_a_second_turn_waits_for_the_answer_that_is_being_streamed(model, is_first: bool) -> None:
    chat, twin = model.chat(), model.chat()
    image = pictures(1) if is_first else None
    if not is_first:
        for one in (chat, twin):
            one.ask(QUESTION, pictures(1), **FEW)
    stream = chat.stream("Is it red?", image, **FEW)
    pieces = [next(stream)]
    for second in (
        lambda: chat.ask("Is it hot?"),
        lambda: chat.ask("Is it hot?", repick=True),
        lambda: next(chat.stream("Is it hot?", pictures(1))),
    ):
        with refused("an answer is still being streamed.*finish or close it first"):
            second()
    pieces += stream
    assert "".join(pieces) == twin.ask("Is it red?", image, **FEW).text
    agree(chat, twin, "Is it hot?", "Why?")


def test_an_answer_that_was_closed_failed_or_never_begun_lets_the_next_turn_in(model) -> None:
    chat, twin = model.chat(), model.chat()
    for one in (chat, twin):
        one.ask(QUESTION, pictures(1), **FEW)
    never_begun = chat.stream("Is it red?", **FEW)
    dropped = chat.stream("Is it red?", **FEW)
    next(dropped)
    dropped.close()
    with refused("prompt is empty"):
        chat.ask("")
    with refused("temperature"):
        chat.ask("Is it red?", temperature=-1)
    agree(chat, twin, "Is it hot?", "Why?")
    with refused("conversation is closed"):
        next(never_begun)


def test_a_conversation_closed_while_it_answers_keeps_its_cache_until_the_stream_ends(
    model,
) -> None:
    expected = model.generate(pictures(1), QUESTION, **FEW)
    for has_reader in (True, False):
        chat = model.chat()
        cache = chat.cache
        stream = chat.stream(QUESTION, pictures(1), **FEW)
        next(stream)
        chat.close()
        other = model.chat()
        assert other.cache is not cache
        assert other.ask(QUESTION, pictures(1), **FEW).token_ids == expected.token_ids
        other.close()
        if has_reader:
            with refused("conversation is closed"):
                next(stream)
        else:
            stream.close()
        assert chat.cache is None and cache.position == 0
        assert model.generate(pictures(1), QUESTION, **FEW).token_ids == expected.token_ids
        with refused("conversation is closed"):
            chat.ask(QUESTION)


def test_a_model_closed_while_it_answers_ends_the_answer_in_one_line(model) -> None:
    own = Model(model.bundle.path, threads=1, check="size")
    chat, stream = own.chat(), own.stream(pictures(1), QUESTION, **FEW)
    next(stream)
    chat.ask(QUESTION, pictures(1), **FEW)
    own.close()
    for use in (lambda: next(stream), lambda: chat.ask("Why?"), own.chat, own.generate):
        with refused("the model is closed.*load the bundle again"):
            use()
    chat.close()
    own.close()


def test_a_choice_that_an_interrupted_answer_lost_is_made_again_and_the_result_says_so(
    model,
) -> None:
    note = "the last answer was interrupted while it chose again"
    chat, twin = model.chat(), model.chat()
    for one in (chat, twin):
        assert one.ask(QUESTION, pictures(1), **FEW).selection == "picked"
    for _ in range(2):  # the second finds nothing in the cache
        stream = chat.stream("Is it red?", repick=True, **FEW)
        next(stream)
        stream.close()
    found = chat.ask("Is it hot?", **FEW)
    expected = twin.ask("Is it hot?", repick=True, **FEW)
    assert found.selection == expected.selection == "repicked"
    assert [text.startswith(note) for text in found.notes] == [True] and not expected.notes
    assert (found.token_ids, found.sites) == (expected.token_ids, expected.sites)
    assert found.prompt_tokens == expected.prompt_tokens
    agree(chat, twin, "Why?")


def test_an_interrupted_first_answer_had_made_no_choice(model) -> None:
    chat, twin = model.chat(), model.chat()
    stream = chat.stream("Is it red?", pictures(1), **FEW)
    next(stream)
    stream.close()
    found, expected = (one.ask(QUESTION, pictures(1), **FEW) for one in (chat, twin))
    assert (found.selection, found.notes) == ("picked", [])
    assert found.token_ids == expected.token_ids
    agree(chat, twin, "Why?")


def test_a_repick_that_fails_before_it_begins_keeps_the_choice(model, monkeypatch) -> None:
    chat, twin = model.chat(), model.chat()
    for one in (chat, twin):
        one.ask(QUESTION, pictures(1), **FEW)

    def fails(*_: Any) -> Any:
        raise PatchsieveError("the tower fails")

    with monkeypatch.context() as patch:
        patch.setattr(model.pipeline, "see", fails)
        with pytest.raises(PatchsieveError, match="the tower fails"):
            chat.ask("And this?", pictures(1), repick=True, **FEW)
    agree(chat, twin, "Is it hot?", "Why?")


def test_a_new_prefill_of_an_unpruned_plan_chooses_nothing(model) -> None:
    chat = model.chat(plan="none")
    chat.ask(QUESTION, pictures(1), **FEW)
    assert chat.ask("Is it hot?", repick=True, **FEW).selection == "none"
    chat.close()


# The end of an answer


def test_bytes_used_are_those_before_a_stop_string_rewound_the_cache(model) -> None:
    chat, twin = model.chat(), model.chat()
    whole = twin.ask(QUESTION, pictures(1), **FEW)
    stop = next(piece for piece in whole.text[3:].split() if piece)[:2]
    stopped = chat.ask(QUESTION, pictures(1), stop=[stop], **FEW)
    count = len(stopped.token_ids)
    assert stopped.finish_reason == "stop" and 1 <= count <= len(whole.token_ids)
    again = model.generate(pictures(1), QUESTION, **FEW | {"max_new_tokens": count})
    assert again.token_ids == stopped.token_ids
    assert again.kv_bytes == stopped.kv_bytes
    assert len(stopped.timings_ms["decode_steps"]) == count - 1
    # The cache itself was rewound to the prompt.
    assert chat.cache.kv_bytes()["used"] < stopped.kv_bytes["used"] or count == 1
    chat.close()
    twin.close()
