import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from patchsieve.contract.errors import PatchsieveError, RequestError
from patchsieve.runtime.sampling import Sampler
from patchsieve.runtime.sampling_options import SamplingOptions
from patchsieve.runtime.turn import Turn

CASES = [
    {"temperature": 1.0},
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 0.8, "top_p": 0.3},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 0.6, "top_k": 40, "top_p": 0.95},
    {"temperature": 1.0, "repetition_penalty": 1.3},
    {"temperature": 0.9, "top_k": 50, "top_p": 0.8, "repetition_penalty": 0.7},
    {"temperature": 1.0, "top_k": 10_000_000},
]
# Eight tokens, 3 and 5 end an answer, the prompt has eleven tokens and its image token lies past V
EOS, PROMPT, V = (3, 5), [0, 1, 2, 8, 8, 8, 4, 1, 2, 1, 2], 8
PENALTIES = [
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3},
    {"no_repeat_ngram_size": 40},
    {"min_length": 15},
    {"min_length": 5},
    {"min_new_tokens": 4},
    {"suppress_tokens": (1, 6, 99)},
    {"begin_suppress_tokens": (0, 4)},
    {"bad_words_ids": ((6,), (2, 7), (1, 2), (3,), (1, 2, 1, 2, 0), (0, 1, 2, 4) * 9)},
    {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 3,
        "min_new_tokens": 6,
        "suppress_tokens": (6,),
        "begin_suppress_tokens": (1,),
        "bad_words_ids": ((4, 0),),
    },
]


def huggingface_penalties(options: SamplingOptions) -> LogitsProcessorList:
    """The processors that `generate` makes of these options, in its order."""
    asked = {
        "repetition_penalty": lambda value: RepetitionPenaltyLogitsProcessor(value),
        "no_repeat_ngram_size": lambda value: NoRepeatNGramLogitsProcessor(value),
        "bad_words_ids": lambda value: NoBadWordsLogitsProcessor(
            [list(word) for word in value], torch.tensor(EOS)
        ),
        "min_length": lambda value: MinLengthLogitsProcessor(value, torch.tensor(EOS)),
        "min_new_tokens": lambda value: MinNewTokensLengthLogitsProcessor(
            len(PROMPT), value, torch.tensor(EOS)
        ),
        "suppress_tokens": lambda value: SuppressTokensLogitsProcessor(value),
        "begin_suppress_tokens": lambda value: SuppressTokensAtBeginLogitsProcessor(
            value, len(PROMPT)
        ),
    }
    plain = SamplingOptions()
    return LogitsProcessorList(
        make(getattr(options, name))
        for name, make in asked.items()
        if getattr(options, name) != getattr(plain, name)
    )


