"""`make gpu` as far as a machine without a GPU goes: the same functions on a tiny model."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.checkpoint import LLAVA_7B, ROOT, TINY, tensor_shapes
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import parts, smoke
from benchmarks.gpu.bench import PAPER_KV_MB, check_counts, cuda_time, fixed_plan, paper
from benchmarks.gpu.budget import Budget, OutOfTimeError
from benchmarks.gpu.choice import GPU_TARGETS, choose
from benchmarks.gpu.driver_checks import check_driver
from benchmarks.gpu.fake_cuda import FakeCudaRuntime, FakeGpu, cudaError_t
from benchmarks.gpu.floors import Floor, peak_of
from benchmarks.gpu.report import file_name, write_report
from benchmarks.papers import LLAVA_7B as PAPER_SHAPE
from patchsieve import cost as costs
from patchsieve.contract.errors import BackendMissingError, PatchsieveError
from patchsieve.contract.plan import NO_PRUNING
from patchsieve.pruning.select import num_to_keep
from patchsieve.runtime.board.doctor import diagnose
from patchsieve.runtime.gpu.driver import Driver
from tests.runtime import test_on_gpu
from tests.runtime.test_doctor import CPU_ONLY, CUDA, HOPPER, READY, RTX, probes


@pytest.mark.slow
def test_the_whole_benchmark_runs_on_a_cpu_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--target", "cpu", "--shape", "tiny", "--precision", "float32", "--only", "bench"]
    common += ["--results", str(tmp_path / "results"), "--workdir", str(tmp_path / "work")]
    assert gpu.main([*common, "--minutes", "0"]) == 1
    assert "no time is left for checkpoint" in capsys.readouterr().err
    assert gpu.main(common) == 0
    out = capsys.readouterr().out
    said = json.loads(out.splitlines()[-1])
    assert out.index("floor") < out.index("ms, median")
    assert (said["kind"], said["target"]) == ("cpu-run", "cpu")
    (file,) = (tmp_path / "results").iterdir()
    assert "cpu-run" in file.name
    assert json.loads(file.read_text())["bench"] == said["bench"]
    facts = said["bench"]["facts"]
    assert "error" not in said["bench"]
    sites, counts = TINY.plans["atp-144"]
    kept = {key: value["max"] for key, value in facts["plans"]["atp-144"]["survivors"].items()}
    assert kept == {f"{layer}.0": count for layer, count in zip(sites, counts, strict=True)}
    # 16 tokens in layer 0, 9 in 1 and 2, 6 in 3, 2 in 4; keys and values of 64 x 4 bytes each.
    assert facts["floors"]["atp-144"]["visual_kv_bytes"] == (16 + 9 + 9 + 6 + 2) * 2 * 64 * 4
    assert facts["floors"]["none"]["ms"] is None  # nobody tells this processor's peak
    full = facts["plans"]["none"]["kv_bytes"]
    assert facts["plans"]["atp-88"]["kv_bytes"]["used"] < full["used"]
    assert full["reserved_alone"] == full["reserved"]
    assert facts["paper"] == {}
    assert set(said["bench"]["transformers"]["sdpa"]) == {"ttft_ms", "per_token_ms", "total_ms"}
    rows = facts["plans"]["none"]["prompt_tokens"]
    assert said["bench"]["transformers"]["prompt_rows"] == rows


def test_without_a_gpu_each_target_says_what_is_absent_and_the_code_is_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "diagnose", lambda: diagnose(probes(tmp_path, CPU_ONLY)))
    assert gpu.main(["--results", str(tmp_path / "results")]) == 2
    first, *lines = capsys.readouterr().err.splitlines()
    assert "no NVIDIA GPU" in first
    assert [line.split(":")[1].strip() for line in lines] == list(GPU_TARGETS)
    assert all("what to do: " in line for line in lines)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("installed", "smi", "wanted", "target"),
    [
        (READY, RTX, None, "tensorrt"),
        (READY | {"tensorrt": "10.16.1"}, RTX, None, "tensorrt10"),
        (READY | {"tensorrt": "10.3.0"}, RTX, None, "jetpack6"),
        (CPU_ONLY | {"tensorrt-rtx": "1.7", "cuda-python": "13"}, RTX, None, "tensorrt-rtx"),
        (CPU_ONLY | {"tensorrt-rtx": "1.7", "cuda-python": "13"}, HOPPER, None, "tensorrt-rtx"),
        (READY, RTX, "cuda", "cuda"),
        (CPU_ONLY, "", "cpu", "cpu"),
        (CPU_ONLY, RTX, None, None),
        (READY, "", "tensorrt", None),
    ],
)
def test_the_best_target_that_may_run_is_chosen(
    tmp_path: Path, installed: dict[str, str], smi: str, wanted: str | None, target: str | None
) -> None:
    report = diagnose(probes(tmp_path, installed, smi=smi))
    if target is None:
        with pytest.raises(BackendMissingError):
            choose(report, wanted)
    else:
        assert choose(report, wanted) == target


def test_onnxruntime_s_cuda_is_taken_where_nothing_else_is(tmp_path: Path) -> None:
    installed = CPU_ONLY | {"onnxruntime-gpu": "1.31.0"}
    assert choose(diagnose(probes(tmp_path, installed, smi=RTX, **CUDA)), None) == "cuda"


@pytest.mark.parametrize("name", LLAVA_7B.plans)
def test_plans_keep_exactly_the_published_survivors(name: str) -> None:
    sites, counts = LLAVA_7B.plans[name]
    plan = fixed_plan(LLAVA_7B, name)
    assert tuple(plan.layers) == sites
    kept = tuple(num_to_keep(site.params["keep_ratio"], 576) for site in plan.sites)
    assert kept == counts == tuple(site.budget for site in plan.sites)


def test_the_shape_is_that_of_llava_7b() -> None:
    tensors = [size for shard in tensor_shapes(LLAVA_7B) for size in shard.values()]
    numbers = sum(_product(size) for size in tensors)
    assert numbers == pytest.approx(7.06e9, rel=2e-3)
    assert LLAVA_7B.cuts == (1, 4, 13, 14, 24, 25)


def _product(size: tuple[int, ...]) -> int:
    product = 1
    for length in size:
        product *= length
    return product


def test_a_run_that_kept_another_count_is_refused() -> None:
    right = {
        f"{layer}.0": {"min": n, "max": n} for layer, n in zip((1, 3, 4), (9, 6, 2), strict=True)
    }
    check_counts(TINY, "atp-144", right)
    check_counts(TINY, NO_PRUNING, {})
    for wrong in ({}, right | {"3.0": {"min": 5, "max": 6}}):
        with pytest.raises(PatchsieveError, match="kept other counts"):
            check_counts(TINY, "atp-144", wrong)


def test_the_paper_s_kv_memory_follows_from_the_counts() -> None:
    plans, least = {}, {}
    for name, median in ((NO_PRUNING, 100.0), ("atp-144", 60.0), ("atp-88", 50.0)):
        schedule = costs.no_pruning(PAPER_SHAPE)
        if name != NO_PRUNING:
            sites, counts = LLAVA_7B.plans[name]
            schedule = costs.in_decoder(PAPER_SHAPE, counts, sites)
        plans[name] = {"cuda_ms": {"answer": median}}
        visual = costs.cost(PAPER_SHAPE, schedule, 0)
        least[name] = Floor(1, visual.flops.llm, 1, visual.kv_bytes)
    rows = paper(LLAVA_7B, plans, least)
    for name, row in rows.items():
        # the counts' means are 143.8 and 84.7; the paper writes 144 and 88
        allowed = {"atp-88": 0.05}.get(name, 0.003)
        assert row["visual_kv_mb"] == pytest.approx(PAPER_KV_MB[name], rel=allowed)
    assert rows["atp-144"]["cuda_time_saved"] == 0.4
    assert rows["atp-144"]["paper_cuda_time_saved"] == 0.384


def test_cuda_time_is_every_graph_of_prefill_and_each_later_token() -> None:
    times = {"vision": 9.0, "gpu.vision": 1.0, "gpu.stage_0": 2.0, "gpu.decode_per_token": 0.5}
    made = {"times_ms": {name: {"p50": value} for name, value in times.items()}, "new_tokens": 5}
    assert cuda_time(made) == {"prefill": 3.0, "per_token": 0.5, "answer": 5.0}
    assert cuda_time({"times_ms": {"vision": {"p50": 9.0}}, "new_tokens": 5}) is None


def test_floors_are_work_over_peak() -> None:
    floor = Floor(vision_flops=10**12, prefill_flops=10**13, decode_bytes=10**9, visual_kv_bytes=1)
    assert peak_of("NVIDIA H200") == (989.0, 4800.0)
    assert peak_of("a GPU of next year") is None
    told = floor.to_dict((1000.0, 500.0))
    assert told["ms"] == {"vision": 1.0, "prefill": 10.0, "per_token": 2.0}


def test_a_report_is_named_after_day_and_device_and_keeps_earlier_parts(tmp_path: Path) -> None:
    said: dict[str, Any] = {
        "date": "2026-11-21T10:00:00+00:00",
        "device": "NVIDIA H200 (one)",
        "kind": "gpu",
        "target": "tensorrt",
    }
    assert file_name(said) == "2026-11-21-nvidia-h200-one.json"
    path = write_report(tmp_path, said | {"settle": {"a": 1}})
    assert write_report(tmp_path, said | {"bench": {"b": 2}}) == path
    both = json.loads(path.read_text())
    assert (both["settle"], both["bench"]) == ({"a": 1}, {"b": 2})
    write_report(tmp_path, said | {"target": None, "smoke": {"c": 3}})  # the smoke run needs none
    kept = json.loads(path.read_text())
    assert (kept["target"], kept["settle"], kept["smoke"]) == ("tensorrt", {"a": 1}, {"c": 3})
    write_report(tmp_path, said | {"target": "cuda"})
    assert "settle" not in json.loads(path.read_text())
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_run_that_is_killed_keeps_the_parts_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, work = tmp_path / "results", tmp_path / "work"
    arguments = ["--target", "cpu", "--results", str(results), "--workdir", str(work)]
    monkeypatch.setattr(parts, "settle", lambda *a, **k: {"answers": {"a": 1}})

    def half(target: str, folder: Path, budget: Budget, keep: parts.Keep) -> None:
        keep({"passed": 7})
        raise KeyboardInterrupt

    monkeypatch.setattr(parts, "parity", half)
    with pytest.raises(KeyboardInterrupt):
        gpu.main(arguments)
    (file,) = results.iterdir()
    said = json.loads(file.read_text())
    assert said["settle"] == {"answers": {"a": 1}} and said["parity"] == {"passed": 7}
    assert said["unfinished"] == ["parity", "bench"]


def test_a_report_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(parts, "parity", lambda *a, **k: pytest.fail("it was measured"))
    (tmp_path / "results").write_text("a file, no folder")
    arguments = ["--target", "cpu", "--only", "parity", "--results", str(tmp_path / "results")]
    assert gpu.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot write" in line


@pytest.mark.parametrize(("only", "share"), [(("settle", "parity"), 1 / 3), (("settle",), 1)])
def test_questions_may_not_take_the_time_of_what_comes_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, only: tuple[str, ...], share: float
) -> None:
    monkeypatch.setattr(gpu, "diagnose", lambda: diagnose(probes(tmp_path, READY, smi=RTX)))
    monkeypatch.setattr(parts, "parity", lambda *a, **k: {"passed": 1})
    given: dict[str, Any] = {}

    def ran(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        given.update(command=command, **options)
        file = Path(command[command.index("--json") + 1])
        file.write_text('{"answers": {}}')
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(parts.subprocess, "run", ran)
    words = [word for part in only for word in ("--only", part)]
    assert gpu.main([*words, "--minutes", "10", "--results", str(tmp_path / "r")]) == 0
    longest = int(given["command"][given["command"].index("--longest") + 1])
    assert longest == pytest.approx(600 * share, abs=5)
    assert given["timeout"] == pytest.approx(longest + parts.GRACE_S, abs=1)


def test_the_smoke_run_needs_no_target_and_asks_nothing_of_onnxruntime_that_it_has_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first call on a machine that has a GPU, cuda-python and no library that runs graphs."""
    machine = probes(tmp_path, CPU_ONLY | {"cuda-python": "13.0"}, smi=HOPPER)
    monkeypatch.setattr(gpu, "diagnose", lambda: diagnose(machine))
    monkeypatch.setattr(smoke.cuda_provider, "obstacle", lambda: "built without CUDA")
    monkeypatch.setattr(smoke, "_piece", lambda *of: dry_driver())
    common = ["--results", str(tmp_path / "r")]
    assert gpu.main(["--only", "smoke", *common]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (said["kind"], said["target"], said["unfinished"]) == ("gpu", None, [])
    pieces = said["smoke"]["pieces"]
    assert pieces.pop("driver")["wrong"] == []
    assert len(pieces) == 4 and all("built without CUDA" in p["not_run"] for p in pieces.values())
    monkeypatch.setattr(gpu, "diagnose", lambda: diagnose(probes(tmp_path, CPU_ONLY, smi=HOPPER)))
    assert gpu.main(["--only", "bench", *common]) == 2  # all else needs a target


@pytest.mark.parametrize(
    ("end", "wrong"),
    [
        (
            subprocess.CompletedProcess([], -11, None, "one\ntwo\n"),
            "ended with code -11: one / two",
        ),
        (subprocess.TimeoutExpired([], 120), "no end within 120 s"),
        (None, "3 of 48"),
    ],
)
def test_a_piece_that_takes_its_process_along_is_one_answer_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: Any, wrong: str
) -> None:
    def ran(command: list[str], **options: Any) -> Any:
        assert command[2:4] == ["benchmarks.gpu.smoke", "driver"] and options["timeout"] == 120
        if isinstance(end, Exception):
            raise end
        if end is None:  # it left its answer
            (Path(command[-1]) / "found.json").write_text('{"wrong": ["3 of 48"]}')
        return end

    monkeypatch.setattr(smoke.subprocess, "run", ran)
    (tmp_path / "found.json").write_text('{"wrong": ["of an earlier piece"]}')
    found = smoke._piece(smoke.Smoke(tmp_path, is_dry=False), "driver", Budget(5))
    assert found["wrong"] == [wrong]
    assert wrong in smoke.line_of("driver", found)


