"""Write scenes and their questions as LLaVA's conversations, one question a record.

python -m examples.demo_model.make_data demo/held-out --split held-out --questions 4000
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .questions import Asker, as_prompt
from .scenes import SPLITS, make_scene, render


def write(path: Path, split: str, questions: int, per_image: int = 8) -> Path:
    """Write `images/` and `questions.jsonl`.

    Every second question asks for one word. The record's `category` is the kind of question.

    Args:
        path: The directory, made where absent.
        split: One of `SPLITS`.
        questions: How many questions.
        per_image: Questions to an image.

    Returns:
        The file of the questions.
    """
    folder = path / "images"
    folder.mkdir(parents=True, exist_ok=True)
    asker, written, index = Asker(1), 0, 0
    target = path / "questions.jsonl"
    temporary = target.with_suffix(".part")
    with temporary.open("w", encoding="utf-8") as file:
        while written < questions:
            scene = make_scene(split, index)
            name = f"images/{index:05d}.png"
            render(scene).save(path / name)
            asked = asker.ask(scene, min(per_image, questions - written))
            for number, question in enumerate(asked):
                prompt, answer = as_prompt(question, is_short=number % 2 == 0)
                human = {"from": "human", "value": f"<image>\n{prompt}"}
                record = {
                    "id": f"{index}.{number}",
                    "image": name,
                    "category": question.kind,
                    "conversations": [human, {"from": "gpt", "value": answer}],
                }
                file.write(json.dumps(record) + "\n")
            written += len(asked)
            index += 1
    temporary.replace(target)
    return target


def main() -> None:
    """Write what the command line asks for."""
    parser = argparse.ArgumentParser(description="Write scenes and questions about them.")
    parser.add_argument("path", metavar="DIR", type=Path, help="directory to write")
    parser.add_argument("--split", choices=SPLITS, default="held-out", help="which (held-out)")
    parser.add_argument("--questions", type=int, default=4000, help="how many (4000)")
    options = parser.parse_args()
    print(write(options.path, options.split, options.questions))


if __name__ == "__main__":
    main()
