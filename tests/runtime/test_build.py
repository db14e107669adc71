"""Bundles compile ahead of time in TensorRT-RTX, and the parsed networks hold what was meant."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from patchsieve.cli import main
from patchsieve.contract import engine_memory, files, names
from patchsieve.contract.errors import BackendMissingError, BundleError, PatchsieveError
from patchsieve.contract.manifest import Limits
from patchsieve.contract.plan import Plan, SitePlan
from patchsieve.export.exporter import ExportOptions, export
from patchsieve.export.reuse import reuse
from patchsieve.runtime.building.build import Built, build
from patchsieve.runtime.building.build_request import Request
from patchsieve.runtime.building.profiles import profiles
from patchsieve.runtime.trt.engines import FILE_NAME, Gpu, Library, open_engines, read_record
from tests.support.models import save_checkpoint

TARGET = "tensorrt-rtx"
REQUEST = Request(TARGET)
OVERHEAD = 4e6  # bytes that an engine may carry besides 1.05 x its weights

pytestmark = pytest.mark.tensorrt


@pytest.fixture(scope="module", params=["float16", "float32"])
def bundle(request, tmp_path_factory) -> Path:
    """A bundle with a FastV and an ATP plan on two cuts, two images at most."""
    folder = tmp_path_factory.mktemp(f"build-{request.param}")
    checkpoint = save_checkpoint(folder / "checkpoint", "llama")
    fastv = Plan((SitePlan(1, "fastv", {"keep_ratio": 0.5}), SitePlan(3, "fastv")))
    options = ExportOptions(
        plan=fastv,
        plan_name="fastv",
        targets=("cpu", TARGET),
        precision=request.param,
        limits=Limits(64, 32, 2),
    )
    export(str(checkpoint), folder / "bundle", options)
    theta = {"theta_r": 0.5, "theta_s": 0.9}
    atp = Plan((SitePlan(1, "atp", theta, 8), SitePlan(3, "atp", theta, 8)))
    reuse(folder / "bundle", atp, "atp")
    return folder / "bundle"


@pytest.fixture(scope="module")
def engines(bundle: Path) -> list[Built]:
    """Every engine of the bundle."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    return list(build(bundle, REQUEST))


def parsed(bundle: Path, graph: str):
    """The parsed network of a graph."""
    from tests.support.networks import parse_network

    return parse_network(bundle / files.read(bundle).targets[TARGET][graph])


def origins(network, value: str) -> set[str]:
    """Every tensor that a tensor of a network is computed from."""
    made_by = {output: layer for layer in network.layers for output in layer.outputs}
    found, front = set(), [value]
    while front:
        name = front.pop()
        if name and name not in found:
            found.add(name)
            front += made_by[name].inputs if name in made_by else ()
    return found


@pytest.mark.slow
def test_every_graph_of_a_fastv_and_an_atp_plan_builds(bundle, engines) -> None:
    facts = files.read(bundle)
    assert {engine.graph for engine in engines} == set(facts.targets[TARGET])
    assert {"decide.fastv.1", "decide.atp.3", "stage_0", "stage_2", "vision", "compact"} <= set(
        facts.targets[TARGET]
    )
    assert not any(engine.was_there for engine in engines)


def test_engines_hold_the_weights_once(bundle, engines) -> None:
    weights = sum(path.stat().st_size for path in (bundle / "graphs" / "weights").iterdir())
    total = sum(engine.path.stat().st_size for engine in engines)
    assert total <= 1.05 * weights + OVERHEAD * len(engines)


def test_a_stage_updates_its_caches_in_place_and_attends_through_the_mask(bundle) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    facts = files.read(bundle)
    for index, stage in enumerate(facts.stages):
        network = parsed(bundle, names.stage(index))
        updates = {update.cache: update.result for update in network.cache_updates}
        assert updates == {
            name: name + names.OUT
            for layer in range(stage.first, stage.last)
            for name in (names.key_cache(layer), names.value_cache(layer))
        }
        slots = {t.shape[2] for t in network.inputs if "cache" in t.name}
        assert slots == {stage.slots}
        assert network.attentions == ()  # spelt out: what softmax reads is the masked sum
        masks = [layer.inputs[0] for layer in network.layers if layer.kind == "SOFTMAX"]
        assert len(masks) == stage.num_layers
        for mask in masks:
            assert {names.SLOT, names.LAST_KEY} <= origins(network, mask)


