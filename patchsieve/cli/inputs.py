"""Prompts and images of the command line: `-` reads stdin, and each turn gets its images."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from patchsieve.contract.errors import RequestError

STDIN = "-"


def take_inputs(args: argparse.Namespace) -> None:
    """Replace `-` among `args.prompt` and `args.image` by what stdin holds.

    Raises:
        RequestError: Stdin is asked for twice, closed, or no text; or an image is an address.
    """
    for image in args.image or ():
        if image.startswith(("http://", "https://", "data:")):
            raise RequestError(
                "--image cannot fetch an address",
                found=image if len(image) <= 80 else f"{image[:80]}...",
                expected="an image file",
                do="download it first, then name the file: --image FILE",
            )
    prompts = [args.prompt] if isinstance(args.prompt, str) else args.prompt
    images = list(args.image or ())
    wanted = ["--prompt -"] * prompts.count(STDIN) + ["--image -"] * images.count(STDIN)
    if not wanted:
        return
    if len(wanted) > 1:
        raise RequestError(
            "stdin cannot be read twice",
            found=" and ".join(wanted),
            expected="one of them",
            do="give the other as text or as a file: --prompt TEXT, --image FILE",
        )
    if prompts.count(STDIN):
        text = _read_prompt(args.quiet or args.json)
        taken = [text if prompt == STDIN else prompt for prompt in prompts]
        args.prompt = text if isinstance(args.prompt, str) else taken
    else:
        content = _read_image()
        args.image = [content if image == STDIN else image for image in images]


def images_of_turns(
    prompts: Sequence[str], images: Sequence[Any], mark: str, *, is_raw: bool = False
) -> list[list[Any]]:
    """Give each turn its images: one to each mark, in order over all turns.

    A first turn without marks gets those that later marks leave over, as its images in front.

    Args:
        prompts: The turns.
        images: All images.
        mark: What places an image in a prompt, such as `<image>`.
        is_raw: The prompt is raw, so every image needs its mark.

    Raises:
        RequestError: There are more marks than images, or images that no mark places.
    """
    counts = [prompt.count(mark) for prompt in prompts]
    spare = len(images) - sum(counts)
    if not counts[0] and not is_raw:
        counts[0] = max(spare, 0)
    if sum(counts) != len(images):
        is_short = spare < 0
        raise RequestError(
            f"the prompts have {'more' if is_short else 'fewer'} {mark} marks than images",
            found=f"{len(images) - spare} x {mark}, images: {len(images)}",
            expected="one --image for each mark",
            do=f"add an --image, or remove a {mark}"
            if is_short
            else f"write {mark} for each image, or leave out an --image",
        )
    left = iter(images)
    return [[next(left) for _ in range(count)] for count in counts]


def _read_prompt(is_quiet: bool) -> str:
    """All of stdin as text, without the newline at its end."""
    if sys.stdin is not None and sys.stdin.isatty() and not is_quiet:
        print("type the prompt; end it with Ctrl-D on a line of its own", file=sys.stderr)
    try:
        text = _read().decode()
    except UnicodeDecodeError as error:
        raise RequestError(
            "the prompt on stdin is not text",
            found=f"bytes that are not UTF-8 ({error.reason} at byte {error.start})",
            expected="text in UTF-8",
            do="convert it, or give the prompt as --prompt TEXT",
        ) from error
    return text.removesuffix("\n").removesuffix("\r")


def _read_image() -> bytes:
    if sys.stdin is not None and sys.stdin.isatty():
        raise RequestError(
            "an image cannot be typed on a terminal",
            found="--image - with a terminal on stdin",
            expected="the bytes of an image file on stdin",
            do="redirect a file, as in --image - < photo.jpg, or name it: --image photo.jpg",
        )
    content = _read()
    if not content:
        raise RequestError(
            "stdin holds no image",
            found="0 bytes",
            expected="the bytes of an image file",
            do="redirect a file, as in --image - < photo.jpg",
        )
    return content


def _read() -> bytes:
    if sys.stdin is None or sys.stdin.closed:
        raise RequestError(
            "stdin is closed", do="redirect a file, or give --prompt TEXT and --image FILE"
        )
    return sys.stdin.buffer.read()
