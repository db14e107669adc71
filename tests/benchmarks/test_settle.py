"""settle.py's graphs, expectations and report, as far as a machine without a GPU goes."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from benchmarks.settle import __main__ as settle
from benchmarks.settle import cuda, graphs, onnxruntime_cuda, questions
from benchmarks.settle import reference as ref
from benchmarks.settle.questions import BUILDS, NO, NOT_RUN, YES, Answer, Setup
from patchsieve.contract.errors import BackendMissingError, PatchsieveError

ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
needs_opset_24 = pytest.mark.skipif(
    tuple(map(int, ort.__version__.split(".")[:2])) < (1, 24),
    reason="this ONNX Runtime refuses opset 24",
)


class CpuEngine:
    """ONNX Runtime on the CPU with the verbs of cuda.Engine, to try a question's logic."""

    def __init__(self, path: Path) -> None:
        model = onnx.load(path)
        for node in model.graph.node:  # ONNX Runtime does not know TensorRT's attribute
            kept = [a for a in node.attribute if a.name != "TRT_decomposable"]
            del node.attribute[:]
            node.attribute.extend(kept)
            if node.op_type == "TRT_Attention":  # takes a scaled query, a mask, and a length
                mask_end = list(node.input)[:4]
                new = onnx.helper.make_node("Attention", mask_end, list(node.output), scale=1.0)
                node.CopyFrom(new)
        self.outputs = [output.name for output in model.graph.output]
        self.pairs = {n: n.removeprefix("new_") for n in self.outputs if n.startswith("new_")}
        self.session = ort.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        self.contexts: list[str] = []
        self.values: dict[str, np.ndarray] = {}

    def add_context(self, profile: int = 0, shared: object = None) -> int:
        self.contexts.append("context")
        return len(self.contexts) - 1

    def write(self, name: str, value: np.ndarray) -> None:
        self.values[name] = value

    def enqueue(self, context: int = 0) -> None:
        feeds = {i.name: self.values[i.name] for i in self.session.get_inputs()}
        results = self.session.run(self.outputs, feeds)
        for name, value in zip(self.outputs, results, strict=True):
            self.values[self.pairs.get(name, name)] = value

    def run(self, inputs: dict[str, np.ndarray], context: int = 0) -> dict[str, np.ndarray]:
        self.values.update(inputs)
        self.enqueue()
        return {name: self.read(name) for name in self.outputs}

    def read(self, name: str, context: int = 0) -> np.ndarray:
        return self.values[self.pairs.get(name, name)]

    def synchronize(self) -> None:
        pass

    def capture(self, context: int = 0) -> str:
        return "graph"

    def launch(self, graph: str) -> None:
        self.enqueue()


@dataclasses.dataclass
class CpuSetup(Setup):
    """A setup whose engines are ONNX Runtime sessions."""

    def build(self, name: str) -> Path:
        path = self.folder / f"{name}.onnx"
        return path if path.exists() else BUILDS[name].write(self.folder, name)

    def engine(self, name: str, *, apart: bool = False) -> Any:
        return CpuEngine(self.build(name))