def test_a_stage_has_a_prefill_and_a_decode_profile(bundle) -> None:
    facts = files.read(bundle)
    prefill, decode = profiles(facts, "stage_1", TARGET)
    assert [shape[1] for shape in decode[names.HIDDEN]] == [1, 1, 2]
    assert [shape[0] for shape in decode[names.LAST_KEY]] == [1, 1, 2]
    # Rows come in from stage 0 with two whole images and leave with two pruned ones.
    assert prefill[names.HIDDEN][2] == (1, 64 + 2 * 16, facts.text.hidden_size)
    assert prefill[names.KEEP_INDICES][2] == (64 + 2 * 8,)
    assert names.key_cache(1) not in prefill and names.SLOT not in prefill


def test_building_takes_no_more_memory_than_export_says(bundle, engines, capsys) -> None:
    expected = engine_memory.expectations(files.read(bundle))
    for one in engines:
        assert one.engine.peak_bytes <= expected[one.graph]
    assert main(["build", str(bundle), "--target", TARGET, "--quiet", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["engines"]
    assert {one["graph"]: one["expected_memory_bytes"] for one in told} == expected
    assert main(["build", str(bundle), "--target", TARGET, "--dry-run"]) == 0
    comments = [line for line in capsys.readouterr().out.splitlines() if line.startswith("# ")]
    assert {line.split(":")[0].removeprefix("# ") for line in comments} == set(expected)


def test_a_second_build_takes_what_stands_there_and_mends_what_does_not(bundle, engines) -> None:
    assert all(engine.was_there for engine in build(bundle, REQUEST))
    first = (bundle / "engines" / TARGET / "vision.engine").read_bytes()
    whole = engines[-1].path.read_bytes()
    engines[-1].path.write_bytes(whole[: len(whole) // 2])
    again = list(build(bundle, REQUEST))
    assert [engine.graph for engine in again if not engine.was_there] == [engines[-1].graph]
    record = bundle / "engines" / TARGET / FILE_NAME
    text = record.read_text()
    record.write_text("{")
    said: list[str] = []
    builds = build(bundle, REQUEST, told=said.append)
    assert not next(builds).was_there
    assert "all engines are built again" in said[0]
    builds.close()
    (bundle / "engines" / TARGET / "vision.engine").write_bytes(first)
    record.write_text(text)


def test_the_record_tells_what_an_engine_was_built_with(bundle, engines) -> None:
    record = read_record(bundle, TARGET).engines
    assert set(record) == {engine.graph for engine in engines}
    for engine in record.values():
        assert engine.library.name == "tensorrt_rtx"
        assert engine.gpu is None and engine.rung == "as asked"
        assert engine.size > 0 and len(engine.sha256) == 64
        assert 0 < engine.base_bytes < engine.peak_bytes
    card = Gpu("any", "8.9")
    library = Library(engine.library.name, engine.library.version)
    facts = files.read(bundle)
    assert set(open_engines(bundle, facts, TARGET, gpu=card, library=library)) == set(record)
    with pytest.raises(BundleError, match="--compute-capability 7.5"):
        open_engines(bundle, facts, TARGET, gpu=Gpu("old", "7.5"), library=library)


def test_a_killed_build_goes_on_where_it_was(bundle, engines, tmp_path) -> None:
    """What was whole stays, what was not goes."""
    if files.read(bundle).precision != "float16":
        pytest.skip("one precision is enough")
    own = Path(shutil.copytree(bundle, tmp_path / "own", ignore=shutil.ignore_patterns("engines")))
    script = f"""
import os, signal
from pathlib import Path
from patchsieve.runtime.building.build import build
from patchsieve.runtime.building.build_request import Request
for number, one in enumerate(build(Path({str(own)!r}), Request({TARGET!r}))):
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
"""
    where = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": where})
    assert done.returncode == -signal.SIGKILL
    folder = own / "engines" / TARGET
    (folder / ".stage_1.engine.part").write_bytes(b"half")
    builds = build(own, REQUEST)
    assert [next(builds).was_there for _ in range(3)] == [True, True, False]
    builds.close()
    assert not list(folder.glob(".*"))


def test_build_refuses_in_one_line(bundle, monkeypatch, capsys) -> None:
    with pytest.raises(PatchsieveError, match="no engines to build"):
        list(build(bundle, Request("cpu")))
    facts = files.read(bundle)
    targets = {"cpu": facts.targets["cpu"]}
    monkeypatch.setattr(files, "read", lambda path: replace(facts, targets=targets))
    with pytest.raises(BundleError, match="--targets cpu,tensorrt-rtx"):
        list(build(bundle, REQUEST))
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(BackendMissingError, match=r'pip install "tensorrt-rtx>=1\.7"'):
        list(build(bundle, REQUEST))
    assert main(["build", str(bundle), "--target", TARGET, "--json"]) == 2
    out = capsys.readouterr()
    assert "error" in json.loads(out.out) and out.err.count("\n") == 1
