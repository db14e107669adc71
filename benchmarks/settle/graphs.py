"""Small ONNX graphs of a decoder stage for settle.py, each beside its result in NumPy.

Letters as everywhere: L rows fed now, L0 rows before the gather, S slots of the cache, H query
heads, G key/value heads, D head dim, C hidden size, F width of the MLP. Batch is 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 24
OLD_OPSET = 18  # which TensorRT 10.3 reads too
NEVER = -6e4  # added to a score that must not count; -inf makes NaN in a row that sees nothing
ONNX_TYPE = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int64": TensorProto.INT64,
    "int32": TensorProto.INT32,
    "bool": TensorProto.BOOL,
}
Profile = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


@dataclass(frozen=True)
class StageSize:
    """Sizes of the stage under test.

    The defaults hold 5.5 million parameters: enough that weights stored twice show beside the
    1.7 MB that each profile of a TensorRT-RTX engine carries anyway.
    """

    layers: int = 2
    hidden: int = 512  # C
    heads: int = 4  # H
    kv_heads: int = 2  # G
    head_dim: int = 128  # D
    mlp: int = 1280  # F
    slots: int = 96  # S
    max_rows: int = 64  # largest L
    dtype: str = "float16"
    epsilon: float = 1e-5

    @property
    def cache_shape(self) -> tuple[int, int, int, int]:
        """Shape of one cache, [1, G, S, D]."""
        return (1, self.kv_heads, self.slots, self.head_dim)

    def cache_names(self, prefix: str = "") -> list[str]:
        """Names of the caches, two per layer; results carry the prefix `new_`."""
        return [
            f"{prefix}cache_{kind}.{i}" for i in range(self.layers) for kind in ("key", "value")
        ]


@dataclass(frozen=True)
class Form:
    """How a stage is spelled.

    Attributes:
        decomposable: Put `TRT_decomposable=1` on each attention, which TensorRT wants for float32
            and which onnx.checker and ONNX Runtime refuse.
        has_lengths: Use TRT_Attention with the mask and a key length, which may skip unused slots,
            and not standard Attention.
        in_parts: Spell attention in parts with float32 scores, as `export` does by default.
        index_dtype: Type of `keep_indices`, `slot` and `last_key`.

    """

    decomposable: bool = True
    has_lengths: bool = False
    in_parts: bool = False
    index_dtype: str = "int64"


PLAIN = Form()
EXPORTED = Form(in_parts=True)
TINY = StageSize(hidden=64, head_dim=16, mlp=96, slots=40, max_rows=24)


def stage_weights(size: StageSize, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights, matrices as [in, out], in the dtype of the stage."""
    rng = np.random.default_rng(seed)
    c, f = size.hidden, size.mlp
    q_width, kv_width = size.heads * size.head_dim, size.kv_heads * size.head_dim
    shapes = {
        "q": (c, q_width),
        "k": (c, kv_width),
        "v": (c, kv_width),
        "o": (q_width, c),
        "gate": (c, f),
        "up": (c, f),
        "down": (f, c),
    }
    weights: dict[str, np.ndarray] = {}
    for i in range(size.layers):
        for name, shape in shapes.items():
            values = rng.standard_normal(shape, dtype=np.float32) / np.sqrt(shape[0])
            weights[f"{name}.{i}"] = values.astype(size.dtype)
        for name in ("input_norm", "mlp_norm"):
            values = 1 + 0.1 * rng.standard_normal(c, dtype=np.float32)
            weights[f"{name}.{i}"] = values.astype(size.dtype)
    return weights


