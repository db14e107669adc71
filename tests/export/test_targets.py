"""Targets with caches of their own form answer as the reference does, on shared weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import patchsieve
from patchsieve.contract import files, names, targets, weights
from patchsieve.contract.errors import BackendMissingError, PatchsieveError
from patchsieve.contract.manifest import Limits
from patchsieve.contract.plan import NO_PRUNING, Plan, SitePlan
from patchsieve.export.exporter import ExportOptions, export
from patchsieve.export.reuse import reuse
from patchsieve.runtime.model import Model
from patchsieve.runtime.ort.backend import OrtBackend
from patchsieve.verify.recorder import Recorder
from tests.support.bundles import command, command_json
from tests.support.models import save_checkpoint
from tests.support.stages import run_stage
from tests.support.tiny_bundles import largest_error, pictures, recorded_logits
from tests.support.tolerances import LOWERED_FLOAT32

pytest_plugins = ["tests.support.target_bundles"]

TARGETS = ("cpu", "cuda", "jetpack6")
OF_ROWS = ("cuda", "jetpack6")
COUNT = 64
QUESTION = "What is on the table?"
PLANS = {
    NO_PRUNING: Plan(),
    "fastv": Plan(
        (
            SitePlan(1, "fastv", {"keep_ratio": 0.75, "rows": "mean"}),
            SitePlan(2, "fastv", {"keep_ratio": 0.25}),
        )
    ),
    "tome": Plan(tuple(SitePlan(at, "tome", {"num_keep": n}) for at, n in ((1, 9), (2, 5)))),
    "atp": Plan(tuple(SitePlan(at, "atp", {"theta_r": 0.4, "theta_s": 0.9}) for at in (1, 2))),
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers with grouped heads and biases, cut at each, for five images."""
    folder = tmp_path_factory.mktemp("targets")
    checkpoint = save_checkpoint(folder / "checkpoint", "qwen2", layers=3)
    options = ExportOptions(cuts=(1, 2), targets=("reference", *TARGETS), limits=Limits(200, 80, 5))
    export(str(checkpoint), folder / "bundle", options)
    for name, plan in PLANS.items():
        if plan.sites:
            reuse(folder / "bundle", plan, name)
    return folder / "bundle"


@pytest.fixture(scope="module")
def load(bundle: Path) -> Callable[[str], Model]:
    """The bundle as a target, in ONNX Runtime on the CPU whatever the target is for."""
    made: dict[str, Model] = {}

    def model(target: str) -> Model:
        if target not in made:
            made[target] = Model(bundle, target=target, check="size", backend=on_the_cpu)
        return made[target]

    return model


def on_the_cpu(bundle: Any) -> OrtBackend:
    return OrtBackend(bundle, threads=1, device="cpu")


@pytest.fixture(scope="module")
def answers(load: Callable[[str], Model]) -> Callable[..., Any]:
    """Tokens, survivors and logits of one answer, kept for the tests to come."""
    made: dict[Any, Any] = {}

    def answer(target: str, plan: str, images: int) -> Any:
        if (target, plan, images) not in made:
            model = load(target)
            logits = recorded_logits(model)
            result = model.generate(
                pictures(images), QUESTION, max_new_tokens=COUNT, plan=plan, ignore_eos=True
            )
            sites = [(site.layer, site.image, site.kept) for site in result.sites]
            made[target, plan, images] = (result.token_ids, sites, logits)
        return made[target, plan, images]

    return answer


@pytest.mark.parametrize("images", (1, 2, 5))
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("target", TARGETS)
def test_a_target_gives_the_tokens_and_survivors_of_the_reference(
    answers: Callable[..., Any], target: str, plan: str, images: int
) -> None:
    tokens, sites, logits = answers(target, plan, images)
    expected, survivors, others = answers("reference", plan, images)
    assert tokens == expected
    assert len(tokens) == COUNT
    assert sites == survivors
    assert len(sites) == images * len(PLANS[plan].sites)
    assert not sites or any(len(kept) < 16 for _, _, kept in sites)
    scale = max(float(np.abs(row).max()) for row in others)
    error = largest_error(logits, others) / scale
    print(f"largest error of a logit: {error:.1e} of the largest")
    assert error < LOWERED_FLOAT32


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("target", TARGETS)
def test_later_turns_are_those_of_the_reference(
    load: Callable[[str], Model], target: str, plan: str
) -> None:
    turns = [(QUESTION, pictures(1)), ("And in these?", pictures(3)[1:]), ("Explain why.", [])]
    found = []
    for each in ("reference", target):
        chat = load(each).chat(plan=plan)
        results = [chat.ask(text, shown, max_new_tokens=12) for text, shown in turns]
        found.append([(r.token_ids, [(s.image, s.kept) for s in r.sites]) for r in results])
        found[-1].append([stage.length for stage in chat.cache.stages])
        chat.close()
    assert found[0] == found[1]


