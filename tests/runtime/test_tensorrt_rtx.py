"""TensorRT-RTX compiles our stage and means by it what we mean.

Facts that these tests hold fast (TensorRT-RTX 1.7.1.116, no GPU):

- `Attention` takes H=4 query heads on G=2 key heads as they are; the parsed layer ATTENTION_INPUT
  has query, key, value as inputs 0-2, the mask as input 3, a key length as input 6. Its Python
  object is a plain ILayer, so that causality cannot be read back.
- `TRT_decomposable=1` is needed for float32 (no fused kernel) and changes nothing in fp16.
- ONNX's scale is split: the parser multiplies query and the whole cached key by its root, also
  where scale is 1; `TRT_Attention` has no such products.
- `keep_indices`, `slot` and `last_key` are int64. TensorScatter casts `slot` to int32 by itself and
  becomes KV_CACHE_UPDATE; its result must be a network output, its cache a network input.
- An int32 `slot` fails where it meets the int64 Range of the mask: one integer type throughout.
- An engine carries 1.7 MB besides the weights for each profile (2.0 MB in float32).
- `TRT_Attention` takes a key length together with a mask when `causal_kind` is "none", not beside a
  causal kind.
- `Attention` with `nonpad_kv_seqlen` parses, and the length is gone.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from benchmarks.settle import reference
from benchmarks.settle.graphs import (
    TINY,
    AttentionSize,
    Form,
    StageSize,
    compaction_model,
    lengths_attention_model,
    save_stage,
    stage_model,
    stage_profiles,
    stage_weights,
)
from patchsieve.contract.errors import BackendMissingError, BundleError, ShapeError
from patchsieve.runtime.building.compile import build_engine
from patchsieve.runtime.trt import library as ours
from patchsieve.runtime.trt.engines import Options
from tests.support.networks import parse_network

RTX = "tensorrt-rtx"
# Relative to the largest value: float32 sums in another order; fp16 rounds after every operator.
TOLERANCE = {"float32": 2e-6, "float16": 4e-3}

needs_rtx = pytest.mark.tensorrt


@pytest.fixture(autouse=True)
def _rtx(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("tensorrt"):
        pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")


def sized(dtype: str, size: StageSize = TINY) -> StageSize:
    return dataclasses.replace(size, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_stage_graph_means_what_numpy_says(dtype: str) -> None:
    runtime = pytest.importorskip("onnxruntime")
    if tuple(map(int, runtime.__version__.split(".")[:2])) < (1, 24):
        pytest.skip("this ONNX Runtime refuses opset 24")
    size = sized(dtype)
    model = stage_model(size, Form(decomposable=False))
    onnx.checker.check_model(model, full_check=True)
    session = runtime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    weights, caches = stage_weights(size), reference.empty_caches(size)
    last_key = np.arange(18, dtype=np.int64)
    last_key[-1] = 9  # a side row: sees slots 0..9 and itself
    calls = [dict(rows=18, entering=24, slot=0, last_key=last_key)]
    calls += [dict(rows=1, entering=1, slot=slot) for slot in (17, 18, 19)]
    for seed, call in enumerate(calls):
        feed = reference.make_feed(size, seed=seed, **call)
        expected, after = reference.stage(size, weights, feed, caches)
        names = ["hidden_out", *size.cache_names("new_")]
        found = session.run(names, {**feed.inputs(), **caches})
        caches = dict(zip(size.cache_names(), found[1:], strict=True))
        assert reference.relative_error(found[0], expected) < TOLERANCE[dtype]
        for name, cache in caches.items():
            assert reference.relative_error(cache, after[name]) < TOLERANCE[dtype]


@needs_rtx
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_parsed_stage_updates_its_caches_in_place_under_a_mask(
    dtype: str, tmp_path: Path
) -> None:
    size = sized(dtype)
    path, _ = save_stage(size, tmp_path)
    network = parse_network(path)
    assert [update.cache for update in network.cache_updates] == size.cache_names()
    assert [update.result for update in network.cache_updates] == size.cache_names("new_")
    outputs = {tensor.name for tensor in network.outputs}
    assert outputs == {"hidden_out", *size.cache_names("new_")}
    assert len(network.attentions) == size.layers
    assert {attention.mask for attention in network.attentions} == {"mask"}
    assert not any(attention.key_length for attention in network.attentions)
    assert [a.value for a in network.attentions] == ["new_cache_value.0", "new_cache_value.1"]
    assert network.count("ROTARY_EMBEDDING") == 2 * size.layers
    shapes = {tensor.name: (tensor.dtype, tensor.shape) for tensor in network.inputs}
    assert shapes["keep_indices"] == ("INT64", (-1,))
    assert shapes["slot"] == ("INT64", (1,))
    assert shapes["cache_key.0"][1] == size.cache_shape


@needs_rtx
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_one_engine_holds_prefill_and_decode_and_its_weights_once(
    dtype: str, tmp_path: Path
) -> None:
    size = StageSize(dtype=dtype)
    path, weight_bytes = save_stage(size, tmp_path)
    report = build_engine(path, tmp_path / "e.engine", stage_profiles(size), target=RTX)
    assert report.profiles == 2
    assert report.engine_bytes == (tmp_path / "e.engine").stat().st_size
    assert weight_bytes < report.engine_bytes <= 1.05 * weight_bytes + 4e6
    assert report.warnings == ()


@needs_rtx
def test_a_decode_profile_of_exactly_one_row_stores_fp16_weights_twice(tmp_path: Path) -> None:
    size = StageSize()
    path, weight_bytes = save_stage(size, tmp_path)
    profiles = stage_profiles(size, exact_decode=True)
    report = build_engine(path, tmp_path / "e.engine", profiles, target=RTX)
    assert report.engine_bytes > 2 * weight_bytes, "mended: profiles may be 1/1/1 again"


@needs_rtx
def test_a_list_of_gpus_shares_the_weights(tmp_path: Path) -> None:
    size = StageSize()
    path, weight_bytes = save_stage(size, tmp_path)
    report = build_engine(
        path,
        tmp_path / "e.engine",
        stage_profiles(size),
        target=RTX,
        options=Options(compute_capabilities=("7.5", "8.6", "8.9", "12.0")),
    )
    assert report.engine_bytes <= 1.05 * weight_bytes + 4e6


@needs_rtx
def test_float32_attention_needs_the_decomposable_attribute(tmp_path: Path) -> None:
    size = sized("float32")
    path, _ = save_stage(size, tmp_path, form=Form(decomposable=False))
    with pytest.raises(BundleError, match="decomposable"):
        build_engine(path, tmp_path / "e.engine", stage_profiles(size), target=RTX)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["stage.bin", "stage.onnx"]


@needs_rtx
def test_mixed_integers_are_refused_with_node_and_operator(tmp_path: Path) -> None:
    path, _ = save_stage(TINY, tmp_path, form=Form(index_dtype="int32"))
    with pytest.raises(BundleError, match=r"node 'own_slot', operator Add") as raised:
        parse_network(path)
    assert "\n" not in str(raised.value)


@needs_rtx
def test_nonpad_lengths_of_attention_are_lost_without_a_word(tmp_path: Path) -> None:
    shapes = {"q": [1, 4, "L", 64], "k": [1, 2, 32, 64], "v": [1, 2, 32, 64]}
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT16, s) for n, s in shapes.items()]
    inputs.append(helper.make_tensor_value_info("lengths", TensorProto.INT64, [1]))
    names = ["q", "k", "v", "", "", "", "lengths"]
    node = helper.make_node("Attention", names, ["out"], is_causal=1)
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT16, shapes["q"])
    graph = helper.make_graph([node], "lost", inputs, [out])
    opset = [helper.make_opsetid("", 24)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "lost.onnx")
    (attention,) = parse_network(tmp_path / "lost.onnx").attentions
    assert attention.key_length == "", "mended: nonpad_kv_seqlen may be used"


@needs_rtx
@pytest.mark.parametrize("has_mask", [False, True])
def test_tensorrts_own_attention_keeps_the_key_length(has_mask: bool, tmp_path: Path) -> None:
    size = AttentionSize()
    path = tmp_path / "attention.onnx"
    onnx.save(lengths_attention_model(size, has_mask=has_mask), path)
    (attention,) = parse_network(path).attentions
    assert attention.key_length
    assert attention.has_mask == has_mask
    profiles = [size.profile(has_mask=has_mask)]
    assert build_engine(path, tmp_path / "e", profiles, target=RTX).engine_bytes


@needs_rtx
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_stage_on_tensorrts_own_attention_has_mask_and_length(dtype: str, tmp_path: Path) -> None:
    size = StageSize(dtype=dtype)
    path, weight_bytes = save_stage(size, tmp_path, form=Form(has_lengths=True))
    for attention in parse_network(path).attentions:
        assert attention.mask == "mask"
        assert attention.key_length
        assert attention.key.startswith("new_cache_key")  # the cache is not multiplied on the way
    report = build_engine(path, tmp_path / "e.engine", stage_profiles(size), target=RTX)
    assert report.engine_bytes <= 1.05 * weight_bytes + 4e6


@needs_rtx
def test_a_compaction_without_nonzero_builds(tmp_path: Path) -> None:
    onnx.save(compaction_model(12), tmp_path / "compact.onnx")
    assert build_engine(tmp_path / "compact.onnx", tmp_path / "e", [], target=RTX).engine_bytes


def test_an_absent_library_is_named_with_its_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt_rtx", None)
    with pytest.raises(BackendMissingError, match=r'pip install "tensorrt-rtx>=1\.7"'):
        ours.load_tensorrt(RTX)
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    with pytest.raises(BackendMissingError, match=r"extra-index-url https://pypi\.nvidia\.com"):
        ours.load_tensorrt("tensorrt")
    with pytest.raises(BackendMissingError, match=r'pip install "tensorrt>=10\.15,<11"'):
        ours.load_tensorrt("tensorrt10")
    with pytest.raises(BackendMissingError, match="system-site-packages"):
        ours.load_tensorrt("jetpack6")


@needs_rtx
def test_what_is_not_a_whole_graph_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not there"):
        parse_network(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_bytes(b"not a graph " * 9)
    with pytest.raises(BundleError, match="Failed to parse the ONNX model|holds no graph"):
        parse_network(tmp_path / "text.onnx")
    path, _ = save_stage(TINY, tmp_path)
    (tmp_path / "alone").mkdir()
    shutil.copy(path, tmp_path / "alone")
    with pytest.raises(BundleError, match=r"stage\.bin.*keep the weights beside the graph"):
        parse_network(tmp_path / "alone" / "stage.onnx")


@needs_rtx
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nonsense": ((1,), (1,), (1,))}, "names inputs that the graph lacks"),
        ({"last_key": ((4,), (2,), (8,))}, "does not fit last_key"),
        ({"hidden": ((1, 1, 8), (1, 1, 8), (1, 1, 8))}, "does not fit hidden"),
        ({"cos": None}, "gives no shapes for cos"),
    ],
)
def test_a_profile_that_does_not_fit_is_refused(change: dict, message: str, tmp_path: Path) -> None:
    path, _ = save_stage(TINY, tmp_path)
    profile = {**stage_profiles(TINY)[0], **change}
    profile = {name: shapes for name, shapes in profile.items() if shapes}
    with pytest.raises(ShapeError, match=message):
        build_engine(path, tmp_path / "e.engine", [profile], target=RTX)


@needs_rtx
def test_an_unknown_gpu_and_a_missing_folder_are_refused(tmp_path: Path) -> None:
    path, _ = save_stage(TINY, tmp_path)
    with pytest.raises(BundleError, match=r"cannot compile for a list with '9\.0'"):
        build_engine(
            path,
            tmp_path / "e",
            stage_profiles(TINY),
            target=RTX,
            options=Options(compute_capabilities=("9.0",)),
        )
    with pytest.raises(BundleError, match="has no folder"):
        build_engine(path, tmp_path / "x" / "e", stage_profiles(TINY), target=RTX)


@needs_rtx
def test_a_failed_build_leaves_the_older_engine(tmp_path: Path) -> None:
    size = sized("float32")
    path, _ = save_stage(size, tmp_path, form=Form(decomposable=False))
    (tmp_path / "e.engine").write_bytes(b"older")
    with pytest.raises(BundleError):
        build_engine(path, tmp_path / "e.engine", stage_profiles(size), target=RTX)
    assert (tmp_path / "e.engine").read_bytes() == b"older"
    assert not list(tmp_path.glob(".*.part"))


@needs_rtx
def test_progress_names_phases_and_ends_each(tmp_path: Path) -> None:
    path, _ = save_stage(TINY, tmp_path)
    seen: list[tuple[str, int, int]] = []
    build_engine(
        path,
        tmp_path / "e",
        stage_profiles(TINY),
        target=RTX,
        options=Options(workspace_bytes=1 << 28),
        progress=lambda *step: seen.append(step),
    )
    assert seen[0][1] == 0
    assert seen[-1][1] == seen[-1][2]
    assert all(step <= steps for _, step, steps in seen)
