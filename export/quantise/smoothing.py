"""Channels made equal before matrices are rounded: factors folded into a checkpoint's tensors.

Matrices that alone read what a norm gives may have channel j of it divided by s_j, in the norm's
own weight and bias, and multiplied by s_j in their input channel j. The model is the same function
in floating point, and no graph changes. `patchsieve.export.quantise.search` says how s is chosen.

Left as they are: the residual stream, queries, keys and values, which decisions read. So v_proj and
o_proj are no group, and fc1 and fc2 are none because their activation is no product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from patchsieve.contract.formats import FLOAT
from patchsieve.export.quantise.search import Quantised, Reader, choose, folded
from patchsieve.export.quantise.statistics import InputStatistics, Statistics
from patchsieve.export.weights import Source

_SAMPLE = 256  # columns of a matrix by which factors are judged
_PEAK = 4.0  # largest |x| of a normed channel over its deviation, if nothing was measured
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
        tensors: Such as `layers.0.input_layernorm.weight`. A group needs all of its matrices; a
            head that is tied to the embeddings is not among them.
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
        statistics: Of the checkpoint's activations, if there are any.
    """

    def __init__(
        self,
        source: Source,
        groups: Collection[Group],
        factors: Callable[[Group], Tensor],
        statistics: Statistics | None = None,
    ) -> None:
        self._source, self._factors, self._statistics = source, factors, statistics
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

    def inputs(self, matrix: str) -> InputStatistics | None:
        """Measured statistics of the rows that the folded matrix multiplies, if there are any.

        `square` is the importance of each channel, `largest.max() / 127` the static scale of int8.
        """
        found = None if self._statistics is None else self._statistics.of(matrix)
        factor = self.factor(matrix)
        return found if found is None or factor is None else folded(found, factor)

    def importance(self, matrix: str) -> Tensor | None:
        """Mean x**2 of each input channel of the folded matrix, measured or else assumed, [in].

        None if nothing is known: no statistics, and no group.
        """
        found = self.inputs(matrix)
        if found is not None:
            return found.square
        group = self._read_by.get(matrix)
        if group is None:
            return None
        return assumed_inputs(self._source, group).square / self._of(group) ** 2

    def _of(self, group: Group) -> Tensor:
        if group not in self._chosen:
            self._chosen[group] = self._factors(group)
        return self._chosen[group]


def smoothed(
    source: Source,
    tensors: Iterable[str],
    formats: Mapping[str, Collection[str]],
    statistics: Statistics | None,
    quantised: Quantised,
) -> Smoothed:
    """A source for one part of a bundle, whose matrices are made easy to round.

    Args:
        source: The checkpoint.
        tensors: The part's tensors, by their names in the checkpoint.
        formats: How each matrix will be stored, by its name without ".weight". Matrices that are
            not named stay float: they are folded, but not judged. A group of only such is left.
        statistics: Of the activations. Without, rows after a norm are taken to be as large as its
            weights say (`assumed_inputs`).
        quantised: Rounds a matrix.
    """
    rounded = {
        name: [kind for kind in kinds if kind != FLOAT]
        for name, kinds in formats.items()
        if any(kind != FLOAT for kind in kinds)
    }
    groups = [group for group in groups_of(tensors) if set(group.readers) & set(rounded)]

    def factors(group: Group) -> Tensor:
        wanted = [name for name in group.readers if name in rounded]
        readers = [_reader(source.read(f"{name}.weight"), rounded[name]) for name in wanted]
        measured = None if statistics is None else statistics.of(wanted[0], len(readers[0].sample))
        inputs = measured or assumed_inputs(source, group)
        return choose(readers, inputs, _unit(source, group), quantised)

    return Smoothed(source, groups, factors, statistics)


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
    mean = size * math.sqrt(2 / math.pi)  # of |x|, if x is normal
    return InputStatistics(mean, size.square(), size * _PEAK)


def _reader(weight: Tensor, formats: Collection[str]) -> Reader:
    """What the search needs of a matrix [out, in]."""
    sample = weight[:: max(1, len(weight) // _SAMPLE)]
    return Reader(sample.float().t(), formats)


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
