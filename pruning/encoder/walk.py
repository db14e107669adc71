"""The seam of methods that prune or merge patches inside a vision tower, or right after it.

Every count, or its bound, is fixed when the graph is made (`patchsieve.pruning.schedules`), so
every shape is. A method chooses; `Walk` applies what it chose to all that a tower carries, and
remembers where each original patch went.

Where the count depends on the image, rows up to the bound leave the tower: the tokens, in raster
order, then padding. A layer after such a method hides the padding from its attention.

Letters: B images, N patches of an image, n rows at the moment (the class token first where there is
one, then the tokens, last a fused row where a method made one), H heads, D head dim, C width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from patchsieve.pruning.catalogue import Catalogued, in_tower
from patchsieve.pruning.entry import Entry
from patchsieve.pruning.rollout import Layer
from patchsieve.pruning.schedules import TowerSchedule
from patchsieve.pruning.select import ascending, keep_top

HIDDEN = -6e4  # bias of a key that no row may see; fits float16
NOWHERE = -1  # where a dropped patch went, and the raster id of a token that is no patch


@dataclass(frozen=True)
class Tower:
    """What a method must know of a tower.

    Attributes:
        grid: Patch rows and columns of an image.
        num_layers: Layers that run.
        has_cls: A class token comes before the patches.
    """

    grid: tuple[int, int]
    num_layers: int
    has_cls: bool

    @property
    def num_patches(self) -> int:
        """Patches of an image, N."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class TowerSite:
    """The rows at one pruning inside the tower.

    Attributes:
        rows: The rows that are pruned, [B, n, C].
        group: Layers since the last pruning, lowest first, with their values; of the same n rows.
        has_cls: Row 0 is the class token, which always stays.
        num_fused: Rows at the end that are no candidates (EViT's fused row).
        sizes: Patches that each row stands for, float32 [B, n]; None while it is one.
        noise: Uniform numbers, one for each row, for methods that draw, [B, n].
    """

    rows: Tensor
    group: tuple[Layer, ...]
    has_cls: bool
    num_fused: int
    sizes: Tensor | None = None
    noise: Tensor | None = None

    @property
    def cls(self) -> int | None:
        """Row of the class token, None if there is none."""
        return 0 if self.has_cls else None

    def choices(self, count: int) -> int:
        """Candidates that stay where `count` tokens are left: a fused row stays too."""
        return count - self.num_fused

    def candidates(self, rows: Tensor) -> Tensor:
        """The part of [B, n, ...] that may be dropped."""
        return rows[:, int(self.has_cls) : rows.shape[1] - self.num_fused]

    def whole(self, keep: Tensor, *, is_fused_kept: bool) -> Tensor:
        """A choice of all rows [B, n], the class token in it, from that of the candidates."""
        always = torch.ones_like(keep[:, :1])
        parts = [always] if self.has_cls else []
        parts += [keep] + [always if is_fused_kept else ~always] * self.num_fused
        return torch.cat(parts, dim=1) if len(parts) > 1 else keep


class Reduction(Protocol):
    """What a method chose: how n rows become fewer."""

    @property
    def moved(self) -> Tensor:
        """New row of each old one, NOWHERE for one that is dropped, int64 [B, n]."""
        ...

    @property
    def num_fused(self) -> int:
        """Rows at the end that are no candidates from here on."""
        ...

    @property
    def sizes(self) -> Tensor | None:
        """Patches that each new row stands for, float32 [B, K]; None if nothing merges."""
        ...

    @property
    def num_wanted(self) -> Tensor | None:
        """Tokens that the method would leave without a bound, int64 [B]; None if it is fixed.

        The class token is not counted. Of the K rows the tokens come first, as many as wanted and
        the bound allow, then padding, which repeats any row; fused rows come last.
        """
        ...

    def rows(self, rows: Tensor) -> Tensor:
        """Apply it to rows, [B, n, C] -> [B, K, C]."""
        ...


