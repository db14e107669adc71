"""Where the host waits for the GPU, how often, and when decoding is one captured graph."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.gpu.fake_cuda import cudaError_t
from patchsieve.contract import names
from patchsieve.runtime.gpu.decode_row import WAIT, why_not_captured
from patchsieve.runtime.gpu.weight_streaming import budgets
from tests.support.gpu import FASTV, QUESTION, ROW, TARGET
from tests.support.tiny_bundles import pictures

pytest_plugins = ["tests.support.gpu"]

COUNT = 12


def ask(model: Any, **options: Any) -> Any:
    return model.generate(
        pictures(1), QUESTION, **{"max_new_tokens": COUNT, "ignore_eos": True} | options
    )


def new_waits(model: Any, **options: Any) -> dict[str, int]:
    before = model.backend.driver.waits.copy()
    ask(model, **options)
    return dict(model.backend.driver.waits - before)


@pytest.mark.parametrize(("sites", "num_sites"), [([], 0), (FASTV, 2)], ids=("none", "fastv"))
@pytest.mark.parametrize("target", (TARGET, "jetpack6"))
def test_the_host_waits_once_per_result_that_it_needs(
    tiny, machine, target: str, sites: list, num_sites: int
) -> None:
    gpu = machine(is_rtx=target == TARGET)
    model = gpu.load(tiny(ROW), sites, target)
    ask(model)
    expected = {"image features": 1, "logits of the prompt": 1, WAIT: COUNT - 1}
    if num_sites:
        expected["survivors of a site"] = num_sites
    calls = gpu.gpu.calls["cudaStreamSynchronize"]
    assert new_waits(model) == expected
    # No wait goes round the one function that counts them.
    assert gpu.gpu.calls["cudaStreamSynchronize"] - calls == sum(expected.values())
    assert gpu.gpu.calls["cudaFree"] == 0
    model.close()


def test_a_request_allocates_nothing_once_another_has_run(tiny, machine) -> None:
    gpu = machine()
    model = gpu.load(tiny(ROW), FASTV)
    ask(model)
    before = gpu.gpu.calls.copy()
    ask(model)
    for name in ("cudaMalloc", "cudaMallocHost", "cudaEventCreate", "cudaStreamBeginCapture"):
        assert gpu.gpu.calls[name] == before[name], name
    model.close()


def test_a_token_is_one_launch_and_one_wait(tiny, machine) -> None:
    gpu = machine()
    model = gpu.load(tiny(ROW), FASTV)
    ask(model)
    cache = model.take_cache(model.facts.default_plan)
    model.pipeline.decode(5, cache)
    before = gpu.gpu.calls.copy()
    model.pipeline.decode(6, cache)
    assert dict(gpu.gpu.calls - before) == {
        "cudaGraphLaunch": 1,
        "cudaStreamSynchronize": 1,
        "cudaEventRecord": 2,
    }
    model.close()


def test_the_second_step_on_a_cache_is_captured_and_no_third(tiny, machine) -> None:
    gpu = machine()
    model = gpu.load(tiny(ROW))
    for count, captures in ((1, 0), (2, 0), (3, 1), (9, 1)):  # the first token is the prefill's
        ask(model, max_new_tokens=count)
        assert gpu.gpu.calls["cudaStreamBeginCapture"] == captures
    assert model.backend.describe()["decode"] == "one CUDA graph"
    model.close()


def test_conversations_that_alternate_are_not_captured_anew_for_each_token(tiny, machine) -> None:
    gpu = machine()
    model = gpu.load(tiny(ROW))
    caches = [model.pipeline.new_cache("none") for _ in range(2)]
    for _ in range(4):
        for cache in caches:
            model.pipeline.decode(5, cache)
    assert gpu.gpu.calls["cudaStreamBeginCapture"] == 0
    model.close()


def context(**facts: Any) -> Any:
    known = {"streamed": 0, "on_host": False, "is_capturable": True, "has_run": True} | facts
    port = SimpleNamespace(name="slot", is_on_host=known["on_host"])
    engine = SimpleNamespace(
        graph="stage_1",
        streamed_bytes=known["streamed"],
        ports={"slot": port},
        trt=SimpleNamespace(__name__="tensorrt_rtx"),
    )
    return SimpleNamespace(
        engine=engine, has_run=known["has_run"], is_capturable=lambda: known["is_capturable"]
    )


@pytest.mark.parametrize(
    ("facts", "form", "reason"),
    [
        ({}, names.IN_PLACE, None),
        ({}, names.NEW_ROWS, "shape grows"),
        ({"streamed": 5}, names.IN_PLACE, "weights of stage_1 are streamed"),
        ({"on_host": True}, names.IN_PLACE, "stage_1 reads slot with the CPU"),
        ({"is_capturable": False}, names.IN_PLACE, "tensorrt_rtx cannot capture stage_1"),
        # The library cannot know before all is bound: it is not asked.
        ({"is_capturable": False, "has_run": False}, names.IN_PLACE, None),
    ],
)
def test_what_cannot_be_captured_is_named(facts: dict, form: str, reason: str | None) -> None:
    found = why_not_captured([context(), context(**facts)], form)
    assert found is None if reason is None else reason in str(found)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda trt: trt.streamable.update({"stage_0": 20 << 30}), "are streamed"),
        (lambda trt: trt.on_host.add(names.POSITION_IDS), "position_ids with the CPU"),
        (lambda trt: setattr(trt, "is_capturable", False), "cannot capture stage_0"),
    ],
    ids=("streaming", "shape-input", "library"),
)
def test_what_is_not_captured_runs_stage_by_stage_with_the_reason(
    tiny, machine, change: Any, reason: str
) -> None:
    bundle, gpu = tiny(ROW), machine()
    change(gpu.trt)
    model = gpu.load(bundle, FASTV)
    expected = bundle.model(FASTV).generate(pictures(1), QUESTION, max_new_tokens=COUNT)
    assert ask(model).token_ids == expected.token_ids
    assert gpu.gpu.calls["cudaGraphLaunch"] == 0
    assert model.backend.describe()["decode"].startswith("stage by stage: ")
    assert reason in model.backend.describe()["decode"]
    model.close()


@pytest.mark.parametrize(
    "function", ("cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate")
)
def test_a_capture_that_fails_is_told_and_the_answer_comes_all_the_same(
    tiny, machine, caplog, function: str
) -> None:
    bundle, gpu = tiny(ROW), machine()
    model = gpu.load(bundle)
    gpu.gpu.fail(function, cudaError_t.cudaErrorInvalidValue)
    expected = bundle.model().generate(pictures(1), QUESTION, max_new_tokens=COUNT)
    with caplog.at_level(logging.WARNING):
        assert ask(model).token_ids == expected.token_ids
    assert "not captured" in caplog.text and "\n" not in caplog.records[-1].message
    assert "cudaErrorInvalidValue" in model.backend.describe()["decode"]
    model.close()
    assert not any(gpu.gpu.live.values()), gpu.gpu.live


def test_a_library_that_refuses_within_a_capture_is_told_too(tiny, machine) -> None:
    bundle, gpu = tiny(ROW), machine()
    model = gpu.load(bundle)
    gpu.trt.refuses = "capture"
    expected = bundle.model().generate(pictures(1), QUESTION, max_new_tokens=COUNT)
    assert ask(model).token_ids == expected.token_ids
    assert gpu.gpu.calls["cudaStreamBeginCapture"] == gpu.gpu.calls["cudaStreamEndCapture"] == 1
    assert "fails at the engine stage_0" in model.backend.describe()["decode"]
    model.close()


def test_gpu_times_stand_beside_those_of_the_host(tiny, machine) -> None:
    model = machine().load(tiny(ROW), FASTV)
    plan = model.facts.default_plan
    device = ask(model).to_dict()["timings_ms"]["device"]
    stages = [names.stage(index) for index in range(4)]
    decisions = [names.decide(plan, 1), names.decide(plan, 3), names.COMPACT]
    assert sorted(device) == sorted([names.VISION, *stages, *decisions, "decode_per_token"])
    assert all(ms > 0 for ms in device.values())
    model.close()


def test_streamed_weights_share_the_room_that_is_left() -> None:
    assert budgets([30, 0, 10], 100) == [30, 0, 10]
    assert budgets([30, 0, 10], 20) == [15, 0, 5]
    assert budgets([30, 0, 10], -7) == [0, 0, 0]


def test_host_numbers_of_another_width_are_cast_and_other_types_refused() -> None:
    from patchsieve.contract.errors import ShapeError
    from patchsieve.runtime.gpu.engine import Port, as_port

    port = Port("slot", np.dtype(np.int32), (1,), True, False, ())
    assert as_port(np.array([7]), port).dtype == np.int32
    bits = Port("hidden", np.dtype(np.uint16), (1, 1, 4), True, False, ())  # bfloat16
    rows = np.arange(4, dtype=np.uint16)[None, None]
    assert as_port(rows, bits) is rows
    for array in (rows.astype(np.float32), rows.astype(np.int64)):
        with pytest.raises(ShapeError, match="hidden has another type"):
            as_port(array, bits)
