"""`patchsieve cost` says bytes by part and format, and the boards that hold them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from patchsieve.contract.precision import BYTES
from tests.support.bundles import PLAN, command, command_json

pytest_plugins = ["tests.support.bundles"]

SEVEN = ("cost", "--model", "llava-1.5-7b")


def said(*words: str) -> dict[str, Any]:
    """What the command says of LLaVA-1.5-7B."""
    code, found = command_json(*SEVEN, *words)
    assert code == 0, found
    assert found["weight_bytes"] == sum(row["bytes"] for row in found["weights"])
    return found


def formats_of(found: dict[str, Any], part: str) -> set[str]:
    return {row["format"] for row in found["weights"] if row["part"] == part}


def holding(found: dict[str, Any]) -> list[str]:
    """Boards that run the model."""
    return [board["memory"] for board in found["boards"] if board["runs"]]


def test_llava_7b_in_int4_is_at_most_4_3_gb_and_runs_on_8_gb() -> None:
    found = said("--precision", "int4")
    assert 3.9e9 < found["weight_bytes"] < 4.3e9
    assert formats_of(found, "decoder layers") == {"int4-128", "float"}
    assert formats_of(found, "vision tower") == {"int8", "float"}
    assert holding(found) == ["8 GB", "16 GB", "32 GB", "64 GB"]
    assert (found["precision"], found["cache_type"]) == ("int4", "float16")
    half = said()
    assert (half["precision"], holding(half)) == ("float16", ["32 GB", "64 GB"])
    assert half["kv_bytes"] == found["kv_bytes"]


def test_types_targets_and_caches_are_those_of_export() -> None:
    assert formats_of(said("--precision", "int4", "--targets", "cpu"), "decoder layers") == {
        "int4-32",
        "float",
    }
    mixed = said("--precision", "mixed")
    assert mixed["memory"]["target"] == "cpu" and mixed["memory"]["building"] == 0
    assert "int4-32" in formats_of(mixed, "decoder layers for single rows")
    assert all(board["builds"] is None for board in mixed["boards"])
    wide = said("--precision", "float32")
    assert wide["kv_bytes"] == 2 * said()["kv_bytes"]
    some = said("--precision", "int4,layers.0=float,decisions=int4", "--sites", "2", *_FASTV)
    assert some["weight_bytes"] > said("--precision", "int4")["weight_bytes"]
    # The layers before the last site are int8 unless asked otherwise.
    decided = said("--precision", "int4", "--sites", "2", *_FASTV)
    layers = {r["format"]: r["bytes"] for r in decided["weights"] if r["part"] == "decoder layers"}
    assert layers["int8"] == 2 * (202_375_168 + 2 * (4 * 4096 + 2 * 11008 + 4096))


_FASTV = ("--method", "fastv", "--keep-ratio", "0.5")


def test_a_plan_that_compares_words_has_a_scorer() -> None:
    assert "CLIP scorer" not in {row["part"] for row in said()["weights"]}
    scored = said("--method", "ivtp", "--precision", "int8")
    assert formats_of(scored, "CLIP scorer") == {"int8", "float"}


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("--precision", "int5"), "cannot read the precision"),
        (("--precision", "int4,eyes=int8"), "a matrix that the model does not have"),
        (("--precision", "mixed", "--targets", "tensorrt"), "has one copy of the decoder"),
        (("--precision", "bfloat16", "--targets", "cpu"), "does not compute in this precision"),
        (("--config", "config.json"), "cost needs one model"),
    ],
)
def test_what_export_refuses_is_refused(words: tuple[str, ...], what: str) -> None:
    code, found = command_json(*SEVEN, *words)
    assert code == 2 and what in found["error"] and found["do"]


def test_a_bundle_in_its_own_precision_or_in_another(tiny_bundle: Path) -> None:
    _, own = command_json("cost", tiny_bundle)
    _, same = command_json("cost", tiny_bundle, "--precision", "float32")
    assert own["weights"] == same["weights"]
    assert own["memory"]["kv"] == same["memory"]["kv"] == own["kv_bytes_reserved"]
    _, low = command_json("cost", tiny_bundle, "--precision", "int8", "--plan", "none")
    assert low["weight_bytes"] < 0.5 * own["weight_bytes"]
    assert low["memory"]["kv"] > own["memory"]["kv"]
    code, refused = command_json("cost", tiny_bundle, "--targets", "cpu")
    assert code == 2 and "--targets has no effect" in refused["error"]
    _, inspected = command_json("inspect", tiny_bundle, "--plan", PLAN)
    assert inspected["weights"] == own["weights"] and inspected["boards"] == own["boards"]
    assert {row["type"] for row in own["weights"]} <= set(BYTES)


def test_the_tables_are_for_people() -> None:
    code, out, _ = command(*SEVEN, "--precision", "int4", "--sites", "4", *_FASTV)
    assert code == 0
    lines = out.splitlines()
    assert ["part", "type", "format", "bytes"] in [line.split() for line in lines]
    nano = next(line for line in lines if line.startswith("8 GB "))
    assert nano.count("left") == 1 and "LACKS" in nano  # it runs, but 28 layers are one engine
    assert any(line.startswith("8 GB: export with --build-memory 6.4") for line in lines)
    assert all(len(line) <= 120 for line in lines)
