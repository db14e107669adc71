"""The pages of docs/ are true: their commands, plans and Python run, on one small bundle.

An export is only checked up to its options here, and copies the shared bundle: whole ones are the
README's (test_readme.py).
"""

from __future__ import annotations

import inspect
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from patchsieve.cli import main
from patchsieve.contract import files, manifest
from patchsieve.contract.plan import MethodPlan, Plan, PseudoCls, SitePlan
from patchsieve.contract.targets import TARGETS
from patchsieve.export import exporter
from patchsieve.runtime.records import Records
from tests.support.conversations import make_conversations
from tests.support.documents import CHECKPOINT, HUB_ID, blocks, commands
from tests.support.models import save_checkpoint

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
WITH_COMMANDS = sorted(p.name for p in DOCS.glob("*.md") if commands(p.read_text(encoding="utf-8")))
WIDTH = 120
# What the small checkpoint has instead: 4 layers and 16 patches, not 32 and 576.
SMALLER = {"4,14,24": "1,2", "144": "10"}
SMALLER_IN_PYTHON = {
    HUB_ID: CHECKPOINT,
    '"keep": 288': '"keep": 8',
    "sites=(4, 14, 24), target_tokens=144": "sites=(1, 2), target_tokens=10",
    "steps=500": "steps=2",
}
SHORTER = {
    "calibrate": ["--steps", "2"],
    "eval": ["--max-new-tokens", "4"],
    "run": ["--max-new-tokens", "4"],
}


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the files that the pages speak of."""
    folder = tmp_path_factory.mktemp("docs")
    save_checkpoint(folder / CHECKPOINT, "llama")
    shutil.copy(ROOT / "examples" / "photo.jpg", folder / "photo.jpg")
    make_conversations(folder, 3).rename(folder / "conversations.json")
    (folder / "config.json").write_text('{"model_type": "llava"}')  # its defaults: LLaVA-1.5-7B
    for name, body in blocks(page("plan.md"), "json").items():
        (folder / name).write_text(body)
    return folder


@pytest.fixture(scope="module")
def bundle(workplace: Path) -> Path:
    """The bundle of plan.md's own export, for two targets."""
    (words,) = [w for w in commands(page("plan.md")) if w[0] == "export" and "-o" in w]
    words = [
        str(workplace / word) if word in ("fastv.json", CHECKPOINT) else word for word in words
    ]
    words[words.index("-o") + 1] = str(workplace / "shared")
    assert main([*words, "--targets", "cpu,tensorrt-rtx", "--quiet"]) == 0
    return workplace / "shared"


@pytest.fixture
def here(workplace: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The workplace, in which an export copies the shared bundle; what a test made is removed."""
    arguments = inspect.signature(exporter.export)

    def export(*args: Any, **options: Any) -> manifest.Manifest:
        given = arguments.bind(*args, **options).arguments
        assert isinstance(given["options"], exporter.ExportOptions)
        shutil.copytree(bundle, given["out"])
        facts = files.read(given["out"])
        given.get("seconds", {}).update(dict.fromkeys(facts.targets, 0.0))
        return facts

    monkeypatch.chdir(workplace)
    monkeypatch.setattr(exporter, "export", export)
    before = set(workplace.iterdir())
    yield workplace
    for path in set(workplace.iterdir()) - before:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_every_line_of_a_page_fits() -> None:
    long = [
        f"{path.name}:{number}"
        for path in DOCS.glob("*.md")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > WIDTH and not line.startswith("|")  # a row of a table cannot be wrapped
    ]
    assert not long


def test_links_between_pages_lead_somewhere() -> None:
    for path in (*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / link).exists(), f"{path.name}: {link}"


def test_the_page_of_the_plan_names_every_field() -> None:
    text = page("plan.md")
    for kind in (Plan, SitePlan, MethodPlan, PseudoCls):
        for field in fields(kind):
            assert re.search(rf"^\| `{field.name}`", text, flags=re.M), field.name


def test_the_plans_of_the_page_cost_what_it_says(workplace: Path, capsys) -> None:
    text = page("plan.md")
    for name, body in blocks(text, "json").items():
        assert Plan.from_dict(Plan.from_dict(json.loads(body)).to_dict()).prunes
        plan, config = str(workplace / name), str(workplace / "config.json")
        words = ["--config", config, "--plan", plan, "--text-tokens", "64", "--json"]
        assert main(["cost", *words]) == 0
        tokens = json.loads(capsys.readouterr().out)["average_tokens"]
        before = text[: text.index(body)].rsplit("\n\n", 2)[1]
        assert f"{tokens / 576:.0%}".replace("%", " %") in before, (name, tokens)


def test_the_page_of_targets_says_what_each_is() -> None:
    rows = re.findall(
        r"^\| `([\w-]+)` \| .* (>=\S+) \| (\d+) \| .* \| (.*) \|$", page("targets.md"), re.M
    )
    found = {target: (versions, int(opset), kinds) for target, versions, opset, kinds in rows}
    assert found == {
        target: (kind.versions, kind.opset, ", ".join(kind.precisions))
        for target, kind in TARGETS.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_COMMANDS)
def test_every_command_of_a_page_works_in_its_order(
    name: str, here: Path, bundle: Path, capsys
) -> None:
    if name == "targets.md":
        pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    said = commands(page(name))
    if name != "plan.md":  # whose first export makes it
        shutil.copytree(bundle, "bundle")
    for words in said:
        if words[0] == "calibrate":
            words = [SMALLER.get(word, word) for word in words]
        shorter = [] if "--statistics" in words else SHORTER.get(words[0], [])
        assert main([*words, *shorter]) == 0, words
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.slow
def test_the_python_of_the_page_runs_from_top_to_bottom(here: Path, bundle: Path, capsys) -> None:
    shutil.copytree(bundle, "bundle")
    names: dict[str, Any] = {}
    for body in blocks(page("python.md"), "python").values():
        for said, smaller in SMALLER_IN_PYTHON.items():
            body = body.replace(said, smaller)
        exec(compile(body, "python.md", "exec"), names)
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("name", ["llava.json", "messages.json"])
def test_the_data_of_the_page_are_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(blocks(page("calibrate.md"), "json")[name])
    (record,) = (Records(path)[i] for i in range(len(Records(path))))
    assert [path.name for path in record.images] == ["photo.jpg"]
    assert record.messages[-1]["role"] == "assistant"


def test_the_intervals_of_the_accuracy_page_are_those_that_were_measured() -> None:
    number = r"[+-]?(\d+\.\d)"  # a difference may be read from either side
    measured = set()
    for path in (*(ROOT / "benchmarks/results").glob("*.md"), ROOT / "benchmarks" / "LOG.md"):
        text = path.read_text(encoding="utf-8")
        for mean, *edges in re.findall(rf"{number} \[{number}, {number}\]", text):
            measured.add((mean, *sorted(edges)))
    said = re.findall(rf"{number}(?: \|)? \[{number}, {number}\]", page("accuracy.md"))
    assert len(said) > 20
    assert not [each for each in said if (each[0], *sorted(each[1:])) not in measured]