@needs_opset_24
@pytest.mark.parametrize("letter", ["a", "c", "e", "f", "h", "i", "j"])
def test_a_runtime_that_is_right_is_answered_yes(
    letter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(questions, "_microseconds", lambda call: call() and 0.0 or 0.0)
    answer = settle.QUESTIONS[letter][1](CpuSetup("tensorrt-rtx", tmp_path))
    assert answer.status == YES, answer


@needs_opset_24
def test_nan_in_unused_slots_is_told_apart_from_a_wrong_cache(tmp_path: Path) -> None:
    answer = questions.caches_are_written_in_place(CpuSetup("tensorrt-rtx", tmp_path))
    assert "in place and right: True" in answer.text
    assert "NaN in unused slots does no harm: False" in answer.text


@needs_opset_24
def test_a_cache_that_is_not_written_is_answered_no(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(self: CpuEngine, context: int = 0) -> None:
        feeds = {i.name: self.values[i.name] for i in self.session.get_inputs()}
        found = self.session.run(["hidden_out"], feeds)[0]
        self.values["hidden_out"] = found
        self.values.update({n: self.values[i] for n, i in self.pairs.items()})

    monkeypatch.setattr(CpuEngine, "enqueue", forgetful)
    answer = questions.caches_are_written_in_place(CpuSetup("tensorrt-rtx", tmp_path))
    assert answer.status == NO


@pytest.mark.parametrize("meaning", ["kv_len", "S", "upper left"])
def test_each_meaning_of_a_key_length_is_recognised(
    meaning: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lengths:
        def add_context(self, profile: int) -> int:
            return 0

        def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            query, key, value = (inputs[n] for n in ("query", "key", "value"))
            rows, slots = query.shape[2], np.arange(key.shape[2])
            end = {"kv_len": int(inputs["kv_len"][0]) - rows, "S": key.shape[2] - rows}
            seen = slots <= np.arange(rows)[:, None] + end.get(meaning, 0)
            if "mask" in inputs:
                seen = inputs["mask"][0, 0] == 0
            return {"out": ref.attend(query, key, value, seen)}

    engine = Lengths()
    told = questions._match_lengths(engine, "float32", 5, 50.0, has_mask=False)
    assert told.startswith(f"{meaning} (")
    # This stand-in heeds the mask alone, which lets the slots beyond kv_len through.
    told = questions._match_lengths(engine, "float32", 5, 50.0, has_mask=True)
    assert told.startswith("nothing known")
    monkeypatch.setattr(Setup, "engine", lambda self, name: engine)
    answer = questions.length_attention_aligns_to_length(Setup("tensorrt-rtx", tmp_path))
    assert answer.status == (YES if meaning == "kv_len" else NO)
    assert "with a mask instead of causality: False" in answer.text
    assert len(answer.facts) == 16


@needs_opset_24
def test_the_compaction_graph_packs_ascending_indices() -> None:
    model = graphs.compaction_model(6)
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    keep = np.array([False, True, True, False, False, True])
    indices, count = session.run(None, {"keep": keep})
    assert indices.tolist() == [1, 2, 5, 0, 0, 0]
    assert count.tolist() == [3]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_grouped_attention_with_a_bias_on_a_shared_buffer_is_right_on_the_cpu(dtype: str) -> None:
    error = onnxruntime_cuda.grouped_attention_error(ort, "CPUExecutionProvider", dtype)
    assert error < {"float32": 1e-6, "float16": 4e-3}[dtype]


@needs_opset_24
@pytest.mark.parametrize("op", ["Attention", "TensorScatter"])
def test_the_modern_operators_open_on_the_cpu(op: str) -> None:
    model = onnxruntime_cuda.modern_model(op, "float32")
    assert onnxruntime_cuda.session_on(ort, model, "CPUExecutionProvider").get_outputs()


@pytest.mark.slow
@pytest.mark.tensorrt
def test_build_only_compiles_every_engine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    code = settle.main(["--build-only", "--target", "tensorrt-rtx", "--json", str(tmp_path / "j")])
    last = capsys.readouterr().out.splitlines()[-1]
    told = json.loads(last)
    assert code == 0
    assert told == json.loads((tmp_path / "j").read_text())
    assert len(told["answers"]) == len(BUILDS) + 1
    assert {answer["status"] for answer in told["answers"].values()} == {YES}


def no_device(self: cuda.Cuda) -> str:
    raise BackendMissingError("no CUDA device answers", do="run where an NVIDIA GPU is")


def test_without_a_gpu_it_says_what_is_absent_and_exits_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cuda.Cuda, "__init__", lambda self: None)
    monkeypatch.setattr(cuda.Cuda, "compute_capability", no_device)
    assert settle.main([]) == 2
    said = capsys.readouterr().err
    assert said == ("settle: no CUDA device answers | what to do: run where an NVIDIA GPU is\n")


def test_what_needs_an_engine_is_not_run_where_none_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replies = {"a": Answer(NO, "refused by SM 9.0"), "g": Answer(YES, "fine")}
    monkeypatch.setattr(settle, "ask", lambda letter, setup, seconds: replies[letter])
    answers = settle.ask_all("bcg", "tensorrt-rtx", tmp_path, 5)
    assert list(answers) == ["a", "b", "c", "g"]
    assert answers["b"].status == answers["c"].status == NOT_RUN
    assert "(a)" in answers["b"].text
    assert "(g) yes" in capsys.readouterr().out
    answers = settle.ask_all("cg", None, tmp_path, 5)
    assert "neither tensorrt_rtx nor tensorrt" in answers["c"].text
    assert answers["g"].status == YES


def test_the_form_of_engine_that_ran_serves_the_later_questions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, tuple[str, ...]]] = []

    def reply(letter: str, setup: Setup, seconds: float) -> Answer:
        asked.append((letter, setup.capabilities))
        return Answer(YES, "")

    monkeypatch.setattr(settle, "ask", reply)
    settle.ask_all("ac", "tensorrt-rtx", tmp_path, 5)
    forms = [("current",), (), questions.PORTABLE]
    assert asked == [*(("a", form) for form in forms), ("c", ("current",))]


