"""Channels made equal before matrices are rounded: factors folded into a checkpoint's tensors.

Matrices that alone read what a norm gives may have channel j of it divided by s_j, in the norm's
own weight and bias, and multiplied by s_j in their input channel j. The model is the same function
in floating point, and no graph changes. `patchsieve.export.quantise.search` says how s is chosen.

Left as they are: the residual stream, queries, keys and values, which decisions read. So v_proj and
o_proj are no group, and fc1 and fc2 are none because their activation is no product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchsieve.contract.formats import FLOAT, FORMATS
from patchsieve.export.quantise.hints import NOTHING, Hints
from patchsieve.export.quantise.search import Reader, choose, folded
from patchsieve.export.quantise.statistics import InputStatistics, Statistics
from patchsieve.export.weights import Source, Weight

Measured = Callable[[str], InputStatistics | None]  # by the name of a matrix
_SAMPLE = 128  # columns of a matrix by which factors are judged
_MEAN = math.sqrt(2 / math.pi)  # mean |x| of a normal channel of deviation 1
_PEAK = 4.0  # and its largest
_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_NORM, _GATE, _UP = "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj"
# What makes rows, and the matrices that read them, which nothing else does.
_STRUCTURE = (
    ("input_layernorm", _ATTENTION),
    (_NORM, (_GATE, _UP)),
    (_UP, ("mlp.down_proj",)),  # exact: the activation is on gate_proj
    ("norm", ("lm_head",)),
    ("layer_norm1", _ATTENTION),
    ("layer_norm2", ("mlp.fc1",)),
    ("post_layernorm", ("visual_projection",)),
    ("text_model.final_layer_norm", ("text_projection",)),
)


@dataclass(frozen=True)
class Group:
    """Matrices that read the same rows, and what makes these rows.

    Attributes:
        maker: A norm; or up_proj, whose output channels down_proj reads times those of gate_proj.
        has_bias: The maker has one.
        readers: The matrices.
    """

    maker: str
    has_bias: bool
    readers: tuple[str, ...]


def groups_of(tensors: Iterable[str]) -> list[Group]:
    """The groups among tensors of one part, by their names in the checkpoint (`Weight.source`).

    Args:
        tensors: Those of one file, such as `layers.0.input_layernorm.weight`. A group needs all of
            its matrices: a head that is tied to the embeddings goes by their name and is left.
    """
    names, found = set(tensors), []
    for maker, readers in _STRUCTURE:
        ending = f"{maker}.weight"
        for name in sorted(names):
            prefix = name.removesuffix(ending)
            after = tuple(prefix + reader for reader in readers)
            is_maker = prefix != name and prefix[-1:] in ("", ".")
            if is_maker and names.issuperset(f"{reader}.weight" for reader in after):
                found.append(Group(prefix + maker, f"{prefix}{maker}.bias" in names, after))
    return found


class Smoothed:
    """A source whose tensors are folded; factors are chosen as their group is first read.

    Args:
        source: The checkpoint.
        groups: Those to fold.
        factors: Gives the factors s of a group, [C], which are kept.
        measured: Gives the statistics of the rows that a matrix multiplies, unfolded.
    """

    def __init__(
        self,
        source: Source,
        groups: Collection[Group],
        factors: Callable[[Group], Tensor],
        measured: Measured = lambda _: None,
    ) -> None:
        self._source, self._factors, self._measured = source, factors, measured
        self._chosen: dict[Group, Tensor] = {}
        self._made_by = {group.maker: group for group in groups}
        self._read_by = {reader: group for group in groups for reader in group.readers}

    def read(self, name: str) -> Tensor:
        """Read one tensor; a folded one is float32, so that it is rounded once, when stored."""
        tensor = self._source.read(name)
        owner, _, kind = name.rpartition(".")
        if group := self._made_by.get(owner):
            factors = self._of(group)
            tensor = tensor.float() / (factors if tensor.dim() == 1 else factors[:, None])
        if kind == "weight" and (factor := self.factor(owner)) is not None:
            tensor = tensor.float() * factor  # [out, in]
        return tensor

    def factor(self, matrix: str) -> Tensor | None:
        """What each input channel of a matrix is multiplied by, [in]; None if it is not folded."""
        group = self._read_by.get(matrix)
        return None if group is None else self._of(group)

    def is_measured(self, tensor: str) -> bool:
        """Whether there are statistics of a matrix, by its tensor in the checkpoint."""
        return self._measured(tensor.removesuffix(".weight")) is not None

    def hints(self, tensor: str) -> Hints:
        """What guides the rounding of a folded matrix, by its tensor in the checkpoint.

        The importance of its channels is measured or else assumed, as its factors are. The scale of
        its rows is measured, or absent.
        """
        matrix = tensor.removesuffix(".weight")
        found, group = self._measured(matrix), self._read_by.get(matrix)
        if found is not None:
            after = found if group is None else folded(found, self._of(group))
            # Rows of zeros have no scale: any will do.
            return Hints(after.square, input_scale=float(after.largest.max()) / 127 or 1.0)
        if group is None:
            return NOTHING
        return Hints(folded(assumed_inputs(self._source, group), self._of(group)).square)

    def _of(self, group: Group) -> Tensor:
        if group not in self._chosen:
            self._chosen[group] = self._factors(group)
        return self._chosen[group]


def smoothed(
    source: Source,
    weights: Sequence[Weight],
    statistics: Statistics | None = None,
    kept: Collection[str] = (),
) -> Smoothed:
    """A source for one file of weights, whose matrices are made easy to round.

    Args:
        source: The checkpoint.
        weights: The file's tensors. Matrices that stay float are folded with their group, but not
            judged. A group of only such is left.
        statistics: Of the activations, by `Weight.name`. Without, rows after a norm are taken to be
            as large as its weights say (`assumed_inputs`).
        kept: Matrices that keep the checkpoint's numbers: a group with one of them is left.

    Raises:
        PatchsieveError: As it is read, if the statistics are those of another model.
    """
    by_matrix = {each.source.removesuffix(".weight"): each for each in weights if each.transposed}

    def measured(matrix: str) -> InputStatistics | None:
        if statistics is None or matrix not in by_matrix:
            return None
        weight = by_matrix[matrix]
        return statistics.of(weight.name.removesuffix(".weight"), weight.shape[0])

    groups = groups_of(weight.source for weight in weights)
    made_by = {group.maker: group for group in groups}

    def rounded(group: Group) -> list[Weight]:
        found = (by_matrix[name] for name in group.readers if name in by_matrix)
        return [weight for weight in found if weight.format != FLOAT]

    def factors(group: Group) -> Tensor:
        readers = [
            _reader(source, weight, made_by.get(weight.source.removesuffix(".weight")))
            for weight in rounded(group)
        ]
        known = [found for found in map(measured, group.readers) if found is not None]
        inputs = known[0] if known else assumed_inputs(source, group)
        if known and group.maker.endswith(_UP):
            # A few rows of a product peak at a hundred times the others, which count as much.
            inputs = _normal(inputs.mean / _MEAN)
        return choose(readers, inputs, _unit(source, group), is_measured=bool(known))

    free = (g for g in groups if not {g.maker, *g.readers} & set(kept))
    return Smoothed(source, [group for group in free if rounded(group)], factors, measured)


def assumed_inputs(source: Source, group: Group) -> InputStatistics:
    """What the rows of a group are taken to be if nothing was measured.

    A norm gives channels of deviation 1, times its weight, plus its bias. A channel of down_proj is
    a product of up_proj's and gate_proj's, whose sizes follow from the rows that these read.
    """
    if group.maker.endswith(_UP):
        gate = group.maker.removesuffix(_UP) + _GATE
        size = _unit(source, group) * _output(source, gate, group)
    else:
        size = source.read(f"{group.maker}.weight").float().abs()
        if group.has_bias:
            size = torch.hypot(size, source.read(f"{group.maker}.bias").float())
    return _normal(size)


def _normal(size: Tensor) -> InputStatistics:
    """Statistics of normal channels of these deviations."""
    return InputStatistics(size * _MEAN, size.square(), size * _PEAK)


def _reader(source: Source, weight: Weight, maker: Group | None) -> Reader:
    """What the search needs of a matrix; `maker` is the group whose rows it makes, if it does."""
    matrix = source.read(weight.source)  # [out, in]
    some = slice(None, None, max(1, len(matrix) // _SAMPLE))
    sample = matrix[some].float()
    if maker is not None:
        sample = sample / _unit(source, maker)[some, None]  # a scale that the next fold takes out
    return Reader(sample.t(), FORMATS[weight.format])


def _unit(source: Source, group: Group) -> Tensor:
    """Natural size of each channel by what makes it, positive, [C]."""
    if group.maker.endswith(_UP):
        unit = _output(source, group.maker, group)
    else:
        unit = source.read(f"{group.maker}.weight").float().abs()
    return torch.where(unit > 0, unit, 1.0)


def _output(source: Source, matrix: str, group: Group) -> Tensor:
    """Deviation of each output of up_proj or gate_proj, by the weight of the norm before, [out]."""
    norm = source.read(group.maker.removesuffix(_UP) + _NORM + ".weight").float()
    weight = source.read(f"{matrix}.weight").float()
    size = (weight * norm).norm(dim=1)
    return torch.hypot(size, source.read(f"{matrix}.bias").float()) if group.has_bias else size
