"""A bundle answers through the GPU backend as it does on the CPU: same tokens, same survivors.

The engines compute for real (benchmarks/gpu/fake_tensorrt.py) on a GPU whose memory, streams and
graphs are byte arrays and queues (benchmarks/gpu/fake_cuda.py). So what is proven is all that lies
around the kernels: which address holds what, when it is read, and when the host may look.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.gpu import __main__ as benchmark
from benchmarks.gpu import smoke
from benchmarks.gpu.fake_cuda import FakeCudaRuntime, cudaError_t
from tests.support.gpu import FASTV, QUESTION, ROW
from tests.support.tiny_bundles import pictures
from tests.support.tolerances import LOGITS_FLOAT32

pytest_plugins = ["tests.support.gpu"]

COUNT = 64
ATP = [{"layer": 2, "method": "atp", "params": {"theta_r": 0.4, "theta_s": 0.9}, "budget": 9}]
TOME = [
    {"layer": 1, "method": "tome", "params": {"num_keep": 9}},
    {"layer": 3, "method": "tome", "params": {"num_keep": 5}},
]
FURTHER = [
    {"layer": 1, "method": "sparsevlm", "params": {"keep_ratio": 0.75}},
    {"layer": 2, "method": "sparsevlm", "params": {"keep_ratio": 0.5, "over_heads": "all"}},
    {"layer": 3, "method": "pyramiddrop", "params": {"keep_ratio": 0.25}},
]
PLANS: dict[str, list[dict[str, Any]]] = {"none": [], "fastv": FASTV, "atp": ATP}
LIBRARIES = {"tensorrt-rtx": True, "jetpack6": False}  # whether it is TensorRT-RTX


@pytest.mark.parametrize("runs_late", (True, False), ids=("late", "at-once"))
@pytest.mark.parametrize("num_images", (1, 3))
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("target", LIBRARIES)
def test_answers_are_those_of_the_cpu(
    tiny, machine, target: str, plan: str, num_images: int, runs_late: bool
) -> None:
    sites, images = PLANS[plan], pictures(num_images)
    options = {"max_new_tokens": COUNT, "ignore_eos": True}
    bundle, gpu = tiny(ROW), machine(runs_late=runs_late, is_rtx=LIBRARIES[target])
    expected = bundle.model(sites).generate(images, QUESTION, **options)
    model = gpu.load(bundle, sites, target)
    for _ in range(2):  # the second one finds caches, blocks and a captured graph of the first
        result = model.generate(images, QUESTION, **options)
        assert result.token_ids == expected.token_ids
        assert result.sites == expected.sites
    assert len(result.token_ids) == COUNT
    assert (gpu.gpu.calls["cudaGraphLaunch"] > COUNT) == (target == "tensorrt-rtx")
    model.close()


@pytest.mark.parametrize("target", LIBRARIES)
def test_rows_that_merge_on_the_gpu_are_those_of_the_cpu(tiny, machine, target: str) -> None:
    images, bundle, gpu = pictures(3), tiny(ROW), machine(is_rtx=LIBRARIES[target])
    expected = bundle.model(TOME).generate(images, QUESTION, max_new_tokens=COUNT)
    model = gpu.load(bundle, TOME, target)
    result = model.generate(images, QUESTION, max_new_tokens=COUNT)
    assert result.token_ids == expected.token_ids and result.sites == expected.sites
    assert all(one.merged for one in result.sites)
    model.close()


@pytest.mark.parametrize("target", LIBRARIES)
def test_rows_from_the_host_and_the_next_layer_judge_as_on_the_cpu(
    tiny, machine, target: str
) -> None:
    images, bundle, gpu = pictures(3), tiny(ROW), machine(is_rtx=LIBRARIES[target])
    expected = bundle.model(FURTHER).generate(images, QUESTION, max_new_tokens=8)
    model = gpu.load(bundle, FURTHER, target)
    result = model.generate(images, QUESTION, max_new_tokens=8)
    assert result.token_ids == expected.token_ids and result.sites == expected.sites
    model.close()


@pytest.mark.parametrize("plan", ("none", "fastv"))
@pytest.mark.parametrize("target", LIBRARIES)
def test_later_turns_continue_on_the_same_cache(tiny, machine, target: str, plan: str) -> None:
    sites, images = PLANS[plan], pictures(2)
    bundle, gpu = tiny(ROW), machine(is_rtx=LIBRARIES[target])
    models = [gpu.load(bundle, sites, target), bundle.model(sites)]
    chats = [model.chat() for model in models]
    turns = [(QUESTION, images[:1]), ("And in this one?", images[1:]), ("Explain why.", [])]
    for question, shown in turns:
        ours, theirs = (chat.ask(question, shown, max_new_tokens=16) for chat in chats)
        assert ours.token_ids == theirs.token_ids
        assert ours.sites == theirs.sites
        assert ours.selection == theirs.selection
    ours, theirs = (chat.ask("Again?", repick=True, max_new_tokens=16) for chat in chats)
    assert ours.token_ids == theirs.token_ids and ours.sites == theirs.sites
    for chat in chats:
        chat.close()
    models[0].close()


def test_two_conversations_take_turns_token_by_token(tiny, machine) -> None:
    """Each has its own caches: a graph that was captured on the other's must not run."""
    bundle, gpu = tiny(ROW), machine()
    model, images = gpu.load(bundle, FASTV), pictures(2)
    chats = [model.chat(), model.chat()]
    expected = [
        bundle.model(FASTV).generate(image, QUESTION, max_new_tokens=24).text for image in images
    ]
    streams = [
        chat.stream(QUESTION, image, max_new_tokens=24)
        for chat, image in zip(chats, images, strict=True)
    ]
    texts = ["", ""]
    alive = [0, 1]
    while alive:
        for number in list(alive):
            piece = next(streams[number], None)
            if piece is None:
                alive.remove(number)
            else:
                texts[number] += piece
    assert texts == expected and texts[0] != texts[1]
    model.close()


