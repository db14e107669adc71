"""The key/value cache: its size to the byte, its memory in place, and what failures leave in it."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import psutil
import pytest

from patchsieve.contract import names
from patchsieve.contract.errors import CapacityError, PatchsieveError
from patchsieve.contract.manifest import Limits
from patchsieve.export.exporter import ExportOptions, export
from patchsieve.runtime.model import Model
from tests.support.tiny_bundles import LIMITS, pictures
from tests.support.tolerances import GROWTH_MB

ROW = "llama-gqa-tied-linear-rope"
QUESTION = "What is on the table?"
FASTV = [
    {"layer": 1, "method": "fastv", "params": {"keep_ratio": 0.75}},
    {"layer": 3, "method": "fastv", "params": {"keep_ratio": 0.25}},
]
ATP = [{"layer": 2, "method": "atp", "params": {"theta_r": 0.4, "theta_s": 0.9}, "budget": 11}]


@pytest.mark.parametrize("sites", (FASTV, ATP, []), ids=("fastv", "atp", "none"))
@pytest.mark.parametrize("num_images", (0, 1, 2))
def test_bytes_used_are_those_of_the_rows_present(tiny, sites, num_images: int) -> None:
    bundle = tiny(ROW)
    config = bundle.hugging_face.config.text_config
    count = 9
    result = bundle.model(sites).generate(pictures(num_images), QUESTION, max_new_tokens=count)
    head_dim = config.hidden_size // config.num_attention_heads
    dropped_before = {site["layer"]: 0 for site in sites}
    for site in result.sites:
        for layer in dropped_before:
            if site.layer <= layer:
                dropped_before[layer] += site.num_visual_before - len(site.kept)
    total = 0
    for stage in result.kv_bytes["per_stage"]:
        first, last = stage["layers"]
        dropped = max([n for layer, n in dropped_before.items() if layer <= first], default=0)
        rows = result.prompt_tokens - dropped + len(result.token_ids) - 1
        assert stage["slots_used"] == rows
        layers = last - first + 1
        assert stage["used"] == layers * 2 * config.num_key_value_heads * head_dim * 4 * rows
        total += stage["used"]
    assert result.kv_bytes["used"] == total


@pytest.mark.parametrize("sites", (FASTV, ATP, []), ids=("fastv", "atp", "none"))
def test_reserved_slots_are_text_new_tokens_and_images_by_budget(tiny, sites) -> None:
    result = tiny(ROW).model(sites).generate(pictures(1), QUESTION, max_new_tokens=2)
    kept = {
        site["layer"]: site.get("budget") or 16 * site["params"]["keep_ratio"] for site in sites
    }
    for stage in result.kv_bytes["per_stage"]:
        budget = min([16, *(n for layer, n in kept.items() if layer <= stage["layers"][0])])
        assert stage["slots_reserved"] == 400 + 80 + 3 * budget
    assert (LIMITS.max_text_tokens, LIMITS.max_new_tokens, LIMITS.max_images) == (400, 80, 3)


@pytest.mark.parametrize("target", ("cpu", "reference"))
def test_rows_are_written_where_they_stay(tiny, target: str) -> None:
    """Same addresses from the first token to the last; a new token changes its own slot only."""
    model = tiny(ROW).model(FASTV, target)
    cache = model.pipeline.new_cache(model.facts.default_plan)
    model._spare = {model.facts.default_plan: cache}
    chat = model.chat()
    assert chat.cache is cache

    def addresses() -> list[int]:
        found = []
        for stage in cache.stages:
            for name, array in stage.buffers.arrays.items():
                assert stage.buffers.values[name].data_ptr() == array.ctypes.data
                found.append(array.ctypes.data)
        return found

    def contents() -> list[np.ndarray]:
        return [a.copy() for stage in cache.stages for a in stage.buffers.arrays.values()]

    before, decode, steps = addresses(), model.pipeline.decode, []

    def watched(token_id: int, cache: Any) -> np.ndarray:
        lengths = [stage.length for stage in cache.stages]
        old = contents()
        out = decode(token_id, cache)
        new = iter(contents())
        old_arrays = iter(old)
        for stage, length in zip(cache.stages, lengths, strict=True):
            for _ in stage.buffers.arrays:
                was, now = next(old_arrays), next(new)
                assert np.array_equal(was[:, :, :length], now[:, :, :length])
                assert not now[:, :, length + 1 :].any()
                assert now[:, :, length].any() and not was[:, :, length].any()
        steps.append(token_id)
        return out

    model.pipeline.decode = watched  # type: ignore[method-assign]
    chat.ask(QUESTION, pictures(1), max_new_tokens=6)
    del model.pipeline.decode
    assert len(steps) == 5
    assert addresses() == before
    chat.close()


def test_full_cache_is_refused_and_a_smaller_question_continues(tiny) -> None:
    bundle = tiny(ROW)
    model = bundle.model(FASTV)
    chat, twin = model.chat(), model.chat()
    for one in (chat, twin):
        one.ask(QUESTION, pictures(1), max_new_tokens=40)
    rounds = 0
    while True:
        marks = chat.cache.mark()
        try:
            chat.ask("Explain why. " * 10, max_new_tokens=80)
        except CapacityError as error:
            assert "the conversation is full" in str(error) and "\n" not in str(error)
            break
        twin.ask("Explain why. " * 10, max_new_tokens=80)
        rounds += 1
    assert rounds and chat.cache.mark() == marks
    small = [one.ask("Why?", max_new_tokens=3).token_ids for one in (chat, twin)]
    assert small[0] == small[1]
    for one in (chat, twin):
        one.close()


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"max_new_tokens": 81}, "new tokens"),
        ({"image": pictures(4)}, "images"),
        ({"prompt": "Why? " * 400}, "text tokens"),
    ],
)
def test_request_beyond_the_limits_is_one_line(tiny, options: dict, what: str) -> None:
    request = {"image": pictures(1), "prompt": QUESTION, "max_new_tokens": 4} | options
    with pytest.raises(CapacityError, match=f"too many {what}.*--max-") as caught:
        tiny(ROW).model(FASTV).generate(**request)
    assert "\n" not in str(caught.value)


def test_two_hundred_images_leave_no_memory_behind(tiny) -> None:
    model, rng, process = tiny(ROW).model(FASTV), np.random.default_rng(0), psutil.Process()

    def ask(times: int) -> float:
        for _ in range(times):
            side = rng.integers(20, 60, 2)
            image = rng.integers(0, 256, (*side, 3), np.uint8)
            model.generate(image, QUESTION, max_new_tokens=2)
        gc.collect()
        return process.memory_info().rss / 1e6

    before = ask(20)
    after = ask(200)
    print(f"growth: {after - before:.2f} MB")
    assert after - before < GROWTH_MB


def test_output_that_is_not_finite_is_one_line_and_leaves_no_trace(tiny) -> None:
    model = tiny(ROW).model(FASTV)
    right = model.generate(pictures(1), QUESTION, max_new_tokens=16).token_ids
    embed, broken = model.bundle.embed, [True]

    def poisoned(ids: np.ndarray) -> np.ndarray:
        rows = np.array(embed(ids))
        if broken[0]:
            rows[len(rows) // 2] = np.nan
        return rows

    model.bundle.embed = poisoned  # type: ignore[method-assign]
    chat = model.chat()
    with pytest.raises(PatchsieveError, match="not finite") as caught:
        chat.ask(QUESTION, pictures(1), max_new_tokens=16)
    assert "\n" not in str(caught.value)
    broken[0] = False
    assert chat.ask(QUESTION, pictures(1), max_new_tokens=16).token_ids == right
    chat.close()
    assert model.generate(pictures(1), QUESTION, max_new_tokens=16).token_ids == right
    del model.bundle.embed


def test_bundle_with_nan_weights_is_refused_while_another_answers(tiny, tmp_path) -> None:
    from tests.support.models import make_checkpoint, tiny_llava

    sound = tiny(ROW).model(FASTV)
    right = sound.generate(pictures(1), QUESTION, max_new_tokens=16).token_ids
    model, processor = tiny_llava("llama", layers=2)
    model.model.language_model.layers[1].mlp.down_proj.weight.data[3, 5] = float("nan")
    make_checkpoint.save_llava(tmp_path / "checkpoint", model, processor)
    options = ExportOptions(limits=Limits(64, 16, 1))
    export(str(tmp_path / "checkpoint"), tmp_path / "bundle", options)
    broken = Model(tmp_path / "bundle", threads=1)
    for _ in range(2):
        with pytest.raises(PatchsieveError, match="not finite"):
            broken.generate(pictures(1), QUESTION, max_new_tokens=16)
    assert sound.generate(pictures(1), QUESTION, max_new_tokens=16).token_ids == right


@pytest.mark.parametrize("turn", (0, 1))
def test_stream_closed_early_leaves_the_chat_as_it_was(tiny, turn: int) -> None:
    model = tiny(ROW).model(FASTV)
    chat, twin = model.chat(), model.chat()
    if turn:
        for one in (chat, twin):
            one.ask(QUESTION, pictures(1), max_new_tokens=16)
    mark = chat.cache.mark()
    stream = chat.stream("Explain why.", pictures(2)[1:], max_new_tokens=40)
    for _ in range(3):
        next(stream)
    assert chat.cache.mark() != mark
    stream.close()
    assert chat.cache.mark() == mark
    for question, image in ((QUESTION, pictures(3)[2:]), ("And why?", [])):
        found = chat.ask(question, image, max_new_tokens=16)
        expected = twin.ask(question, image, max_new_tokens=16)
        assert found.token_ids == expected.token_ids
        assert found.sites == expected.sites
        assert found.selection == expected.selection
        assert found.kv_bytes == expected.kv_bytes
    for one in (chat, twin):
        one.close()


def test_a_plan_named_by_the_request_reserves_its_own_cache(tiny) -> None:
    model = tiny(ROW).model(FASTV)
    pruned = model.generate(pictures(1), QUESTION, max_new_tokens=8)
    whole = model.generate(pictures(1), QUESTION, max_new_tokens=8, plan="none")
    assert whole.kv_bytes["used"] > pruned.kv_bytes["used"]
    assert whole.kv_bytes["reserved"] > pruned.kv_bytes["reserved"]
    assert (
        whole.token_ids
        == tiny(ROW).model().generate(pictures(1), QUESTION, max_new_tokens=8).token_ids
    )
    assert names.decide(pruned.plan, 1) in model.facts.targets["cpu"]
