"""`make gpu` as far as a machine without a GPU goes: the same functions on a tiny model."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.checkpoint import LLAVA_7B, ROOT, TINY, tensor_shapes
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import parts
from benchmarks.gpu.bench import PAPER_KV_MB, check_counts, cuda_time, fixed_plan, paper
from benchmarks.gpu.budget import Budget, OutOfTimeError
from benchmarks.gpu.choice import GPU_TARGETS, choose
from benchmarks.gpu.floors import Floor, peak_of
from benchmarks.gpu.report import file_name, write_report
from benchmarks.papers import LLAVA_7B as PAPER_SHAPE
from patchsieve import cost as costs
from patchsieve.errors import BackendMissingError, PatchsieveError
from patchsieve.plan import NO_PRUNING
from patchsieve.pruning.select import num_to_keep
from patchsieve.runtime.board.doctor import diagnose
from tests import test_on_gpu
from tests.test_doctor import CPU_ONLY, CUDA, HOPPER, READY, RTX, probes


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
    write_report(tmp_path, said | {"target": "cuda"})
    assert "settle" not in json.loads(path.read_text())
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_the_budget_refuses_what_will_not_end() -> None:
    now = [0.0]
    budget = Budget(1, clock=lambda: now[0])
    budget.needs(60, "all of it")
    now[0] = 31.0
    with pytest.raises(OutOfTimeError, match="29 s.*--workdir"):
        budget.needs(30, "the rest")
    now[0] = 90.0
    assert budget.left_s == 0


def test_the_parity_part_tells_what_passed_failed_and_was_left_out(tmp_path: Path) -> None:
    file = tmp_path / "test_little.py"
    file.write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('x', [0, 1], ids=['on:reference:a', 'on:cuda:a'])\n"
        "def test_right(x): assert x == 0\n"
        "@pytest.mark.parametrize('x', [0], ids=['on:reference:a'])\n"
        "def test_wrong(x): assert x == 7\n"
        "@pytest.mark.parametrize('x', [0], ids=['on:reference:a'])\n"
        "def test_absent(x): pytest.skip('no GPU')\n"
    )
    told = parts.parity("cpu", tmp_path, Budget(5), file)
    assert told["passed"] == 1
    assert list(told["failed"]) == ["test_wrong[on:reference:a]"]
    assert "assert 0 == 7" in told["failed"]["test_wrong[on:reference:a]"]
    assert told["skipped"] == {"test_absent[on:reference:a]": "no GPU"}
    assert gpu.failed("parity", told)
    assert gpu.failed("parity", {"passed": 0, "failed": {}, "skipped": {"a": "b"}})
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
    assert "need a GPU" in parts.settle("cpu", tmp_path, Budget(5))["not_run"]
