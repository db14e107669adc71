"""The README is true: its commands and its Python run as they stand, on a small checkpoint."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from patchsieve.cli import COMMANDS, main
from tests.support.conversations import make_conversations
from tests.support.models import save_checkpoint

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
HUB_ID = "llava-hf/llava-1.5-7b-hf"
MODEL_7B = {"model_type": "llava"}  # whose defaults are LLaVA-1.5-7B


def blocks(language: str) -> list[str]:
    """Fenced blocks of a language; "" for those without one."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.M | re.S)
    return [text for found, text in fenced if found == language]


def commands() -> list[list[str]]:
    """Every `patchsieve ...` line, without its comment."""
    lines = [line for block in blocks("") for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("patchsieve")]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the files that the README speaks of."""
    save_checkpoint(tmp_path / "checkpoint", "llama")
    shutil.copy(ROOT / "examples" / "photo.jpg", tmp_path / "photo.jpg")
    make_conversations(tmp_path, 3).rename(tmp_path / "conversations.json")
    (tmp_path / "config.json").write_text(json.dumps(MODEL_7B))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_door_of_optimum_is_shown_with_words_that_work() -> None:
    """Words behind it go to `patchsieve export` unread (tests/patchsieve/test_optimum_door.py)."""
    (line,) = re.findall(r"^optimum-cli .*$", README, flags=re.M)
    assert shlex.split(line)[1:3] == ["export", "patchsieve"]
    assert ["export", *shlex.split(line)[3:]] in commands()


@pytest.mark.slow
def test_every_command_of_the_readme_works_in_its_order(workplace: Path, capsys) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    told = commands()
    assert {words[0] for words in told} == set(COMMANDS)
    short = {
        "profile": ["--runs", "2", "--warmup", "1", "--max-new-tokens", "4"],
        "calibrate": ["--steps", "2"],
        "eval": ["--max-new-tokens", "4"],
    }
    for words in told:
        words = ["checkpoint" if word == HUB_ID else word for word in words]
        if words[0] == "calibrate":  # 3 layers and 16 patches, not 32 and 576
            words = [{"4,14,24": "1,2", "144": "10"}.get(word, word) for word in words]
        assert main([*words, *short.get(words[0], [])]) == 0, words
    told_python = capsys.readouterr()
    assert "Traceback" not in told_python.err
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()