@pytest.mark.parametrize("target", TARGETS)
def test_every_graph_gives_what_the_reference_gives(
    bundle: Path, load: Callable[[str], Model], target: str
) -> None:
    """Features, rows, queries, keys, values, scores and logits of one prefill of three stages."""
    seen = []
    for each in ("reference", target):
        recorder = Recorder(on_the_cpu(load(each).bundle))
        model = Model(bundle, target=each, check="size", backend=lambda _, r=recorder: r)
        model.generate(pictures(2), QUESTION, max_new_tokens=1, plan="atp")
        seen.append(recorder.values)
        model.close()
    expected, found = seen
    assert set(found) == set(expected)
    assert {names.LOGITS, names.key_cache(2), names.value_cache(0), names.query(1)} <= set(found)
    for name, values in expected.items():
        assert found[name].shape == values.shape, name
        error = np.abs(found[name].astype(np.float64) - values).max(initial=0.0)
        assert error <= LOWERED_FLOAT32 * max(1.0, float(np.abs(values).max(initial=0.0))), name


@pytest.mark.parametrize("target", OF_ROWS)
def test_new_rows_are_written_behind_the_past_and_nowhere_else(
    load: Callable[[str], Model], target: str
) -> None:
    model = load(target)
    cache = model.pipeline.new_cache(NO_PRUNING)
    stage, width = cache.stages[1], model.facts.text.hidden_size
    rng = np.random.default_rng(0)
    before: dict[str, np.ndarray] = {}
    for count in (5, 1, 3):
        hidden = rng.standard_normal((1, count, width), np.float32)
        rows = np.arange(count)
        addresses = {name: value.data_ptr() for name, value in stage.buffers.values.items()}
        run_stage(model, 1, hidden, rows, stage.length + rows, stage)
        for name, value in stage.buffers.values.items():
            held = value.numpy()
            assert value.data_ptr() == addresses[name]
            if name in before:
                past = stage.length - count
                assert np.array_equal(held[:, :past], before[name][:, :past])
            assert np.abs(held[:, : stage.length]).sum(axis=-1).all()
            assert not held[:, stage.length :].any()
            before[name] = held.copy()
    assert stage.length == 9


@pytest.mark.parametrize("target", OF_ROWS)
def test_a_row_sees_what_the_mask_says_and_itself(
    load: Callable[[str], Model], target: str
) -> None:
    """A side row that sees the first rows only: its keys move nobody, later rows do not move it."""
    outputs = []
    for each in ("reference", target):
        model = load(each)
        cache = model.pipeline.new_cache(NO_PRUNING).stages[0]
        rng = np.random.default_rng(1)
        hidden = rng.standard_normal((1, 9, model.facts.text.hidden_size), np.float32)
        inputs = {
            names.HIDDEN: hidden,
            names.KEEP_INDICES: np.array([0, 1, 2, 4, 5, 8]),
            names.POSITION_IDS: np.array([0, 1, 2, 4, 5, 8]),
            names.SLOT: np.array([0]),
            names.LAST_KEY: np.array([0, 1, 2, 3, 2, 1]),
        }
        out = model.backend.run_stage(0, inputs, cache)
        outputs.append(model.backend.to_numpy(out[names.HIDDEN_OUT]))
    np.testing.assert_allclose(*outputs, rtol=LOWERED_FLOAT32, atol=LOWERED_FLOAT32)


