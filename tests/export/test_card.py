"""README.md of a bundle, and the command that an export ends with."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from patchsieve.contract import files
from patchsieve.export import card
from patchsieve.export.reuse import reuse
from tests.support import damage
from tests.support.bundles import command, command_json
from tests.support.damage import answer


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return damage.copy(damage.bundle(), tmp_path / "bundle")


def test_a_bundle_says_what_it_is_and_how_to_run_it(bundle: Path) -> None:
    text = (bundle / card.FILE_NAME).read_text(encoding="utf-8")
    assert text.startswith("---\nlibrary_name: patchsieve\n")
    for part in (
        "| checkpoint | checkpoint |",
        "not named by the checkpoint",
        "fastv (default) | before layer 2: fastv keep_ratio 0.5 | 16 / 8",
        "| 64 | 16 | 2 |",
        "| cpu | onnxruntime >=",
        "patchsieve run BUNDLE --image photo.jpg",
    ):
        assert part in text, part


def test_the_card_is_no_part_of_what_is_checked(bundle: Path) -> None:
    """People and the hub write into it; weights that nobody lists are refused as ever."""
    assert card.FILE_NAME not in files.read(bundle).files
    (bundle / card.FILE_NAME).write_text("mine")
    assert answer(bundle) == answer(damage.bundle())
    (bundle / card.FILE_NAME).unlink()
    assert answer(bundle) == answer(damage.bundle())


def test_a_new_plan_is_written_into_the_card_that_nobody_has_made_their_own(bundle: Path) -> None:
    path = bundle / card.FILE_NAME
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("---\n", "---\nlicense: llama2\n", 1), encoding="utf-8")
    reuse(bundle, damage.RANDOM, "few")
    written = path.read_text(encoding="utf-8")
    assert "few (default)" in written and "license: llama2" in written.split("---")[1]
    assert "| licence of the model | llama2 |" in written
    path.write_text("my own words", encoding="utf-8")
    reuse(bundle, damage.RANDOM, "again")
    assert path.read_text(encoding="utf-8") == "my own words"
    assert not list(bundle.glob(".*"))


@pytest.mark.parametrize(
    ("text", "config", "expected"),
    [
        ("---\nlicense: apache-2.0\n---\n", {}, {"license": "apache-2.0"}),
        (
            "---\ntags:\n- a\nlicense: 'other'\nlicense_name: a b\n---\nlicense: mit\n",
            {"license": "mit"},
            {"license": "other", "license_name": "a b"},
        ),
        ("license: mit\n", {}, {}),
        ("---\nlicense: mit\n", {}, {}),
        ("---\nlicense:\n- mit\n---\n", {"license": "mit"}, {"license": "mit"}),
        ("---\nlicense: <script>\n---\n", {"license": ["mit"]}, {}),
        (None, {"license": "a\nb: c"}, {}),
        (None, None, {}),
    ],
)
def test_the_licence_is_that_of_the_checkpoints_card_or_config(
    text: str | None, config: object, expected: dict[str, str], tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert card.licence_of(tmp_path) == expected


def test_export_ends_with_the_next_command_and_it_works(tmp_path: Path) -> None:
    checkpoint = damage.copy(damage.checkpoint(), tmp_path / "checkpoint")
    (checkpoint / "README.md").write_text("---\nlicense: mit\n---\nA model.\n")
    out = tmp_path / "a bundle"
    code, said = command_json("export", checkpoint, "-o", out, "--quiet")
    assert code == 0
    (line,) = said["next"]
    words = shlex.split(line)
    assert words[:3] == ["patchsieve", "run", str(out)]
    code, answered, err = command(*words[1:], "--max-new-tokens", 1, "--quiet")
    assert code == 0 and not err and answered
    assert "license: mit" in (out / card.FILE_NAME).read_text().split("---")[1]
    code, shown, _ = command("export", "--reuse", out, "--quiet")
    assert code == 0 and shown.rstrip().endswith(f"next:\n  {line}")


def test_a_bundle_of_engines_is_built_first(bundle: Path) -> None:
    facts = files.read(bundle)
    graphs = facts.targets["cpu"]
    board = replace(facts, targets={"jetpack6": graphs})
    assert card.next_commands("b", board)[0] == "patchsieve build b"
    both = replace(facts, targets={"jetpack6": graphs, "tensorrt": graphs})
    build, run = card.next_commands("b", both)
    assert build == "patchsieve build b --target jetpack6" and run.endswith("--target jetpack6")
