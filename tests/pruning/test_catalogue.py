"""The catalogue says of every method what its class does."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import MISSING, fields
from itertools import product
from typing import Any

import pytest

from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.plan import SitePlan
from patchsieve.pruning import catalogue, counts
from patchsieve.pruning.entry import ADAPTS, DECODER, NUMBER, RATIO, RECIPE, Entry, Option
from patchsieve.pruning.schedules import SCHEDULE_OPTIONS

ENTRIES = {f"{entry.name} {entry.place}": entry for entry in catalogue.ENTRIES}
METHODS = {label: entry for label, entry in ENTRIES.items() if entry.place != RECIPE}
WRONG: dict[str, Any] = {
    "count": 0,
    "integers": [1.5],
    "ratio": 1.5,
    "number": "x",
    "text": "no such word",
    "flag": 1,
    "folder": 3,
}


def own(entry: Entry) -> list[Option]:
    """The options that are fields of the class itself, and not of its schedule."""
    names = {field.name for field in fields(entry.load())}
    return [option for option in entry.params if option.name in names]


@pytest.mark.parametrize("entry", METHODS.values(), ids=METHODS)
def test_an_entry_has_the_fields_and_defaults_of_its_class(entry: Entry) -> None:
    kind = entry.load()
    assert (kind.name, kind.__module__.startswith("patchsieve.pruning.")) == (entry.name, True)
    made = {field.name: field for field in fields(kind)}
    heads = {"heads", "theta_r", "theta_s"} if entry.has("heads") else set()
    listed = {option.name for option in entry.params} - heads
    assert listed - set(SCHEDULE_OPTIONS) <= set(made)
    assert set(made) - listed <= {"schedule", "thresholds"}
    assert ("schedule" in made) == (entry.place != DECODER and not entry.is_grid)
    for option in own(entry):
        assert made[option.name].default is not MISSING
        assert made[option.name].default == option.default


@pytest.mark.parametrize("entry", METHODS.values(), ids=METHODS)
def test_every_choice_of_an_option_is_taken_and_every_other_value_refused(entry: Entry) -> None:
    for option in own(entry):
        for choice in option.choices:
            assert getattr(entry.load()(**{option.name: choice}), option.name) == choice
        with pytest.raises(PatchsieveError, match=option.name) as refused:
            entry.load()(**{option.name: WRONG[option.kind]})
        assert "what to do: correct " in str(refused.value)


@pytest.mark.parametrize("entry", METHODS.values(), ids=METHODS)
def test_what_a_method_leaves_and_reads_is_what_its_class_says(entry: Entry) -> None:
    if entry.place != DECODER:
        assert ("noise" in getattr(entry.load(), "reads", ())) == entry.draws
        assert entry.leaves in (NUMBER, ADAPTS) and entry.has("keep")
        return
    left = {RATIO: ["keep_ratio"], NUMBER: ["num_keep"], ADAPTS: []}[entry.leaves]
    assert [n for n in ("keep_ratio", "num_keep") if entry.has(n)] == left
    words = [option for option in own(entry) if option.choices]
    for values in product(*(option.choices for option in words)):
        params = {option.name: value for option, value in zip(words, values, strict=True)}
        method = entry.load()(**params)
        assert entry.is_judged_by_cls(params) == ("side_row" in method.reads)
        assert method.merges == entry.merges
        assert ("noise" in method.reads) == entry.draws


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_an_entry_is_complete_and_its_options_have_one_spelling(entry: Entry) -> None:
    assert entry.summary and not entry.summary.endswith(".")
    keywords = [entry.keyword(option) for option in entry.options]
    assert len(keywords) == len(set(keywords))
    for option in entry.options:
        assert option.help
        assert option.default is None or not option.choices or option.default in option.choices
    for other in catalogue.ENTRIES:  # one option of the command line is of one type
        for option, same in product(entry.options, other.options):
            is_same = entry.keyword(option) == other.keyword(same)
            both = None not in (option.word, same.word)
            assert not (is_same and both) or (option.kind, option.choices) == (
                same.kind,
                same.choices,
            )


def test_a_site_is_counted_within_its_budget() -> None:
    sites = (SitePlan(2, "fastv"), SitePlan(4, "topk", {"num_keep": 90}, 200), SitePlan(6, "atp"))
    left = counts.left_by_sites(sites, 576)
    assert [(each.count, each.budget) for each in left] == [(288, 288), (90, 200), (90, 200)]
    assert [each.is_exact for each in left] == [True, True, False]
    assert [each.is_given for each in left] == [True, True, False]
    with pytest.raises(PatchsieveError, match="every other token"):
        counts.left_by_sites((SitePlan(3, "tome"),), 576)


def test_the_catalogue_and_plans_need_no_torch() -> None:
    script = (
        "import sys; from patchsieve import plans; plans.build('fastv', [2], keep_ratio=0.5); "
        "plans.build('ivtp', size=plans.Size(576, 32)); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
