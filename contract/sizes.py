"""Bytes of a model's weights by part and format, counted from its measures: no weights, no torch.

This is the one place that counts them: `cost` shows the count, `export --build-memory` divides by
it, and a test compares it with the files that `export` writes. `contract/stored.py` reads the same
from the files of a bundle.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from patchsieve.contract import formats, weights
from patchsieve.contract.formats import FLOAT, FORMATS, Formats
from patchsieve.contract.model import TextModel, VisionModel
from patchsieve.contract.precision import BYTES, Precision
from patchsieve.contract.weights import Part

Matrix = tuple[str, int, int]  # its name without ".weight", input channels, output channels

PROJECTOR_LABEL = "projector"  # in the file of the tower, but a part of its own in `--precision`
PROJECTOR_PREFIX = "multi_modal_projector."


@dataclass(frozen=True)
class TextTower:
    """The measures of CLIP's text tower, the scorer; the defaults are CLIP-L's."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 12
    window: int = 77
    width: int = 768


@dataclass(frozen=True)
class Group:
    """The tensors of a weights file, or of the projector's share in the tower's.

    Attributes:
        part: Whose they are.
        key: What `--precision` calls it; None if its matrices are floats always.
        label: For people.
        layer: Of the decoder, where a layer has a file.
        numbers: Of all tensors that are no matrices: norms, biases, tables.
        matrices: The others.
    """

    part: Part
    key: str | None
    label: str
    layer: int | None
    numbers: int
    matrices: tuple[Matrix, ...]

    def num_bytes(self, types: Precision, chosen: Formats) -> dict[str, int]:
        """Bytes of each format in it."""
        kind = getattr(types, self.part.precision)
        found = {FLOAT: self.numbers * BYTES[kind]}
        for name, size_in, size_out in self.matrices:
            sizes = size_in, size_out
            form = FLOAT if self.key is None else chosen.of(self.key, name, *sizes)
            found[form] = found.get(form, 0) + FORMATS[form].num_bytes(*sizes, kind)
        return found


@dataclass(frozen=True)
class Share:
    """A row of the table: what a part of the model stores in a format.

    Attributes:
        part: Label of the part, for people.
        type: Floating-point type of the part.
        format: A key of `FORMATS`, or "float".
        bytes: Of the tensors, without the headers of their files.
    """

    part: str
    type: str
    format: str
    bytes: int


def groups(
    text: TextModel,
    vision: VisionModel,
    *,
    scorer: TextTower | None = None,
    has_step: bool = False,
    has_own_head: bool = True,
) -> list[Group]:
    """The tensors that a bundle stores, by weights file.

    Args:
        text: The decoder.
        vision: The tower and the projector.
        scorer: The text tower of plans that compare the question with an image; None without.
        has_step: The decoder is stored once more, for single rows.
        has_own_head: The output matrix is stored apart from the table of embeddings.
    """
    layers = range(text.num_layers)
    found = [_tower(vision), _projector(vision, text.hidden_size), _embeddings(text)]
    for part in (weights.LAYER, weights.STEP) if has_step else (weights.LAYER,):
        found += [_layer(part, text, index) for index in layers]
    found.append(_head(text, has_own_head))
    if scorer is not None:
        found += [_scorer(scorer), _joint(vision, scorer.width)]
    return found


def names(found: Iterable[Group]) -> list[str]:
    """Names of the matrices that `--precision` may name."""
    return [matrix[0] for group in found if group.key for matrix in group.matrices]


def shares(found: Iterable[Group], types: Precision, chosen: Formats) -> list[Share]:
    """Bytes by part and format."""
    return merged(
        Share(group.label, getattr(types, group.part.precision), form, count)
        for group in found
        for form, count in group.num_bytes(types, chosen).items()
        if count
    )


def merged(rows: Iterable[Share]) -> list[Share]:
    """One row for each part and format, in the order in which parts come; largest format first."""
    sums: dict[str, dict[tuple[str, str], int]] = {}
    for row in rows:
        part = sums.setdefault(row.part, {})
        part[row.type, row.format] = part.get((row.type, row.format), 0) + row.bytes
    return [
        Share(part, kind, form, count)
        for part, counts in sums.items()
        for (kind, form), count in sorted(counts.items(), key=lambda item: -item[1])
    ]


