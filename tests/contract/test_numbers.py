"""How types and formats are named to people, in one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from patchsieve.contract import files
from patchsieve.contract.precision import Precision
from patchsieve.contract.weights import WeightsFile, in_words
from patchsieve.export.card import card
from tests.support.bundles import command, command_json

pytest_plugins = ["tests.support.bundles"]

INT8 = {"tower": "int8", "layer": "int8", "scorer": "int8", "head": "int8-weights"}


@pytest.mark.parametrize(
    ("formats", "words"),
    [
        ({}, ""),
        ({"layer": "float"}, ""),
        (INT8, "tower and decoder and scorer int8, head int8-weights"),
        ({"layer": "int8", "step": "int4-32"}, "decoder int8, single rows int4-32"),
        ({"tower": "int8", "layer": "int4-128"}, "tower int8, decoder int4-128"),
    ],
)
def test_formats_are_named_by_part(formats: dict[str, str], words: str) -> None:
    held = [WeightsFile(part, None, "float32", form) for part, form in formats.items()]
    held += [WeightsFile(part, None, "float32", "float") for part in ("embeddings", "joint")]
    assert in_words(held) == words


def test_layers_of_two_formats_name_both() -> None:
    kinds = ["int8", "int8", "int4-128", "int4-128", "int8"]
    held = [WeightsFile("layer", index, "float16", kind) for index, kind in enumerate(kinds)]
    assert in_words(held) == "decoder int8 and int4-128"


def test_the_card_and_the_commands_say_the_same(own_bundle: Path) -> None:
    facts = files.read(own_bundle)
    assert facts.numbers == "float32"
    weights = {
        path: replace(entry, format=INT8.get(entry.part, "float"))
        for path, entry in facts.weights.items()
    }
    low = replace(facts, weights=weights, precision=Precision("float16", "float32", "float32"))
    line = "tower=float16,decoder=float32,head=float32; tower and decoder int8, head int8-weights"
    assert low.numbers == line
    assert replace(facts, cache_type="float16").numbers == "float32; caches float16"
    assert f"| precision | {line} |" in card(low, {})
    files.write(own_bundle, replace(facts, weights=weights))
    said = "float32; tower and decoder int8, head int8-weights"
    assert command_json("inspect", own_bundle)[1]["precision"] == said
    assert said in command("inspect", own_bundle)[1].splitlines()[0]
    assert command_json("doctor", own_bundle)[1]["bundle"]["precision"] == said


def test_export_says_weights_and_boards_in_short(own_bundle: Path) -> None:
    plan = ("--method", "fastv", "--sites", "2", "--keep-ratio", "0.75")
    code, out, _ = command("export", "--reuse", own_bundle, *plan, "--quiet")
    assert code == 0
    assert "  weights: float32 (float " in out
    assert "  boards of 8 GB, 16 GB, 32 GB, 64 GB hold it" in out
