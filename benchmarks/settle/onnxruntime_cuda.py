"""Question (g): what ONNX Runtime's CUDA provider has of the operators that our graphs use."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from benchmarks.settle import reference as ref
from benchmarks.settle.graphs import NEVER
from benchmarks.settle.questions import NO, NOT_RUN, TOLERANCE, YES, Answer

HEADS, KV_HEADS, HEAD_DIM, SLOTS = 4, 2, 64, 32
CUDA = "CUDAExecutionProvider"


def grouped_attention_model(dtype: str) -> onnx.ModelProto:
    """Write GroupQueryAttention on a buffer of S slots, with a bias [1, 1, L, total]."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    cache = (kind, [1, KV_HEADS, SLOTS, HEAD_DIM])
    shapes = {
        "query": (kind, [1, "L", HEADS * HEAD_DIM]),
        "key": (kind, [1, "L", KV_HEADS * HEAD_DIM]),
        "value": (kind, [1, "L", KV_HEADS * HEAD_DIM]),
        "past_key": cache,
        "past_value": cache,
        "seqlens_k": (TensorProto.INT32, [1]),
        "total": (TensorProto.INT32, []),
        "bias": (kind, [1, 1, "L", "total"]),
    }
    names = [*list(shapes)[:7], "", "", "", "bias"]
    outputs = {"out": shapes["query"], "present_key": cache, "present_value": cache}
    node = helper.make_node(
        "GroupQueryAttention",
        names,
        list(outputs),
        domain="com.microsoft",
        num_heads=HEADS,
        kv_num_heads=KV_HEADS,
    )
    return _single(node, shapes, outputs, 21)


def modern_model(op: str, dtype: str = "float16") -> onnx.ModelProto:
    """Write Attention-24 with a mask, or TensorScatter-24."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    cache = (kind, [1, KV_HEADS, SLOTS, HEAD_DIM])
    if op == "TensorScatter":
        rows = (kind, [1, KV_HEADS, "L", HEAD_DIM])
        inputs = {"cache": cache, "rows": rows, "slot": (TensorProto.INT64, [1])}
        node = helper.make_node(op, list(inputs), ["out"], axis=-2)
        return _single(node, inputs, {"out": cache}, 24)
    query = (kind, [1, HEADS, "L", HEAD_DIM])
    mask = (kind, [1, 1, "L", SLOTS])
    inputs = {"query": query, "key": cache, "value": cache, "mask": mask}
    return _single(helper.make_node(op, list(inputs), ["out"]), inputs, {"out": query}, 24)


def _single(node: onnx.NodeProto, inputs: dict, outputs: dict, opset: int) -> onnx.ModelProto:
    ends = [
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in side.items()]
        for side in (inputs, outputs)
    ]
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "single", *ends)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def session_on(runtime: ModuleType, model: onnx.ModelProto, provider: str) -> Any:
    """Open a session that may not fall back to the CPU where another provider is wanted."""
    options = runtime.SessionOptions()
    if provider == CUDA:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return runtime.InferenceSession(model.SerializeToString(), options, providers=[provider])


def grouped_attention_error(runtime: ModuleType, provider: str, dtype: str) -> float:
    """Feed 5 rows on 7 past ones in place; the last is a side row. Return the relative error."""
    rows, past = 5, 7
    total, rng = rows + past, np.random.default_rng(5)
    query = rng.standard_normal((1, HEADS, rows, HEAD_DIM)).astype(dtype)
    key, value = rng.standard_normal((2, 1, KV_HEADS, SLOTS, HEAD_DIM)).astype(dtype)
    slots, own = np.arange(SLOTS), past + np.arange(rows)
    last_key = own.copy()
    last_key[-1] = 3
    seen = (slots <= last_key[:, None]) | (slots == own[:, None])  # [L, S]
    expected = ref.attend(query, key, value, seen, HEAD_DIM**-0.5)

    def flat(heads: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(heads.swapaxes(1, 2).reshape(1, rows, -1))

    session = session_on(runtime, grouped_attention_model(dtype), provider)
    device = "cuda" if provider == CUDA else "cpu"
    binding = session.io_binding()
    feeds = {"query": flat(query), "key": flat(key[:, :, own]), "value": flat(value[:, :, own])}
    feeds["bias"] = np.where(seen[:, :total], 0, NEVER).astype(dtype)[None, None]
    feeds["seqlens_k"] = np.array([total - 1], np.int32)
    feeds["total"] = np.array(total, np.int32)
    for name, feed in feeds.items():
        place = "cpu" if name == "total" else device  # the operator reads it on the host
        binding.bind_ortvalue_input(name, runtime.OrtValue.ortvalue_from_numpy(feed, place, 0))
    for name, cache in (("key", key), ("value", value)):
        cleared = np.where(slots[:, None] < past, cache, 0).astype(dtype)
        buffer = runtime.OrtValue.ortvalue_from_numpy(cleared, device, 0)
        binding.bind_ortvalue_input(f"past_{name}", buffer)
        binding.bind_ortvalue_output(f"present_{name}", buffer)
    empty = np.zeros((1, rows, HEADS * HEAD_DIM), dtype)
    out = runtime.OrtValue.ortvalue_from_numpy(empty, device, 0)
    binding.bind_ortvalue_output("out", out)
    session.run_with_iobinding(binding)
    return ref.relative_error(out.numpy(), flat(expected))


def cuda_provider_has_our_operators() -> Answer:
    """Settle (g)."""
    try:
        import onnxruntime as runtime
        from onnxruntime.capi.onnxruntime_pybind11_state import (
            Fail,
            InvalidArgument,
            InvalidGraph,
            NotImplemented,
            RuntimeException,
        )
    except ImportError as problem:
        return Answer(NOT_RUN, f"onnxruntime is absent: {problem}; pip install onnxruntime-gpu")
    version = f"onnxruntime {runtime.__version__}"
    if CUDA not in runtime.get_available_providers():
        return Answer(NOT_RUN, f"{version} has no {CUDA}; pip install onnxruntime-gpu")
    failures = (Fail, InvalidArgument, InvalidGraph, NotImplemented, RuntimeException)
    facts: dict[str, Any] = {"version": version}
    good = True
    for dtype in ("float16", "float32"):
        try:
            error = grouped_attention_error(runtime, CUDA, dtype)
            facts[f"GroupQueryAttention with bias {dtype}"] = error
            is_right = error < TOLERANCE[dtype]
        except failures as problem:
            facts[f"GroupQueryAttention with bias {dtype}"] = str(problem)
            is_right = False
        if dtype == "float16":  # in float32 the provider has no kernel for it
            good = is_right
    for op in ("Attention", "TensorScatter"):
        try:
            session_on(runtime, modern_model(op), CUDA)
            facts[f"{op}-24"] = True
        except failures as problem:
            facts[f"{op}-24"] = str(problem)
    modern = {op: facts[f"{op}-24"] is True for op in ("Attention", "TensorScatter")}
    text = f"{version}: GroupQueryAttention with bias right: {good}; on CUDA: {modern}"
    return Answer(YES if good and all(modern.values()) else NO, text, facts)