@dataclass(frozen=True)
class Kept:
    """Some rows stay as they are.

    Attributes:
        indices: Which, in their new order, int64 [B, K].
        moved: See `Reduction`.
    """

    indices: Tensor
    moved: Tensor
    num_fused: int = 0
    num_wanted: Tensor | None = None
    sizes: None = None

    @classmethod
    def of(cls, site: TowerSite, keep: Tensor, count: int) -> Kept:
        """Keep `count` of the candidates, bool [B, N], and whatever is no candidate."""
        mask = site.whole(keep, is_fused_kept=True)  # [B, n]
        indices = ascending(mask, count + site.has_cls + site.num_fused)
        return cls(indices, places_of(mask), site.num_fused)

    @classmethod
    def up_to(cls, site: TowerSite, keep: Tensor, num_wanted: Tensor, count: int) -> Kept:
        """Keep at most `count` of the candidates, whose number depends on the image.

        Args:
            site: The rows, none of them fused.
            keep: What stays, at least one and at most `count` of each image, bool [B, N].
            num_wanted: How many the rule kept before it was cut to `count`, int64 [B].
            count: The bound.
        """
        mask = site.whole(keep, is_fused_kept=True)  # [B, n]
        indices = ascending(mask, count + site.has_cls)
        indices = indices.clamp(max=mask.shape[1] - 1)  # the padding repeats the last row
        return cls(indices, places_of(mask), num_wanted=num_wanted)

    def rows(self, rows: Tensor) -> Tensor:
        """[B, n, C] -> [B, K, C]."""
        return gather_rows(rows, self.indices)


@dataclass(frozen=True)
class TowerMethod(Catalogued):
    """The base of methods inside the tower: a score for each candidate, and the highest stay.

    A method writes `scores`; one that does more than keep tokens writes `reduce`.

    Attributes:
        reads: "noise", where it draws.
        schedule: Where it prunes, and to how many tokens.
    """

    reads: ClassVar[tuple[str, ...]] = ()

    schedule: TowerSchedule = TowerSchedule()

    @property
    def entry(self) -> Entry:
        """What the catalogue says of the method, inside the tower or else after it."""
        return in_tower(self.name)

    @property
    def is_inside(self) -> bool:
        """It acts between attention and MLP of its layer, as published; else after it."""
        return self.entry.tower.is_inside

    @property
    def is_projected(self) -> bool:
        """It acts on what the projector made; else on rows of the tower."""
        return self.entry.is_projected

    @property
    def is_proportional(self) -> bool:
        """A row counts in attention as often as it has patches."""
        return False

    def places(self, num_patches: int, num_layers: int) -> dict[int, int]:
        """Tokens that each pruning layer leaves at most, the class token not counted."""
        return self.schedule.places(self.name, num_patches, num_layers)

    def scores(self, site: TowerSite) -> Tensor:
        """Score of each candidate, higher is kept, float32 [B, N]."""
        raise NotImplementedError

    def reduce(self, site: TowerSite, count: int) -> Reduction:
        """Choose `count` tokens, fewer than there are: here those that score highest.

        A method whose count adapts to the image chooses at most as many (`Reduction.num_wanted`).
        """
        count = site.choices(count)
        return Kept.of(site, keep_top(self.scores(site), count), count)


class Tokens(NamedTuple):
    """What leaves the tower.

    Attributes:
        rows: Features, [B, n, F * C], the class token first where there is one.
        ids: Raster id of each row, NOWHERE for one that is no patch, int64 [B, n].
        sources: Row that each patch went to, NOWHERE if it was dropped, int64 [B, N].
        num_wanted: Tokens that the method would leave without its bound, the class token not
            counted, int64 [B]; rows after them are padding. None if the count is fixed.
    """

    rows: Tensor
    ids: Tensor
    sources: Tensor
    num_wanted: Tensor | None = None


