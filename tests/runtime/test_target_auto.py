"""`--target auto`: what a bundle runs as, and is built for, if nobody says."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import patchsieve
from patchsieve.contract import files
from patchsieve.contract.errors import BundleError
from patchsieve.contract.manifest import Manifest
from patchsieve.runtime import target as target_module
from patchsieve.runtime.target import choose, choose_to_build
from patchsieve.runtime.trt.device import Device
from patchsieve.runtime.trt.engines import (
    Engine,
    Gpu,
    Library,
    Options,
    Record,
    folder_of,
    write_record,
)
from tests.support.bundles import command, command_json
from tests.support.damage import refused

pytest_plugins = ["tests.support.bundles"]

ORIN = Device(Gpu("Orin", "8.7", "12.6"), memory_bytes=8 << 30, is_integrated=True)
CARD = Device(Gpu("NVIDIA L4", "8.9", "13.0"), memory_bytes=24 << 30, is_integrated=False)


@pytest.fixture
def has(tiny_bundle: Path) -> Callable[..., Manifest]:
    """The tiny bundle's manifest, as if it had been made for other targets."""
    facts = files.read(tiny_bundle)
    graphs = facts.targets["cpu"]
    return lambda *targets: replace(facts, targets=dict.fromkeys(targets, graphs), needs={})


def build_for(bundle: Path, target: str, gpu: Gpu | None) -> None:
    """A record of one engine, as `build` leaves it."""
    shutil.rmtree(folder_of(bundle, target), ignore_errors=True)
    folder_of(bundle, target).mkdir(parents=True)
    engine = Engine(
        graph_sha256="0",
        weights_sha256="0",
        library=Library("tensorrt", "10.3.0"),
        gpu=gpu,
        asked=Options(),
        options=Options(),
        rung="as asked",
        profiles=(),
        seconds=1.0,
        peak_bytes=None,
        size=1,
        sha256="0",
    )
    write_record(Record(bundle, target, {"stage_0": engine}))


def machine(
    monkeypatch: pytest.MonkeyPatch, *, has_ort: bool = True, has_cuda: bool = False
) -> None:
    """What libraries the machine has."""
    monkeypatch.setattr(target_module, "is_importable", lambda name: has_ort)
    providers = ["CUDAExecutionProvider"] * has_cuda + ["CPUExecutionProvider"]
    monkeypatch.setattr(target_module, "onnxruntime_providers", lambda: providers)


def test_the_only_target_is_taken_whatever_the_machine_has(has, monkeypatch, tmp_path) -> None:
    machine(monkeypatch, has_ort=False)
    for target in ("cpu", "jetpack6", "reference", "abacus"):
        assert choose(tmp_path, has(target), device=lambda: None).target == target


@pytest.mark.parametrize(
    ("targets", "gpu", "has_cuda", "expected"),
    [
        (("cpu", "reference"), None, False, "cpu"),
        (("reference", "jetpack6"), None, False, "reference"),
        (("tensorrt-rtx", "cpu"), None, False, "cpu"),
        (("cpu", "tensorrt-rtx", "jetpack6", "tensorrt"), CARD, False, "cpu"),
        (("cpu", "cuda"), None, True, "cpu"),
        (("cpu", "cuda"), CARD, False, "cpu"),
        (("cuda", "tensorrt"), CARD, True, "cuda"),
    ],
)
def test_else_the_only_one_that_runs_here_is_taken_and_the_reason_said(
    targets, gpu, has_cuda, expected, has, monkeypatch, tmp_path
) -> None:
    machine(monkeypatch, has_cuda=has_cuda)
    choice = choose(tmp_path, has(*targets), device=lambda: gpu)
    assert choice.target == expected and "the only one that runs here" in choice.why
    assert all(f"{other}: " in choice.why for other in targets if other != expected)


def test_engines_for_this_gpu_go_before_all_else(has, monkeypatch, tmp_path) -> None:
    machine(monkeypatch, has_cuda=True)
    facts = has("cpu", "cuda", "tensorrt", "jetpack6")
    build_for(tmp_path, "tensorrt", CARD.gpu)
    assert choose(tmp_path, facts, device=lambda: CARD).target == "tensorrt"
    build_for(tmp_path, "jetpack6", ORIN.gpu)
    assert choose(tmp_path, facts, device=lambda: ORIN).target == "jetpack6"
    build_for(tmp_path, "jetpack6", CARD.gpu)
    line = refused(lambda: choose(tmp_path, facts, device=lambda: CARD), BundleError)
    assert "--target tensorrt or --target jetpack6" in line and "--target cpu" not in line
    (folder_of(tmp_path, "jetpack6") / "engines.json").write_text("{")
    assert choose(tmp_path, facts, device=lambda: CARD).target == "tensorrt"