def total(rows: Iterable[Share]) -> int:
    """Bytes of all rows."""
    return sum(row.bytes for row in rows)


def _tower(vision: VisionModel) -> Group:
    size, patch = vision.hidden_size, vision.patch_size
    numbers = (3 * patch * patch + vision.patch_bias) * size  # the patch embedding
    numbers += (vision.num_patches + 2 * vision.has_cls) * size  # positions, class token
    numbers += 2 * size * vision.has_pre_norm
    layers = range(max(vision.feature_layers))
    numbers += len(layers) * _block_numbers(size, vision.intermediate_size)
    matrices = [
        matrix
        for index in layers
        for matrix in _block(f"vision_tower.encoder.layers.{index}", size, vision.intermediate_size)
    ]
    part = weights.TOWER
    return Group(part, formats.TOWER, part.label, None, numbers, tuple(matrices))


def _projector(vision: VisionModel, width: int) -> Group:
    size = vision.hidden_size * len(vision.feature_layers)
    matrices = (
        (f"{PROJECTOR_PREFIX}linear_1", size, width),
        (f"{PROJECTOR_PREFIX}linear_2", width, width),
    )
    numbers = 2 * width * vision.projector_bias
    return Group(weights.TOWER, formats.PROJECTOR, PROJECTOR_LABEL, None, numbers, matrices)


def _embeddings(text: TextModel) -> Group:
    part = weights.EMBEDDINGS
    return Group(part, None, part.label, None, text.vocab_size * text.hidden_size, ())


def _layer(part: Part, text: TextModel, index: int) -> Group:
    size, inner = text.hidden_size, text.intermediate_size
    queries, keys = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    numbers = 2 * size + text.qkv_bias * (queries + 2 * keys)
    numbers += text.output_bias * size + text.mlp_bias * (2 * inner + size)
    sizes = {
        "self_attn.q_proj": (size, queries),
        "self_attn.k_proj": (size, keys),
        "self_attn.v_proj": (size, keys),
        "self_attn.o_proj": (queries, size),
        "mlp.gate_proj": (size, inner),
        "mlp.up_proj": (size, inner),
        "mlp.down_proj": (inner, size),
    }
    matrices = tuple((f"layers.{index}.{name}", *pair) for name, pair in sizes.items())
    return Group(part, part.key, part.label, index, numbers, matrices)


def _head(text: TextModel, has_own: bool) -> Group:
    part, size = weights.HEAD, text.hidden_size
    matrices = (("lm_head", size, text.vocab_size),) if has_own else ()
    return Group(part, formats.HEAD, part.label, None, size, matrices)


def _scorer(tower: TextTower) -> Group:
    size, inner = tower.hidden_size, tower.intermediate_size
    numbers = (tower.vocab_size + tower.window + 2) * size
    numbers += tower.num_layers * _block_numbers(size, inner)
    matrices = [
        matrix
        for index in range(tower.num_layers)
        for matrix in _block(f"text_model.encoder.layers.{index}", size, inner)
    ]
    matrices.append(("text_projection", size, tower.width))
    part = weights.SCORER
    return Group(part, formats.SCORER, part.label, None, numbers, tuple(matrices))


def _joint(vision: VisionModel, width: int) -> Group:
    size, inner = vision.hidden_size, vision.intermediate_size
    further = range(vision.num_layers_run, vision.num_layers)
    numbers = 2 * size + len(further) * _block_numbers(size, inner)
    matrices = [matrix for index in further for matrix in _block(f"layers.{index}", size, inner)]
    matrices.append(("visual_projection", size, width))
    part = weights.JOINT
    return Group(part, part.key, part.label, None, numbers, tuple(matrices))


def _block(name: str, size: int, inner: int) -> Iterator[Matrix]:
    """Matrices of a layer of CLIP's towers."""
    for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
        yield f"{name}.self_attn.{projection}", size, size
    yield f"{name}.mlp.fc1", size, inner
    yield f"{name}.mlp.fc2", inner, size


def _block_numbers(size: int, inner: int) -> int:
    """Numbers of its norms and biases."""
    return 9 * size + inner