@pytest.mark.parametrize("target", OF_ROWS)
def test_a_decision_takes_a_cache_as_the_rows_present(bundle: Path, target: str) -> None:
    facts = files.read(bundle)
    assert (facts.cache_forms[target], facts.cache_forms["cpu"]) == (names.NEW_ROWS, names.IN_PLACE)
    width = facts.text.num_kv_heads * facts.text.head_dim
    key = facts.signature(target, "decide.atp.2").input(names.KEY)
    assert key is not None and key.shape == (1, names.AXIS_PRESENT, width)
    stage = facts.signature(target, "stage_2")
    shapes = {tensor.name: tensor.shape for tensor in (*stage.inputs, *stage.outputs)}
    assert shapes[names.key_cache(2)] == (1, names.AXIS_PAST, width)
    assert shapes[names.value_cache(2) + names.NEW] == (1, names.AXIS_ROWS, width)
    assert set(facts.target_graphs) == set(OF_ROWS)
    assert names.VISION not in facts.target_graphs[target]


# What a bundle says of its targets.


@pytest.fixture(scope="module")
def everything(
    small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A bundle for every target, and what export said of it."""
    path = tmp_path_factory.mktemp("everything") / "bundle"
    targets = ("--targets", "all", "--quiet")
    code, said = command_json("export", small_checkpoint, "-o", path, *targets)
    assert code == 0
    return path, said


def test_weights_are_stored_once_however_many_targets_there_are(
    everything: tuple[Path, Any], small_checkpoint: Path, tmp_path: Path
) -> None:
    export(str(small_checkpoint), tmp_path / "one", ExportOptions())
    stored = []
    for path in (everything[0], tmp_path / "one"):
        facts = files.read(path)
        stored.append({k: v for k, v in facts.files.items() if k.startswith(weights.FOLDER)})
    assert set(files.read(everything[0]).targets) == set(targets.TARGETS)
    assert stored[0] == stored[1]
    assert sum(file.size for file in stored[0].values()) > 100_000


def test_the_manifest_tells_what_each_target_needs(everything: tuple[Path, Any]) -> None:
    path, _ = everything
    facts = files.read(path)
    told = {target: (n.library, n.versions.split(",")[0]) for target, n in facts.needs.items()}
    assert told == {
        "cpu": ("onnxruntime", ">=1.23"),
        "cuda": ("onnxruntime-gpu", ">=1.23"),
        "jetpack6": ("tensorrt", ">=10.3"),
        "reference": ("onnxruntime", ">=1.24"),
        "tensorrt": ("tensorrt", ">=11"),
        "tensorrt10": ("tensorrt", ">=10.15"),
        "tensorrt-rtx": ("tensorrt-rtx", ">=1.7"),
    }
    for target, graphs in facts.targets.items():
        for graph in graphs.values():
            model = onnx.load(path / graph, load_external_data=False)
            opsets = {entry.domain: entry.version for entry in model.opset_import}
            assert opsets[""] == facts.needs[target].opset, graph
    code, said = command_json("inspect", path)
    assert code == 0
    assert said["targets"]["jetpack6"]["needs"]["versions"] == ">=10.3,<11"
    assert said["targets"]["jetpack6"]["caches"] == names.NEW_ROWS
    _, out, _ = command("inspect", path)
    assert "jetpack6 needs tensorrt >=10.3,<11 (JetPack 6" in out


def test_export_tells_time_size_and_needs_of_every_target(everything: tuple[Any, Any]) -> None:
    _, said = everything
    for key in ("graph_bytes", "target_seconds", "needs"):
        assert set(said[key]) == set(targets.TARGETS)
        assert all(said[key].values())
    assert sum(said["target_seconds"].values()) < said["seconds"]


# Refusals.


def test_cuda_without_its_provider_is_refused_with_what_to_install(bundle: Path) -> None:
    with pytest.raises(BackendMissingError) as caught:
        patchsieve.load(bundle, target="cuda", check="size")
    assert "CPUExecutionProvider" in str(caught.value)
    assert targets.TARGETS["cuda"].install in str(caught.value)


def test_a_session_that_fell_back_to_the_cpu_is_refused(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the package is there and CUDA is not: ONNX Runtime goes on with a log line."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.warns(UserWarning), pytest.raises(BackendMissingError, match="could not start"):
        patchsieve.load(bundle, target="cuda", check="size")


def test_jetpack6_is_not_run_in_onnxruntime_unasked(bundle: Path) -> None:
    with pytest.raises(PatchsieveError):
        patchsieve.load(bundle, target="jetpack6", check="size")
