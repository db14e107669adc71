"""Small data sets of conversations about pictures, on disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

QUESTIONS = ("What is on the table?", "Is it red?", "How many are there, and where?")


def make_conversations(folder: Path, count: int, seed: int = 0) -> Path:
    """Write pictures that differ and LLaVA's JSON about them; every third asks twice."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for number in range(count):
        small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
        small.resize((40, 52), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
        turns = [
            {"from": "human", "value": "<image>\n" + QUESTIONS[number % len(QUESTIONS)]},
            {"from": "gpt", "value": "A cup." if number % 2 else "Two green bowls"},
        ]
        if number % 3 == 0:
            turns += [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]
        records.append({"id": f"{number}", "image": f"{number}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records, indent=1))
    return folder / "data.json"


def last_epoch(out: Path) -> float:
    """Passes over the data that a calibration made: more with more processes."""
    return json.loads((out / "log.jsonl").read_text().splitlines()[-1])["epoch"]
