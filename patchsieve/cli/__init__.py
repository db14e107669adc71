"""The command line: `patchsieve COMMAND`. Each command's file is imported when it is called."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from signal import SIGINT, SIGTERM
from typing import NoReturn

from patchsieve import __version__
from patchsieve.cli.output import error_json, print_json
from patchsieve.contract.errors import BackendMissingError, PatchsieveError
from patchsieve.runtime.board.abilities import install_line

COMMANDS = {
    "export": "turn a LLaVA checkpoint into a bundle",
    "build": "compile a bundle's engines",
    "run": "answer a question about an image",
    "show": "draw which patches survive, as a page or a picture",
    "profile": "measure latency and memory, pruned beside unpruned",
    "compare": "put two profiles side by side",
    "cost": "count FLOPs and KV bytes of a plan, with no weights",
    "inspect": "show what a bundle holds and what it costs",
    "verify": "compare a bundle with its checkpoint, layer by layer",
    "calibrate": "learn pruning thresholds, or collect activation statistics",
    "eval": "score a bundle's answers, pruned beside unpruned",
    "doctor": "say what this machine can run and what it lacks",
}
_ABOUT = """\
Make LLaVA models faster by removing image tokens, and run them without PyTorch.

`export` turns a Hugging Face checkpoint into a bundle, a directory that holds all that is needed
to answer. A bundle's plan says which image tokens are removed, and where; the plan "none", which
every bundle holds, removes nothing.
"""
_ORDER = """\
the usual order:
  patchsieve doctor
  patchsieve cost --config config.json --method fastv --sites 2
  patchsieve export CHECKPOINT -o BUNDLE --method fastv --sites 2
  patchsieve build BUNDLE        (TensorRT only: compile engines where they will run)
  patchsieve run BUNDLE --image photo.jpg --prompt "What is this?"
  patchsieve show BUNDLE --image photo.jpg --prompt "What is this?" -o page.html
  patchsieve profile BUNDLE
  patchsieve eval BUNDLE --data questions.json

`patchsieve COMMAND --help` explains a command's options.
"""
USER_ERROR = 2
INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """argparse, with errors in one line, and in a JSON object if that was asked for."""

    as_json = False

    def error(self, message: str) -> NoReturn:
        """Print one line and exit."""
        if self.as_json:
            print_json(error_json(PatchsieveError(message, do=f"see {self.prog} --help")))
        self.exit(USER_ERROR, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None, called: str | None = None) -> int:
    """Run a command; the exit code is 2 for what the user can mend.

    Args:
        argv: The words; by default those of the command line.
        called: What the user typed for `patchsieve COMMAND`, if another program passes them on.
    """
    args = _parse(list(sys.argv[1:] if argv is None else argv), called)
    module = importlib.import_module(f"{__name__}.{args.command}")
    with _signals() as received:
        try:
            code = module.run(args)
            sys.stdout.flush()
            return code or 0
        except PatchsieveError as error:
            return _fail(args.json, error)
        except ModuleNotFoundError as error:
            if (line := install_line(error.name)) is None:
                raise
            library = (error.name or "").partition(".")[0]
            missing = BackendMissingError(f"{library} is not installed", do=line)
            return _fail(args.json, missing)
        except BrokenPipeError:  # the reader went away (`| head`)
            sys.stderr.close()
            return 0
        except BaseException:
            if not received:
                raise
            # Not only KeyboardInterrupt: torch turns one inside a trace into errors of its own.
            print("patchsieve: interrupted", file=sys.stderr)
            return INTERRUPTED


def _parse(argv: list[str], called: str | None) -> argparse.Namespace:
    """The command and its options; only the file of the command that is called is imported."""
    parser = _Parser(
        prog="patchsieve",
        description=_ABOUT,
        epilog=_ORDER,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = f"patchsieve {__version__}"
    parser.add_argument("-v", "--version", action="version", version=version)
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, title="commands"
    )
    named = next((word for word in argv if not word.startswith("-")), None)
    for name, what in COMMANDS.items():
        program = called if name == named else None
        command = commands.add_parser(name, help=what, description=what, prog=program)
        command.as_json = "--json" in argv
        command.add_argument("--json", action="store_true", help="print one JSON object on stdout")
        if name == named:
            importlib.import_module(f"{__name__}.{name}").add_arguments(command)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        commands.choices[args.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Let Ctrl-C and a polite kill raise KeyboardInterrupt, so that commands clean up."""
    received: list[int] = []

    def interrupt(number: int, _: object) -> NoReturn:
        received.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.signal(number, interrupt) for number in (SIGINT, SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _fail(as_json: bool, error: PatchsieveError) -> int:
    if as_json:
        print_json(error_json(error))
    print(f"patchsieve: {error}", file=sys.stderr)
    return USER_ERROR
