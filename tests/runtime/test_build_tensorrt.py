"""Builds for the full TensorRT, against a stand-in for its Python module (tensorrt_double.py).

What these tests hold fast is our side: what TensorRT is asked, what is recorded of the answer, and
what happens when memory, the disk or the GPU is short.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from patchsieve.contract import engine_memory, names
from patchsieve.contract import files as bundle_files
from patchsieve.contract.errors import BackendMissingError, BundleError, PatchsieveError
from patchsieve.contract.graphs import STAGE, Graph, Tensor
from patchsieve.runtime.building import build as build_module
from patchsieve.runtime.building.build import Built, build
from patchsieve.runtime.building.build_config import TIMING_CACHE
from patchsieve.runtime.building.build_request import Request
from patchsieve.runtime.building.builder_process import Job, build_in_process
from patchsieve.runtime.building.compile import build_engine
from patchsieve.runtime.building.ladder import LADDER, CompilerError, OutOfMemoryError, climb
from patchsieve.runtime.building.profiles import profiles
from patchsieve.runtime.trt.device import Device, find_device
from patchsieve.runtime.trt.engines import Gpu, Options, engine_path, folder_of, read_record
from tests.support.bundles import command, command_json
from tests.support.damage import as_snapshot, contents, edit_manifest
from tests.support.tensorrt_double import Kind, install, module

pytest_plugins = ["tests.support.bundles"]

ORIN = Device(Gpu("Orin", "8.7", "12.6"), memory_bytes=8 << 30, is_integrated=True)
CARD = Device(Gpu("NVIDIA L4", "8.9", "13.0"), memory_bytes=24 << 30, is_integrated=False)
GIB = 1 << 30
TARGET = "jetpack6"


def growing(graph: Graph) -> Graph:
    """The graph with axes that grow where its caches have slots."""
    axis = names.AXIS_PAST if graph.kind == STAGE else names.AXIS_PRESENT

    def change(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(
            replace(
                tensor,
                shape=tuple(axis if each == names.AXIS_SLOTS else each for each in tensor.shape),
            )
            for tensor in tensors
        )

    return replace(graph, inputs=change(graph.inputs), outputs=change(graph.outputs))


@pytest.fixture
def bundle(own_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle whose CPU graphs stand for those of every TensorRT, on a machine with an Orin."""
    facts = bundle_files.read(own_bundle)
    graphs = facts.targets["cpu"]
    targets = dict.fromkeys(("cpu", "tensorrt", "tensorrt10", TARGET), graphs)
    grown = {name: growing(graph) for name, graph in facts.graphs.items()}
    forms = dict.fromkeys(targets, names.IN_PLACE)
    changed = replace(facts, targets=targets, graphs=grown, cache_forms=forms)
    bundle_files.write(own_bundle, changed)
    monkeypatch.setattr(build_module, "find_device", lambda: ORIN)
    return own_bundle


