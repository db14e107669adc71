"""The README's table of methods and docs/methods.md say what the catalogue says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import methods
from patchsieve.cli import main
from tests.support.documents import commands


def test_both_files_are_current() -> None:
    text = methods.README.read_text(encoding="utf-8")
    assert methods.readme(text) == text, "run python -m benchmarks.methods"
    current = methods.PAGE.read_text(encoding="utf-8") == methods.page()
    assert current, "run python -m benchmarks.methods"
    assert len(text.splitlines()) <= 150


def test_the_commands_of_the_page_count_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text('{"model_type": "llava"}')
    page = methods.page()
    prose = " ".join(page.split())
    for words in commands(page):
        assert main([*words, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert f"FLOPs: {methods.flops(told['flops']['total'])} " in prose, words
        assert f"KV cache: {methods.size(told['kv_bytes'])} " in prose, words
