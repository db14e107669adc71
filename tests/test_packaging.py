"""What is installed, what it pulls in, and who may import whom."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import patchsieve
from tests.support.installs import FOLDERS, ROOT, build_wheel, environment, unpack

STDLIB = set(sys.stdlib_module_names)

# Folder -> the folders that it may import, besides itself. The face, patchsieve/, may import all.
INSIDE: dict[str, set[str]] = {
    "contract": set(),
    "pruning": {"contract"},
    "runtime": {"contract"},
    "export": {"contract", "pruning"},
    "calibration": {"contract", "pruning", "export", "runtime"},
}
# Folder -> the foreign packages that it may import.
OUTSIDE: dict[str, set[str]] = {
    "contract": set(),
    "pruning": {"torch", "safetensors"},
    "runtime": {
        "numpy",
        "PIL",
        "tokenizers",
        "jinja2",
        "onnxruntime",
        "tensorrt",
        "tensorrt_rtx",
        "cuda",
    },
    "calibration": {"numpy", "torch", "transformers", "safetensors"},
    "export": {
        "torch",
        "transformers",
        "onnx",
        "onnx_ir",
        "safetensors",
        "huggingface_hub",
        "tokenizers",
        "PIL",
        "numpy",
        "open_clip",
        "sentencepiece",
        "jinja2",
    },
}


def imports_of(path: Path, module: str) -> list[tuple[int, str]]:
    """Line and full name of every import in a file, those inside functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                package = module.split(".")
                if path.name != "__init__.py":
                    package = package[:-1]
                package = package[: len(package) - node.level + 1]
                source = ".".join([*package, *([source] if source else [])])
            # `from patchsieve import errors` names a module, so the names count.
            found += [(node.lineno, f"{source}.{alias.name}") for alias in node.names]
    return found


def imports_in(folder: str) -> list[tuple[str, list[str]]]:
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        module = ".".join(("patchsieve", *(part for part in parts if part != "__init__")))
        for line, name in imports_of(path, module):
            found.append((f"{path.relative_to(ROOT)}:{line} imports {name}", name.split(".")))
    return found


def test_setup_and_package_agree_on_the_version() -> None:
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    versions = [
        keyword.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup"
        for keyword in node.keywords
        if keyword.arg == "version"
    ]
    assert versions == [patchsieve.__version__]


@pytest.mark.parametrize("folder", FOLDERS)
def test_folder_imports_only_the_parts_below_it(folder: str) -> None:
    wrong = []
    for said, parts in imports_in(folder):
        if parts[0] in FOLDERS:
            wrong.append(f"{said}: import it as patchsieve.{parts[0]}")
        if parts[0] != "patchsieve" or len(parts) < 2 or parts[1] in (folder, "__version__"):
            continue
        if parts[1] not in INSIDE[folder]:
            wrong.append(said)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", sorted(OUTSIDE))
def test_folder_imports_only_its_foreign_packages(folder: str) -> None:
    allowed = STDLIB | OUTSIDE[folder] | {"patchsieve"}
    wrong = [said for said, parts in imports_in(folder) if parts[0] not in allowed]
    assert not wrong, "\n".join(wrong)


def test_import_rules_see_relative_and_nested_imports(tmp_path: Path) -> None:
    file = tmp_path / "cache.py"
    file.write_text("from ..export import graphs\ndef f():\n    import torch\n")
    names = [name for _, name in imports_of(file, "patchsieve.runtime.cache")]
    assert names == ["patchsieve.export.graphs", "torch"]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def test_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.endswith((".py", ".json"))}
    tables = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("export/operators/*.json")}
    modules = {
        ("patchsieve/" if folder != "patchsieve" else "") + path.relative_to(ROOT).as_posix()
        for folder in ("patchsieve", *FOLDERS)
        for path in (ROOT / folder).rglob("*.py")
    }
    doors = {name for name in modules if name.startswith("patchsieve/doors/optimum/")}
    moved = {f"optimum/commands/register/{Path(name).name}" for name in doors}
    assert packed == modules - doors | moved | {f"patchsieve/{path}" for path in tables}


def test_folders_of_others_hold_no_init_of_ours(wheel: Path) -> None:
    """optimum's folders are shared by several distributions (PEP 420)."""
    with zipfile.ZipFile(wheel) as archive:
        shared = [name for name in archive.namelist() if name.startswith("optimum/")]
    assert shared == ["optimum/commands/register/register_patchsieve.py"]


def test_entry_points_name_functions_that_are_there(wheel: Path) -> None:
    """lmms-eval would only warn of one that is not, and know no model of that name."""
    (found,) = importlib.metadata.distributions(name="patchsieve", path=[str(wheel)])
    names = {f"{entry.group}: {entry.name}": entry for entry in found.entry_points}
    assert set(names) == {"console_scripts: patchsieve", "lmms_eval.models: patchsieve"}
    assert all(callable(entry.load()) for entry in names.values())


def test_wheel_holds_the_files_that_a_page_is_made_of(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("patchsieve/show/page.")}
    assert packed == {f"patchsieve/show/page.{kind}" for kind in ("css", "js", "html.jinja")}


def test_wheel_imports_from_elsewhere_without_torch(wheel: Path, tmp_path: Path) -> None:
    installed = unpack(wheel, tmp_path / "installed")
    # What a board imports: the face, all of contract and runtime, the command line; it draws
    # and counts costs.
    script = """
import importlib, importlib.util, pkgutil, sys
sys.path.insert(0, sys.argv[1])
import patchsieve, patchsieve.contract, patchsieve.runtime
assert patchsieve.__file__.startswith(sys.argv[1]), patchsieve.__file__
assert patchsieve.runtime.__file__.startswith(sys.argv[1]), patchsieve.runtime.__file__
modules = [
    *pkgutil.walk_packages(patchsieve.contract.__path__, "patchsieve.contract."),
    *pkgutil.walk_packages(patchsieve.runtime.__path__, "patchsieve.runtime."),
]
for module in modules:
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        root = (error.name or "").partition(".")[0]
        if root not in ("tensorrt", "tensorrt_rtx", "cuda"):  # a backend that this machine lacks
            raise
if importlib.util.find_spec("patchsieve.cli"):
    importlib.import_module("patchsieve.cli")
from patchsieve.show.html import render
from patchsieve.show.sheet import draw
from patchsieve.show.shown import Shown
shown = Shown("bundle", "checkpoint", "cpu", "none", 1, (), ())
assert "</html>" in render(shown) and draw(shown)
from patchsieve.cli import main
assert main(["cost", "--config", "config.json", "--method", "ivtp"]) == 0
heavy = sorted({"torch", "transformers", "onnx"} & set(sys.modules))
assert not heavy, heavy
"""
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    command = [sys.executable, "-c", script, str(installed)]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
