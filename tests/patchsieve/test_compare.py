"""`patchsieve compare`: two profiles side by side."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from patchsieve.runtime import profiles
from tests.support.bundles import PHOTO, PLAN, PROMPT, command, command_json

pytest_plugins = ["tests.support.bundles"]


@pytest.fixture(scope="module")
def measured(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `profile` writes of the tiny bundle."""
    file = tmp_path_factory.mktemp("profile") / "a.json"
    given = ("--image", PHOTO, "--prompt", PROMPT, "--threads", 1, "--output", file)
    counts = ("--warmup", 0, "--runs", 1, "--max-new-tokens", 2, "--quiet")
    assert command("profile", tiny_bundle, *given, *counts)[0] == 0
    return json.loads(file.read_text())


@pytest.fixture
def two(measured: dict[str, Any], tmp_path: Path) -> Any:
    """Writes two profiles, the second after a change, and gives their paths."""

    def write(change: Any = lambda profile: None) -> tuple[Path, Path]:
        other = copy.deepcopy(measured)
        change(other)
        paths = tmp_path / "a.json", tmp_path / "b.json"
        for path, profile in zip(paths, (measured, other), strict=True):
            path.write_text(json.dumps(profile))
        return paths

    return write


def test_a_profile_equals_itself(two: Any) -> None:
    code, said = command_json("compare", *two())
    assert (code, said["schema_version"], said["differences"]) == (0, 1, {})
    assert list(said["plans"]) == [PLAN, "none"]
    for rows in said["plans"].values():
        assert {"ttft", "prefill.0", "per_token", "kv_used", "kv_reserved"} <= set(rows)
        assert {row["ratio"] for row in rows.values()} <= {1.0, None}
        assert all((row["ratio"] is None) == (row["a"] == 0) for row in rows.values())


def test_the_command_prints_what_python_users_compare(two: Any) -> None:
    a, b = two(lambda profile: profile.update(precision="float16"))
    found = profiles.compare(profiles.read(str(a)), profiles.read(b))
    assert found.differences == {"precision": [found.a.facts["precision"], "float16"]}
    printed = json.loads(json.dumps({"schema_version": 1} | found.to_dict()))
    assert command_json("compare", a, b)[1] == printed


def test_ratios_are_those_of_the_second_over_the_first(two: Any, measured: dict[str, Any]) -> None:
    def faster(profile: dict[str, Any]) -> None:
        profile["plans"][PLAN]["times_ms"]["ttft"]["p50"] /= 4
        profile["plans"][PLAN]["kv_bytes"]["used"] *= 3
        del profile["plans"][PLAN]["times_ms"]["vision"]

    code, said = command_json("compare", *two(faster))
    rows = said["plans"][PLAN]
    assert code == 0
    assert rows["ttft"]["ratio"] == 0.25 and rows["kv_used"]["ratio"] == 3.0
    assert rows["ttft"]["a"] == measured["plans"][PLAN]["times_ms"]["ttft"]["p50"]
    assert "vision" not in rows and "vision" in said["plans"]["none"]
    assert said["plans"]["none"]["ttft"]["ratio"] == 1.0


def test_energy_is_compared_where_both_measured_it(two: Any, measured: dict[str, Any]) -> None:
    def powered(joules: float) -> Any:
        return lambda p: p["plans"][PLAN].update(power={"joules_per_answer": {"p50": joules}})

    a, b = two(powered(6.0))
    code, said = command_json("compare", a, b)
    assert code == 0 and "joules" not in said["plans"][PLAN]
    other = copy.deepcopy(measured)
    powered(4.0)(other)
    a.write_text(json.dumps(other))
    code, said = command_json("compare", a, b)
    assert said["plans"][PLAN]["joules"] == {"a": 4.0, "b": 6.0, "ratio": 1.5}
    code, out, _ = command("compare", a, b)
    assert "energy of an answer" in out and "4.000 J" in out


def test_what_is_not_the_same_is_said_first(two: Any) -> None:
    def elsewhere(profile: dict[str, Any]) -> None:
        profile["machine"]["cpu"]["model"] = "another processor"
        profile["machine"]["memory_bytes"]["available"] += 1  # says nothing of a machine
        profile["precision"] = "float16"
        profile["plans"][PLAN]["new_tokens"] = 7

    paths = two(elsewhere)
    code, said = command_json("compare", *paths)
    assert code == 0
    assert set(said["differences"]) == {"precision", "new_tokens", "cpu.model"}
    assert said["differences"]["new_tokens"] == [2, 7]
    code, out, _ = command("compare", *paths)
    assert code == 0
    assert out.index("not the same in both") < out.index("another processor") < out.index("B / A")


def test_plans_of_other_names_stand_beside_each_other(two: Any) -> None:
    def renamed(profile: dict[str, Any]) -> None:
        profile["plan"] = "quarter"
        profile["plans"]["quarter"] = profile["plans"].pop(PLAN)

    code, said = command_json("compare", *two(renamed))
    assert code == 0
    assert list(said["plans"]) == [f"{PLAN} / quarter", "none"]
    assert (said["a"]["plan"], said["b"]["plan"]) == (PLAN, "quarter")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "a JSON object"),
        ("[1]", "no schema_version"),
        ("{}", "no schema_version"),
        ('{"schema_version": 2}', "schema_version 2"),
        ('{"schema_version": 1, "text": "of run"}', "is not a profile"),
        ('{"schema_version": 1, "error": "no such plan"}', "is not a profile"),
    ],
)
def test_what_is_no_profile_is_refused_in_one_line(text: str, told: str, two: Any) -> None:
    a, b = two()
    b.write_text(text)
    code, out, err = command("compare", a, b)
    assert (code, out) == (2, "")
    assert told in err and str(b) in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p["plans"][PLAN]["times_ms"]["ttft"].pop("p50"),
        lambda p: p["plans"][PLAN].update(times_ms=[1]),
        lambda p: p["plans"][PLAN]["kv_bytes"].update(used="much"),
        lambda p: p.update(plans={}),
        lambda p: p.pop("machine"),
    ],
)
def test_a_damaged_profile_is_refused_in_one_line(change: Any, two: Any) -> None:
    code, out, err = command("compare", *two(change))
    assert (code, out) == (2, "")
    assert "profile" in err and len(err.splitlines()) == 1
