"""Names of graphs, tensors and axes: the one place where export and runtime agree on them.

The cache of a layer reaches a graph in one of two forms. A stage's outputs show which; the manifest
names it too (`Manifest.cache_forms`).

In place. `key_cache.{i} [1, G, S, D]` comes in whole and `key_cache.{i}.out`, of the same shape, is
the same buffer with the new rows written at `slot`. A decision reads `key [1, G, S, D]`.

New rows. The runtime holds `[1, S, G * D]`, the heads of a row side by side, so that the first P
rows are one piece of memory. `key_cache.{i} [1, P, G * D]` comes in as a view of that piece, where
P = `slot` and is 0 for an empty cache; `key_cache.{i}.new [1, L, G * D]` gives the rows that
follow it, P * G * D elements from the start. A runtime may bind the output right there, if that
address is aligned as its library asks (TensorRT: 256 bytes, so if a row's bytes are a multiple of
it), and copies the rows there otherwise. A decision reads `key [1, P + L, G * D]`, the same view
after the write, and so does every other cache that a decision takes.

`slot`, `last_key` and all other tensors are the same in both forms.
"""

from __future__ import annotations

# Forms of a cache.
IN_PLACE = "in place"
NEW_ROWS = "new rows"
CACHE_FORMS = (IN_PLACE, NEW_ROWS)

# How the graphs of caches in place spell float16 and bfloat16 attention for TensorRT: every one in
# parts, all but that of the tower, which has no mask, or none.
DECOMPOSED = "decomposed"
FUSED_TOWER = "fused-tower"
FUSED = "fused"
ATTENTION_FORMS = (DECOMPOSED, FUSED_TOWER, FUSED)

# Graphs.
VISION = "vision"
SCORER = "scorer"
COMPACT = "compact"


def vision(plan: str) -> str:
    """Name of the vision graph of a plan that prunes before the decoder."""
    return f"{VISION}.{plan}"


def is_vision(graph: str) -> bool:
    """Whether a graph turns pixels into visual tokens, pruned or not."""
    return graph.split(".")[0] == VISION


def stage(index: int) -> str:
    """Name of the graph of one stage of the decoder."""
    return f"stage_{index}"


def step(index: int) -> str:
    """Name of a stage's graph on the copy of the decoder that feeds single rows."""
    return f"step_{index}"


def decide(plan: str, layer: int) -> str:
    """Name of the graph that decides, for a plan, what enters decoder layer `layer`."""
    return f"decide.{plan}.{layer}"


def decided(graph: str) -> tuple[str, int] | None:
    """Plan and layer of a decision's graph; None for any other graph."""
    parts = graph.split(".")
    return (parts[1], int(parts[2])) if parts[0] == "decide" else None


# Tensors of `vision` and `vision.{plan}`; NOISE too where a plan draws, [B, patches].
PIXEL_VALUES = "pixel_values"  # [B, 3, h, w]
IMAGE_FEATURES = "image_features"  # [B, N, C]
# [B, N] raster index of each token on the patch grid; -1 for CLS (the first) and for tokens that
# are fused (the last), merged or pooled (all of them).
IMAGE_IDS = "image_ids"
IMAGE_SOURCES = "image_sources"  # [B, patches] token that each patch went to, -1: dropped
# NUM_WANTED too, [B], where the number of tokens depends on the image. N is then its bound: the
# first min(NUM_WANTED, N) tokens of an image count, what follows is padding.

CLS_JOINT = "cls_joint"  # [B, E] class token in the space that the scorer's text lies in
CLS_FEATURES = "cls_features"  # [B, C] class token through the projector

# Tensors of `scorer`: CLIP's text tower.
TEXT_IDS = "text_ids"  # [W, P] windows of tokens, P with the marks of beginning and end
TEXT_FEATURES = "text_features"  # [W, P, E] every position in the joint space
MOST_WINDOWS = 8  # that one run takes

