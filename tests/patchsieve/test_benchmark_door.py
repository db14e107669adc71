"""A benchmark's requests on a bundle: what is asked, refused, answered and counted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from patchsieve.contract.errors import CapacityError, RequestError
from patchsieve.contract.manifest import Limits
from patchsieve.doors.account import Account
from patchsieve.doors.benchmark import Benchmark, Request, load
from patchsieve.runtime.model import Model
from tests.support.bundles import PHOTO, PROMPT, export_tiny

pytest_plugins = ["tests.support.bundles"]

N = 16  # visual tokens of an image


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """Holds two images of a question."""
    out = export_tiny(
        tiny_checkpoint, tmp_path_factory.mktemp("two") / "bundle", limits=Limits(64, 32, 2)
    )
    loaded = load(out, threads=1).model
    yield loaded
    loaded.close()


@pytest.fixture
def benchmark(model: Model) -> Benchmark:
    return Benchmark(model)


def request(prompt: str = PROMPT, doc: int = 7, **arguments: Any) -> Request:
    return Request("gqa", doc, prompt, {"max_new_tokens": 4} | arguments)


@pytest.mark.parametrize(
    ("told", "options"),
    [
        ({}, {"max_new_tokens": 32, "temperature": 0.0}),
        (  # GQA's, with what LLaVA's own loader would read
            {
                "max_new_tokens": 16,
                "temperature": 0,
                "top_p": 1.0,
                "num_beams": 1,
                "do_sample": False,
                "image_aspect_ratio": "original",
            },
            {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0},
        ),
        # MM-Vet's: a temperature, and no sampling
        ({"temperature": 0.2, "do_sample": False, "top_p": None}, {"temperature": 0.0}),
        ({"temperature": 0.2}, {"temperature": 0.2}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"until": "ASSISTANT:"}, {"stop": ("ASSISTANT:",)}),
        ({"until": ["\n\n", ""]}, {"stop": ("\n\n",)}),
        ({"until": None}, {}),  # the checkpoint's own stop strings, if any
        ({"until": ""}, {}),
        ({"top_k": 5, "repetition_penalty": 1.1}, {"top_k": 5, "repetition_penalty": 1.1}),
        (
            {"no_repeat_ngram_size": 3, "min_new_tokens": 2},
            {"no_repeat_ngram_size": 3, "min_new_tokens": 2},
        ),
    ],
)
def test_the_words_of_a_task_become_options(
    benchmark: Benchmark, told: dict[str, Any], options: dict[str, Any]
) -> None:
    plain = {"max_new_tokens": 32, "temperature": 0.0}
    assert benchmark.options(told) == plain | options
    assert benchmark.not_followed == set(told) & {"image_aspect_ratio"}


def test_a_bound_shortens_only_what_asks_for_more(model: Model) -> None:
    bounded = Benchmark(model, max_new_tokens=8)
    assert bounded.options({"max_new_tokens": 1024})["max_new_tokens"] == 8
    assert bounded.options({"max_new_tokens": 4})["max_new_tokens"] == 4
    assert bounded.options({})["max_new_tokens"] == 8


@pytest.mark.parametrize(
    ("asked", "kind", "said"),
    [
        (request(max_new_tokens=1024), CapacityError, "max_new_tokens=32 in --model_args"),
        (request(num_beams=3), RequestError, "several beams | found: num_beams 3"),
        (request(until=5), RequestError, "no stop strings | found: 5"),
        (request("word " * 70), CapacityError, "oversized=empty in --model_args"),
    ],
)
def test_what_cannot_be_followed_is_refused_before_the_first_answer(
    benchmark: Benchmark, asked: Request, kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match="^question 7 of gqa: ") as refused:
        benchmark.check([request(doc=6), asked])
    assert said in str(refused.value) and "\n" not in str(refused.value)
    assert not benchmark.accounts


def test_no_plan_no_bound_and_no_rule_of_another_kind(model: Model) -> None:
    with pytest.raises(RequestError, match="no such plan"):
        Benchmark(model, plan="nope")
    for wrong in (0, 33):
        with pytest.raises(RequestError, match=f"found: max_new_tokens={wrong}"):
            Benchmark(model, max_new_tokens=wrong)
    with pytest.raises(RequestError, match="found: oversized=skip"):
        Benchmark(model, oversized="skip")


def test_an_answer_is_the_models_and_what_it_took_is_counted(
    benchmark: Benchmark, model: Model
) -> None:
    picture = Image.open(PHOTO)
    given = benchmark.answer(request(), [picture])
    assert given.token_ids == model.generate(PHOTO, PROMPT, max_new_tokens=4).token_ids
    means = benchmark.total().means()
    full = model.generate(PHOTO, PROMPT, plan="none", max_new_tokens=4)
    # Layers 0 and 1 see all, FastV leaves half for 2 and 3, and a quarter of all for layer 4
    assert means["visual_tokens"] == (N * 2 + N // 2 * 2 + N // 4) / 5
    assert means["visual_tokens_unpruned"] == N
    assert means["kv_bytes"] == given.kv_bytes["used"] < means["kv_bytes_unpruned"]
    assert means["kv_bytes_unpruned"] == full.kv_bytes["used"]
    assert benchmark.total().cut == (given.finish_reason == "length")


def test_images_come_first_or_where_the_prompt_places_them(
    benchmark: Benchmark, model: Model
) -> None:
    pictures = [Image.open(PHOTO), Image.open(PHOTO).rotate(180)]
    first = benchmark.answer(request("Same?"), pictures)
    assert first.visual_tokens == 2 * N
    placed = benchmark.answer(request("<image> and <image>: same?"), pictures)
    assert placed.prompt_tokens > first.prompt_tokens
    with pytest.raises(RequestError, match="question 7 of gqa: .*found: 1"):
        benchmark.answer(request("one <image> only"), pictures)
    assert benchmark.answer(request("No picture?"), []).visual_tokens == 0
    account = benchmark.total()
    assert (account.questions, account.shown) == (3, 2)
    assert account.means()["visual_tokens_unpruned"] == 2 * N  # over the questions with an image


def test_a_question_that_does_not_fit_is_refused_or_answered_empty_and_counted(
    model: Model,
) -> None:
    three = [Image.open(PHOTO)] * 3
    with pytest.raises(CapacityError, match="question 7 of gqa: .*--max-images"):
        Benchmark(model).answer(request(), three)
    lenient = Benchmark(model, oversized="empty")
    lenient.check([request("word " * 70)])
    assert lenient.answer(request("word " * 70), three[:1]).text == ""
    assert lenient.answer(request(), three).text == ""
    lenient.answer(request(), three[:1])
    account = lenient.total()
    assert (account.questions, account.unanswered) == (3, 2)
    assert account.means()["visual_tokens_unpruned"] == N
    assert "2 did not fit the bundle" in account.sentence()


def test_stop_strings_end_an_answer(benchmark: Benchmark) -> None:
    whole = benchmark.answer(request(max_new_tokens=8), [PHOTO])
    assert len(whole.text) > 2
    stop = whole.text[1:3]
    cut = benchmark.answer(request(max_new_tokens=8, until=[stop]), [PHOTO])
    assert cut.text == whole.text[: whole.text.index(stop)]


def test_sampled_answers_differ_and_repeat_with_the_seed(model: Model) -> None:
    def drawn(seed: int) -> list[list[int]]:
        sampling = Benchmark(model, seed=seed)
        asked = request(max_new_tokens=8, temperature=2.0)
        return [sampling.answer(asked, [PHOTO]).token_ids for _ in range(2)]

    first = drawn(0)
    assert first == drawn(0) and first[0] != first[1]


def test_accounts_of_tasks_add_up(benchmark: Benchmark) -> None:
    benchmark.answer(request(), [PHOTO])
    benchmark.answer(Request("mme", 1, PROMPT, {"max_new_tokens": 2}), [])
    one, other = benchmark.accounts["gqa"], benchmark.accounts["mme"]
    total = benchmark.total()
    assert total.questions == 2 and total.new_tokens == one.new_tokens + other.new_tokens
    assert total.kv_bytes == one.kv_bytes + other.kv_bytes
    assert Account().means()["visual_tokens"] == 0  # nothing asked, nothing divided
