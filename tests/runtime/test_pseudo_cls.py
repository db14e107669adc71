"""Which words judge an image: eqs. 6-8 of IVTP, on texts of every kind."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from patchsieve.contract.model import Scorer
from patchsieve.runtime.inputs.prompt import Prompt
from patchsieve.runtime.pseudo_cls import Words, cosines, pool, to_other_tokens
from patchsieve.runtime.rows import TEXT, Rows
from patchsieve.runtime.scorer import TextScorer
from tests.references import ivtp as reference
from tests.support.tiny_clip import make_tokenizer
from tests.support.tiny_tokenizers import KINDS, tokenizer

TEXTS = [
    "What is on the table?",
    "  Describe   the IMAGE\nin\tdetail. ",
    "Is there a \U0001f600 or a \U0001f469‍\U0001f469‍\U0001f467 in the café?",
    "猫はどこですか? Ä, ö and ß.",
    "what? " * 40,
    "a",
    " ",
]


def cuts(rng: np.random.Generator, length: int) -> list[tuple[int, int]]:
    """Spans as a tokeniser cuts a text; some characters belong to no token."""
    ends = sorted({0, length, *rng.integers(0, length + 1, 6).tolist()})
    return [s for s in zip(ends, ends[1:], strict=False) if rng.random() < 0.8]


@pytest.mark.parametrize("seed", range(20))
def test_relevance_passes_to_tokens_that_share_characters(seed: int) -> None:
    rng = np.random.default_rng(seed)
    spans, other = cuts(rng, 30), [*cuts(rng, 30), (4, 4)]
    cls, text = rng.normal(size=5), rng.normal(size=(len(spans), 5))
    found = to_other_tokens(cosines(cls, text), np.array(spans), np.array(other))
    expected = reference.relevance(cls.tolist(), text, spans, other)
    np.testing.assert_allclose(found, expected)
    assert found[-1] == -np.inf  # a token of no character
    embeddings, visual = rng.normal(size=(len(other), 4)), rng.normal(size=4)
    for tau in (-2.0, 0.2, 2.0):
        row, chosen = reference.pseudo_cls(embeddings, expected, tau, visual)
        np.testing.assert_allclose(pool(embeddings, found >= tau, visual), row)
        assert np.flatnonzero(found >= tau).tolist() == chosen


def test_one_of_clips_tokens_serves_all_pieces_inside_it() -> None:
    c = np.array([0.3, 0.6])
    spans, other = np.array([(0, 5), (5, 8)]), np.array([(0, 2), (2, 5), (4, 6), (8, 9), (5, 5)])
    found = to_other_tokens(c, spans, other)
    np.testing.assert_allclose(found, [0.3, 0.3, 0.45, -np.inf, -np.inf])


def test_vectors_of_length_zero_are_like_nothing() -> None:
    assert (cosines(np.zeros(3), np.ones((2, 3))) == 0).all()
    assert (cosines(np.ones(3), np.zeros((2, 3))) == 0).all()


def scorer(tmp_path, run) -> TextScorer:
    made = make_tokenizer()
    (tmp_path / "t.json").write_text(made.backend_tokenizer.to_str(), encoding="utf-8")
    facts = Scorer("", "t.json", made.bos_token_id, made.eos_token_id, window=12, width=2)
    return TextScorer(facts, tmp_path / "t.json", run)


def test_bfloat16_rows_are_pooled_as_torch_pools_them() -> None:
    """The host holds their bits; the mean rounds as torch rounds, ties to even."""
    rows = (torch.randn(9, 33, generator=torch.manual_seed(0)) * 3).to(torch.bfloat16)
    cls = rows[0] * 2
    bits = rows.view(torch.uint16).numpy()
    chosen = np.arange(9) % 2 == 0
    mean = rows.double()[torch.from_numpy(chosen)].mean(0).to(torch.bfloat16)
    pooled = pool(bits, chosen, cls.view(torch.uint16).numpy())
    np.testing.assert_array_equal(pooled, mean.view(torch.uint16).numpy())
    none = pool(bits, np.zeros(9, bool), cls.view(torch.uint16).numpy())
    np.testing.assert_array_equal(none, cls.view(torch.uint16).numpy())
    found = cosines(cls.view(torch.uint16).numpy(), bits)
    expected = torch.nn.functional.cosine_similarity(cls.double()[None], rows.double())
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-12)


def test_long_texts_are_cut_into_windows_whose_marks_are_left_out(tmp_path) -> None:
    runs: list[np.ndarray] = []

    def run(ids: np.ndarray) -> np.ndarray:
        runs.append(ids)
        return np.stack((ids, ids * 2), axis=-1).astype(np.float32)

    made = make_tokenizer()
    for text in TEXTS:
        runs.clear()
        features, spans = scorer(tmp_path, run)(text)
        expected = made(text, add_special_tokens=False, return_offsets_mapping=True)
        assert features[:, 0].astype(int).tolist() == expected.input_ids
        assert spans.tolist() == [list(pair) for pair in expected.offset_mapping]
        ids = np.concatenate(runs) if runs else np.zeros((0, 12), int)
        assert len(ids) == -(-len(features) // 10) and all(len(part) <= 8 for part in runs)
        assert (ids[:, 0] == made.bos_token_id).all() and (ids[:, -1] == made.eos_token_id).all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_word_finds_its_clip_tokens_whatever_cuts_it(kind: str, tmp_path) -> None:
    score = scorer(tmp_path, lambda ids: np.zeros((*ids.shape, 2)))
    for text in TEXTS:
        _, spans = score(text)
        cut = tokenizer(kind).encode(text, add_special_tokens=False).offsets
        found = to_other_tokens(np.ones(len(spans)), spans, np.array(cut).reshape(-1, 2))
        for value, (start, stop) in zip(found, cut, strict=True):
            is_word = bool(text[start:stop].strip())
            assert np.isfinite(value) == is_word, (text[start:stop], value)


def test_a_question_around_an_image_leaves_a_blank_for_it() -> None:
    text = "USER: Is <image> a cat? ASSISTANT:"
    offsets = np.array([(0, 5), (5, 8), (8, 16), (16, 18), (18, 22), (22, 23), (23, 34)])
    prompt = Prompt(text, np.arange(7), np.array([2]), np.array([1, 3, 4, 5]), offsets, True)
    question, spans = prompt.question()
    assert question == " Is         a cat?"
    assert [question[a:b] for a, b in spans] == [" Is", " a", " cat", "?"]


def test_words_are_told_as_json() -> None:
    words = Words(1, ("a", "b"), np.array([0.25, -np.inf]), np.array([True, False]))
    told = json.loads(json.dumps(words.to_dict()))
    assert [one["relevance"] for one in told["tokens"]] == [0.25, None]
    assert told["image"] == 1 and not told["is_visual_cls"]
    nothing = Words(0, ("a",), None, np.array([False])).to_dict()
    assert nothing["is_visual_cls"] and nothing["tokens"][0]["relevance"] is None


def rows() -> Rows:
    """System | image 0 | image 1 | text, as a vision graph that prunes leaves them."""
    image = np.array([-1, 0, 0, 1, 1, -1, -1])
    return Rows(
        position_ids=np.array([0, 2, 4, 6, 7, 9, 10]),
        image=image,
        patch_ids=np.array([-1, 1, 3, 1, 2, -1, -1]),
        places=np.array([-1, 0, 1, 0, 1, -1, -1]),
        is_instruction=image < 0,
        sizes=np.ones(7, np.float32),
        side_of=np.full(7, TEXT),
        next_position=11,
    )


def test_side_rows_stand_last_at_the_position_of_the_text_behind_their_image() -> None:
    both = rows().with_side_rows()
    assert both.position_ids[7:].tolist() == [9, 9]
    assert both.last_seen().tolist() == [0, 1, 2, 3, 4, 5, 6, 2, 4]
    assert both.num_side == 2 and both.side_row(1).tolist() == [8]
    assert both.last_row().tolist() == [6]
    assert both.text_for(0).tolist() == [5, 6]
    fewer = both.take(np.array([0, 2, 3, 6, 7, 8]))
    assert fewer.last_seen().tolist() == [0, 1, 2, 3, 1, 2]
    ends = rows().take(np.arange(5)).with_side_rows()
    assert ends.position_ids[5:].tolist() == [11, 11]  # no text behind: the next one's
    assert ends.text_for(1).tolist() == ends.last_row().tolist() == [4]