# Tensors of `stage_i`. L0 rows come in, L rows are kept and fed.
HIDDEN = "hidden"  # [1, L0, C]
KEEP_INDICES = "keep_indices"  # [L] rows of `hidden` that this stage keeps, ascending
# [L] rotary position of each kept row; [L, A] for a model with A rotary sections.
POSITION_IDS = "position_ids"
SLOT = "slot"  # [1] cache slot of the first kept row
LAST_KEY = "last_key"  # [L] last slot that a row sees, apart from its own
LOGITS_ROW = "logits_row"  # [1] kept row whose logits are wanted (last stage)
HIDDEN_OUT = "hidden_out"  # [1, L, C]
LOGITS = "logits"  # [1, 1, V]


def key_cache(layer: int) -> str:
    """Keys of a layer, rotated: [1, G, S, D] with `OUT`, or [1, P, G * D] with `NEW`."""
    return f"key_cache.{layer}"


def value_cache(layer: int) -> str:
    """Values of a layer, as its keys."""
    return f"value_cache.{layer}"


def query(layer: int) -> str:
    """Queries of a layer, rotated, heads side by side, [1, L, H * D]."""
    return f"query.{layer}"


def key(layer: int) -> str:
    """Keys of a layer below the one before the site, as a decision reads them, [1, G, S, D]."""
    return f"key.{layer}"


def layer_output(layer: int) -> str:
    """Inner value of a stage graph: the hidden rows after a layer, [1, L, C]."""
    return f"layers.{layer}.output"


def product(matrix: str) -> str:
    """Inner value of a graph: what a matrix makes of its rows, [..., out], without a bias."""
    return f"{matrix}{PRODUCT}"


PRODUCT = ".product"  # after the name of a matrix
OUT = ".out"  # after the name of a cache: the same buffer, updated, [1, G, S, D]
NEW = ".new"  # after the name of a cache: the rows to be written after the past, [1, L, G * D]

# Tensors of `decide`. It runs once per image over the L rows of the stage before the site. Of the
# layer before the site it reads QUERY, KEY and VALUE; of layers below that, `query` and `key`.
QUERY = "query"  # [1, L, H * D]
KEY = "key"  # [1, G, S, D] the cache of the layer that is read; [1, P + L, G * D] as rows
VALUE = "value"  # the same of its values
SIDE_ROW = "side_row"  # [1] row of the image's pseudo-CLS
LAST_ROW = "last_row"  # [1] the last ordinary row
VISUAL_ROWS = "visual_rows"  # [N] rows of the image's tokens that are alive
TEXT_ROWS = "text_rows"  # [T] rows of the instruction after the image
PATCH_IDS = "patch_ids"  # [N] raster index of each of `visual_rows`
NOISE = "noise"  # [1, N] uniform numbers in [0, 1), one for each token
EMBEDDINGS = "embeddings"  # [1, L, C] the rows as they entered the decoder
SIZES = "sizes"  # [N] patches that each of the image's tokens stands for, float32
BUDGET = "budget"  # [1] most tokens that may be kept
KEEP = "keep"  # [L] rows that survive so far; in and out
KEEP_OUT = "keep_out"
SCORES = "scores"  # [N]
NUM_WANTED = "num_wanted"  # [1] tokens that the method would keep without a budget
# A method that merges takes HIDDEN too, the rows of the stage before the site [1, L, C], and gives
# them back as HIDDEN_OUT, the image's tokens merged in their places.
MERGED_INTO = "merged_into"  # [N] the image's token that each merged into, or its own place

# Tensors of `compact`, apart from KEEP and KEEP_INDICES.
NUM_KEEP = "num_keep"  # [1]

# Axes.
AXIS_IMAGES = "images"
AXIS_ROWS_IN = "rows_in"
AXIS_ROWS = "rows"
AXIS_SLOTS = "slots"
AXIS_PAST = "past"  # rows of a cache that came before
AXIS_PRESENT = "present"  # the same, and those of this call
AXIS_VISUAL = "visual"
AXIS_TEXT = "text"
AXIS_WINDOWS = "windows"
