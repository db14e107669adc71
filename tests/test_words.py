"""The words of CONTRIBUTING.md's list stay out of the sources and the pages."""

from __future__ import annotations

import argparse
import importlib
import re
from pathlib import Path

import pytest

from patchsieve.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
# Not plain English where we used them -> what CONTRIBUTING.md says instead. "stand for", "a
# stand-in" and "tell apart" are what one says.
WORDS = {
    "behind": r"behind",
    "stands": r"stands?(?! for\b| in for\b|-in\b)",
    "tells": r"tells?(?!(?: \w+){0,4} apart\b)",
    "anew": r"anew",
    "leave away": r"(?:leave|leaves|leaving|left) away",
    "None where": r"None where",
    "for the eye": r"for the eye",
    "besides": r"besides",
    "goes on": r"(?:go|goes|going|went) on",
}
PLACES = (
    "contract",
    "pruning",
    "export",
    "runtime",
    "calibration",
    "patchsieve",
    "docs",
    "benchmarks",
    "examples",
    "README.md",
    "setup.py",
)
PICTURES = {"examples": 2}  # sentences about pictures: "the old house behind the trees"
RECORDS = {"LOG.md"}  # dated entries stay as they were written


def found_in(path: Path) -> list[str]:
    """Each word of the list in a file, with its place."""
    text = path.read_text(encoding="utf-8")
    return [
        f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}: {word}"
        for word, pattern in WORDS.items()
        for match in re.finditer(rf"\b{pattern}\b".replace(" ", r"\s+"), text, flags=re.I)
    ]


def files_of(place: str) -> list[Path]:
    """Sources and pages of a folder, or a file alone."""
    path = ROOT / place
    if path.is_file():
        return [path]
    files = [file for kind in ("py", "md") for file in path.rglob(f"*.{kind}")]
    return [file for file in files if file.name not in RECORDS]


@pytest.mark.parametrize("place", PLACES)
def test_words_of_the_list_do_not_come_back(place: str) -> None:
    found = [line for path in files_of(place) for line in found_in(path)]
    assert len(found) <= PICTURES.get(place, 0), "\n".join(found)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_help_begins_with_of(command: str) -> None:
    parser = argparse.ArgumentParser()
    importlib.import_module(f"patchsieve.cli.{command}").add_arguments(parser)
    helps = {action.dest: action.help or "" for action in parser._actions}
    assert not [name for name, text in helps.items() if re.match(r"(?:[\w, ]+: )?of\b", text)]
