"""Every command: help, one-line errors with exit code 2, one JSON object."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import patchsieve
from patchsieve import cli
from patchsieve.cli import COMMANDS, main
from patchsieve.cli.output import Progress
from patchsieve.tables import flops, plural
from tests.support.bundles import PHOTO, PROMPT, command, command_json

pytest_plugins = ["tests.support.bundles"]

# A mistake for each command, after which nothing may have happened.
MISTAKES = {
    "export": ("no-such-checkpoint", "-o", "{tmp}/out"),
    "build": ("{tmp}", "--target", "tensorrt-rtx"),
    "run": ("{tmp}", "--prompt", "x"),
    "show": ("{tmp}", "--image", "x", "--prompt", "x", "-o", "{tmp}/p.html"),
    "profile": ("{tmp}",),
    "compare": ("{tmp}/a.json", "{tmp}/b.json"),
    "inspect": ("{tmp}",),
    "verify": ("{tmp}", "--against", "{tmp}"),
    "doctor": ("{tmp}",),
    "cost": ("{tmp}",),
    "calibrate": (
        *("no-such-checkpoint", "--data", "{tmp}/data.json", "-o", "{tmp}/heads"),
        *("--sites", "2", "--target-tokens", "9"),
    ),
    "eval": ("{tmp}", "--data", "{tmp}/data.json"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    code, out, err = command(name, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: patchsieve {name}")
    assert "--json" in out


def test_the_program_has_help_and_a_version() -> None:
    for option in ("-v", "--version"):
        assert command(option)[:2] == (0, f"patchsieve {patchsieve.__version__}\n")
    code, out, _ = command("--help")
    assert code == 0
    assert all(f"    {name} " in out for name in COMMANDS)
    assert set(re.findall(r"^  patchsieve (\w+)", out, flags=re.M)) <= set(COMMANDS)
    assert max(map(len, out.splitlines())) <= 100


def test_another_program_is_named_as_the_user_typed_it(capsys: pytest.CaptureFixture[str]) -> None:
    for words, code in ((["export", "--help"], 0), (["export", "--bogus"], 2)):
        with pytest.raises(SystemExit) as ended:
            cli.main(words, "optimum-cli export patchsieve")
        said = capsys.readouterr()
        assert ended.value.code == code
        text = said.out + said.err
        assert "optimum-cli export patchsieve" in text.splitlines()[0]
        assert "patchsieve export" not in text


def test_an_unknown_option_points_to_the_help_of_its_command() -> None:
    code, _, err = command("inspect", "x", "--frobnicate", "y")
    assert code == 2
    assert err == (
        "patchsieve inspect: unrecognized arguments: --frobnicate y "
        "(see patchsieve inspect --help)\n"
    )


def test_off_a_terminal_each_percentage_is_printed_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    progress = Progress()
    for number in range(4):
        progress(f"writing {number}", number / 400)
        progress(f"writing {number}", number / 400)  # said already
    progress("done", 1.0)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "  0% writing 0",
        "     writing 1",
        "     writing 2",
        "  1% writing 3",
        "100% done",
    ]


def test_progress_beside_json_is_for_terminals_only(monkeypatch) -> None:
    asked = argparse.Namespace(quiet=False, json=True)
    assert (
        Progress.of(asked).quiet
        and not Progress.of(argparse.Namespace(quiet=False, json=False)).quiet
    )
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert not Progress.of(asked).quiet


def test_numbers_for_people_have_their_unit() -> None:
    shown = [0, 999, 5800, 999_960, 4.3e9, 2.029e11, 8.2336e12, 1.5e15]
    assert [flops(count) for count in shown] == [
        *("0", "999", "5.800 k", "1.000 M", "4.300 G", "202.9 G", "8.234 T", "1500 T")
    ]
    assert [plural(count, "image") for count in (0, 1, 2)] == ["0 images", "1 image", "2 images"]


@pytest.mark.parametrize(
    "arguments",
    [(), ("frobnicate",), ("run",), ("inspect", "x", "--frobnicate"), ("run", "x", "--top-k", "y")],
)
def test_a_wrong_command_line_is_one_line_with_exit_code_2(arguments: tuple[str, ...]) -> None:
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("patchsieve")
    assert len(err.splitlines()) == 1
    assert "--help" in err


@pytest.mark.parametrize("name", COMMANDS)
def test_a_mistake_is_one_line_and_as_json_one_object(name: str, tmp_path: Path) -> None:
    arguments = [text.format(tmp=tmp_path) for text in MISTAKES[name]]
    code, out, err = command(name, *arguments)
    assert (code, out) == (2, "")
    said = [line for line in err.splitlines() if line.startswith("patchsieve: ")]
    assert len(said) == 1 and said[0] == err.splitlines()[-1]
    assert "found: " in said[0] and "Traceback" not in err
    code, report = command_json(name, *arguments)
    assert (code, report["schema_version"]) == (2, 1)
    assert said[0] == f"patchsieve: {report['error']}"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("run", "{bundle}", "--prompt", "x", "--plan", "nope"), "no such plan"),
        (("run", "{bundle}", "--prompt", "x", "--image", "/no/such.jpg"), "/no/such.jpg"),
        (("run", "{bundle}", "--prompt", "x", "--max-new-tokens", "999"), "--max-new-tokens"),
        (("run", "{bundle}", "--prompt", "x", "--temperature", "-1"), "temperature"),
        (("run", "{bundle}", "--prompt", "x", "--target", "reference"), "--targets reference"),
        (("profile", "{bundle}", "--plan", "nope"), "no such plan"),
        (("profile", "{bundle}", "--against", "nope"), "no such plan"),
        (("profile", "{bundle}", "--runs", "0"), "too few runs"),
        (("profile", "{bundle}", "--runs", "1", "--output", "/no/such/file"), "/no/such/file"),
        (("inspect", "{bundle}", "--plan", "nope"), "no such plan"),
        (("verify", "{bundle}", "--against", "{checkpoint}", "--plan", "nope"), "no such plan"),
        (("verify", "{bundle}", "--against", "/no/such"), "no such checkpoint"),
    ],
)
def test_a_request_that_cannot_be_is_one_line(
    arguments: tuple[str, ...], names: str, tiny_bundle: Path, tiny_checkpoint: Path
) -> None:
    given = [text.format(bundle=tiny_bundle, checkpoint=tiny_checkpoint) for text in arguments]
    code, out, err = command(*given)
    assert (code, out) == (2, "")
    assert names in err.splitlines()[-1]
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "words",
    [
        ["export", "x", "-o", "{there}"],
        ["export", "x", "-o", "{there}", "--method", "ivtp"],
        ["calibrate", "x", "-o", "{there}", "--data", "x", "--sites", "1", "--target-tokens", "8"],
    ],
)
def test_an_output_that_exists_is_refused_before_torch_is_loaded(
    words: list[str], tmp_path: Path, monkeypatch, capsys
) -> None:
    for name in ("exporter", "checkpoint", "lowering"):
        monkeypatch.setitem(sys.modules, f"patchsieve.export.{name}", None)  # may not be imported
    monkeypatch.setitem(sys.modules, "patchsieve.calibration.checkpoint", None)
    assert main([word.format(there=tmp_path) for word in words]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "option", "default"),
    [
        ("export", "--keep-ratio", "0.5"),
        ("export", "--revision", "main"),
        ("run", "--top-k", "0: all"),
        ("run", "--seed", "default: "),
        ("calibrate", "--seed", "(default: 0)"),
    ],
)
def test_the_help_of_an_option_says_its_default(
    name: str, option: str, default: str, capsys
) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert default in words.rpartition(f"{option} ")[2].partition(" --")[0]


def test_run_prints_the_answer_alone_on_stdout(tiny_bundle: Path) -> None:
    arguments = ("run", tiny_bundle, "--image", PHOTO, "--prompt", PROMPT, "--max-new-tokens", 6)
    code, out, err = command(*arguments)
    assert code == 0
    assert "KV cache" in err
    code, said = command_json(*arguments)
    assert (code, said["schema_version"]) == (0, 1)
    assert out == said["text"] + "\n"
    assert len(said["token_ids"]) <= 6
    assert [(site["layer"], site["num_kept"]) for site in said["sites"]] == [(2, 8), (4, 4)]


def test_the_module_runs_as_a_program(tiny_bundle: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "patchsieve", "inspect", str(tiny_bundle), "--json"],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["schema_version"] == 1


def test_a_reader_that_goes_away_is_no_error(tiny_bundle: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as gone:
        done = subprocess.run(
            [sys.executable, "-m", "patchsieve", "inspect", str(tiny_bundle), "--tensors"],
            cwd=Path(__file__).resolve().parents[2],
            stdout=gone,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert "Traceback" not in done.stderr
