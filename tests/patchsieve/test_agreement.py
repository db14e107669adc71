"""`cost`, `inspect` and `export` take the same options and count the same, for every method."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from benchmarks import papers
from patchsieve.pruning import catalogue
from patchsieve.pruning.entry import DECODER, RECIPE, Entry
from tests.support.bundles import command_json
from tests.support.models import make_checkpoint, tiny_llava
from tests.support.tiny_clip import save_clip

pytest_plugins = ["tests.support.bundles"]

LIMITS = ("--max-text-tokens", 64, "--max-new-tokens", 8, "--max-images", 2)
REQUEST = ("--text-tokens", 50, "--images", 2)
# What fits 16 patches and 4 layers in the place of an example's own numbers.
SMALL = {"num_keep": 10, "encoder_keep": 9, "projector_keep": 9, "keep_ratio": 0.5}
RECIPES = {entry.name: entry for entry in catalogue.ENTRIES if entry.place == RECIPE}
# The decoder's part of a recipe has no options of its own: the recipe is its case.
CASES = {
    f"{entry.name} {entry.place}": entry
    for entry in catalogue.ENTRIES
    if entry.place == RECIPE or entry.name not in RECIPES
}


def words_of(entry: Entry) -> list[str]:
    """An entry's example as options that fit the tiny model."""
    flag = "--method" if entry.place in (DECODER, RECIPE) else f"--{entry.place}"
    words = [flag, entry.name]
    sites = len(entry.example.get("sites", ()))
    options: dict[str, Any] = dict(entry.example)
    options |= {name: value for name, value in SMALL.items() if name in options}
    options |= {"sites": [1, 2, 3][:sites]} if sites else {}
    options |= {"budget": [12, 9, 4][:sites]} if "budget" in options else {}
    options |= {"group_layers": 1} if entry.place == RECIPE else {}
    for name, value in options.items():
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        words += ["--" + name.replace("_", "-"), text]
    return words


@dataclass
class Exports:
    """A checkpoint, and its bundle, which takes one plan after the other."""

    checkpoint: Path
    bundle: Path
    made: dict[str, dict[str, Any]] = field(default_factory=dict)

    def make(self, entry: Entry) -> dict[str, Any]:
        """What `export` says of an entry's plan."""
        code, said = command_json("export", "--reuse", self.bundle, *words_of(entry), "--quiet")
        assert code == 0
        return said


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """The first plan is IVTP's, so that the bundle has a scorer and gives every layer's queries."""
    folder = tmp_path_factory.mktemp("agreement")
    llava, processor = tiny_llava("llama", layers=4)
    make_checkpoint.save_llava(folder / "checkpoint", llava, processor)
    clip = save_clip(folder / "clip", llava)
    words = [*words_of(RECIPES["ivtp"]), "--scorer", clip, *LIMITS, "--quiet"]
    assert command_json("export", folder / "checkpoint", "-o", folder / "bundle", *words)[0] == 0
    return Exports(folder / "checkpoint", folder / "bundle")


@pytest.mark.slow_rows("ivtp recipe")
@pytest.mark.parametrize("entry", CASES.values(), ids=CASES)
def test_cost_inspect_and_export_agree(exports: Exports, entry: Entry) -> None:
    exported = exports.make(entry)
    name = exported["plan"]
    of_bundle = command_json("cost", exports.bundle, "--plan", name, *REQUEST)[1]
    everything = command_json("inspect", exports.bundle, "--plan", name, *REQUEST)[1]
    inspected = everything["plans"][name]
    config = ("--config", exports.checkpoint, "--convention", "runtime", "--precision", "float32")
    of_options = command_json("cost", *config, *words_of(entry), *REQUEST)[1]
    # The plan: its sites, and what it leaves.
    layers = [site["layer"] for site in inspected["sites"]]
    assert layers == of_bundle["sites"] == of_options["sites"]
    assert not of_bundle["is_costs_only"] and not of_options["is_costs_only"]
    assert inspected["num_visual"] == exported["num_visual"]
    tokens = of_bundle["tokens_per_layer"]
    firsts = [stage["layers"][0] for stage in inspected["stages"]]
    budgets = [stage["budget"] for stage in inspected["stages"]]
    assert [tokens["llm"][first] for first in firsts] == budgets == exported["budgets"]
    # What it costs.
    assert inspected["flops"] == of_bundle["flops"]
    assert inspected["average_tokens"] == of_bundle["average_tokens"] < 16
    assert inspected["kv_bytes"] == of_bundle["kv_bytes_reserved"] == exported["kv_bytes_reserved"]
    adapts = [inspected, of_bundle, of_options]
    assert {each["is_upper_bound"] for each in adapts} == {entry.leaves == "adapts"}
    for same in ("kv_bytes", "average_tokens", "tokens_per_layer"):
        assert of_options[same] == of_bundle[same], same
    # A config does not say how large the scorer is: CLIP-L's stands for it.
    has_scorer = of_bundle["flops"]["scorer"] > 0
    assert has_scorer == (entry.place == RECIPE)
    parts = ("llm",) if has_scorer else ("vision", "llm", "scorer", "total")
    assert [of_options["flops"][p] for p in parts] == [of_bundle["flops"][p] for p in parts]


def sites_of(said: dict[str, Any]) -> list[int]:
    return said["sites"]


def survivors(said: dict[str, Any]) -> list[int]:
    llm = said["tokens_per_layer"]["llm"]
    return [llm[layer] for layer in said["sites"]]


TOPK16 = {"sites": [{"layer": 2, "method": "topk", "params": {"num_keep": 16}}]}
GTP64 = (576, 438, 333, 253, 192, 146, 111, 84)  # 576 (64 / 576)^(k / 8), CLS not counted
DEMO = Path(papers.__file__).parents[1] / "examples" / "demo_model" / "checkpoint"
# Wrong answers of 0.1: what was asked, and what is right.
ONCE_WRONG: dict[str, tuple[str, Callable[[dict[str, Any]], Any], Any]] = {
    "ivtp of a small decoder": ("--config DEMO --method ivtp", sites_of, [3, 6, 9]),
    "topk in a plan file": ("--config CONFIG --plan PLAN", survivors, [16]),
    "topk in the decoder": (
        "--config CONFIG --method topk --place decoder --sites 2 --num-keep 16",
        survivors,
        [16],
    ),
    "ivtp in groups of five": ("--config CONFIG --method ivtp --group-layers 5", sites_of, [5, 10]),
    "gtp as export spells it": (
        "--config CONFIG --encoder gtp --encoder-keep 64",
        lambda said: said["tokens_per_layer"],
        {
            "vision": [n + 1 for n in GTP64 for _ in range(3)][:23],  # the last has 2
            "llm": [64] * 32,
        },
    ),
}


@pytest.mark.parametrize("case", ONCE_WRONG)
def test_what_cost_once_got_wrong_is_right(case: str, tmp_path: Path) -> None:
    words, fact, expected = ONCE_WRONG[case]
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    plan = TOPK16 | {"pseudo_cls": {"text": "none"}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    named = {"DEMO": DEMO, "CONFIG": tmp_path / "config.json", "PLAN": tmp_path / "plan.json"}
    code, said = command_json("cost", *(named.get(word, word) for word in words.split()))
    assert code == 0 and fact(said) == expected
    assert not said["is_upper_bound"] and not said["is_costs_only"]