@pytest.mark.parametrize("case", PENALTIES, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_penalties_are_those_of_hugging_face_at_each_token(
    case: dict[str, object], temperature: float
) -> None:
    rng = np.random.default_rng(0)
    options = SamplingOptions(temperature=temperature, max_new_tokens=8, seed=0, **case)
    sampler, theirs, said = Sampler(options, EOS, PROMPT), huggingface_penalties(options), []
    changed = 0
    for _ in range(8):
        logits = rng.standard_normal(V).astype(np.float32)
        ids = torch.tensor([[*PROMPT, *said]])
        wanted = theirs(ids, torch.from_numpy(logits)[None].clone())[0].numpy()
        changed += not np.array_equal(wanted, logits)
        if np.isneginf(wanted).all():
            with pytest.raises(RequestError, match="forbid every token"):
                sampler.next_token(logits)
            break
        if temperature:
            ids, probabilities = sampler.candidates(logits)
            assert ids.tolist() == np.flatnonzero(wanted > -np.inf).tolist()
            expected = torch.softmax(torch.from_numpy(wanted).double(), -1).numpy()[ids]
            assert np.abs(probabilities - expected).max() < 1e-6
            said.append(sampler.next_token(logits))
            assert said[-1] in ids
        else:
            said.append(sampler.next_token(logits))
            assert said[-1] == int(wanted.argmax())
    assert changed or case in ({"no_repeat_ngram_size": 40}, {"min_length": 5})


def test_tokens_are_not_drawn_from_the_numbers_that_feed_noise() -> None:
    """One seed, two streams: a method's noise and the draws of tokens are independent."""
    sampler = Sampler(SamplingOptions(temperature=1.0, seed=5))
    drawn = [sampler.next_token(np.zeros(1 << 20, np.float32)) / (1 << 20) for _ in range(3)]
    noise = Turn("none", SamplingOptions(seed=5)).noise.random(3)
    assert noise.tolist() == np.random.default_rng(5).random(3).tolist()  # as 0.1 drew it
    assert np.abs(np.array(drawn) - noise).min() > 1e-3


def huggingface_probabilities(
    logits: np.ndarray, history: list[int], options: SamplingOptions
) -> np.ndarray:
    processors = LogitsProcessorList()
    if options.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    processors.append(TemperatureLogitsWarper(options.temperature))
    if options.top_k:
        processors.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        processors.append(TopPLogitsWarper(options.top_p))
    scores = processors(torch.tensor([history]), torch.from_numpy(logits)[None].clone())
    return torch.softmax(scores.double(), dim=-1)[0].numpy()


def our_probabilities(
    logits: np.ndarray, history: list[int], options: SamplingOptions
) -> np.ndarray:
    ids, probabilities = Sampler(options, (), history).candidates(logits)
    full = np.zeros(logits.size)
    full[ids] = probabilities
    return full


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("size", [50, 5000])
@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_the_distribution_is_that_of_hugging_face(
    case: dict[str, float], size: int, scale: float
) -> None:
    options = SamplingOptions(**case)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        logits = (rng.standard_normal(size) * scale).astype(np.float32)
        history = rng.integers(0, size, 30).tolist()
        ours = our_probabilities(logits, history, options)
        theirs = huggingface_probabilities(logits, history, options)
        assert np.abs(ours - theirs).max() < 1e-6  # float32 softmax against float64
        assert np.array_equal(ours > 0, theirs > 0)


def test_ties_at_the_top_k_edge_are_all_kept() -> None:
    logits = np.array([3, 1, 2, 2, 2, 0], dtype=np.float32)
    options = SamplingOptions(temperature=1.0, top_k=2)
    ids, _ = Sampler(options).candidates(logits)
    assert ids.tolist() == [0, 2, 3, 4]


@pytest.mark.parametrize("size", [8192, 65536])
def test_a_nucleus_in_a_flat_distribution_keeps_the_lower_ids(size: int) -> None:
    options = SamplingOptions(temperature=1.0, top_p=0.5)
    ids, probabilities = Sampler(options).candidates(np.zeros(size, dtype=np.float32))
    assert ids.tolist() == list(range(size // 2))
    assert probabilities.sum() == pytest.approx(1)


@pytest.mark.parametrize("scale", [0.05, 1.0, 3.0])
def test_a_large_nucleus_is_that_of_a_full_sort(scale: float) -> None:
    logits = (np.random.default_rng(1).standard_normal(60_000) * scale).astype(np.float32)
    options = SamplingOptions(temperature=1.0, top_p=0.6)
    ids, _ = Sampler(options).candidates(logits)
    weights = np.exp(logits.astype(np.float64))
    order = np.argsort(-weights)
    mass = np.cumsum(weights[order]) / weights.sum()
    assert ids.tolist() == sorted(order[: int(np.searchsorted(mass, 0.6)) + 1].tolist())


def test_greedy_takes_the_lower_of_equal_logits() -> None:
    assert Sampler(SamplingOptions()).next_token(np.array([0, 5, 5, 1], dtype=np.float32)) == 1


def test_greedy_obeys_the_repetition_penalty() -> None:
    logits = np.array([2.0, 1.9, -1.0], dtype=np.float32)
    sampler = Sampler(SamplingOptions(repetition_penalty=1.5), (), [0, 0, 99, 2])
    assert sampler.next_token(logits) == 1
    assert logits.tolist() == pytest.approx([2.0, 1.9, -1.0])  # the caller's row is left alone


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others() -> None:
    logits = np.zeros(1000, dtype=np.float32)

    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingOptions(temperature=1.0, seed=seed))
        return [sampler.next_token(logits) for _ in range(20)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(None) != draw(None)


def test_tokens_are_drawn_as_often_as_their_probability_says() -> None:
    logits = np.random.default_rng(0).standard_normal(12).astype(np.float32) * 1.5
    options = SamplingOptions(temperature=0.9, top_k=8, top_p=0.95, seed=3)
    sampler = Sampler(options)
    ids, probabilities = sampler.candidates(logits)
    draws = 20_000
    counts = np.bincount([sampler.next_token(logits) for _ in range(draws)], minlength=12)
    assert counts.sum() == counts[ids].sum()
    expected = probabilities * draws
    chi_square = ((counts[ids] - expected) ** 2 / expected).sum()
    assert chi_square < 26  # 7 degrees of freedom or fewer: p below 0.001


def test_a_tiny_temperature_does_not_overflow() -> None:
    logits = np.array([900.0, 901.0, -1000.0], dtype=np.float32)
    assert Sampler(SamplingOptions(temperature=1e-30, seed=0)).next_token(logits) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_an_error(bad: float) -> None:
    logits = np.array([0.0, bad, 1.0], dtype=np.float32)
    for temperature in (0.0, 1.0):
        with pytest.raises(PatchsieveError, match="not finite.*1 of 3"):
            Sampler(SamplingOptions(temperature=temperature)).next_token(logits)


@pytest.mark.parametrize(
    "option",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": 1.5},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_k": True},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"repetition_penalty": 0},
        {"no_repeat_ngram_size": -1},
        {"min_length": 1.0},
        {"min_new_tokens": None},
        {"suppress_tokens": 5},
        {"begin_suppress_tokens": (-1,)},
        {"bad_words_ids": ((),)},
        {"bad_words_ids": (1,)},
        {"seed": -1},
        {"stop": "USER:"},
        {"stop": ("",)},
    ],
    ids=str,
)
def test_a_bad_option_is_refused_by_name(option: dict[str, object]) -> None:
    with pytest.raises(RequestError, match=f"bad {next(iter(option))}"):
        SamplingOptions(**option)


def test_stop_strings_may_come_as_a_list_and_options_stay_hashable() -> None:
    assert hash(SamplingOptions(stop=["a"])) == hash(SamplingOptions(stop=("a",)))


def test_end_tokens_are_known() -> None:
    sampler = Sampler(SamplingOptions(), [2, 7])
    assert sampler.is_eos(7) and not sampler.is_eos(3)
