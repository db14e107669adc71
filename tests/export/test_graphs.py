"""What the files of a bundle hold: checked, named, dynamic, and every weight stored once."""

from __future__ import annotations

import functools
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, shape_inference

import patchsieve
from patchsieve.contract import files as bundle_files
from patchsieve.contract import manifest, names
from patchsieve.contract.plan import Plan, SitePlan
from patchsieve.export.exporter import export
from patchsieve.export.reuse import reuse
from tests.support import damage
from tests.support.models import save_checkpoint
from tests.support.stages import run_stage

TARGETS = {"cpu": 21, "reference": 24}
INLINE = 64 << 10  # bytes; a larger tensor lies in a weights file
AXES = {
    names.AXIS_IMAGES,
    names.AXIS_ROWS_IN,
    names.AXIS_ROWS,
    names.AXIS_SLOTS,
    names.AXIS_VISUAL,
    names.AXIS_TEXT,
}
ATP = Plan((SitePlan(2, "atp", {"theta_r": 0.5, "theta_s": 0.9}),))


@functools.cache
def tied_bundle() -> Path:
    """Tied embeddings, all three methods, three stages."""
    folder = damage.folder() / "tied"
    checkpoint = save_checkpoint(folder / "checkpoint", "qwen2-tied")
    plan = Plan(
        (
            SitePlan(1, "fastv", {"keep_ratio": 0.75, "rows": "mean"}),
            SitePlan(2, "atp", {"theta_r": 0.5, "theta_s": 0.9, "causal": True}),
            SitePlan(3, "random", {"keep_ratio": 0.25}),
        )
    )
    out = folder / "bundle"
    export(
        str(checkpoint),
        out,
        damage.options(plan=plan, plan_name="all", targets=tuple(TARGETS)),
    )
    return out


BUNDLES = {"plain": damage.bundle, "tied": tied_bundle}


@pytest.fixture(params=list(BUNDLES))
def bundle(request: pytest.FixtureRequest) -> Path:
    """Each of the bundles; not to be changed."""
    return BUNDLES[request.param]()


def files(bundle: Path) -> list[tuple[str, str, Path]]:
    """Target, graph and file."""
    facts = bundle_files.read(bundle)
    return [
        (target, graph, bundle / path)
        for target, graphs in facts.targets.items()
        for graph, path in graphs.items()
    ]


def bare(file: Path) -> onnx.ModelProto:
    """A graph without its weights."""
    return onnx.load(file, load_external_data=False)


def nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """All nodes, those of sub-graphs too."""
    found = []
    for node in graph.node:
        found.append(node)
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                found += nodes(inner)
    return found


def external(tensor: TensorProto) -> dict[str, Any]:
    """Where a tensor lies."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return {
        "location": entries["location"],
        "offset": int(entries["offset"]),
        "length": int(entries["length"]),
    }


def shape_of(value: onnx.ValueInfoProto) -> list[int | str | None]:
    """Lengths and names of axes, None where there is neither."""
    return [
        d.dim_value if d.HasField("dim_value") else d.dim_param or None
        for d in value.type.tensor_type.shape.dim
    ]


def size_of(tensor: TensorProto) -> int:
    """Bytes of a tensor's values."""
    return int(np.prod(tensor.dims)) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


@pytest.mark.slow_rows("tied")
def test_every_file_passes_the_checker_at_its_targets_opset(bundle: Path) -> None:
    seen = 0
    for target, graph, file in files(bundle):
        model = bare(file)
        opsets = {entry.domain: entry.version for entry in model.opset_import}
        assert opsets.pop("") == TARGETS[target], graph
        assert set(opsets) <= ({"com.microsoft"} if target == "cpu" else set())
        onnx.checker.check_model(str(file), full_check=target == "reference")
        seen += 1
    stages, sites = (2, 1) if bundle == damage.bundle() else (4, 3)
    assert seen == 2 * (2 + stages + sites)  # vision and compact besides