def test_a_question_that_crashes_costs_one_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho the reason >&2\nkill -SEGV $$\n")
    script.chmod(0o755)
    monkeypatch.setattr(settle.sys, "executable", str(script))
    answer = settle.ask("c", Setup("tensorrt-rtx", tmp_path), 20)
    assert answer.status == NO
    assert f"signal {signal.SIGSEGV.value}: the reason" in answer.text
    script.write_text("#!/bin/sh\nexec sleep 9\n")
    assert settle.ask("c", Setup("tensorrt-rtx", tmp_path), 0.3).status == NOT_RUN


def test_errors_of_a_question_become_its_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(setup: Setup) -> Answer:
        raise PatchsieveError("the engine does not load", found="everything it said")

    def nothing(setup: Setup) -> Answer:
        return Answer(NO, "", {"errors": [float("nan"), 1.0]})

    monkeypatch.setitem(settle.QUESTIONS, "b", ("", broken))
    monkeypatch.setitem(settle.QUESTIONS, "c", ("", nothing))
    setup = Setup("tensorrt-rtx", tmp_path)
    settle.answer_one("b", setup)
    settle.answer_one("c", setup)
    told = json.loads((tmp_path / "b.json").read_text())
    assert (told["status"], told["text"]) == (
        NO,
        "the engine does not load | found: everything it said",
    )
    assert json.loads((tmp_path / "c.json").read_text())["facts"]["errors"] == ["nan", 1.0]


def test_an_unknown_question_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        settle.main(["--only", "az"])
    assert "no question z" in capsys.readouterr().err


def test_a_machine_without_a_cuda_runtime_is_told_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda, "_first_module", lambda *names: None)
    with pytest.raises(BackendMissingError, match="pip install cuda-python"):
        cuda.Cuda()


class FakeBinding:
    """Answers as cuda.bindings.runtime does: a status, then results."""

    __name__ = "fake"
    cudaDeviceAttr = int
    status = 0

    def cudaMemGetInfo(self) -> tuple[int, int, int]:
        return self.status, 3, 10

    def cudaGetDeviceCount(self) -> tuple[int, int]:
        return self.status, 1

    def cudaDeviceGetAttribute(self, attribute: int, device: int) -> tuple[int, int]:
        return self.status, {75: 8, 76: 7}[attribute]

    def cudaGetErrorString(self, status: int) -> tuple[int, bytes]:
        return 0, b"out of memory"


def test_a_call_gives_its_results_or_cuda_s_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    binding = FakeBinding()
    monkeypatch.setattr(cuda, "_first_module", lambda *names: binding)
    runtime = cuda.Cuda()
    assert runtime.used_bytes() == 7
    assert runtime.compute_capability() == "8.7"
    binding.status = 2
    with pytest.raises(cuda.CudaError, match="cudaMemGetInfo failed.*error 2: out of memory"):
        runtime.used_bytes()


@pytest.mark.gpu
def test_every_question_is_asked_on_a_gpu(tmp_path: Path) -> None:
    try:
        cuda.Cuda().compute_capability()
    except BackendMissingError as error:
        pytest.skip(str(error))
    assert settle.main(["--json", str(tmp_path / "answers.json")]) == 0
    told = json.loads((tmp_path / "answers.json").read_text())
    assert set(told["answers"]) == set(settle.QUESTIONS)
    assert os.path.getsize(tmp_path / "answers.json")


def test_every_context_computes_in_memory_that_it_is_given() -> None:
    """An engine built with REQUIRE_USER_ALLOCATION takes no context with memory of its own."""
    given: list[Any] = []

    class Strict:
        device_memory_size_v2 = 5000

        def create_execution_context(self, strategy: str) -> Any:
            assert strategy == "user managed"
            return SimpleNamespace(
                set_optimization_profile_async=lambda profile, stream: True,
                set_device_memory=lambda *block: given.append(block),
            )

    class Driver:
        def call(self, name: str, *arguments: Any) -> int:
            return {"cudaMalloc": 4096, "cudaStreamSynchronize": 0}[name]

    engine = cuda.Engine.__new__(cuda.Engine)
    strategies = SimpleNamespace(USER_MANAGED="user managed")
    severity = SimpleNamespace(ERROR=1, INTERNAL_ERROR=0, WARNING=2)
    engine.trt = types.ModuleType("tensorrt")
    vars(engine.trt).update(
        ExecutionContextAllocationStrategy=strategies,
        ILogger=type("ILogger", (), {"Severity": severity}),
    )
    engine.cuda, engine.engine, engine.stream, engine.contexts = Driver(), Strict(), 7, []
    assert [engine.add_context(1), engine.add_context(0, (512, 9000))] == [0, 1]
    assert given == [(4096, 5000), (512, 9000)]


