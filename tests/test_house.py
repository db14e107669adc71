"""The shape of the source: no circle of files, no long function, a target in its row alone."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

from patchsieve.contract.targets import TARGETS
from tests.support.installs import FOLDERS, ROOT
from tests.test_packaging import imports_of

MOST_LINES = 50


def modules() -> dict[str, Path]:
    """Every module of the six folders, by its installed name."""
    found = {}
    for folder in (*FOLDERS, "patchsieve"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts if folder == "patchsieve" else ("patchsieve", *parts)
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


def imported(module: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of ours that a file imports, inside functions and for types too."""
    for _, name in imports_of(path, module):
        while name and name not in known:
            name = name.rpartition(".")[0]
        if name not in ("", module, "patchsieve"):
            yield name


def test_no_files_import_each_other_in_a_circle() -> None:
    known = modules()
    order = graphlib.TopologicalSorter(
        {module: set(imported(module, path, known)) for module, path in known.items()}
    )
    order.prepare()  # raises CycleError, which names the circle


def test_functions_can_be_read_at_once() -> None:
    long = []
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MOST_LINES:
                    long.append(f"{module}.{node.name}: {lines} lines")
    assert not long, "\n".join(long)


def test_a_target_is_named_in_its_row_and_its_lowering_alone() -> None:
    """Of those whose name is no other word: "cpu" is a device, "tensorrt" a module."""
    named = {name for name in TARGETS if re.search(r"\d|-", name)}
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.value}"
        for module, path in modules().items()
        if not module.startswith(("patchsieve.contract.targets", "patchsieve.export.lowering"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in named
    ]
    assert not found, "\n".join(found)