def expected_names(facts: manifest.Manifest, graph: str) -> tuple[set[str], set[str]]:
    """Inputs and outputs of a graph by `patchsieve.contract.names`."""
    if graph == names.VISION:
        return {names.PIXEL_VALUES}, {names.IMAGE_FEATURES, names.IMAGE_IDS}
    if graph == names.COMPACT:
        return {names.KEEP}, {names.KEEP_INDICES, names.NUM_KEEP}
    if graph.startswith("decide."):
        # A decision takes what its method reads, and nothing else.
        always = {names.VISUAL_ROWS, names.KEEP, names.BUDGET}
        scored = always | {names.QUERY, names.KEY, names.SLOT}
        reads = {
            "random": always | {names.NOISE},
            "fastv last": scored | {names.LAST_ROW},
            "fastv mean": scored | {names.TEXT_ROWS},
            "atp": scored | {names.TEXT_ROWS, names.PATCH_IDS},
        }
        plan, layer = graph.split(".")[1:]
        site = next(s for s in facts.plans[plan].sites if s.layer == int(layer))
        method = site.method
        if method == "fastv":
            method = f"fastv {site.params.get('rows', 'last')}"
        return reads[method], {names.KEEP_OUT, names.SCORES, names.NUM_WANTED}
    stage = next(s for i, s in enumerate(facts.stages) if names.stage(i) == graph)
    layers = range(stage.first, stage.last)
    caches = {n for i in layers for n in (names.key_cache(i), names.value_cache(i))}
    inputs = {names.HIDDEN, names.KEEP_INDICES, names.POSITION_IDS, names.SLOT, names.LAST_KEY}
    outputs = {name + names.OUT for name in caches}
    if stage.last == facts.text.num_layers:
        return inputs | caches | {names.LOGITS_ROW}, outputs | {names.LOGITS}
    return inputs | caches, outputs | {names.HIDDEN_OUT, names.query(stage.last - 1)}


def test_every_tensor_and_axis_has_its_name_from_one_place(bundle: Path) -> None:
    facts = bundle_files.read(bundle)
    for _, graph, file in files(bundle):
        model = bare(file)
        found = {v.name for v in model.graph.input}, {v.name for v in model.graph.output}
        assert found == expected_names(facts, graph), graph
        for value in (*model.graph.input, *model.graph.output):
            for axis in shape_of(value):
                assert isinstance(axis, int) or axis in AXES, (graph, value.name, axis)
        inner = {axis for v in model.graph.value_info for axis in shape_of(v)}
        assert not {a for a in inner if isinstance(a, str)} - AXES, graph
        listed = facts.graphs[graph]
        for tensors, values in (
            (listed.inputs, model.graph.input),
            (listed.outputs, model.graph.output),
        ):
            assert {t.name: list(t.shape) for t in tensors} == {v.name: shape_of(v) for v in values}


def test_each_layer_output_keeps_the_name_that_verify_asks_for(bundle: Path) -> None:
    facts = bundle_files.read(bundle)
    for target in facts.targets:
        seen = set()
        for index in range(len(facts.stages)):
            model = bare(bundle / facts.targets[target][names.stage(index)])
            seen |= {name for node in model.graph.node for name in node.output}
        ends = {stage.last - 1 for stage in facts.stages[:-1]}  # those are `hidden_out`
        for layer in set(range(facts.text.num_layers)) - ends:
            assert names.layer_output(layer) in seen, (target, layer)


def test_no_graph_transposes_a_weight_or_has_shapes_that_depend_on_data(bundle: Path) -> None:
    for _, graph, file in files(bundle):
        model = bare(file)
        weights = {tensor.name for tensor in model.graph.initializer}
        for node in nodes(model.graph):
            assert node.op_type not in ("NonZero", "Compress", "Unique", "NonMaxSuppression"), graph
            assert node.op_type not in ("Loop", "If", "Scan"), graph
            if node.op_type == "Transpose":
                assert node.input[0] not in weights, (graph, node.input[0])
            if node.op_type == "Gemm":
                turned = any(a.name == "transB" and a.i for a in node.attribute)
                assert not turned or node.input[1].startswith("lm_head"), graph


def test_large_tensors_lie_in_the_weights_files_and_within_them(bundle: Path) -> None:
    graphs = bundle / "graphs"
    for _, graph, file in files(bundle):
        model = bare(file)
        for tensor in model.graph.initializer:
            if tensor.data_location != TensorProto.EXTERNAL:
                assert size_of(tensor) <= INLINE, (graph, tensor.name)
                continue
            place = external(tensor)
            location = Path(place["location"])
            assert location.parts[0] == "weights" and len(location.parts) == 2
            assert place["length"] == size_of(tensor)
            data = graphs / location
            assert place["offset"] + place["length"] <= data.stat().st_size
        for node in nodes(model.graph):
            for attribute in node.attribute:
                assert size_of(attribute.t) <= INLINE if attribute.HasField("t") else True
        assert file.stat().st_size < 4 * INLINE


