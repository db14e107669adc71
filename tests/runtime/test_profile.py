"""`patchsieve profile`: what it counts. No test looks at how long anything took."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import patchsieve
from patchsieve.cli import profile as cli_profile
from patchsieve.contract.errors import RequestError
from patchsieve.contract.model import Generation
from patchsieve.contract.writing import check_file, write_result
from patchsieve.runtime.profile import profile, statistics
from tests.support.bundles import PHOTO, PLAN, PROMPT, command, command_json

pytest_plugins = ["tests.support.bundles"]


CALIBRATE = ("calibrate", "no-model", "--data", "no-data", "--sites", "2", "--target-tokens", "9")


def test_every_part_is_measured_in_every_run(tiny_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    arguments = ("profile", tiny_bundle, "--image", PHOTO, "--prompt", PROMPT, "--threads", 1)
    counts = ("--warmup", 1, "--runs", 3, "--max-new-tokens", 5, "--output", file)
    code, said = command_json(*arguments, *counts)
    assert (code, said["schema_version"]) == (0, 1)
    assert json.loads(file.read_text()) == said
    assert (said["plan"], said["against"], said["stages"]) == (
        PLAN,
        "none",
        [[0, 1], [2, 3], [4, 4]],
    )
    pruned, full = said["plans"][PLAN], said["plans"]["none"]
    shared = {"preprocess", "vision", "prefill", "decide", "ttft", "total"}
    shared |= {f"prefill.{stage}" for stage in range(3)}
    assert set(pruned["raw"]["times_ms"]) == shared | {"decide.2", "decide.4"}
    assert set(full["raw"]["times_ms"]) == shared
    for plan in (pruned, full):
        assert all(len(values) == 3 for values in plan["raw"]["times_ms"].values())
        assert [len(steps) for steps in plan["raw"]["decode_ms"]] == [4, 4, 4]
        assert plan["new_tokens"] == 5
        assert set(plan["times_ms"]) == set(plan["raw"]["times_ms"]) | {"per_token"}
        assert all(
            set(v) == {"p50", "p90", "p95", "p99", "mean"} for v in plan["times_ms"].values()
        )
    assert pruned["survivors"] == {
        "2.0": {"min": 8, "median": 8.0, "max": 8},
        "4.0": {"min": 4, "median": 4.0, "max": 4},
    }
    assert full["survivors"] == {}
    assert set(said["ratios"]) == shared - {"decide"} | {"per_token", "kv_used", "kv_reserved"}
    used = pruned["kv_bytes"]["used"] / full["kv_bytes"]["used"]
    assert said["ratios"]["kv_used"] == pytest.approx(used, abs=1e-4)
    assert said["peak_rss_bytes"] > 1e7
    assert {"cpu", "python", "memory_bytes", "backend"} <= set(said["machine"])


def test_an_end_token_does_not_shorten_a_run(tiny_bundle: Path) -> None:
    model = patchsieve.load(tiny_bundle, threads=1)
    said = model.generate(PHOTO, PROMPT, max_new_tokens=6, ignore_eos=True)
    ends = set(model.facts.tokens.eos_token_ids)
    assert len(said.token_ids) == 6
    assert said.finish_reason == "length"
    object.__setattr__(model.facts.tokens, "eos_token_ids", (said.token_ids[2], *ends))
    shorter = model.generate(PHOTO, PROMPT, max_new_tokens=6)
    assert len(shorter.token_ids) <= 3
    assert shorter.finish_reason == "eos"
    assert (
        model.generate(PHOTO, PROMPT, max_new_tokens=6, ignore_eos=True).token_ids == said.token_ids
    )
    model.close()


def test_a_stop_string_of_the_checkpoint_does_not_shorten_a_run(tiny_bundle: Path) -> None:
    model = patchsieve.load(tiny_bundle, threads=1)
    said = model.generate(PHOTO, PROMPT, max_new_tokens=6, ignore_eos=True).text
    model.facts = replace(model.facts, generation=Generation(stop=(said.strip()[0],)))
    assert model.generate(PHOTO, PROMPT, max_new_tokens=6).finish_reason == "stop"
    report = profile(model, PHOTO, PROMPT, warmup=0, runs=1, max_new_tokens=6)
    model.close()
    assert report["plans"][PLAN]["new_tokens"] == 6


def test_decode_steps_stay_out_of_a_result_s_json(tiny_bundle: Path) -> None:
    model = patchsieve.load(tiny_bundle, threads=1)
    result = model.generate(PHOTO, PROMPT, max_new_tokens=4, ignore_eos=True)
    model.close()
    assert len(result.timings_ms["decode_steps"]) == 3
    assert "decode_steps" not in result.to_dict()["timings_ms"]


def test_a_plan_alone_and_a_prompt_without_image(tiny_bundle: Path) -> None:
    model = patchsieve.load(tiny_bundle, threads=1)
    report = profile(model, None, "Hello", plan="none", warmup=0, runs=1, max_new_tokens=1)
    model.close()
    assert "ratios" not in report
    assert list(report["plans"]) == ["none"]
    assert "per_token" not in report["plans"]["none"]["times_ms"]


def test_both_plans_keep_their_caches_between_runs(tiny_bundle: Path) -> None:
    model = patchsieve.load(tiny_bundle, threads=1)
    made = []
    allocate = model.backend.allocate
    model.backend.allocate = lambda *a: made.append(a) or allocate(*a)
    profile(model, PHOTO, PROMPT, against="none", warmup=1, runs=3, max_new_tokens=2)
    model.close()
    assert len(made) == 2 * 3  # plans x stages


def test_the_table_shows_each_stage_and_the_ratio(tiny_bundle: Path) -> None:
    counts = ("--warmup", 0, "--runs", 1, "--max-new-tokens", 2, "--quiet")
    code, out, _ = command("profile", tiny_bundle, *counts)
    assert code == 0
    lines = [line.split("  ")[0] for line in out.splitlines()]
    order = ["preprocess", "vision", "prefill, layers 0-1", "decision before layer 2"]
    order += ["prefill, layers 2-3", "decision before layer 4", "prefill, layers 4-4"]
    order += ["time to first token", "time per token", "total"]
    places = [lines.index(name) for name in order]
    assert places == sorted(places)
    assert "none p50 ratio" in " ".join(out.split())  # columns are as wide as their numbers


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("profile", "no-bundle", "--output", "{tmp}/no/p.json"), "no folder {tmp}/no"),
        (("profile", "no-bundle", "--output", "{tmp}"), "found: a folder"),
        (("profile", "no-bundle", "--output", "{tmp}/file/p.json"), "no folder {tmp}/file"),
        (("show", "no-bundle", "--image", PHOTO, "--prompt", "x", "-o", "{tmp}/no/p.html"), "no "),
        (("eval", "no-bundle", "--data", "no-data", "-o", "{tmp}/no/a.jsonl"), "no folder"),
        ((*CALIBRATE, "-o", "{tmp}/file/heads"), "is no folder"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    (tmp_path / "file").touch()
    code, out, said = command(*(word.replace("{tmp}", str(tmp_path)) for word in arguments))
    assert (code, out) == (2, "")
    assert "cannot write" in said and words.replace("{tmp}", str(tmp_path)) in said
    assert said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]  # trying leaves nothing


@pytest.mark.parametrize("as_json", (True, False))
def test_a_measurement_whose_file_fails_is_printed_and_kept(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    """As where a disk becomes full, or a stick is drawn, while it is measured."""
    monkeypatch.setattr(cli_profile, "check_file", lambda path: None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gone = tmp_path / "gone" / "profile.json"
    counts = ("--warmup", 0, "--runs", 1, "--max-new-tokens", 2, "--quiet", "--output", gone)
    code, out, said = command("profile", tiny_bundle, *counts, *(["--json"] if as_json else []))
    assert code == 2 and "cannot write" in said
    (kept,) = tmp_path.iterdir()
    assert f"move {kept}" in said
    report = json.loads(kept.read_text())
    assert report["plans"][PLAN]["times_ms"]["ttft"]["p50"] > 0
    if as_json:
        printed = json.loads(out)
        error = {name: printed.pop(name) for name in ("error", "what", "found", "expected", "do")}
        assert "cannot write" in error["what"] and f"move {kept}" in error["do"]
        assert printed == report
    else:
        assert "time to first token" in out


def test_a_result_may_go_to_a_device_or_over_a_link(tmp_path: Path) -> None:
    check_file(Path("/dev/null"))
    write_result(Path("/dev/null"), b"gone")
    assert Path("/dev/null").is_char_device()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_result(tmp_path / "link", b"kept")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == b"kept"


def test_statistics_are_percentiles_of_the_values() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert statistics(values) == {
        "p50": 3.0,
        "p90": pytest.approx(np.percentile(values, 90)),
        "p95": pytest.approx(np.percentile(values, 95)),
        "p99": pytest.approx(np.percentile(values, 99)),
        "mean": 3.0,
    }


@pytest.mark.parametrize("counts", [{"runs": 0}, {"warmup": -1}])
def test_counts_that_measure_nothing_are_refused(counts: dict[str, int]) -> None:
    with pytest.raises(RequestError, match="too few runs"):
        profile(None, None, "", **counts)  # type: ignore[arg-type]  # refused before it is used
