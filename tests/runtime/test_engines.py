"""Engines load where they were built for; anything else is refused with the command that mends."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from patchsieve.contract import files, manifest, verified
from patchsieve.contract.errors import BackendMissingError, BundleError
from patchsieve.contract.manifest import Manifest
from patchsieve.runtime.trt.engines import (
    Attempt,
    Engine,
    Gpu,
    Library,
    Options,
    Record,
    check_loadable,
    engine_path,
    folder_of,
    open_engines,
    read_record,
    weights_hash,
    write_record,
)
from tests.support.bundles import command

RTX = "tensorrt-rtx"
pytest_plugins = ["tests.support.bundles"]

TARGET = "tensorrt"
ORIN = Gpu("Orin", "8.7", "12.6")
TRT = Library("tensorrt", "10.3.0")
COMMAND = "patchsieve build .* --target tensorrt"


@pytest.fixture
def bundle(own_bundle: Path) -> Path:
    """A bundle whose graphs stand for the target, with an engine file and record for each."""
    facts = files.read(own_bundle)
    other = {TARGET: facts.targets["cpu"]}
    forms = dict.fromkeys(other, facts.cache_forms["cpu"])
    needs = {TARGET: facts.needs["cpu"]}
    files.write(own_bundle, replace(facts, targets=other, needs=needs, cache_forms=forms))
    folder_of(own_bundle, TARGET).mkdir(parents=True)
    facts, engines = files.read(own_bundle), {}
    for number, (graph, path) in enumerate(facts.targets[TARGET].items()):
        file = engine_path(own_bundle, TARGET, graph)
        file.write_bytes(b"engine" * (number + 1))
        found = files.hash_file(file)
        engines[graph] = Engine(
            graph_sha256=facts.files[path].sha256,
            weights_sha256=weights_hash(facts),
            library=TRT,
            gpu=ORIN,
            asked=Options(),
            options=Options(optimization_level=2),
            rung="level-2",
            profiles=({"hidden": ((1, 1, 8), (1, 4, 8), (1, 9, 8))},),
            seconds=1.5,
            peak_bytes=None,
            size=found.size,
            sha256=found.sha256,
            failed=(Attempt("as asked", "out of memory"),),
        )
    write_record(Record(own_bundle, TARGET, engines))
    return own_bundle


def opened(bundle: Path, gpu: Gpu | None = ORIN, library: Library = TRT) -> dict[str, Path]:
    """What `open_engines` finds."""
    return open_engines(bundle, files.read(bundle), TARGET, gpu=gpu, library=library)


def change(bundle: Path, graph: str, **changes: object) -> None:
    """Change the record of one engine."""
    record = read_record(bundle, TARGET)
    record.engines[graph] = replace(record.engines[graph], **changes)
    write_record(record)


def test_engines_open_where_they_were_built(bundle: Path) -> None:
    facts: Manifest = files.read(bundle)
    assert set(opened(bundle)) == set(facts.targets[TARGET])
    record = read_record(bundle, TARGET)
    write_record(record)
    assert read_record(bundle, TARGET) == record
    assert opened(bundle, replace(ORIN, driver="13.0"))  # a newer driver runs an older engine


@pytest.mark.parametrize(
    ("gpu", "library", "message"),
    [
        (replace(ORIN, name="Thor", compute_capability="11.0"), TRT, "found: Orin .*Thor"),
        (replace(ORIN, name="Another"), TRT, "another GPU"),
        (replace(ORIN, compute_capability="8.6"), TRT, r"expected: Orin \(SM 8.6\)"),
        (ORIN, replace(TRT, version="10.16.1"), "found: tensorrt 10.3.0 .*10.16.1"),
        (ORIN, Library("tensorrt_rtx", "10.3.0"), "another library"),
    ],
)
def test_another_machine_is_refused_with_the_command(
    bundle: Path, gpu: Gpu, library: Library, message: str
) -> None:
    with pytest.raises(BundleError, match=f"{message}.*{COMMAND}") as raised:
        opened(bundle, gpu, library)
    assert "\n" not in str(raised.value)
    assert str(bundle) in str(raised.value)


def test_no_gpu_is_refused(bundle: Path) -> None:
    with pytest.raises(BackendMissingError, match="no GPU.*doctor"):
        opened(bundle, None)


def test_an_engine_built_ahead_of_time_runs_on_the_gpus_of_its_list(bundle: Path) -> None:
    record = read_record(bundle, TARGET)
    ahead = replace(record.engines["vision"], gpu=None, options=Options())
    only_ada = replace(ahead, options=Options(compute_capabilities=("8.9",)))
    spark = replace(ahead, options=Options(compute_capabilities=("12.1",)))
    pairs = [(ahead, "8.6"), (ahead, "8.9"), (ahead, "12.0"), (only_ada, "8.9"), (spark, "12.1")]
    for engine, capability in pairs:
        card = Gpu("any", capability)
        check_loadable(Record(bundle, RTX, {"vision": engine}), card, TRT)
    for engine, capability in ((ahead, "7.5"), (ahead, "8.0"), (ahead, "12.1"), (only_ada, "8.6")):
        with pytest.raises(BundleError, match=f"--compute-capability {capability}$"):
            check_loadable(Record(bundle, RTX, {"vision": engine}), Gpu("any", capability), TRT)


@pytest.mark.parametrize("capability", ["6.1", "8.7", "9.0", "10.0", "10.3", "11.0", "13.0"])
def test_a_gpu_that_tensorrt_rtx_refuses_is_sent_to_another_target(
    bundle: Path, capability: str
) -> None:
    engine = read_record(bundle, TARGET).engines["vision"]
    card = Gpu("any", capability)
    forms = (
        replace(engine, gpu=None, options=Options()),
        replace(engine, gpu=None, options=Options(compute_capabilities=(capability,))),
        replace(engine, gpu=card),
    )
    for form in forms:
        line = f"found: any .SM {capability}. .*--targets tensorrt "
        with pytest.raises(BundleError, match=line):
            check_loadable(Record(bundle, RTX, {"vision": form}), card, TRT)
    check_loadable(Record(bundle, TARGET, {"vision": forms[-1]}), card, TRT)  # full TensorRT


def test_missing_damaged_and_stale_engines_are_refused(bundle: Path) -> None:
    path = engine_path(bundle, TARGET, "stage_1")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"x")
    with pytest.raises(BundleError, match=f"stage_1.engine is damaged.*{COMMAND}"):
        opened(bundle)
    path.write_bytes(whole[:-1])
    with pytest.raises(BundleError, match="damaged"):
        open_engines(bundle, files.read(bundle), TARGET, gpu=ORIN, library=TRT, hashes=False)
    path.unlink()
    with pytest.raises(BundleError, match=f"stage_1 is not built.*{COMMAND}"):
        opened(bundle)
    assert open_engines(  # the others serve
        bundle, files.read(bundle), TARGET, gpu=ORIN, library=TRT, graphs=["stage_0"]
    )
    path.write_bytes(whole)
    for changes in ({"graph_sha256": "0" * 64}, {"weights_sha256": "0" * 64}):
        before = read_record(bundle, TARGET)
        change(bundle, "stage_1", **changes)
        with pytest.raises(BundleError, match=f"another export.*{COMMAND}"):
            opened(bundle)
        write_record(before)


def garbled(data: dict) -> list[object]:
    """Records that no build wrote."""
    engine = data["engines"]["vision"]

    def with_engine(**changes: object) -> dict:
        return data | {"engines": data["engines"] | {"vision": engine | changes}}

    return [
        [],
        "engines",
        data | {"schema_version": 2},
        data | {"schema_version": True},
        data | {"target": "jetpack6"},
        data | {"engines": None},
        data | {"engines": {"vision": None}},
        with_engine(size=-1),
        with_engine(size=1 << 60),
        with_engine(seconds="1"),
        with_engine(seconds=float("nan")),
        with_engine(gpu="Orin"),
        with_engine(library={"name": "tensorrt"}),
        with_engine(options=engine["options"] | {"weight_streaming": 1}),
        with_engine(profiles=[{"hidden": [[1], [1]]}]),
        with_engine(rung="\ud800"),
        with_engine(surprise=1),
    ]


def test_a_garbled_record_is_refused_in_one_line(bundle: Path) -> None:
    path = folder_of(bundle, TARGET) / "engines.json"
    texts = [json.dumps(record) for record in garbled(json.loads(path.read_text()))]
    for text in [*texts, "{", "", "\x00", "[" * 100_000, '{"schema_version": ' + "9" * 5000 + "}"]:
        path.write_text(text)
        with pytest.raises(BundleError, match=COMMAND) as raised:
            opened(bundle)
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 1000
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(BundleError, match=COMMAND):
        opened(bundle)
    path.unlink()
    with pytest.raises(BundleError, match=f"no engines for {TARGET}.*{COMMAND}"):
        opened(bundle)


@pytest.mark.parametrize("graph", ["../vision", "a/b", "", ".hidden", "x" * 200, "a\n"])
def test_a_graph_cannot_name_a_file_elsewhere(graph: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot be a file"):
        engine_path(tmp_path, TARGET, graph)


def test_engines_are_hashed_once_and_again_on_demand(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, hash_file = time.time_ns, files.hash_file
    read: list[str] = []
    monkeypatch.setattr(verified.time, "time_ns", lambda: now() + 60_000_000_000)

    def counted(path: Path) -> manifest.File:
        read.append(path.name)
        return hash_file(path)

    monkeypatch.setattr(files, "hash_file", counted)
    count = len(opened(bundle))
    assert len(read) == count
    assert len(opened(bundle)) == count == len(read)
    code, _, _ = command("inspect", bundle, "--check", "--quiet")
    engine = engine_path(bundle, TARGET, "stage_0")
    assert code == 0 and read.count(engine.name) == 2
    engine.write_bytes(engine.read_bytes()[::-1])
    code, _, line = command("inspect", bundle, "--check", "--quiet")
    assert code == 2 and "stage_0.engine is damaged" in line