@pytest.fixture
def tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes `import tensorrt` give a stand-in, here and in the processes of a build."""

    def use(**kind: Any) -> None:
        made = Kind(**kind)
        monkeypatch.setitem(sys.modules, "tensorrt", module(made))
        monkeypatch.syspath_prepend(install(tmp_path / f"double-{made.version}", made))

    use()
    return use


def in_this_process(job: Job, progress: Any) -> Any:
    """Builds as a process of its own would, but quicker."""
    from patchsieve.runtime.building.builder_process import Done

    report = build_engine(
        job.onnx_path,
        job.out_path,
        job.profiles,
        target=job.target,
        options=job.options,
        timing_cache=None if job.timing_cache is None else Path(job.timing_cache),
        bundle=None if job.bundle is None else Path(job.bundle),
        progress=progress,
    )
    return Done(report.seconds, None, None, report.warnings, report.has_timing_cache)


def built(bundle: Path, request: Request | None = None, **options: Any) -> dict[str, Built]:
    """Every engine of a build, in this process."""
    request = request or Request(TARGET)
    done = build(bundle, request, builder=in_this_process, **options)
    return {one.graph: one for one in done}


def engine(bundle: Path, graph: str, target: str = TARGET) -> dict[str, Any]:
    """What the stand-in wrote of how an engine was built."""
    return json.loads(engine_path(bundle, target, graph).read_text())


@pytest.mark.parametrize(
    ("version", "has_typed_flag", "has_fp16", "has_stream"),
    [
        ("10.3.0", True, True, False),
        ("10.16.1", True, True, True),
        ("11.0.0", True, False, True),
        ("11.4.1", False, False, True),
    ],
)
def test_every_version_builds_typed_engines(
    bundle: Path,
    tensorrt: Any,
    version: str,
    has_typed_flag: bool,
    has_fp16: bool,
    has_stream: bool,
) -> None:
    tensorrt(
        version=version, has_typed_flag=has_typed_flag, has_fp16=has_fp16, has_stream=has_stream
    )
    done = built(bundle)
    assert set(done) == set(bundle_files.read(bundle).targets[TARGET])
    made = engine(bundle, "stage_1")
    assert made["is_typed"] is True
    shapes = profiles(bundle_files.read(bundle), "stage_1", TARGET)
    assert made["profiles"] == json.loads(json.dumps(shapes))
    assert done["stage_1"].engine.library.version == version
    assert done["stage_1"].engine.gpu == ORIN.gpu


def test_a_snapshot_of_links_is_built_into_itself_and_says_so(
    bundle: Path, tensorrt: Any, tmp_path: Path
) -> None:
    """The stand-in takes no weights that are links, or lie outside the folder it is given."""
    snapshot = as_snapshot(bundle, tmp_path / "models--me--bundle")
    blobs = contents(snapshot.parents[1] / "blobs")
    said: list[str] = []
    done = built(snapshot, told=said.append)
    assert set(done) == set(built(bundle))
    assert "snapshot of the hub's cache" in said[0]
    assert engine(snapshot, "stage_1") == engine(bundle, "stage_1")
    assert all(one.was_there for one in built(snapshot).values())
    assert contents(snapshot.parents[1] / "blobs") == blobs
    # And by a process of its own, as a user's build is.
    for one in build(snapshot, Request(TARGET, force=True)):
        assert one.engine is not None
        break
    code, out, err = command("build", snapshot, "--target", TARGET, "--dry-run")
    assert code == 0 and out.startswith("trtexec") and "cp -L -r" in err


def test_a_tensorrt_that_knows_no_typed_networks_is_refused(bundle: Path, tensorrt: Any) -> None:
    tensorrt(version="8.5.2", has_typed_flag=False)
    with pytest.raises(BackendMissingError, match="found: tensorrt 8.5.2 .*10.3.*upgrade"):
        built(bundle)


def test_a_past_that_grows_has_room_for_every_slot(bundle: Path) -> None:
    facts = bundle_files.read(bundle)
    prefill, decode = profiles(facts, "stage_1", TARGET)
    slots = facts.stages[1].slots
    name = "key_cache.2"
    assert [shape[2] for shape in prefill[name]] == [0, 1, slots]
    assert decode[name][0][2] == 0 and decode[name][2][2] == slots
    assert [shape[1] for shape in decode["hidden"]] == [1, 1, 2]


def test_options_reach_the_builder_and_the_record(bundle: Path, tensorrt: Any) -> None:
    options = Options(workspace_bytes=GIB, optimization_level=2)
    done = built(bundle, Request(TARGET, options, streaming="on"))
    made = engine(bundle, "stage_0")
    assert (made["workspace"], made["level"], made["flags"]) == (GIB, 2, ["WEIGHT_STREAMING"])
    assert done["stage_0"].engine.options == replace(options, weight_streaming=True)
    assert engine(bundle, "compact")["flags"] == []  # it has no weights to stream


def test_timings_of_one_engine_serve_the_next_and_bad_ones_are_made_again(
    bundle: Path, tensorrt: Any
) -> None:
    built(bundle)
    facts = bundle_files.read(bundle)
    caches = [engine(bundle, graph)["cache"] for graph in facts.targets[TARGET]]
    assert caches == ["", *["timings"] * (len(caches) - 1)]
    cache = folder_of(bundle, TARGET) / TIMING_CACHE
    assert cache.read_bytes() == b"timings"
    cache.write_bytes(b"of another GPU")
    built(bundle, Request(TARGET, force=True))
    assert engine(bundle, "vision")["cache"] == ""
    assert cache.read_bytes() == b"timings"


@pytest.mark.parametrize(
    ("kind", "rung"),
    [
        ({}, "as asked"),
        ({"most_workspace": GIB}, "workspace 1 GiB"),
        ({"most_workspace": GIB // 4}, "workspace 256 MiB"),
        ({"most_level": 1}, "level 1, workspace 1 GiB"),
        ({"most_level": 0}, "level 0, workspace 256 MiB"),
        ({"needs_streaming": True}, "weight streaming, level 0, workspace 256 MiB"),
    ],
)
def test_the_ladder_takes_the_first_rung_that_fits_and_says_so(
    bundle: Path, tensorrt: Any, kind: dict[str, Any], rung: str
) -> None:
    tensorrt(**kind)
    said: list[str] = []
    done = built(bundle, told=said.append)["stage_0"].engine
    assert done.rung == rung
    names = [step.name for step in LADDER]
    assert [step.rung for step in done.failed] == names[: names.index(rung)]
    assert all("OutOfMemory" in step.why for step in done.failed)
    assert any(f"stage_0: {names[0]} failed" in text for text in said) == bool(done.failed)
    assert read_record(bundle, TARGET).engines["stage_0"] == done
    assert done.asked == Options()
    # The engine stands although it was built with less than was asked.
    assert built(bundle)["stage_0"].was_there


def test_no_rung_goes_above_what_was_asked_and_none_is_tried_twice(
    bundle: Path, tensorrt: Any
) -> None:
    tensorrt(most_level=0)
    asked = Options(workspace_bytes=GIB // 8, optimization_level=1)
    done = built(bundle, Request(TARGET, asked))["stage_0"].engine
    assert done.options == Options(workspace_bytes=GIB // 8, optimization_level=0)
    assert [step.rung for step in done.failed] == ["as asked"]


def test_a_ladder_that_ends_says_what_to_change_at_export(bundle: Path, tensorrt: Any) -> None:
    tensorrt(needs_streaming=True)
    with pytest.raises(OutOfMemoryError, match="as asked: .*level 0.*--max-text-tokens") as raised:
        built(bundle, Request(TARGET, streaming="off"))
    assert "\n" not in str(raised.value) and "weight streaming" not in str(raised.value)
    assert not list(folder_of(bundle, TARGET).glob("*.engine"))


NO_KERNEL = (
    "[optimizer.cpp::computeCosts] Error Code 10: Internal Error (Could not find any "
    "implementation for node {ForeignNode[attention.0...]}"
)
SKIPPED = "Skipping tactic 0x5 due to insufficient memory on requested size of 2147483648 detected."
TACTIC = "Tactic Device request: 2048MB Available: 1024MB. Device memory is insufficient to use it."


@pytest.mark.parametrize(
    ("errors", "warnings", "is_memory"),
    [
        ((f"{NO_KERNEL}.)",), (), False),
        ((f"{NO_KERNEL} due to insufficient workspace. See verbose log.)",), (), True),
        ((f"{NO_KERNEL}.)",), (SKIPPED,), True),
        ((f"{NO_KERNEL}.)",), (TACTIC,), True),
        (("Tensor scratch could not be allocated.",), (), True),
        (("Requested amount of GPU memory (9 bytes) could not be allocated.",), (), True),
        (
            ("Error Code 1: Myelin (MyelinCheckException: utils.cpp:692: CHECK(idx < 4) failed)",),
            (),
            False,
        ),
        # A tactic that was skipped is no reason for another failure.
        (("Error Code 1: Myelin (MyelinCheckException)",), (SKIPPED,), False),
        (("CUDA driver version is insufficient for CUDA runtime version",), (), False),
    ],
)
def test_only_what_says_so_is_a_lack_of_memory(
    bundle: Path, tensorrt: Any, errors: tuple, warnings: tuple, is_memory: bool
) -> None:
    tensorrt(fails="stage_0", errors=errors, warnings=warnings)
    said: list[str] = []
    with pytest.raises(OutOfMemoryError if is_memory else CompilerError) as raised:
        built(bundle, told=said.append)
    tries = 1 + sum("stage_0: " in text for text in said)
    assert tries == (len(LADDER) if is_memory else 1)
    assert ("free memory" in str(raised.value)) == is_memory
    assert ("another --optimization-level" in str(raised.value)) == (not is_memory)
    assert "--attention" not in str(raised.value)  # these graphs hold it in parts


def with_half_precision(bundle: Path, attention: str) -> None:
    """Let the manifest say float16, and how attention is spelt: the graphs stay what they are."""

    def change(data: dict[str, Any]) -> None:
        data.update(precision="float16", attention=attention)
        data["embeddings"]["dtype"] = "float16"
        for entry in data["weights"].values():
            entry["type"] = "float16"

    edit_manifest(bundle, change)


@pytest.mark.parametrize(
    ("attention", "graph", "is_fused"),
    [
        ("fused", "stage_0", True),
        ("fused", "vision", True),
        ("fused", "decide.half.2", False),
        ("fused-tower", "vision", True),
        ("fused-tower", "stage_0", False),
        ("decomposed", "stage_0", False),
    ],
)
def test_a_compiler_that_fails_over_fused_attention_asks_for_its_parts(
    bundle: Path, tensorrt: Any, attention: str, graph: str, is_fused: bool
) -> None:
    with_half_precision(bundle, attention)
    tensorrt(
        version="11.2.0",
        has_typed_flag=False,
        has_fp16=False,
        fails=f".{graph}.",
        errors=(NO_KERNEL,),
    )
    with pytest.raises(CompilerError) as raised:
        built(bundle, Request("tensorrt"))
    line = str(raised.value)
    assert "\n" not in line and "Could not find any implementation" in line
    assert ("export the bundle again with --attention decomposed" in line) == is_fused


def test_a_gpu_without_float32_products_is_named(bundle: Path, tensorrt: Any) -> None:
    said = "Cannot compile operation 'scores' for Turing (SM75): FP32 GEMM is not supported."
    tensorrt(fails="stage_0", errors=(said,))
    with pytest.raises(CompilerError, match="leave --compute-capability 7.5 out"):
        built(bundle)


def test_a_compiler_that_crashes_is_no_lack_of_memory(bundle: Path, tensorrt: Any) -> None:
    with_half_precision(bundle, "fused")
    tensorrt(version="11.2.0", has_typed_flag=False, has_fp16=False, fails=".stage_0.")
    (bundle / "engines" / "tensorrt").mkdir(parents=True)
    with pytest.raises(CompilerError, match="died .*SIGSEGV.*--attention decomposed") as raised:
        for _ in build(bundle, Request("tensorrt")):
            continue
    assert "\n" not in str(raised.value)
    assert not list((bundle / "engines" / "tensorrt").glob("stage_0*"))


def test_other_failures_climb_down_nowhere() -> None:
    tried: list[Options] = []

    def attempt(options: Options) -> None:
        tried.append(options)
        raise BundleError("a node that is not supported")

    with pytest.raises(BundleError, match="not supported"):
        climb(Options(), attempt)
    assert len(tried) == 1


def compact_job(bundle: Path, options: Options | None = None) -> Job:
    """The smallest graph, to be built beside the bundle's manifest."""
    facts = bundle_files.read(bundle)
    return Job(
        onnx_path=str(bundle / facts.targets[TARGET]["compact"]),
        out_path=str(bundle / "compact.engine"),
        profiles=tuple(profiles(facts, "compact", TARGET)),
        target=TARGET,
        options=options or Options(),
        timing_cache=None,
    )