class Walk:
    """Some images on their way through the tower, and all that a pruning must be applied to.

    Args:
        tower: Measures.
        methods: What prunes, in this order where two act at one place.
        noise: Uniform numbers, one for each patch, [B, N], where a method draws.
    """

    def __init__(
        self, tower: Tower, methods: tuple[TowerMethod, ...], noise: Tensor | None = None
    ) -> None:
        self.tower, self.methods = tower, methods
        self.places = [m.places(tower.num_patches, tower.num_layers) for m in methods]
        if noise is not None and tower.has_cls:
            noise = torch.cat((torch.ones_like(noise[:, :1]), noise), dim=1)
        self.noise = noise  # [B, n]
        self.carried: dict[int, Tensor] = {}  # hidden rows that the projector reads, by layer
        self.num_fused = 0
        self.sources: Tensor | None = None  # [B, N], None while nothing has moved
        self.num_wanted: Tensor | None = None  # [B], of a method whose count adapts
        self._is_padding: Tensor | None = None  # [B, n], None if no row is
        self._group: tuple[Layer, ...] = ()
        self._sizes: Tensor | None = None  # [B, n], None while each row is one patch
        # The layer of the last pruning at the rows that are left, made only where it is asked for.
        self._last: Callable[[], tuple[Layer, ...]] = tuple

    def bias(self) -> Tensor | None:
        """Bias of the next attention, [B, 1, 1, n].

        It is log(size) where attention is proportional, and hides padding.
        """
        bias = None
        if self._sizes is not None and any(method.is_proportional for method in self.methods):
            bias = self._sizes.log()  # [B, n]
        if self._is_padding is not None:
            bias = torch.where(self._is_padding, HIDDEN, 0.0 if bias is None else bias)
        return None if bias is None else bias[:, None, None]

    def mean(self, rows: Tensor) -> Tensor:
        """Mean of rows, padding left out, [B, n, C] -> [B, C]."""
        if self._is_padding is None:
            return rows.sum(1) / rows.shape[1]
        counts = (~self._is_padding).to(rows.dtype)[:, :, None]  # [B, n, 1]
        return (rows * counts).sum(1) / counts.sum(1)

    def remember(self, layer: Layer) -> None:
        """Take note of a layer's queries, keys and values."""
        self._group = (*self._group, layer)

    def prune(self, index: int, rows: Tensor, *, is_inside: bool) -> Tensor:
        """Let the methods prune rows [B, n, C] that act at this place of layer `index`.

        A method's place ends its group of layers also where nothing is left to drop.
        """
        for method, places in zip(self.methods, self.places, strict=True):
            acts_here = method.is_inside == is_inside and not method.is_projected
            if acts_here and index in places:
                rows = self._prune(method, rows, places[index])
        return rows

    @property
    def is_projected(self) -> bool:
        """A method acts on what the projector made."""
        return any(method.is_projected for method in self.methods)

    def prune_projected(self, rows: Tensor) -> Tensor:
        """Let the methods prune that act on what the projector made, [B, n, C]."""
        for method, places in zip(self.methods, self.places, strict=True):
            if method.is_projected:
                rows = self._prune(method, rows, min(places.values()))
        return rows

    def finish(self, rows: Tensor) -> Tokens:
        """Put the features [B, n, F * C] after the last layer into raster order.

        A merged token takes the place of its first patch; fused rows come last, padding after them.
        """
        tower, place = self.tower, torch.arange(rows.shape[1], device=rows.device)  # [n]
        patches = torch.arange(tower.num_patches, device=rows.device)  # [N]
        sources = self._sources(rows)
        mine = sources[:, None] == place[:, None]  # [B, n, N]
        first = torch.where(mine, patches, tower.num_patches).amin(-1)  # [B, n] lowest patch
        first = torch.where(place < int(tower.has_cls), NOWHERE, first)
        is_fused = place >= rows.shape[1] - self.num_fused  # [n]
        first = torch.where(is_fused, tower.num_patches + place, first)  # no two are equal
        if self._is_padding is not None:
            first = torch.where(self._is_padding, 2 * tower.num_patches + 1 + place, first)
        rank = (first[:, None] < first[:, :, None]).float().sum(-1).to(torch.int64)  # [B, n]
        order = torch.zeros_like(rank).scatter(1, rank, place.expand(rank.shape))
        has_no_ids = is_fused | any(method.merges for method in self.methods)
        if self._is_padding is not None:
            has_no_ids = has_no_ids | self._is_padding
        ids = torch.where(has_no_ids, NOWHERE, first).gather(1, order)  # [B, n]
        return Tokens(gather_rows(rows, order), ids, follow(sources, rank), self.num_wanted)

    def _prune(self, method: TowerMethod, rows: Tensor, count: int) -> Tensor:
        if method.adapts or count < rows.shape[1] - self.tower.has_cls:
            return self._apply(method, rows, count)
        self._end_group()
        return rows

    def _apply(self, method: TowerMethod, rows: Tensor, count: int) -> Tensor:
        group = self._group or self._last()
        fused, has_cls = self.num_fused, self.tower.has_cls
        site = TowerSite(rows, group, has_cls, fused, self._sizes, self.noise)
        chosen = method.reduce(site, count)
        self.carried = {k: chosen.rows(each) for k, each in self.carried.items()}
        if self.noise is not None:
            self.noise = chosen.rows(self.noise[:, :, None])[:, :, 0]
        self._group, self._last = (), lambda: (_pruned(group[-1], chosen),)
        self.sources = follow(self._sources(rows), chosen.moved)
        self.num_fused, self._sizes = chosen.num_fused, chosen.sizes
        if chosen.num_wanted is not None:
            self.num_wanted = chosen.num_wanted
            self._is_padding = self._padding(chosen.num_wanted, count)
        return chosen.rows(rows)

    def _padding(self, num_wanted: Tensor, count: int) -> Tensor:
        """Rows that are no tokens, once at most `count` tokens are left, bool [B, n]."""
        has_cls, fused = int(self.tower.has_cls), self.num_fused
        place = torch.arange(count + has_cls, device=num_wanted.device)  # [n]
        stop = num_wanted.clamp(max=count) - fused + has_cls  # [B]
        return (place >= stop[:, None]) & (place < count + has_cls - fused)

    def _end_group(self) -> None:
        """Begin a new group of layers at the same rows."""
        if self._group:
            top = self._group[-1]
            self._group, self._last = (), lambda: (top,)

    def _sources(self, rows: Tensor) -> Tensor:
        """Row of each patch, [B, N]."""
        if self.sources is not None:
            return self.sources
        patches = torch.arange(self.tower.num_patches, device=rows.device)
        return (patches + self.tower.has_cls).expand(rows.shape[0], -1)