@pytest.mark.parametrize(
    ("targets", "has_ort", "match"),
    [
        (("cpu", "cuda"), True, "more than one.*cpu, cuda.*--target cpu or --target cuda"),
        (("jetpack6", "tensorrt"), True, "none of.*no engines.*--target jetpack6 or --target ten"),
        (("cpu", "tensorrt-rtx"), False, "none of.*onnxruntime is not installed.*--target cpu or"),
    ],
)
def test_else_the_choices_are_named(targets, has_ort, match, has, monkeypatch, tmp_path) -> None:
    machine(monkeypatch, has_ort=has_ort, has_cuda=True)
    refused(lambda: choose(tmp_path, has(*targets), device=lambda: CARD), BundleError, match)


def test_a_build_takes_the_only_target_with_engines_or_the_only_one_it_can_build(
    has, monkeypatch
) -> None:
    def library(name: str, version: str | None) -> None:
        module = None if version is None else SimpleNamespace(__name__=name, __version__=version)
        monkeypatch.setitem(sys.modules, name, module)

    library("tensorrt", None)
    library("tensorrt_rtx", None)
    assert choose_to_build(has("cpu", "jetpack6"), device=lambda: None).target == "jetpack6"
    every = has("cpu", "tensorrt-rtx", "tensorrt", "tensorrt10", "jetpack6")
    refused(lambda: choose_to_build(every, device=lambda: CARD), BundleError, "none .*no tensorrt")
    library("tensorrt", "10.3.0")
    assert choose_to_build(every, device=lambda: ORIN).target == "jetpack6"
    library("tensorrt", "11.2.0")
    assert choose_to_build(every, device=lambda: CARD).target == "tensorrt"
    library("tensorrt_rtx", "1.7.1")
    assert choose_to_build(every, device=lambda: None).target == "tensorrt-rtx"
    assert choose_to_build(every, device=lambda: ORIN).target == "tensorrt"  # RTX has no Orin
    refused(lambda: choose_to_build(every, device=lambda: CARD), BundleError, "more than one")
    line = refused(lambda: choose_to_build(has("cpu", "cuda"), device=lambda: CARD), BundleError)
    assert "no target that can be built here" in line and "patchsieve run" in line


def test_a_bundle_for_a_board_is_never_to_be_exported_again_for_another_machine(
    own_bundle: Path,
) -> None:
    facts = files.read(own_bundle)
    only = {"jetpack6": facts.targets["cpu"]}
    forms = dict.fromkeys(only, facts.cache_forms["cpu"])
    files.write(own_bundle, replace(facts, targets=only, needs={}, cache_forms=forms))
    for arguments in (("run", own_bundle, "--prompt", "x"), ("build", own_bundle)):
        code, _, line = command(*arguments)
        assert code == 2 and "export" not in line, line
    with pytest.raises(patchsieve.contract.errors.PatchsieveError) as caught:
        patchsieve.load(own_bundle)
    assert "export" not in str(caught.value)


def test_every_command_says_which_target_it_took(own_bundle: Path, monkeypatch) -> None:
    machine(monkeypatch)
    facts = files.read(own_bundle)
    both = {"cpu": facts.targets["cpu"], "jetpack6": facts.targets["cpu"]}
    forms = dict.fromkeys(both, facts.cache_forms["cpu"])
    files.write(own_bundle, replace(facts, targets=both, cache_forms=forms))
    few = ("--prompt", "x", "--max-new-tokens", 1)
    code, said = command_json("run", own_bundle, *few)
    assert code == 0 and said["target"] == "cpu"
    code, _, err = command("run", own_bundle, *few)
    assert code == 0 and err.startswith("target cpu: the only one that runs here (jetpack6: no ")
    assert command("run", own_bundle, *few, "--quiet")[2] == ""
    code, said = command_json("profile", own_bundle, "--runs", 1, "--warmup", 0)
    assert code == 0 and said["target"] == "cpu"
