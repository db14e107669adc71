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
from tests.support.documents import CHECKPOINT, HUB_ID, blocks, commands
from tests.support.models import save_checkpoint

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODEL_7B = {"model_type": "llava"}  # whose defaults are LLaVA-1.5-7B
MOST_LINES = 150


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the files that the README speaks of."""
    save_checkpoint(tmp_path / CHECKPOINT, "llama")
    shutil.copy(ROOT / "examples" / "photo.jpg", tmp_path / "photo.jpg")
    make_conversations(tmp_path, 3).rename(tmp_path / "conversations.json")
    (tmp_path / "config.json").write_text(json.dumps(MODEL_7B))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_door_of_optimum_is_shown_with_words_that_work() -> None:
    """Words after it go to `patchsieve export` unread (tests/patchsieve/test_optimum_door.py)."""
    (line,) = re.findall(r"^optimum-cli .*$", README, flags=re.M)
    words = shlex.split(line.replace(HUB_ID, CHECKPOINT))
    assert words[1:3] == ["export", "patchsieve"]
    assert ["export", *words[3:]] in commands(README)


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= MOST_LINES


@pytest.mark.slow
def test_every_command_of_the_readme_works_in_its_order(workplace: Path, capsys) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    said = commands(README)
    assert {words[0] for words in said} == set(COMMANDS)
    short = {
        "profile": ["--runs", "2", "--warmup", "1", "--max-new-tokens", "4"],
        "calibrate": ["--steps", "2"],
        "eval": ["--max-new-tokens", "4"],
    }
    for words in said:
        if words[0] == "calibrate":  # 3 layers and 16 patches, not 32 and 576
            words = [{"4,14,24": "1,2", "144": "10"}.get(word, word) for word in words]
        assert main([*words, *short.get(words[0], [])]) == 0, words
    assert "Traceback" not in capsys.readouterr().err
    for block in blocks(README, "python").values():
        exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()