def gather_rows(rows: Tensor, indices: Tensor) -> Tensor:
    """Rows [B, n, C] at int64 [B, K], as one gather of whole rows, which runtimes copy at once."""
    batch, count = indices.shape
    images = torch.arange(batch, device=rows.device)[:, None]
    flat = rows.reshape(batch * rows.shape[1], rows.shape[2])
    picked = flat.index_select(0, (indices + images * rows.shape[1]).reshape(-1))
    return picked.reshape(batch, count, rows.shape[2])


def places_of(keep: Tensor) -> Tensor:
    """New place of each row that is kept, NOWHERE of the others, [B, n] -> int64 [B, n]."""
    place = keep.float().cumsum(-1).to(torch.int64) - 1
    return torch.where(keep, place, NOWHERE)


def follow(sources: Tensor, moved: Tensor) -> Tensor:
    """Where patches are after a move: rows [B, N] through the new places [B, n] of rows."""
    there = moved.gather(1, sources.clamp(min=0))
    return torch.where(sources >= 0, there, NOWHERE)


def _pruned(layer: Layer, chosen: Reduction) -> Layer:
    """A layer's states at the rows that are left, for a second pruning at the same place."""

    def of(states: Tensor) -> Tensor:
        batch, heads, rows, head_dim = states.shape
        side_by_side = states.transpose(1, 2).reshape(batch, rows, heads * head_dim)
        fewer = chosen.rows(side_by_side)
        return fewer.reshape(batch, fewer.shape[1], heads, head_dim).transpose(1, 2)

    value = None if layer.value is None else of(layer.value)
    return layer._replace(query=of(layer.query), key=of(layer.key), value=value)