def test_a_process_that_the_system_kills_ran_out_of_memory(bundle: Path, tensorrt: Any) -> None:
    tensorrt(most_workspace=GIB, dies=True)
    with pytest.raises(OutOfMemoryError, match="killed from outside"):
        build_in_process(compact_job(bundle))
    assert not list(bundle.glob("*compact.engine*"))
    seen: list[Any] = []
    job = compact_job(bundle, Options(GIB))
    done = build_in_process(job, lambda *step: seen.append(step))
    made = json.loads((bundle / "compact.engine").read_text())
    assert made["process"] != os.getpid()
    assert seen[0] == ("Building engine", 0, 1)
    assert done.base_bytes is not None and 0 < done.base_bytes <= done.peak_bytes


def test_a_process_that_dies_otherwise_is_told_with_its_last_words(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt.py").write_text("import os; os.write(2, b'no such symbol'); os._exit(3)")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BundleError, match="died .*exit code 3: no such symbol") as raised:
        build_in_process(compact_job(bundle))
    assert not isinstance(raised.value, OutOfMemoryError)


def test_a_build_without_a_gpu_is_refused_in_one_line(
    bundle: Path, tensorrt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module, "find_device", lambda: None)
    with pytest.raises(BackendMissingError, match="no NVIDIA driver.*--target jetpack6"):
        built(bundle)
    tensorrt(has_gpu=False)  # a driver that is there and does not work
    monkeypatch.setattr(build_module, "find_device", lambda: ORIN)
    with pytest.raises(BackendMissingError, match="builds on the GPU.*error: 35.*doctor"):
        built(bundle)


def test_another_library_gpu_or_option_builds_again(
    bundle: Path, tensorrt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def again(request: Request | None = None) -> set[bool]:
        return {not one.was_there for one in built(bundle, request).values()}

    assert again() == {True}
    assert again() == {False}
    assert again(Request(TARGET, Options(GIB))) == {True}
    tensorrt(version="10.16.1")
    assert again(Request(TARGET, Options(GIB))) == {True}
    monkeypatch.setattr(build_module, "find_device", lambda: CARD)
    assert again(Request(TARGET, Options(GIB))) == {True}
    newer = replace(CARD, gpu=replace(CARD.gpu, driver="14.0"))
    monkeypatch.setattr(build_module, "find_device", lambda: newer)
    assert again(Request(TARGET, Options(GIB))) == {False}
    assert again(Request(TARGET, Options(GIB), force=True)) == {True}
    facts = bundle_files.read(bundle)  # the same graphs and slots, otherwise shared out
    limits = replace(facts.limits, max_text_tokens=60, max_new_tokens=36)
    bundle_files.write(bundle, replace(facts, limits=limits))
    assert True in again(Request(TARGET, Options(GIB)))


def test_a_full_disk_leaves_the_engines_before_it(
    bundle: Path, tensorrt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorrt(has_stream=True)
    done = build(bundle, Request(TARGET), builder=in_this_process)
    first = next(done).graph
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(PatchsieveError, match="disk .* is full.*make room"):
        next(done)
    monkeypatch.undo()
    assert list(read_record(bundle, TARGET).engines) == [first]
    files = {path.name for path in folder_of(bundle, TARGET).iterdir()}
    assert files == {"engines.json", f"{first}.engine", TIMING_CACHE}


def test_two_builds_of_a_target_do_not_meet(bundle: Path, tensorrt: Any) -> None:
    first = build(bundle, Request(TARGET), builder=in_this_process)
    next(first)
    with pytest.raises(PatchsieveError, match="another build"):
        next(build(bundle, Request(TARGET), builder=in_this_process))
    first.close()
    assert built(bundle)


@pytest.mark.parametrize(
    ("device", "memory", "streaming", "expected"),
    [
        (CARD, None, "auto", []),
        (replace(CARD, memory_bytes=1000), None, "auto", ["WEIGHT_STREAMING"]),
        (CARD, 1000, "auto", ["WEIGHT_STREAMING"]),
        (replace(CARD, memory_bytes=1000), None, "off", []),
        (replace(ORIN, memory_bytes=1000), None, "auto", []),  # one memory: nothing to gain
    ],
)
def test_weights_stream_where_they_exceed_the_memory_of_the_gpu(
    bundle: Path,
    tensorrt: Any,
    monkeypatch: pytest.MonkeyPatch,
    device: Device,
    memory: int | None,
    streaming: str,
    expected: list[str],
) -> None:
    monkeypatch.setattr(build_module, "find_device", lambda: device)
    said: list[str] = []
    request = Request("tensorrt", streaming=streaming, device_bytes=memory)
    done = build(bundle, request, builder=in_this_process, told=said.append)
    assert next(done).graph == "vision"
    assert engine(bundle, "vision", "tensorrt")["flags"] == expected
    assert any("shares with the host" in text for text in said) == (
        device.memory_bytes == 1000 and device.is_integrated
    )


def test_a_library_without_weight_streaming_is_refused(bundle: Path, tensorrt: Any) -> None:
    tensorrt(has_streaming=False)
    with pytest.raises(BundleError, match="cannot stream weights.*--weight-streaming off"):
        built(bundle, Request(TARGET, streaming="on"))
    with pytest.raises(BundleError, match="only for the GPU of this machine"):
        built(bundle, Request(TARGET, Options(compute_capabilities=("8.9",))))


def test_the_command_reports_each_engine(
    bundle: Path, tensorrt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorrt(most_workspace=GIB)
    monkeypatch.setattr(
        build_module.build, "__kwdefaults__", build.__kwdefaults__ | {"builder": in_this_process}
    )
    code, report = command_json("build", bundle, "--target", TARGET, "--optimization-level", 4)
    assert code == 0
    one = next(one for one in report["engines"] if one["graph"] == "stage_1")
    assert one["rung"] == "workspace 1 GiB" and one["failed"][0]["rung"] == "as asked"
    assert one["options"]["optimization_level"] == 4
    assert one["library"] == "tensorrt 10.3.0" and one["gpu"]["name"] == "Orin"
    assert report["bytes"] == sum(one["bytes"] for one in report["engines"]) > 0
    code, out, err = command("build", bundle, "--target", TARGET, "--force")
    assert "workspace 1 GiB" in out and "peak memory" in out
    assert "stage_1: as asked failed" in err and "building stage_1" in err
    code, out, err = command("build", bundle, "--target", TARGET, "--optimization-level", 9)
    assert code == 2 and "0 to 5" in err


def test_a_dry_run_prints_the_lines_of_trtexec_without_the_library(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    options = ("--memory-limit", 1.073741824, "--optimization-level", 2, "--weight-streaming", "on")
    code, report = command_json("build", bundle, "--target", TARGET, "--dry-run", *options)
    assert code == 0
    facts = bundle_files.read(bundle)
    assert set(report["commands"]) == set(facts.targets[TARGET])
    words = report["commands"]["stage_1"].split()
    assert words[0] == "trtexec" and words[-1] == "--skipInference"
    assert f"--onnx={bundle / facts.targets[TARGET]['stage_1']}" in words
    assert f"--saveEngine={engine_path(bundle, TARGET, 'stage_1')}" in words
    assert {
        "--stronglyTyped",
        "--memPoolSize=workspace:1024M",
        "--builderOptimizationLevel=2",
    } <= set(words)
    assert f"--timingCacheFile={folder_of(bundle, TARGET) / TIMING_CACHE}" in words
    assert "--allowWeightStreaming" in words
    first, second = words.index("--profile=0"), words.index("--profile=1")
    prefill = [word.split("=")[0] for word in words[first + 1 : second]]
    assert prefill == ["--minShapes", "--optShapes", "--maxShapes"]
    assert words[second + 3].startswith("--maxShapes=hidden:1x2x64,keep_indices:2,")
    assert not folder_of(bundle, TARGET).exists()


class FakeDriver:
    """libcuda with one GPU, or without."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> int:
            if name == self.fails:
                return 100  # CUDA_ERROR_NO_DEVICE
            if name == "cuDeviceGetName":
                args[0].value = b"Orin"
            elif name == "cuDeviceGetAttribute":
                args[0]._obj.value = {75: 8, 76: 7, 18: 1}[args[1]]
            elif name == "cuDriverGetVersion":
                args[0]._obj.value = 12060
            elif name == "cuDeviceTotalMem_v2":
                args[0]._obj.value = 8 << 30
            return 0

        return call


def test_the_driver_tells_the_gpu() -> None:
    assert find_device(lambda _: FakeDriver()) == ORIN
    for step in ("cuInit", "cuDeviceGet", "cuDeviceGetName", "cuDriverGetVersion"):
        assert find_device(lambda _, step=step: FakeDriver(step)) is None

    def absent(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    assert find_device(absent) is None


def test_the_memory_of_a_build_is_an_estimate_where_it_was_not_measured(bundle: Path) -> None:
    facts = bundle_files.read(bundle)
    said = engine_memory.source(facts)
    assert said.startswith("measured with tensorrt-rtx, an estimate for tensorrt, tensorrt10, jetp")
    measured = replace(facts, targets={"tensorrt-rtx": facts.targets["cpu"]})
    assert engine_memory.source(measured) == "measured with tensorrt-rtx"
