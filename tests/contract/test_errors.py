"""Errors: their fields, how the command line prints them, and that each says what to do."""

from __future__ import annotations

import ast
import copy
import json
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from patchsieve.cli import USER_ERROR, main
from patchsieve.contract.errors import CapacityError, PatchsieveError, RequestError
from patchsieve.runtime.gpu.driver import CudaError
from tests.support.installs import FOLDERS, ROOT

# A comment in the call that exempts it, followed by the reason: nobody could do anything.
MARK = "# no do: "


def test_an_error_keeps_its_fields_and_joins_them_in_one_line() -> None:
    error = PatchsieveError("a plan cannot\n be used", found=3, expected=(1, 2), do="use  --plan")
    assert error.fields() == {
        "what": "a plan cannot be used",
        "found": "3",
        "expected": "(1, 2)",
        "do": "use --plan",
    }
    line = "a plan cannot be used | found: 3 | expected: (1, 2) | what to do: use --plan"
    assert str(error) == line
    assert str(PatchsieveError("short", do="wait")) == "short | what to do: wait"
    assert PatchsieveError("short").fields() == dict.fromkeys(error.fields()) | {"what": "short"}


@pytest.mark.parametrize(
    "error",
    [
        CapacityError("too long", found=9, expected="at most 8", do="shorten it"),
        CudaError("cudaMalloc", "cudaErrorMemoryAllocation", "out of memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_is_copied_and_pickled_with_its_fields(error: PatchsieveError) -> None:
    for other in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert type(other) is type(error)
        assert str(other) == str(error) and vars(other) == vars(error)


def test_a_place_is_named_before_the_fault() -> None:
    error = RequestError("no such plan", found="x", do="choose another --plan")
    placed = error.at("question 3 of the data")
    assert type(placed) is RequestError and error.what == "no such plan"
    assert placed.fields() == error.fields() | {"what": "question 3 of the data: no such plan"}
    assert str(error.at("here")) == f"here: {error}"


def test_the_command_line_prints_the_fields(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = tmp_path / "absent"
    assert main(["inspect", str(absent), "--json"]) == USER_ERROR
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert list(report) == ["schema_version", "error", "what", "found", "expected", "do"]
    assert str(absent) in report["error"] and report["what"] in report["error"]
    assert printed.err == f"patchsieve: {report['error']}\n"


def test_a_mistyped_option_is_printed_as_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["inspect", "bundle", "--jsom", "--json"], ["cost", "--json", "--sites", "x"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        printed = capsys.readouterr()
        report = json.loads(printed.out)
        assert ended.value.code == USER_ERROR and printed.err.count("\n") == 1
        assert report["what"] in printed.err
        assert report["do"] == f"see patchsieve {words[0]} --help"


def test_every_error_says_what_to_do() -> None:
    assert not list(_errors_without_do())


def _errors_without_do() -> Iterator[str]:
    """File and line of each error that is made without `do` and without the mark."""
    texts = {
        path: path.read_text(encoding="utf-8")
        for folder in ("patchsieve", *FOLDERS)
        for path in sorted((ROOT / folder).rglob("*.py"))
    }
    trees = {path: ast.parse(text) for path, text in texts.items()}
    own, taking_do = _kinds(trees.values())
    for path, tree in trees.items():
        lines = texts[path].splitlines()
        for call in ast.walk(tree):
            if not isinstance(call, ast.Call) or _has_do(call):
                continue
            name = getattr(call.func, "id", getattr(call.func, "attr", ""))
            if name not in taking_do and call not in own:
                continue
            if not any(MARK in line for line in lines[call.lineno - 1 : call.end_lineno]):
                yield f"{path.relative_to(ROOT)}:{call.lineno}"


def _kinds(trees: Iterable[ast.Module]) -> tuple[set[ast.Call], set[str]]:
    """The calls by which children with an `__init__` of their own make their error, and
    the names of all others."""
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    kinds = {"PatchsieveError"}
    for _ in range(3):  # children, and children of those, in whatever order the files come
        kinds |= {c.name for c in classes if kinds & {ast.unparse(base) for base in c.bases}}
    own: set[ast.Call] = set()
    for kind in classes:
        made = [
            call
            for call in ast.walk(kind)
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "super().__init__"
        ]
        if kind.name in kinds and kind.name != "PatchsieveError" and made:
            own |= set(made)
            kinds.discard(kind.name)
    return own, kinds


def _has_do(call: ast.Call) -> bool:
    """Whether the call gives `do`, or gives keywords that it got (`**fields`)."""
    return any(
        word.arg is None
        or (
            word.arg == "do" and not (isinstance(word.value, ast.Constant) and not word.value.value)
        )
        for word in call.keywords
    )
