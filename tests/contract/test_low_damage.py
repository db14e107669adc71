"""Bundles in int8 and int4 whose manifest contradicts itself are refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import patchsieve
from patchsieve.contract import files as bundle_files
from patchsieve.contract.errors import BundleError
from tests.support.bundles import command
from tests.support.damage import edit_manifest, refused
from tests.support.low_bundles import MIXED

pytest_plugins = ["tests.support.low_bundles"]

Manifest = dict[str, Any]
STEPS = "graphs/weights/steps.{}.safetensors"
LAYERS = "graphs/weights/layers.{}.safetensors"


def unknown_format(data: Manifest) -> None:
    data["weights"][LAYERS.format(2)]["format"] = "int2"


def unknown_part(data: Manifest) -> None:
    data["weights"][STEPS.format(2)]["part"] = "steps"


def one_step_graph_less(data: Manifest) -> None:
    del data["graphs"]["step_1"]
    for graphs in data["targets"].values():
        del graphs["step_1"]


def no_step_graph(data: Manifest) -> None:
    for number in range(3):
        del data["graphs"][f"step_{number}"]
        for graphs in data["targets"].values():
            del graphs[f"step_{number}"]


def one_step_graph_more(data: Manifest) -> None:
    data["graphs"]["step_3"] = data["graphs"]["step_1"] | {
        "identity": data["graphs"]["step_1"]["identity"] | {"stage": 3}
    }


def one_target_without_a_step_graph(data: Manifest) -> None:
    del data["targets"]["reference"]["step_0"]


def step_weights_absent(data: Manifest) -> None:
    del data["weights"][STEPS.format(3)]
    for graph in data["graphs"].values():
        graph["weights"] = [path for path in graph["weights"] if path != STEPS.format(3)]


def all_step_weights_absent(data: Manifest) -> None:
    for number in range(5):
        del data["weights"][STEPS.format(number)]
    for graph in data["graphs"].values():
        graph["weights"] = [path for path in graph["weights"] if "steps" not in path]


def step_weights_of_another_layer(data: Manifest) -> None:
    data["weights"][STEPS.format(3)]["layer"] = 2


def step_graph_of_other_sizes(data: Manifest) -> None:
    hidden = data["graphs"]["step_0"]["inputs"][0]
    assert hidden["name"] == "hidden"
    hidden["shape"][2] = 63


CASES: dict[Callable[[Manifest], None], str] = {
    unknown_format: "int2",
    unknown_part: "steps as int4-32",
    one_step_graph_less: "one for each stage",
    no_step_graph: "one for each stage",
    one_step_graph_more: "one for each stage",
    one_target_without_a_step_graph: "no step_0",
    step_weights_absent: "copied for single rows, once",
    all_step_weights_absent: "one for each stage",
    step_weights_of_another_layer: "copied for single rows, once",
    step_graph_of_other_sizes: "hidden of step_0",
}


@pytest.mark.parametrize("harm", CASES, ids=lambda harm: harm.__name__)
def test_a_manifest_that_contradicts_itself_is_refused(
    own_low: Callable[[str], Path], harm: Callable[[Manifest], None]
) -> None:
    bundle = own_low(MIXED)
    assert bundle_files.read(bundle)
    edit_manifest(bundle, harm)
    line = refused(lambda: bundle_files.read(bundle), BundleError)
    assert CASES[harm] in line, line
    code, out, err = command("inspect", bundle)
    assert code == 2 and "Traceback" not in out + err


def test_weights_of_a_step_that_are_gone_are_named(own_low: Callable[[str], Path]) -> None:
    bundle = own_low(MIXED)
    (bundle / STEPS.format(1)).unlink()
    line = refused(lambda: patchsieve.load(bundle, threads=1), BundleError)
    assert STEPS.format(1) in line