def dry_driver(gpu: FakeGpu | None = None) -> dict[str, Any]:
    return check_driver((gpu or FakeGpu(has_host_addresses=True)).module())


@pytest.mark.parametrize("runs_late", (True, False))
def test_the_smoke_run_calls_every_verb_of_the_driver(
    monkeypatch: pytest.MonkeyPatch, runs_late: bool
) -> None:
    called: set[str] = set()
    verbs = [name for name in vars(Driver) if not name.startswith("_")]

    def noted(name: str, verb: Any) -> Any:
        return lambda *a, **k: called.add(name) or verb(*a, **k)

    for name in verbs:
        monkeypatch.setattr(Driver, name, noted(name, vars(Driver)[name]))
    gpu = FakeGpu(runs_late)
    told = dry_driver(gpu)
    assert told["wrong"] == gpu.wrong == []
    assert called == set(verbs)
    assert not any(gpu.live.values()), gpu.live
    assert told["found"]["wait_in_a_capture"] == "cudaErrorStreamCaptureUnsupported"


malloc = FakeCudaRuntime.cudaMalloc


@pytest.mark.parametrize(
    ("function", "fault", "check"),
    [
        ("cudaMemcpyAsync", lambda *a: (cudaError_t.cudaSuccess,), "copies"),
        ("cudaMemset2DAsync", lambda *a: (cudaError_t.cudaSuccess,), "zeros"),
        ("cudaMalloc", lambda cuda, size: malloc(cuda, min(size, 1 << 24)), "full_memory"),
        ("cudaEventElapsedTime", lambda *a: (cudaError_t.cudaSuccess, -1.0), "events"),
        ("cudaGraphLaunch", lambda *a: (cudaError_t.cudaSuccess,), "replays"),
        ("cudaStreamSynchronize", lambda *a: (cudaError_t.cudaSuccess,), "wait_in_a_capture"),
    ],
)
def test_a_device_that_does_another_thing_than_asked_is_found(
    function: str, fault: Any, check: str
) -> None:
    told = check_driver(type("Odd", (FakeCudaRuntime,), {function: fault})(FakeGpu(False)))
    assert check in [line.partition(":")[0] for line in told["wrong"]]
    assert all("\n" not in line for line in told["wrong"])


