"""The comparison with Hugging Face can fail: each of these mistakes changes the answer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import pytest

from patchsieve.contract import files, names
from patchsieve.export.lowering import cpu
from patchsieve.runtime.model import Model
from patchsieve.runtime.rows import Rows
from tests.support.tiny_bundles import TinyBundle, largest_error, pictures, recorded_logits
from tests.support.tolerances import LOGITS_FLOAT32

ROWS = ("llama-gqa-tied-linear-rope", "qwen2")
SITES = [
    {"layer": 1, "method": "fastv", "params": {"keep_ratio": 0.75, "rows": "mean"}},
    {"layer": 3, "method": "fastv", "params": {"keep_ratio": 0.25}},
]
COUNT = 32


def answer(model: Model) -> list[int]:
    """Tokens about two images."""
    result = model.generate(pictures(2), "What is on the table?", max_new_tokens=COUNT)
    return result.token_ids


def fresh(bundle: TinyBundle) -> Model:
    """A model of its own, to be broken."""
    facts = bundle.model(SITES).facts
    model = Model(bundle.path, threads=1, check="size")
    model.facts = facts
    return model


def every_stage(model: Model, change: Callable[[int, dict], None]) -> None:
    """Change the inputs of each stage just before it runs; the stage's number comes along."""
    run = model.backend.run_stage

    def broken(stage, inputs, cache):
        inputs = dict(inputs)
        change(stage, inputs)
        return run(stage, inputs, cache)

    model.backend.run_stage = broken  # type: ignore[method-assign]


@pytest.fixture(params=ROWS)
def bundle(request, tiny) -> TinyBundle:
    return tiny(request.param)


def test_nothing_broken_answers_alike(bundle) -> None:
    assert answer(fresh(bundle)) == answer(bundle.model(SITES))


def test_survivors_renumbered_without_gaps_answer_otherwise(bundle, monkeypatch) -> None:
    right = answer(bundle.model(SITES))
    take = Rows.take

    def compact(rows: Rows, indices: np.ndarray) -> Rows:
        kept = take(rows, indices)
        first = rows.position_ids[0]
        return replace(kept, position_ids=first + np.arange(len(kept)))

    monkeypatch.setattr(Rows, "take", compact)
    assert answer(fresh(bundle)) != right


def test_new_tokens_numbered_by_their_slot_answer_otherwise(bundle) -> None:
    right, model = answer(bundle.model(SITES)), fresh(bundle)

    def by_slot(stage: int, inputs: dict) -> None:
        if len(inputs[names.POSITION_IDS]) == 1:
            inputs[names.POSITION_IDS] = inputs[names.SLOT]

    every_stage(model, by_slot)
    assert answer(model) != right


def test_one_other_survivor_answers_otherwise(bundle) -> None:
    right, model = answer(bundle.model(SITES)), fresh(bundle)
    run = model.backend.run

    def swapped(graph, inputs):
        out = run(graph, inputs)
        if graph.startswith("decide"):
            keep = model.backend.to_numpy(out[names.KEEP_OUT]).copy()
            visual = inputs[names.VISUAL_ROWS]
            order = np.argsort(model.backend.to_numpy(out[names.SCORES]))
            ranked = visual[order]
            best, worst = ranked[keep[ranked]][-1], ranked[~keep[ranked]][0]
            keep[best], keep[worst] = False, True
            out[names.KEEP_OUT] = keep
        return out

    model.backend.run = swapped  # type: ignore[method-assign]
    assert answer(model) != right


def test_mask_shifted_by_one_answers_otherwise(bundle) -> None:
    right, model = answer(bundle.model(SITES)), fresh(bundle)

    def shift(stage: int, inputs: dict) -> None:
        inputs[names.LAST_KEY] = inputs[names.LAST_KEY] - 2  # a row always sees itself

    every_stage(model, shift)
    assert answer(model) != right


