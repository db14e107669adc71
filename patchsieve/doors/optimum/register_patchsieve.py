"""`optimum-cli export patchsieve ...` is `patchsieve export ...`.

Installed as optimum/commands/register/register_patchsieve.py: optimum loads every file of that
folder, which several distributions share, so it must never hold an __init__.py (PEP 420).
"""

from __future__ import annotations

import argparse
from typing import NoReturn

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class PatchsieveExportCommand(BaseOptimumCLICommand):
    """Passes on every word after `patchsieve`, unread."""

    COMMAND = CommandInfo(
        name="patchsieve",
        help="Turn a LLaVA checkpoint into a bundle whose visual tokens are pruned (ONNX).",
    )

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Take all words as they are, `--help` too: what they mean is said in one place."""
        parser.prefix_chars = "\0"  # which no word begins with: none is an option here
        parser.add_argument("words", nargs=argparse.REMAINDER)

    def run(self) -> NoReturn:
        """Run `patchsieve export`, and exit as it does."""
        from patchsieve.cli import main  # here, because optimum loads this file for every command

        called = "optimum-cli export patchsieve"
        raise SystemExit(main(["export", *self.args.words], called))


REGISTER_COMMANDS = [(PatchsieveExportCommand, ExportCommand)]
