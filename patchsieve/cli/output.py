"""What commands print: one JSON object on stdout, progress on stderr."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from typing import Any

from patchsieve.contract.errors import BackendMissingError, PatchsieveError

_WIDTH = 24  # characters of the bar


def print_json(data: dict[str, Any]) -> None:
    """Print one object with `schema_version` first."""
    print(json.dumps({"schema_version": 1} | data, ensure_ascii=False))


def error_json(error: PatchsieveError) -> dict[str, Any]:
    """An error as `--json` prints it: the whole line as `error`, and each field."""
    return {"error": str(error), **error.fields()}


def require(libraries: Sequence[str], extra: str, what: str) -> None:
    """Refuse a command whose libraries are not installed, in one line."""
    absent = [name for name in libraries if importlib.util.find_spec(name) is None]
    if absent:
        raise BackendMissingError(
            f"{what} needs libraries that are not installed",
            found=f"no {', '.join(absent)}",
            do=f'pip install {" ".join(absent)} (or in a clone: pip install ".[{extra}]")',
        )


class Progress:
    """A bar on a terminal, a line per step elsewhere; silent with `--quiet`.

    Off a terminal a percentage is printed once; later steps at the same one begin with blanks.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.is_terminal = sys.stderr.isatty()
        self._last = self._percent = ""

    @classmethod
    def of(cls, args: argparse.Namespace) -> Progress:
        """The progress of a command; with `--json` a bar on a terminal, which is cleared, or none.

        Programs that read the JSON object read stderr for errors.
        """
        return cls(args.quiet or (args.json and not sys.stderr.isatty()))

    def __call__(self, what: str, fraction: float) -> None:
        """Say what is being done and how much is done, 0 to 1."""
        if self.quiet:
            return
        if self.is_terminal:
            bar = "#" * round(fraction * _WIDTH)
            line = f"[{bar:<{_WIDTH}}] {fraction:4.0%} {what}"
            sys.stderr.write(f"\r{line:<{len(self._last)}}")
            self._last = line
        elif what != self._last:
            percent = f"{fraction:4.0%}"
            blank = " " * len(percent)
            sys.stderr.write(f"{blank if percent == self._percent else percent} {what}\n")
            self._last, self._percent = what, percent
        sys.stderr.flush()

    def done(self) -> None:
        """Clear the bar."""
        if self.is_terminal and not self.quiet and self._last:
            sys.stderr.write("\r" + " " * len(self._last) + "\r")
            sys.stderr.flush()