@pytest.mark.parametrize("stage_number", (0, 1, 2))
@pytest.mark.parametrize("offset", (-1, 1))
def test_new_rows_in_the_wrong_slot_change_the_logits(
    bundle, offset: int, stage_number: int
) -> None:
    """In one stage only: too early writes over a row, too late leaves a gap of zeros."""
    right, model = fresh(bundle), fresh(bundle)

    def wrong(stage: int, inputs: dict) -> None:
        if len(inputs[names.POSITION_IDS]) == 1 and stage == stage_number:
            inputs[names.SLOT] = inputs[names.SLOT] + offset
            inputs[names.LAST_KEY] = inputs[names.LAST_KEY] + offset

    every_stage(model, wrong)
    seen = [recorded_logits(one) for one in (right, model)]
    for one in (right, model):
        answer(one)
    assert largest_error(*seen) > 100 * LOGITS_FLOAT32


def test_decision_that_reads_the_wrong_slot_keeps_others(bundle) -> None:
    right, model = bundle.model(SITES), fresh(bundle)
    run = model.backend.run

    def late(graph, inputs):
        if names.SLOT in inputs:
            inputs = {**inputs, names.SLOT: inputs[names.SLOT] + 1}
        return run(graph, inputs)

    model.backend.run = late  # type: ignore[method-assign]
    question, image = "What is on the table?", pictures(2)[1:]
    found = model.generate(image, question, max_new_tokens=1)
    expected = right.generate(image, question, max_new_tokens=1)
    assert [site.kept for site in found.sites] != [site.kept for site in expected.sites]


def edited(bundle: TinyBundle, folder, edit: Callable[[onnx.ModelProto], int]) -> Model:
    """A copy of the bundle whose stage graphs went through `edit`, which returns its changes."""
    bundle.model(SITES)  # so that the copy holds the plan
    shutil.copytree(bundle.path, folder / "bundle")
    changes = 0
    for path in (folder / "bundle" / "graphs").glob("cpu.stage_*.onnx"):
        graph = onnx.load(path, load_external_data=False)
        changes += edit(graph)
        path.write_bytes(graph.SerializeToString())
    assert changes
    # Sizes and hashes would give the edit away, as they should.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "check_files", lambda *args, **options: None)
        model = Model(folder / "bundle", threads=1)
    model.facts = bundle.model(SITES).facts
    return model


def test_attention_without_its_mask_answers_otherwise(tiny, tmp_path) -> None:
    """The operator is causal by itself here; the mask hides what lies behind `last_key`."""
    bundle = tiny(ROWS[0])

    def drop_bias(graph: onnx.ModelProto) -> int:
        nodes = [n for n in graph.graph.node if n.op_type == "GroupQueryAttention"]
        for node in nodes:
            node.input[10] = ""
        return len(nodes)

    right, model = fresh(bundle), edited(bundle, tmp_path, drop_bias)

    def hide(stage: int, inputs: dict) -> None:  # what a side row will ask for
        inputs[names.LAST_KEY] = np.minimum(inputs[names.LAST_KEY], 20)

    every_stage(right, hide)
    every_stage(model, hide)
    assert answer(model) != answer(right)


def test_rotary_without_its_scaling_answers_otherwise(tiny, tmp_path) -> None:
    bundle = tiny(ROWS[0])

    def unscaled(graph: onnx.ModelProto) -> int:
        changes = 0
        for tensor in graph.graph.initializer:
            if tensor.name == "inv_freq":
                values = onnx.numpy_helper.to_array(tensor) * 4.0  # LINEAR_ROPE's factor
                tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
                changes += 1
        return changes

    model = edited(bundle, tmp_path, unscaled)
    assert answer(model) != answer(bundle.model(SITES))


def test_cpu_lowering_gives_the_mask_to_every_attention(tiny) -> None:
    for path in (tiny(ROWS[0]).path / "graphs").glob("cpu.stage_*.onnx"):
        graph = onnx.load(path, load_external_data=False).graph
        nodes = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
        assert nodes and all(node.input[10] for node in nodes)
        assert {node.domain for node in nodes} == {cpu.MICROSOFT}
