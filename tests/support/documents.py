"""Code blocks of the README and of the pages in docs/, and the commands in them."""

from __future__ import annotations

import re
import shlex

HUB_ID = "llava-hf/llava-1.5-7b-hf"  # what the pages call the checkpoint
CHECKPOINT = "checkpoint"  # what the tests put in its place


def blocks(text: str, language: str) -> dict[str, str]:
    """Fenced blocks of a language, "" for those without one.

    Args:
        text: The page.
        language: The first word after the fence.

    Returns:
        Each block under the second word after its fence, which is a file's name, or its number.
    """
    fenced = re.findall(r"^```(\w*)(?: (\S+))?\n(.*?)^```$", text, flags=re.M | re.S)
    of_language = [(name, body) for found, name, body in fenced if found == language]
    return {name or str(number): body for number, (name, body) in enumerate(of_language)}


def commands(text: str) -> list[list[str]]:
    """Words of every `patchsieve ...` command, without its comment."""
    joined = "\n".join(blocks(text, "").values()).replace("\\\n", " ")
    words = [shlex.split(line, comments=True) for line in joined.splitlines()]
    return [
        [CHECKPOINT if word == HUB_ID else word for word in line[1:]]
        for line in words
        if line and line[0] == "patchsieve"
    ]