@pytest.mark.parametrize(
    ("version", "target", "not_asked"),
    [
        ("11.2.0", "tensorrt", ""),
        ("10.16.1", "tensorrt10", "bj"),
        ("10.3.0", "jetpack6", "bcdehij"),
        ("8.6.1", None, "abcdefhij"),
    ],
)
def test_a_tensorrt_is_asked_about_its_own_operators(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    target: str | None,
    not_asked: str,
) -> None:
    def load(target: str) -> Any:
        if target == "tensorrt-rtx":
            raise BackendMissingError("target tensorrt-rtx needs the Python package tensorrt_rtx")
        return SimpleNamespace(__version__=version)

    monkeypatch.setattr(settle, "load_tensorrt", load)
    monkeypatch.setattr(settle, "ask", lambda letter, setup, seconds: Answer(YES, ""))
    assert settle.find_target() == target
    answers = settle.ask_all("".join(settle.QUESTIONS), target, tmp_path, 5)
    assert "".join(k for k, answer in answers.items() if answer.status == NOT_RUN) == not_asked
    if target == "tensorrt10":
        assert answers["b"].text == "TRT_Attention came with TensorRT 11"
    lengths = [name for name in BUILDS if not questions.lacks(name, target or "") and "len" in name]
    assert bool(lengths) == (target in ("tensorrt", None))


@needs_opset_24
def test_a_gather_is_enough_for_a_tensorrt_without_our_caches(tmp_path: Path) -> None:
    for letter in "af":
        assert settle.QUESTIONS[letter][1](CpuSetup("jetpack6", tmp_path)).status == YES
    models = [graphs.compaction_model(12), graphs.gather_model(64)]
    assert [model.opset_import[0].version for model in models] == [18, 18]


@needs_opset_24
def test_a_fused_attention_that_errs_or_cannot_be_built_is_told_beside_the_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(questions, "_microseconds", lambda call: call() and 0.0 or 0.0)
    few = {name: questions.ATTENTIONS[name] for name in ("16/2 heads", "tower")}
    monkeypatch.setattr(questions, "ATTENTIONS", few)
    engine = CpuSetup.engine

    def broken(self: CpuSetup, name: str, *, apart: bool = False) -> Any:
        assert apart, "a compiler that crashes must not take the answer with it"
        if name == "fused tower":
            raise PatchsieveError("the process that built it died", found="signal SIGSEGV")
        made = engine(self, name)
        if name == "fused 16-2 heads":
            read = made.read
            monkeypatch.setattr(made, "read", lambda *args: read(*args) * 1.05)
        return made

    monkeypatch.setattr(CpuSetup, "engine", broken)
    answer = questions.fused_attention_is_right(CpuSetup("tensorrt", tmp_path))
    assert answer.status == NO
    told = dict(part.split(": ", 1) for part in answer.text.split("; "))
    assert {name: text.split(",")[0] for name, text in told.items()} == {
        "decomposed 16/2 heads": "right",
        "fused 16/2 heads": "wrong",
        "decomposed tower": "right",
        "fused tower": "wrong",
    }
    assert told["decomposed 16/2 heads"] == "right, L=64 0 us, L=1 0 us"
    assert set(answer.facts["decomposed 16/2 heads"]["errors"]) == {"64", "1", "1 apart"}
    assert "SIGSEGV" in answer.facts["fused tower"]["failed"]


@needs_opset_24
@pytest.mark.parametrize("wrong", ["long", "long_lengths"])
def test_a_long_stage_that_errs_is_answered_no(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    found = {"errors": [1e-4], "engine_bytes": 1, "step_us": 1.0}
    monkeypatch.setattr(
        questions,
        "_decode",
        lambda setup, name, size: found | ({"errors": [1e-4, 0.2]} if name == wrong else {}),
    )
    answer = questions.own_attention_serves_a_stage(CpuSetup("tensorrt", tmp_path))
    assert answer.status == NO


@pytest.mark.parametrize(("bad", "status"), [("float32", YES), ("float16", NO)])
def test_float16_decides_whether_grouped_attention_is_there(
    monkeypatch: pytest.MonkeyPatch, bad: str, status: str
) -> None:
    """In float32 ONNX Runtime's CUDA provider has no kernel for it: that is known."""
    from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel

    def error(runtime: Any, provider: str, dtype: str) -> float:
        if dtype == bad:
            raise NoKernel("no kernel")
        return 1e-4

    monkeypatch.setattr(ort, "get_available_providers", lambda: [onnxruntime_cuda.CUDA])
    monkeypatch.setattr(onnxruntime_cuda, "grouped_attention_error", error)
    monkeypatch.setattr(onnxruntime_cuda, "session_on", lambda *_: None)
    answer = onnxruntime_cuda.cuda_provider_has_our_operators()
    assert answer.status == status
    assert "no kernel" in answer.facts[f"GroupQueryAttention with bias {bad}"]
