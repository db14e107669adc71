"""FLOPs and KV bytes of one prefill, from shapes and token counts.

Letters: n rows, d width, m MLP width, H query heads, G KV heads, D head dim, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from patchsieve.contract.errors import PatchsieveError, ShapeError
from patchsieve.contract.precision import BYTES
from patchsieve.cost.config import DecoderShape, ModelShape, ScorerShape, TowerShape


@dataclass(frozen=True)
class Convention:
    """What is counted beside the layers.

    Attributes:
        lm_head: "all": the vocabulary is scored at every row, as the papers count; "last": at the
            last row alone, as the runtime does.
        projections: Count the projector and, with a scorer, CLIP's two projections.
        pseudo_cls: Count what makes IVTP's pseudo-CLS beside the scorer: its row in the decoder,
            and the tower layers that only the scorer's class token goes through.
    """

    lm_head: str = "all"
    projections: bool = False
    pseudo_cls: bool = False

    def __post_init__(self) -> None:
        if self.lm_head not in ("all", "last"):
            raise PatchsieveError(
                "unknown convention for lm_head",
                found=self.lm_head,
                expected="all or last",
                do="correct lm_head",
            )


PAPERS = Convention()
RUNTIME = Convention(lm_head="last", projections=True, pseudo_cls=True)


@dataclass(frozen=True)
class Schedule:
    """How many tokens each layer works on.

    Attributes:
        vision: Rows of one image at the attention of each tower layer that runs, CLS included; last
            the layers that only the class token of a scorer needs (IVTP).
        vision_mlp: The same at each MLP; differs where a method prunes inside the layer.
        llm: Visual tokens of one image at each decoder layer.
        side_layers: Decoder layers, from the first, that carry one side row per image (IVTP).
        windows: Windows of the text scorer, over all of a request's text.
        queries: Learned queries of a resampler between tower and decoder; 0 for none.
        projected: Rows of one image that the projector takes; 0: those that enter the decoder.
        has_cls: The class token goes through the projector too, for a pseudo-CLS.
        has_joint_cls: It also goes into the space of the text scorer.
    """

    vision: tuple[int, ...]
    vision_mlp: tuple[int, ...]
    llm: tuple[int, ...]
    side_layers: int = 0
    windows: int = 0
    queries: int = 0
    projected: int = 0
    has_cls: bool = False
    has_joint_cls: bool = False

    def __post_init__(self) -> None:
        for name in ("vision", "vision_mlp", "llm"):
            counts = getattr(self, name)
            if not counts or not all(type(count) is int and count >= 1 for count in counts):
                raise ShapeError(
                    f"a schedule's {name} counts are no tokens",
                    found=list(counts),
                    expected="at least one token at each layer",
                    do="correct the counts",
                )
        if len(self.vision) != len(self.vision_mlp):
            raise ShapeError(
                "a schedule counts attention and MLP at different tower layers",
                found=f"{len(self.vision)} and {len(self.vision_mlp)}",
                do="give both as many counts",
            )
        if not 0 <= self.side_layers <= len(self.llm) or self.windows < 0 or self.queries < 0:
            raise ShapeError(
                "a schedule's side work cannot be",
                found=f"{self.side_layers} layers, {self.windows} windows, {self.queries} queries",
                do="correct side_layers, windows or queries",
            )


@dataclass(frozen=True)
class Flops:
    """FLOPs by part; `scorer` is all that is neither tower nor decoder."""

    vision: int
    llm: int
    scorer: int

    @property
    def total(self) -> int:
        """All parts."""
        return self.vision + self.llm + self.scorer

    def to_dict(self) -> dict[str, int]:
        """The parts and the total by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"total": self.total}


@dataclass(frozen=True)
class Cost:
    """What one prefill costs.

    Attributes:
        vision_tokens: Rows of one image at each tower layer, CLS included.
        llm_tokens: Visual tokens of one image at each decoder layer.
        kv_bytes: Keys and values of all rows in all layers, used when prefill ends; the slot of a
            side row is overwritten by the first new token and is not counted.
    """

    flops: Flops
    vision_tokens: tuple[int, ...]
    llm_tokens: tuple[int, ...]
    kv_bytes: int

    @property
    def average_tokens(self) -> float:
        """Mean number of visual tokens of one image over all decoder layers."""
        return sum(self.llm_tokens) / len(self.llm_tokens)


def tower_layer(tower: TowerShape | ScorerShape, n: int, n_mlp: int | None = None) -> int:
    """FLOPs of a transformer layer, 2 (4 n d^2 + 2 n^2 d + 2 n d m), with n_mlp rows in the MLP."""
    d, m = tower.hidden_size, tower.intermediate_size
    n_mlp = n if n_mlp is None else n_mlp
    return 2 * (4 * n * d * d + 2 * n * n * d + 2 * n_mlp * d * m)


def patch_embedding(tower: TowerShape) -> int:
    """FLOPs of the convolution that makes patches of pixels."""
    pixels = tower.num_channels * tower.patch_size**2
    return 2 * tower.num_patches * pixels * tower.hidden_size