def stored(bundle: Path) -> dict[str, dict[str, Any]]:
    """Tensors of all weights files by name, with file and absolute offsets."""
    found: dict[str, dict[str, Any]] = {}
    for file in sorted((bundle / "graphs" / "weights").iterdir()):
        content = file.read_bytes()
        start = 8 + struct.unpack("<Q", content[:8])[0]
        end = start
        for name, entry in json.loads(content[8:start]).items():
            assert name not in found, "stored twice"
            a, b = entry["data_offsets"]
            assert start + a == end, "a gap or an overlap"
            end = start + b
            found[name] = {"location": f"weights/{file.name}", "offset": start + a, "length": b - a}
        assert end == len(content)
    return found


def test_each_weight_is_stored_once_and_all_targets_point_to_it(bundle: Path) -> None:
    tensors = stored(bundle)
    facts = bundle_files.read(bundle)
    used: dict[str, dict[str, dict[str, Any]]] = {target: {} for target in facts.targets}
    for target, _, file in files(bundle):
        for tensor in bare(file).graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                used[target][tensor.name] = external(tensor)
    assert used["cpu"] == used["reference"]
    for name, place in used["cpu"].items():
        is_tied = name == "lm_head.weight" and name not in tensors
        assert tensors["embed_tokens.weight" if is_tied else name] == place
    assert set(tensors) - set(used["cpu"]) == {"embed_tokens.weight"}  # gathered by the runtime
    places = {(p["location"], p["offset"], p["length"]) for p in tensors.values()}
    assert len(places) == len(tensors)


def test_the_weights_files_hold_the_parameters_and_nothing_more() -> None:
    from safetensors.numpy import load_file

    bundle = damage.bundle()
    tensors = stored(bundle)
    folder = bundle / "graphs" / "weights"
    total = sum(file.stat().st_size for file in folder.iterdir())
    headers = sum(8 + struct.unpack("<Q", f.read_bytes()[:8])[0] for f in folder.iterdir())
    assert total == sum(t["length"] for t in tensors.values()) + headers
    original = load_file(damage.checkpoint() / "model.safetensors")
    # The tower's last layer and what follows it are not used, and not stored.
    unused = ("vision_model.encoder.layers.2.", "post_layernorm", "encoder.layers.2.")
    wanted = sum(a.nbytes for n, a in original.items() if not any(part in n for part in unused))
    assert sum(t["length"] for t in tensors.values()) == wanted


def test_tied_embeddings_share_the_table() -> None:
    bundle = tied_bundle()
    tensors, facts = stored(bundle), bundle_files.read(bundle)
    assert "lm_head.weight" not in tensors
    last = names.stage(len(facts.stages) - 1)
    for target in facts.targets:
        model = bare(bundle / facts.targets[target][last])
        head = next(t for t in model.graph.initializer if t.name == "lm_head.weight")
        assert external(head) == tensors["embed_tokens.weight"]
    table = facts.embeddings
    assert table.offset == tensors["embed_tokens.weight"]["offset"]
    assert f"graphs/{tensors['embed_tokens.weight']['location']}" == table.file


def decision_inputs(model: onnx.ModelProto, rows: int, visual: int) -> dict[str, np.ndarray]:
    """Inputs of a decision on an image of `visual` tokens among `rows`."""
    rng = np.random.default_rng(0)
    shapes = {value.name: shape_of(value) for value in model.graph.input}
    sizes = {names.AXIS_ROWS: rows, names.AXIS_SLOTS: rows + 5, names.AXIS_VISUAL: visual}
    made: dict[str, np.ndarray] = {
        names.SLOT: np.zeros(1, np.int64),
        names.VISUAL_ROWS: np.arange(4, 4 + visual),
        names.TEXT_ROWS: np.arange(rows - 16, rows),  # scores of text x rows are no map
        names.PATCH_IDS: np.arange(visual),
        names.LAST_ROW: np.array([rows - 1]),
        names.KEEP: np.ones(rows, bool),
        names.BUDGET: np.array([visual]),
    }
    for name in (names.QUERY, names.KEY, names.NOISE):
        if name in shapes:
            shape = [sizes.get(axis, axis) for axis in shapes[name]]
            made[name] = rng.random(shape, np.float32)
    return {name: value for name, value in made.items() if name in shapes}