def test_an_answer_that_departs_is_named() -> None:
    right = smoke.Turn(0.1, smoke.COUNT, True, 1e-5)
    assert smoke.faults([right, right], "float32") == []
    (tokens,) = smoke.faults([replace(right, same_tokens=7)], "float32")
    assert "7 of 48 tokens" in tokens
    assert smoke.faults([replace(right, same_tokens=7)], "float16") == []  # a near tie
    (kept,) = smoke.faults([right, replace(right, has_same_survivors=False)], "float16")
    assert "answer 2 kept other tokens" in kept
    for error in (1.0, float("nan")):
        (off,) = smoke.faults([replace(right, logits_error=error)], "float16")
        assert "logits off by" in off


def test_the_budget_refuses_what_will_not_end() -> None:
    now = [0.0]
    budget = Budget(1, clock=lambda: now[0])
    budget.needs(60, "all of it")
    now[0] = 31.0
    with pytest.raises(OutOfTimeError, match="29 s.*--workdir"):
        budget.needs(30, "the rest")
    now[0] = 90.0
    assert budget.left_s == 0


def test_the_parity_part_finds_its_tests() -> None:
    assert parts.PARITY_TESTS.is_file()


def test_the_parity_part_tells_what_passed_failed_and_was_left_out(tmp_path: Path) -> None:
    file = tmp_path / "test_little.py"
    file.write_text(
        "import pytest\n"
        "ids = ['on:reference:float32:a', 'on:cuda:float32:a']\n"
        "@pytest.mark.parametrize('x', [0, 1], ids=ids)\n"
        "def test_right(x): assert x == 0\n"
        "@pytest.mark.parametrize('x', [0], ids=['on:reference:float32:a'])\n"
        "def test_wrong(x): assert x == 7\n"
        "@pytest.mark.parametrize('x', [0], ids=['on:reference:float32:a'])\n"
        "def test_absent(x): pytest.skip('no GPU')\n"
    )
    told = parts.parity("cpu", tmp_path, Budget(5), file)
    assert told["passed"] == 1
    assert list(told["failed"]) == ["test_wrong[on:reference:float32:a]"]
    assert "assert 0 == 7" in told["failed"]["test_wrong[on:reference:float32:a]"]
    assert told["skipped"] == {"test_absent[on:reference:float32:a]": "no GPU"}
    assert gpu.failed("parity", told)
    assert gpu.failed("parity", {"passed": 0, "failed": {}, "skipped": {"a": "b"}})
    assert gpu.failed("parity", {"passed": 3, "failed": {}, "error": "no time is left"})
    assert not gpu.failed("parity", {"passed": 3, "failed": {}})
    with pytest.raises(OutOfTimeError):
        parts.parity("cpu", tmp_path, Budget(0.1), file)


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "--no-print-directory", *arguments, f"PYTHON={sys.executable}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_gpu_asks_for_no_linter() -> None:
    gpu, lint = (
        set(re.search(r"'(torch .*?)'", make("-n", target).stdout).group(1).split())  # type: ignore[union-attr]
        for target in ("gpu", "check-environment")
    )
    assert gpu >= {"torch", "onnxscript", "pytest"} and lint >= {"ruff", "mypy"}
    assert not gpu & {"ruff", "mypy", "xdist", "psutil", "accelerate"}


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_cases_runs_every_script_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "case_1.py").write_text("import os; assert os.path.isdir(os.environ['PATCHSIEVE'])")
    assert make("cases", f"CASES={tmp_path}").stdout == "right  case_1.py\n"
    (tmp_path / "case_0.py").write_text("print('41 for 42'); raise SystemExit(1)")
    done = make("cases", f"CASES={tmp_path}")
    assert done.stdout == "WRONG  case_0.py\n    41 for 42\nright  case_1.py\n"
    assert done.returncode == 2
    for folder, said in (("", "make cases CASES=folder"), (str(tmp_path / "x"), "no case_*.py in")):
        done = make("cases", f"CASES={folder}")
        assert done.returncode == 2 and said in done.stderr


def test_parity_asks_a_target_for_no_precision_that_it_does_not_export() -> None:
    ids = {param.id for param in test_on_gpu.cases()}
    assert {"on:cuda:float32", "on:cuda:float16", "on:tensorrt:bfloat16"} <= ids
    assert "on:cuda:bfloat16" not in ids


def test_a_cpu_run_leaves_the_questions_for_a_gpu_open(tmp_path: Path) -> None:
    assert "need a GPU" in parts.settle("cpu", tmp_path, Budget(5), 60)["not_run"]