@pytest.mark.slow
def test_several_bundles_share_the_gpu(tiny, machine) -> None:
    gpu = machine()
    bundles = [tiny(ROW), tiny("llama-gqa-tied-linear-rope")]
    models = [gpu.load(bundle, FASTV) for bundle in bundles]
    image = pictures(1)
    for _ in range(2):
        for bundle, model in zip(bundles, models, strict=True):
            expected = bundle.model(FASTV).generate(image, QUESTION, max_new_tokens=16)
            assert model.generate(image, QUESTION, max_new_tokens=16).token_ids == (
                expected.token_ids
            )
    models[0].close()
    expected = bundles[1].model(FASTV).generate(image, QUESTION, max_new_tokens=16)
    result = models[1].generate(image, QUESTION, max_new_tokens=16)
    assert result.token_ids == expected.token_ids
    models[1].close()
    assert not any(gpu.gpu.live.values()), gpu.gpu.live


def test_a_plan_named_by_the_request_runs_beside_the_default(tiny, machine) -> None:
    bundle, gpu = tiny(ROW), machine()
    model, image = gpu.load(bundle, FASTV), pictures(1)
    for plan in ("none", None, "none"):
        sites = [] if plan else FASTV
        expected = bundle.model(sites).generate(image, QUESTION, max_new_tokens=16)
        result = model.generate(image, QUESTION, max_new_tokens=16, plan=plan)
        assert result.token_ids == expected.token_ids
    model.close()


def test_the_dry_smoke_run_gives_every_token_and_captures_one_graph(
    tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`python -m benchmarks.gpu --dry`, as on a Hopper, which TensorRT-RTX does not list."""
    hopper = SimpleNamespace(name=b"NVIDIA H200", major=9, minor=0)
    properties = lambda cuda, device: (cudaError_t.cudaSuccess, hopper)  # noqa: E731
    monkeypatch.setattr(FakeCudaRuntime, "cudaGetDeviceProperties", properties)
    bundle = tiny(ROW)
    plan = bundle.model(FASTV).facts.default_plan
    of_tests = partial(smoke.Smoke, bundles={"float32": bundle.path}, plan=plan)
    monkeypatch.setattr(smoke, "Smoke", of_tests)
    pieces = [piece for piece in smoke.PIECES if not piece.startswith("float16")]
    monkeypatch.setattr(smoke, "PIECES", pieces)
    arguments = ["--dry", "--results", str(tmp_path / "results"), "--workdir", str(tmp_path)]
    assert benchmark.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    said = json.loads(lines[-1])
    assert (said["kind"], said["target"], said["unfinished"]) == ("dry-run", None, [])
    assert said["smoke"]["wrong"] == []
    found = said["smoke"]["pieces"]
    assert list(found) == ["driver", "float32:tensorrt", "float32:jetpack6"]
    assert len(found["driver"]["found"]) == 9
    for target in smoke.TARGETS:
        one = found[f"float32:{target}"]
        assert [turn["same_tokens"] for turn in one["turns"]] == [48, 48, 48]
        assert all(turn["has_same_survivors"] for turn in one["turns"])
        assert max(turn["logits_error"] for turn in one["turns"]) < LOGITS_FLOAT32
        assert one["grown_bytes"] == 0 and len(set(one["token_ids"])) > 8
        is_captured = one["backend"]["decode"] == "one CUDA graph"
        assert is_captured == (target == "tensorrt")
    assert sum("48 of 48 tokens and all survivors" in line for line in lines) == 2
    (file,) = (tmp_path / "results").iterdir()
    assert "dry-run" in file.name