def test_no_decision_holds_a_map_of_rows_by_rows(bundle: Path) -> None:
    rows, visual = 4099, 16  # primes are seldom a product of other sizes
    for _, graph, file in files(bundle):
        if not graph.startswith("decide."):
            continue
        model = shape_inference.infer_shapes(onnx.load(file), data_prop=True)
        inputs = decision_inputs(model, rows, visual)
        inner = [name for node in model.graph.node for name in node.output if name]
        model.graph.output.extend(
            helper.make_empty_tensor_value_info(n)
            for n in inner
            if n not in {o.name for o in model.graph.output}
        )
        session = ort.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        found = session.run(None, inputs)
        fed = max(value.size for value in inputs.values())
        largest = max(np.asarray(value).size for value in found)
        # Scores of the rows against the visual tokens, at most: far from rows x rows (x heads).
        assert largest <= max(fed, 8 * rows * visual) < rows * rows, (graph, largest)


def test_one_export_runs_any_length_image_count_and_capacity() -> None:
    path = damage.folder() / "long"
    limits = manifest.Limits(max_text_tokens=600, max_new_tokens=64, max_images=4)
    if not path.exists():
        export(
            str(damage.checkpoint()), path, damage.options(limits=limits, plan=ATP, plan_name="atp")
        )
    model = patchsieve.load(path, threads=1)
    counts = set()
    for images in (0, 1, 2, 4):
        for words in (1, 7, 150):
            rng = np.random.default_rng(words)
            photos = [rng.integers(0, 255, (9 + words, 20, 3), dtype=np.uint8)] * images
            result = model.generate(photos, "cat " * words, max_new_tokens=3)
            assert result.visual_tokens == 16 * images
            assert result.prompt_tokens > 16 * images + words
            assert len(result.sites) == images
            counts |= {len(site.kept) for site in result.sites}
            used = [stage["slots_used"] for stage in result.kv_bytes["per_stage"]]
            dropped = sum(16 - len(site.kept) for site in result.sites)
            assert used[0] - used[1] == dropped
    model.close()
    assert max(counts) <= 16 and min(counts) >= 1


@pytest.mark.parametrize("target", list(TARGETS))
def test_a_stage_takes_any_capacity_and_gives_the_same_numbers(target: str) -> None:
    bundle = damage.bundle()
    facts = bundle_files.read(bundle)
    session = ort.InferenceSession(
        str(bundle / facts.targets[target][names.stage(0)]), providers=["CPUExecutionProvider"]
    )
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((1, 9, facts.text.hidden_size), np.float32)
    results = []
    for slots in (9, 10, 64, 1000):
        count = 9
        feeds: dict[str, np.ndarray] = {
            names.HIDDEN: hidden,
            names.KEEP_INDICES: np.arange(count),
            names.POSITION_IDS: np.arange(count),
            names.SLOT: np.zeros(1, np.int64),
            names.LAST_KEY: np.arange(count),
        }
        shape = (1, facts.text.num_kv_heads, slots, facts.text.head_dim)
        for layer in range(facts.stages[0].first, facts.stages[0].last):
            feeds[names.key_cache(layer)] = np.zeros(shape, np.float32)
            feeds[names.value_cache(layer)] = np.zeros(shape, np.float32)
        out = dict(
            zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True)
        )
        assert out[names.key_cache(0) + names.OUT].shape[2] in (slots, count)
        results.append(out[names.HIDDEN_OUT])
    for other in results[1:]:
        # Sums over more (masked) slots come in another order in float32.
        np.testing.assert_allclose(other, results[0], rtol=1e-4, atol=1e-5)


def test_fewer_rows_go_on_than_came_in() -> None:
    bundle = damage.bundle()
    facts = bundle_files.read(bundle)
    model = patchsieve.load(bundle, threads=1)
    outs = set()
    for ratio_rows in (1, 3, 8):
        cache = model.pipeline.new_cache("none")
        keep = np.arange(ratio_rows) * 2
        hidden = np.ones((1, 20, facts.text.hidden_size), np.float32)
        out = run_stage(model, 0, hidden, keep, keep, cache.stages[0])
        outs.add(model.backend.to_numpy(out[names.HIDDEN_OUT]).shape[1])
    assert outs == {1, 3, 8}
    model.close()


def test_a_reused_bundle_gets_the_decision_that_an_export_writes(tmp_path: Path) -> None:
    bundle = damage.copy(damage.bundle(), tmp_path / "bundle")
    reuse(bundle, damage.FASTV, "again")
    facts = bundle_files.read(bundle)
    for target, graphs in facts.targets.items():
        first, again = (
            onnx.load(bundle / graphs[names.decide(plan, 2)]).graph for plan in ("fastv", "again")
        )
        assert first.input == again.input and first.output == again.output, target
        assert first.node == again.node and first.initializer == again.initializer, target