class _Graph:
    """Nodes, inputs and constants of a graph being written down."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def take(self, name: str, dtype: str, shape: tuple[int | str, ...]) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, ONNX_TYPE[dtype], list(shape)))
        return name

    def give(self, name: str, dtype: str, shape: tuple[int | str, ...]) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, ONNX_TYPE[dtype], list(shape)))

    def constant(self, name: str, value: np.ndarray) -> str:
        self.constants[name] = numpy_helper.from_array(value, name)
        return name

    def ints(self, *values: int) -> str:
        name = "int_" + "_".join(map(str, values)).replace("-", "m")
        return self.constant(name, np.array(values, dtype=np.int64))

    def add(self, op: str, inputs: list[str], output: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def model(self, name: str, *, opset: int = OPSET) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes, name, self.inputs, self.outputs, list(self.constants.values())
        )
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10
        )


def _mask(g: _Graph, slots: int, dtype: str) -> str:
    """Mask [1, 1, L, S], additive: the row at slot t sees j iff j <= last_key[row] or j == t."""
    every = g.constant("every_slot", np.arange(slots, dtype=np.int64)[None])  # [1, S]
    count = g.add("Shape", ["last_key"], "row_count")  # [1]
    number = g.add("Squeeze", [count, g.ints(0)], "row_number")
    zero, one = (g.constant(f"scalar_{i}", np.array(i, dtype=np.int64)) for i in (0, 1))
    rows = g.add("Range", [zero, number, one], "row_range")  # [L]
    own = g.add("Add", [rows, "slot"], "own_slot")  # [L]
    own = g.add("Unsqueeze", [own, g.ints(1)], "own_slot_column")  # [L, 1]
    last = g.add("Unsqueeze", ["last_key", g.ints(1)], "last_key_column")  # [L, 1]
    before = g.add("LessOrEqual", [every, last], "is_before")  # [L, S]
    itself = g.add("Equal", [every, own], "is_itself")
    seen = g.add("Or", [before, itself], "is_seen")
    yes = g.constant("seen", np.array(0, dtype=dtype))
    no = g.constant("unseen", np.array(NEVER, dtype=dtype))
    flat = g.add("Where", [seen, yes, no], "mask_rows")
    return g.add("Unsqueeze", [flat, g.ints(0, 1)], "mask")  # [1, 1, L, S]


def _heads(g: _Graph, x: str, name: str, heads: int, size: StageSize, layer: int) -> str:
    rows = g.add("MatMul", [x, f"{name}.{layer}"], f"{name}_rows.{layer}")  # [1, L, heads*D]
    shape = g.ints(0, 0, heads, size.head_dim)
    split = g.add("Reshape", [rows, shape], f"{name}_split.{layer}")
    return g.add(
        "Transpose", [split], f"{name}_heads.{layer}", perm=[0, 2, 1, 3]
    )  # [1, heads, L, D]


def _attention(g: _Graph, query: str, mask: str, i: int, size: StageSize, form: Form) -> str:
    scale, keys, values = size.head_dim**-0.5, f"new_cache_key.{i}", f"new_cache_value.{i}"
    free = {"TRT_decomposable": 1} if form.decomposable else {}
    out = f"attention.{i}"
    if form.in_parts:
        return _in_parts(g, query, keys, values, mask, out, size, scale)
    if not form.has_lengths:
        inputs = [query, keys, values, mask]
        return g.add("Attention", inputs, out, is_causal=0, scale=scale, **free)
    factor = g.constant("scale", np.array(scale, dtype=size.dtype))
    query = g.add("Mul", [query, factor], f"scaled_query.{i}")
    inputs = [query, keys, values, mask, "", "kv_len"]
    return g.add("TRT_Attention", inputs, out, causal_kind="none", **free)


def _in_parts(
    g: _Graph,
    query: str,
    keys: str,
    values: str,
    mask: str,
    out: str,
    size: StageSize | MaskedSize,
    scale: float,
) -> str:
    """Attention as export/lowering/tensorrt.py spells it by default; no mask is the empty name."""

    def cast(value: str, name: str, dtype: str) -> str:
        if size.dtype == "float32":
            return value
        return g.add("Cast", [value], f"{out}.{name}", to=ONNX_TYPE[dtype])

    def shaped(value: str, name: str, heads: int) -> str:
        if size.heads == size.kv_heads:
            return value
        return g.add("Reshape", [value, g.ints(0, heads, -1, 0)], f"{out}.{name}")

    factor = g.constant("part_scale", np.array(scale, dtype=size.dtype))
    rows = shaped(g.add("Mul", [query, factor], f"{out}.scaled"), "together", size.kv_heads)
    turned = g.add("Transpose", [keys], f"{out}.turned", perm=[0, 1, 3, 2])
    factors = [cast(rows, "wide_rows", "float32"), cast(turned, "wide_keys", "float32")]
    scores = g.add("MatMul", factors, f"{out}.scores")
    if mask:
        scores = shaped(scores, "apart", size.heads)
        scores = g.add("Add", [scores, mask], f"{out}.masked")
    weights = g.add("Softmax", [scores], f"{out}.weights", axis=-1)
    if mask:
        weights = shaped(weights, "weights_together", size.kv_heads)
    weights = cast(weights, "narrow_weights", size.dtype)
    if size.heads == size.kv_heads:
        return g.add("MatMul", [weights, values], out)
    mixed = g.add("MatMul", [weights, values], f"{out}.mixed")
    return g.add("Reshape", [mixed, g.ints(0, size.heads, -1, 0)], out)


def _layer(g: _Graph, x: str, mask: str, i: int, size: StageSize, form: Form) -> str:
    norm = {"axis": -1, "epsilon": size.epsilon, "stash_type": 1}
    n = g.add("RMSNormalization", [x, f"input_norm.{i}"], f"normed.{i}", **norm)
    query = _heads(g, n, "q", size.heads, size, i)
    key = _heads(g, n, "k", size.kv_heads, size, i)
    value = _heads(g, n, "v", size.kv_heads, size, i)
    query = g.add("RotaryEmbedding", [query, "cos", "sin"], f"query.{i}")
    key = g.add("RotaryEmbedding", [key, "cos", "sin"], f"key.{i}")
    for kind, new in (("key", key), ("value", value)):
        g.add(
            "TensorScatter",
            [f"cache_{kind}.{i}", new, "slot"],
            f"new_cache_{kind}.{i}",
            axis=-2,
            mode="linear",
        )
    out = _attention(g, query, mask, i, size, form)  # [1, H, L, D]
    out = g.add("Transpose", [out], f"attention_rows.{i}", perm=[0, 2, 1, 3])  # [1, L, H, D]
    out = g.add("Reshape", [out, g.ints(0, 0, -1)], f"attention_flat.{i}")  # [1, L, H*D]
    out = g.add("MatMul", [out, f"o.{i}"], f"attention_out.{i}")  # [1, L, C]
    x = g.add("Add", [x, out], f"after_attention.{i}")
    n = g.add("RMSNormalization", [x, f"mlp_norm.{i}"], f"mlp_normed.{i}", **norm)
    gate = g.add("MatMul", [n, f"gate.{i}"], f"gate_rows.{i}")
    sigmoid = g.add("Sigmoid", [gate], f"gate_sigmoid.{i}")
    gate = g.add("Mul", [gate, sigmoid], f"gate_silu.{i}")
    up = g.add("MatMul", [n, f"up.{i}"], f"up_rows.{i}")
    both = g.add("Mul", [gate, up], f"mlp_rows.{i}")  # [1, L, F]
    down = g.add("MatMul", [both, f"down.{i}"], f"down_rows.{i}")
    return g.add("Add", [x, down], f"after_mlp.{i}")


def stage_model(size: StageSize, form: Form = PLAIN, seed: int = 0) -> onnx.ModelProto:
    """Write a stage as architecture.md has it: gather, layers on TensorScatter caches, one mask."""
    g = _Graph(size.dtype)
    hidden = g.take("hidden", size.dtype, (1, "L0", size.hidden))
    keep = g.take("keep_indices", form.index_dtype, ("L",))
    for name in ("cos", "sin"):
        g.take(name, size.dtype, (1, "L", size.head_dim // 2))
    g.take("slot", form.index_dtype, (1,))
    g.take("last_key", form.index_dtype, ("L",))
    for name in size.cache_names():
        g.take(name, size.dtype, size.cache_shape)
    for name, value in stage_weights(size, seed).items():
        g.constant(name, value)
    x = g.add("Gather", [hidden, keep], "gathered", axis=1)  # [1, L, C]
    mask = _mask(g, size.slots, "float32" if form.in_parts else size.dtype)
    if form.has_lengths:
        total = g.add("Add", ["slot", "row_count"], "total")  # [1]; every row's own slot is below
        g.add("Cast", [total], "kv_len", to=TensorProto.INT32)
    for i in range(size.layers):
        x = _layer(g, x, mask, i, size, form)
    g.add("Identity", [x], "hidden_out")
    g.give("hidden_out", size.dtype, (1, "L", size.hidden))
    for name in size.cache_names("new_"):
        g.give(name, size.dtype, size.cache_shape)
    return g.model("stage")


def stage_profiles(size: StageSize, *, exact_decode: bool = False) -> list[Profile]:
    """Profiles for prefill (L up to the bound) and decode.

    Args:
        size: Sizes of the stage.
        exact_decode: Make the decode profile exactly L=1, the form that doubles fp16 weights in an
            RTX engine, and not 1/1/2.

    """
    long = size.max_rows
    return [
        _rows_profile(size, 1, long // 2, long),
        _rows_profile(size, 1, 1, 1 + (not exact_decode)),
    ]


def _rows_profile(size: StageSize, *rows: int) -> Profile:
    def each(*shape: int | None) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(n if d is None else d for d in shape) for n in rows)

    half = size.head_dim // 2
    return {
        "hidden": each(1, None, size.hidden),
        "keep_indices": each(None),
        "cos": each(1, None, half),
        "sin": each(1, None, half),
        "last_key": each(None),
    }


def save_stage(
    size: StageSize, folder: Path, name: str = "stage.onnx", form: Form = PLAIN
) -> tuple[Path, int]:
    """Write the stage, its weights in a file beside it; return its path and bytes of weights."""
    model = stage_model(size, form)
    nbytes = sum(w.nbytes for w in stage_weights(size).values())
    path = folder / name
    onnx.save_model(
        model, path, save_as_external_data=True, location=f"{path.stem}.bin", size_threshold=1024
    )
    return path, nbytes


@dataclass(frozen=True)
class AttentionSize:
    """Sizes of a single attention over a cache whose first `kv_len` slots count."""

    heads: int = 4  # H
    kv_heads: int = 2  # G
    head_dim: int = 64  # D
    slots: int = 32  # S
    max_rows: int = 16
    dtype: str = "float16"

    def profile(self, *, has_mask: bool) -> Profile:
        """Shapes of the inputs for L from 1 to the bound."""
        rows = (1, 5, self.max_rows)
        query = tuple((1, self.heads, n, self.head_dim) for n in rows)
        mask = {"mask": tuple((1, 1, n, self.slots) for n in rows)} if has_mask else {}
        return {"query": query, **mask}


def lengths_attention_model(size: AttentionSize, *, has_mask: bool) -> onnx.ModelProto:
    """Write TensorRT's own TRT_Attention with a key length: lower-right causal, or with a mask.

    TensorRT-RTX 1.7.1 refuses a mask beside a causal kind, but takes one beside `none`. The
    operator applies no scale, so `query` arrives scaled.
    """
    g = _Graph(size.dtype)
    g.take("query", size.dtype, (1, size.heads, "L", size.head_dim))
    for name in ("key", "value"):
        g.take(name, size.dtype, (1, size.kv_heads, size.slots, size.head_dim))
    mask = g.take("mask", size.dtype, (1, 1, "L", size.slots)) if has_mask else ""
    g.take("kv_len", "int32", (1,))
    g.add(
        "TRT_Attention",
        ["query", "key", "value", mask, "", "kv_len"],
        "out",
        causal_kind="none" if has_mask else "lower_right",
        TRT_decomposable=1,
    )
    g.give("out", size.dtype, (1, size.heads, "L", size.head_dim))
    return g.model("lengths_attention")


@dataclass(frozen=True)
class MaskedSize:
    """One attention over a cache, of which an engine is right or wrong in half precision.

    The defaults are where TensorRT 11.2 erred with float16 (TensorRT-Model-Connect, PR 785).
    """

    heads: int = 16  # H
    kv_heads: int = 2  # G
    head_dim: int = 128  # D
    slots: int = 1665  # S
    rows: tuple[int, int, int] = (1, 64, 64)  # smallest, usual and largest L
    has_mask: bool = True
    dtype: str = "float16"

    def profiles(self) -> list[Profile]:
        """Rows up to the bound, and where they change one or two of them, as in a stage."""
        is_static = self.rows[0] == self.rows[2]
        return [] if is_static else [self._profile(*self.rows), self._profile(1, 1, 2)]

    def _profile(self, *rows: int) -> Profile:
        query = tuple((1, self.heads, n, self.head_dim) for n in rows)
        mask = {"mask": tuple((1, 1, n, self.slots) for n in rows)} if self.has_mask else {}
        return {"query": query, **mask}


def masked_attention_model(size: MaskedSize, *, fused: bool) -> onnx.ModelProto:
    """Write softmax(Q K^T * scale + mask) V as one Attention, or in parts with float32 scores."""
    g = _Graph(size.dtype)
    rows = "L" if size.profiles() else size.rows[0]
    query = g.take("query", size.dtype, (1, size.heads, rows, size.head_dim))
    for name in ("key", "value"):
        g.take(name, size.dtype, (1, size.kv_heads, size.slots, size.head_dim))
    mask = g.take("mask", "float32", (1, 1, rows, size.slots)) if size.has_mask else ""
    scale = size.head_dim**-0.5
    if fused:
        kind = ONNX_TYPE[size.dtype]
        own = [g.add("Cast", [mask], "own_mask", to=kind)] if mask else []
        g.add("Attention", [query, "key", "value", *own], "out", is_causal=0, scale=scale)
    else:
        _in_parts(g, query, "key", "value", mask, "out", size, scale)
    g.give("out", size.dtype, (1, size.heads, rows, size.head_dim))
    return g.model("masked_attention")


def compaction_model(rows: int) -> onnx.ModelProto:
    """Write keep [N] (bool) -> keep_indices [N], ascending and padded with 0, and num_keep [1].

    Without NonZero, which TensorRT-RTX lacks, and Compress, which every TensorRT lacks: row i goes
    to place CumSum(keep)[i] - 1, a dropped row to place N, which is cut off.
    """
    g = _Graph("float32")
    g.take("keep", "bool", (rows,))
    ones = g.add("Cast", ["keep"], "ones", to=TensorProto.INT64)  # [N]
    zero = g.constant("axis", np.array(0, dtype=np.int64))
    running = g.add("CumSum", [ones, zero], "running")
    place = g.add("Sub", [running, g.ints(1)], "place")
    place = g.add("Where", ["keep", place, g.ints(rows)], "place_or_end")
    room = g.constant("room", np.zeros(rows + 1, dtype=np.int64))
    every = g.constant("every_row", np.arange(rows, dtype=np.int64))
    packed = g.add("ScatterElements", [room, place, every], "packed", axis=0)  # [N + 1]
    g.add("Slice", [packed, g.ints(0), g.ints(rows), g.ints(0)], "keep_indices")  # [N]
    g.add("ReduceSum", [ones, g.ints(0)], "num_keep", keepdims=1)  # [1]
    g.give("keep_indices", "int64", (rows,))
    g.give("num_keep", "int64", (1,))
    return g.model("compaction", opset=OLD_OPSET)


def gather_model(hidden: int) -> onnx.ModelProto:
    """Write hidden [1, L0, C] (fp16) gathered by int64 keep_indices [L] of dynamic length."""
    g = _Graph("float16")
    g.take("hidden", "float16", (1, "L0", hidden))
    g.take("keep_indices", "int64", ("L",))
    g.add("Gather", ["hidden", "keep_indices"], "rows", axis=1)
    g.give("rows", "float16", (1, "L", hidden))
    return g.model("gather", opset=OLD_OPSET)
