import numpy as np
import pytest
from tokenizers import Tokenizer

from patchsieve.runtime.detokenize import TextStream
from tests.support.tiny_tokenizers import tokenizer

KINDS = ("qwen", "llama", "llama-first")
TEXTS = (
    "The cup is white.",
    "  two leading spaces",
    "emoji 😀👩‍👩‍👧 and 中文字 mixed é ñ",
    "ends with an emoji 🥳",
    "line\n\nline\ttab   spaces ",
    "a real \ufffd replacement \ufffd\ufffd character",
    "",
)


def stream_all(tok: Tokenizer, ids: list[int], **options: object) -> tuple[TextStream, list[str]]:
    stream = TextStream(tok, **options)
    pieces = [stream.push(token) for token in ids]
    return stream, [*pieces, stream.finish()]


def invalid_utf8_ids(tok: Tokenizer, rng: np.random.Generator, size: int) -> list[int]:
    """Random single bytes: nearly always broken UTF-8."""
    if tok.token_to_id("<0x00>") is not None:
        return [tok.token_to_id(f"<0x{byte:02X}>") for byte in rng.integers(0, 256, size)]
    by_length = [i for t, i in tok.get_vocab().items() if len(t) == 1]
    return [by_length[i] for i in rng.integers(0, len(by_length), size)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_is_the_decoded_text(kind: str, text: str) -> None:
    tok = tokenizer(kind)
    ids = tok.encode(text, add_special_tokens=False).ids
    stream, pieces = stream_all(tok, ids)
    assert stream.text == "".join(pieces) == tok.decode(ids, skip_special_tokens=True)
    assert not stream.stopped


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(6))
def test_random_tokens_stream_to_the_decoded_text(kind: str, seed: int) -> None:
    tok = tokenizer(kind)
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, tok.get_vocab_size(), 400).tolist()
    stream, _ = stream_all(tok, ids)
    assert stream.text == tok.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_broken_utf8_streams_to_the_decoded_text(kind: str, seed: int) -> None:
    tok = tokenizer(kind)
    rng = np.random.default_rng(seed)
    words = tok.encode("The cup 😀", add_special_tokens=False).ids
    ids = invalid_utf8_ids(tok, rng, 120) + words + invalid_utf8_ids(tok, rng, 3)
    stream, _ = stream_all(tok, ids)
    assert stream.text == tok.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
def test_no_piece_holds_half_a_character(kind: str) -> None:
    tok = tokenizer(kind)
    text = "smile 😀 中文 end"
    _, pieces = stream_all(tok, tok.encode(text, add_special_tokens=False).ids)
    assert "\ufffd" not in "".join(pieces)
    assert sum(map(bool, pieces)) > 3  # it streams: not everything at the end


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_give_no_text(kind: str) -> None:
    tok = tokenizer(kind)
    ids = tok.encode("The cup", add_special_tokens=False).ids
    image = tok.token_to_id("<image>")
    stream, _ = stream_all(tok, [image, *ids, image])
    assert stream.text == tok.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [("stands",), ("nds on", "zzz"), ("table", "on a t")])
def test_a_stop_string_ends_the_text_before_it(kind: str, stop: tuple[str, ...]) -> None:
    tok = tokenizer(kind)
    text = "The cup is white and it stands on a table."
    stream = TextStream(tok, stop)
    shown = ""
    for token in tok.encode(text, add_special_tokens=False).ids:
        shown += stream.push(token)
        if stream.stopped:
            break
    assert stream.stopped
    assert shown == stream.text == text[: min(text.find(s) for s in stop if s in text)]
    assert stream.push(tok.encode("cup").ids[-1]) == "" and stream.finish() == ""


@pytest.mark.parametrize("kind", KINDS)
def test_the_beginning_of_a_stop_string_is_held_and_then_released(kind: str) -> None:
    tok = tokenizer(kind)
    text = "The cup is white and it stands"
    ids = tok.encode(text, add_special_tokens=False).ids
    stream = TextStream(tok, ("white and it falls", "stands on"))
    before_finish = "".join(stream.push(token) for token in ids)
    assert before_finish == "The cup is white and it "
    assert stream.finish() == "stands"
    assert stream.text == text and not stream.stopped


def test_a_stop_string_that_completes_in_the_last_flush_still_stops() -> None:
    tok = tokenizer("llama")
    ids = tok.encode("cup 中", add_special_tokens=False).ids
    stream, _ = stream_all(tok, ids, stop=("中",))
    assert stream.stopped and stream.text == "cup "


@pytest.mark.parametrize("kind", KINDS)
def test_the_window_stays_short_in_a_long_answer(kind: str) -> None:
    tok = tokenizer(kind)
    rng = np.random.default_rng(0)
    stream = TextStream(tok)
    longest = 0

    class Counting:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            nonlocal longest
            longest = max(longest, len(ids))
            return tok.decode(ids, skip_special_tokens=skip_special_tokens)

    stream._tokenizer = Counting()
    lone = tok.encode("\ufffd", add_special_tokens=False).ids
    ids = rng.integers(260, tok.get_vocab_size(), 2000).tolist()
    for token in [*ids, *(lone * 100 if kind == "qwen" else [])]:
        stream.push(token)
    assert longest <= 40
