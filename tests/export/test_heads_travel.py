"""Learned thresholds become part of the bundle: what made them may be gone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from patchsieve.cli import main
from patchsieve.contract import files as bundle_files
from patchsieve.contract.manifest import Limits
from patchsieve.contract.plan import Plan, SitePlan
from patchsieve.export.exporter import ExportOptions, export
from patchsieve.export.reuse import reuse
from patchsieve.pruning.decoder.thresholds import Thresholds
from patchsieve.pruning.heads import HeadsConfig, save_heads
from tests.support.models import save_checkpoint

pytestmark = pytest.mark.slow  # an export for each test


def make_heads(folder: Path, seed: int, budgets: tuple[int, ...] = ()) -> Path:
    """Heads for layer 2 with a proposal of what to reserve."""
    torch.manual_seed(seed)
    module = Thresholds(8, (4, 4))
    tensors = {f"layer.2.{name}": value for name, value in module.state_dict().items()}
    save_heads(folder, HeadsConfig((2,), (4, 4), 8, budgets=budgets), tensors)
    return folder


def plan(heads: Path) -> Plan:
    return Plan((SitePlan(2, "atp", {"heads": str(heads)}),))


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint, and a bundle whose heads' own directory is gone."""
    checkpoint = save_checkpoint(tmp_path / "checkpoint", "llama")
    heads = make_heads(tmp_path / "private" / "heads", 0, budgets=(9,))
    options = ExportOptions(plan=plan(heads), plan_name="learned", limits=Limits(64, 16, 1))
    export(str(checkpoint), tmp_path / "bundle", options)
    shutil.rmtree(tmp_path / "private")
    return checkpoint, tmp_path / "bundle"


def test_a_bundle_holds_its_heads_and_says_nothing_of_where_they_lay(made) -> None:
    checkpoint, bundle = made
    text = (bundle / bundle_files.FILE_NAME).read_text()
    assert "private" not in text and str(checkpoint.parent) not in text
    facts = bundle_files.read(bundle)
    (site,) = facts.plans["learned"].sites
    assert site.budget == 9  # what the heads propose
    stored = {f"{site.params['heads']}/{name}" for name in ("config.json", "heads.safetensors")}
    assert stored <= set(facts.files)
    bundle_files.check_files(bundle, facts)


def test_verify_finds_the_heads_in_the_bundle(made, capsys) -> None:
    checkpoint, bundle = made
    command = ["verify", str(bundle), "--against", str(checkpoint), "--json"]
    assert main([*command, "--max-new-tokens", "4"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"]


@pytest.mark.slow
def test_heads_that_no_plan_uses_any_more_are_removed(made, tmp_path: Path) -> None:
    _, bundle = made
    before = {path.name for path in (bundle / "heads").iterdir()}
    reuse(bundle, plan(make_heads(tmp_path / "more", 1)), "learned")
    facts = bundle_files.read(bundle)
    bundle_files.check_files(bundle, facts)
    files = {path for path in (bundle / "heads").rglob("*") if path.is_file()}
    assert {path.relative_to(bundle).as_posix() for path in files} <= set(facts.files)
    assert len(files) == 2 and not before & {path.parent.name for path in files}
    reuse(bundle, plan(tmp_path / "more"), "again")  # the same content is stored once
    assert len([path for path in (bundle / "heads").rglob("*") if path.is_file()]) == 2
