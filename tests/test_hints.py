"""What a message says to install can be installed: nobody owns `patchsieve` on PyPI."""

from __future__ import annotations

import importlib.util
import re

import pytest

from patchsieve.cli.output import require
from patchsieve.errors import BackendMissingError
from tests.installs import FOLDERS, ROOT


def test_no_message_names_an_extra_of_a_package_that_is_not_published() -> None:
    files = [file for folder in (*FOLDERS, "patchsieve") for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    wrong = [
        f"{file.relative_to(ROOT)}: {line.strip()}"
        for file in (*files, *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))
        for line in file.read_text(encoding="utf-8").splitlines()
        if re.search(r"patchsieve\[|pip install \W?patchsieve", line)
    ]
    assert not wrong, "\n".join(wrong)


def test_a_command_names_the_libraries_that_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    lacking = ("torch", "onnx")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in lacking else found(name)
    )
    with pytest.raises(BackendMissingError) as caught:
        require(("torch", "numpy", "onnx"), "export", "export")
    assert str(caught.value).endswith(
        "found: no torch, onnx | "
        'what to do: pip install torch onnx (or in a clone: pip install ".[export]")'
    )