def decoder_layer(decoder: DecoderShape, n: int) -> int:
    """FLOPs of a decoder layer with grouped-query attention and a gated MLP on n rows."""
    d, m = decoder.hidden_size, decoder.intermediate_size
    query, key = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim
    projections = 2 * n * d * query + 2 * n * d * key  # q and o, k and v
    attention = 2 * n * n * query  # q k^T and its product with v, over all pairs
    return 2 * (projections + attention + 3 * n * d * m)


def resampler(width: int, queries: int, patches: int) -> int:
    """FLOPs of one cross attention of learned queries over the patches (Qwen-VL's resampler)."""
    linear = 2 * patches * width**2 + 2 * queries * width**2  # k and v, q and o
    return 2 * (linear + 2 * queries * patches * width)


def scorer_window(scorer: ScorerShape, convention: Convention = PAPERS) -> int:
    """FLOPs of CLIP's text tower on one window; the papers' count has no text projection."""
    flops = scorer.num_layers * tower_layer(scorer, scorer.window)
    if convention.projections:
        flops += 2 * scorer.window * scorer.hidden_size * scorer.width
    return flops


def kv_bytes_per_token(decoder: DecoderShape, precision: str = "float16") -> int:
    """Bytes of one token's keys and values in one layer."""
    if precision not in BYTES:
        raise PatchsieveError(
            "unknown precision",
            found=precision,
            expected=" or ".join(BYTES),
            do="correct --precision",
        )
    return 2 * decoder.num_kv_heads * decoder.head_dim * BYTES[precision]


def cost(
    shape: ModelShape,
    schedule: Schedule,
    text_tokens: int,
    *,
    images: int = 1,
    precision: str = "float16",
    convention: Convention = PAPERS,
) -> Cost:
    """Count one prefill.

    Args:
        shape: The model.
        schedule: Tokens at each layer.
        text_tokens: Rows that are not visual: system prompt, template and question.
        images: Images of the request, each pruned to the same counts.
        precision: Of the keys and values, a key of BYTES.
        convention: What counts beside the layers.

    Raises:
        ShapeError: The schedule is for another number of layers.
        PatchsieveError: There is nothing to count.
    """
    _check(shape, schedule, text_tokens, images)
    rows = [images * visual + text_tokens for visual in schedule.llm]
    side_layers = schedule.side_layers if convention.pseudo_cls else 0
    side = [images if layer < side_layers else 0 for layer in range(len(rows))]
    llm = sum(decoder_layer(shape.text, n + more) for n, more in zip(rows, side, strict=True))
    scored = rows[-1] if convention.lm_head == "all" else 1
    llm += 2 * scored * shape.text.hidden_size * shape.text.vocab_size

    extra = schedule.windows * scorer_window(shape.scorer, convention)
    if schedule.queries:
        patches = shape.num_visual
        extra += images * resampler(shape.vision.hidden_size, schedule.queries, patches)
    run = len(schedule.vision) if convention.pseudo_cls else shape.vision.num_layers_run
    return Cost(
        flops=Flops(
            vision=images * _vision(shape, schedule, run, convention), llm=llm, scorer=extra
        ),
        vision_tokens=schedule.vision[:run],
        llm_tokens=schedule.llm,
        kv_bytes=sum(rows) * kv_bytes_per_token(shape.text, precision),
    )


def _vision(shape: ModelShape, schedule: Schedule, run: int, convention: Convention) -> int:
    """FLOPs of one image in the first `run` tower layers and in the projector."""
    flops = patch_embedding(shape.vision)
    for n, n_mlp in zip(schedule.vision[:run], schedule.vision_mlp[:run], strict=True):
        flops += tower_layer(shape.vision, n, n_mlp)
    if convention.projections:  # two linear layers
        width, d = shape.projector_in, shape.text.hidden_size
        rows = (schedule.projected or schedule.llm[0]) + schedule.has_cls
        flops += 2 * rows * (width * d + d * d)
        if schedule.has_joint_cls:
            flops += 2 * shape.vision.hidden_size * shape.scorer.width
    return flops


def _check(shape: ModelShape, schedule: Schedule, text_tokens: int, images: int) -> None:
    if len(schedule.llm) != shape.text.num_layers:
        raise ShapeError(
            "the schedule is for another decoder",
            found=f"{len(schedule.llm)} layers",
            expected=shape.text.num_layers,
            do="make it for this shape",
        )
    run, most = shape.vision.num_layers_run, shape.vision.num_layers
    if not run <= len(schedule.vision) <= most:  # one more than `run` where CLS needs the last
        raise ShapeError(
            "the schedule is for another tower",
            found=f"{len(schedule.vision)} layers",
            expected=f"{run} to {most}",
            do="make it for this shape",
        )
    if text_tokens < 0 or images < 1:
        raise PatchsieveError(
            "a request without text or images cannot be counted",
            found=f"{text_tokens} text tokens, {images} images",
            expected="no negative number, at least one image",
            do="correct --text-tokens or --images",
        )
