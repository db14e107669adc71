"""What a message says to install can be installed: nobody owns `patchsieve` on PyPI."""

from __future__ import annotations

import importlib.util
import re
import runpy
from typing import Any

import pytest
import setuptools

from patchsieve.cli.output import require
from patchsieve.contract.errors import BackendMissingError
from patchsieve.contract.targets import TARGETS
from patchsieve.runtime.board.abilities import INSTALL
from tests.support.installs import FOLDERS, ROOT


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


EXTRAS = {"cpu": "cpu", "cuda": "gpu"}  # target -> extra of setup.py with its library


def test_the_lines_that_install_ask_for_the_versions_of_setup(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", asked.update)
    runpy.run_path(str(ROOT / "setup.py"))
    extras = asked["extras_require"]
    same = {"core": asked["install_requires"]}
    same |= {"export": extras["export"], "calibration": extras["calibration"]}
    same |= {"open_clip": extras["clip"], "lmms_eval": extras["eval"]}
    lines = [(INSTALL[name], requirements) for name, requirements in same.items()]
    lines += [(TARGETS[target].install, extras[extra]) for target, extra in EXTRAS.items()]
    for line, requirements in lines:
        assert set(re.findall('"(.+?)"', line)) == set(requirements), line


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
