"""What a decision may read, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor

from patchsieve.contract import names
from patchsieve.contract.errors import ShapeError
from patchsieve.pruning.rows import attention_rows, mean_over


class NextLayer(Protocol):
    """The layer at the site, asked what it would make of the rows before any of them is dropped.

    It computes only what it is asked for. Rows that were cached before this prefill are not among
    its own: the cache of that layer holds what earlier decisions left of them.
    """

    def query(self, rows: Tensor) -> Tensor:
        """Rotated queries of chosen rows, int64 [R], as [B, H, R, D]."""
        ...

    def key(self) -> Tensor:
        """Rotated keys of all rows fed, [B, G, L, D]."""
        ...


@dataclass(frozen=True)
class Site:
    """One image at one pruning site, as the layer before the site left it.

    Letters: B batch, H query heads, G KV heads (G divides H), D head dim, C width, L rows fed in
    this prefill, P rows cached before it, S = P + L, N alive visual tokens of this image, T
    instruction tokens. Row m (0..L-1) lies at key index P + m and sees the keys j <= P + m. The
    sizes L, P, N and T may be dynamic in a trace; N, T and L are at least 1, P may be 0.

    Attributes:
        query: Rotated queries of the rows fed, of layer s-1 for a site s, [B, H, L, D].
        key: Rotated keys of every row present, same layer, [B, G, S, D].
        visual_rows: Rows of this image's alive tokens, ascending, int64 [N].
        text_rows: Rows of the instruction, after the image, int64 [T].
        patch_ids: Raster index of each token on the original grid, -1 for a row that is no patch
            (a CLS row, say); no other id occurs twice; int64 [N].
        grid: Height and width of the original grid, in patches.
        num_visual: Tokens of the image that entered the decoder, 576 in LLaVA-1.5.
        noise: Uniform numbers in [0, 1), for methods that draw, [B, N].
        slot: Key index P of row 0, int64 [1], where `key` is a cache with room after the rows
            present; None if it ends with them. No row sees what comes after its own key.
        value: Values of every row present, of the same layer, [B, G, S, D].
        lower: Queries and keys of the layers below it, the nearest first, shaped as `query` and
            `key`. The same rows were fed there.
        side_row: Row of this image's pseudo-CLS, after all ordinary rows, int64 [1]. It sees the
            keys up to the image's last token, and its own.
        last_row: The last ordinary row, int64 [1]; None if no side row follows it.
        hidden: The rows themselves, after the layer before the site, [B, L, C].
        sizes: Patches that each of the image's tokens stands for, float32 [B, N].
        position_ids: Rotary positions of the rows fed, int64 [L]; with A rotary sections [L, A].
        next_layer: The layer at the site, for methods that judge by its queries and keys.
        embeddings: The rows as they entered the decoder, image features among them, [B, L, C].

    Raises:
        ShapeError: A rank, the heads or the grid cannot be.
    """

    query: Tensor
    key: Tensor
    visual_rows: Tensor
    text_rows: Tensor
    patch_ids: Tensor
    grid: tuple[int, int]
    num_visual: int
    noise: Tensor | None = None
    slot: Tensor | None = None
    value: Tensor | None = None
    lower: tuple[tuple[Tensor, Tensor], ...] = ()
    side_row: Tensor | None = None
    last_row: Tensor | None = None
    hidden: Tensor | None = None
    sizes: Tensor | None = None
    position_ids: Tensor | None = None
    next_layer: NextLayer | None = None
    embeddings: Tensor | None = None

    @classmethod
    def of(
        cls,
        given: Mapping[str, Tensor],
        below: Sequence[int],
        head_dim: int,
        grid: tuple[int, int],
        num_visual: int,
        next_layer: NextLayer | None = None,
    ) -> Site:
        """The site of one image from the tensors of its decision.

        Args:
            given: By the names and in the shapes of `patchsieve.contract.reads`. What no method
                reads may be absent.
            below: Layers that are read beside the one before the site, the nearest first.
            head_dim: D.
            grid: Height and width of the original grid, in patches.
            num_visual: Tokens of the image that entered the decoder.
            next_layer: The layer at the site.
        """

        def heads(rows: Tensor) -> Tensor:
            """[1, L, H * D] -> [1, H, L, D]."""
            return rows.view(1, -1, rows.shape[2] // head_dim, head_dim).transpose(1, 2)

        sizes = given.get(names.SIZES)
        return cls(
            query=heads(given[names.QUERY]),
            key=given[names.KEY],
            value=given.get(names.VALUE),
            lower=tuple((heads(given[names.query(k)]), given[names.key(k)]) for k in below),
            slot=given.get(names.SLOT),
            visual_rows=given[names.VISUAL_ROWS],
            text_rows=given[names.TEXT_ROWS],
            patch_ids=given[names.PATCH_IDS],
            side_row=given.get(names.SIDE_ROW),
            last_row=given.get(names.LAST_ROW),
            grid=grid,
            num_visual=num_visual,
            noise=given.get(names.NOISE),
            hidden=given.get(names.HIDDEN),
            sizes=None if sizes is None else sizes[None],
            position_ids=given.get(names.POSITION_IDS),
            next_layer=next_layer,
            embeddings=given.get(names.EMBEDDINGS),
        )

    def __post_init__(self) -> None:
        """Check what is static; the dynamic sizes are the caller's, a check would freeze them."""
        for name, rank in RANKS.items():
            tensor = getattr(self, name)
            if tensor is not None and tensor.dim() != rank:
                raise ShapeError(
                    f"{name} of a pruning site has the wrong rank",
                    found=tensor.dim(),
                    expected=rank,
                    do="see the shapes in patchsieve.pruning.decoder.site.Site",
                )
        heads, kv_heads = self.query.shape[1], self.key.shape[1]
        if heads % kv_heads or self.query.shape[3] != self.key.shape[3]:
            raise ShapeError(
                "queries and keys of a pruning site do not belong together",
                found=f"{heads} x {self.query.shape[3]} and {kv_heads} x {self.key.shape[3]}",
                expected="KV heads that divide the query heads, and one head dim",
                do="pass query [B, H, L, D] and key [B, G, S, D] of the same layer",
            )
        if min(self.grid) < 1 or self.num_visual < 1:
            raise ShapeError(
                "an image has no patches",
                found=f"grid {self.grid}, num_visual {self.num_visual}",
                expected="positive sizes",
                do="pass the grid and the token count of the image before pruning",
            )

    @property
    def first_key(self) -> Tensor | int:
        """Key index P of row 0."""
        return self.key.shape[2] - self.query.shape[2] if self.slot is None else self.slot


RANKS = {
    "query": 4,
    "key": 4,
    "value": 4,
    "visual_rows": 1,
    "text_rows": 1,
    "patch_ids": 1,
    "noise": 2,
    "side_row": 1,
    "last_row": 1,
    "hidden": 3,
    "embeddings": 3,
    "sizes": 2,
}


class Decision(NamedTuple):
    """What a method decided at one site.

    Attributes:
        keep: Tokens that stay; at least one in each batch row, [B, N] bool.
        scores: What the decision compared, higher is kept, [B, N] float32.
        num_wanted: Tokens that the rule kept before the budget cut in, [B] int64.
        hidden: The image's tokens after merging, [B, N, C]; only those kept count. None if the
            method does not merge.
        moved: Token that each merged into, its own place where it did not, [B, N] int64.
    """

    keep: Tensor
    scores: Tensor
    num_wanted: Tensor
    hidden: Tensor | None = None
    moved: Tensor | None = None


class Method(Protocol):
    """A pruning method of a decoder site: a frozen dataclass with these four.

    Attributes:
        name: How plans and the command line call it.
    """

    name: ClassVar[str]

    @property
    def merges(self) -> bool:
        """Whether its decisions hold `hidden` and `moved`."""
        ...

    @property
    def reads(self) -> tuple[str, ...]:
        """What it uses beside the rows and ids, in the words of `patchsieve.contract.reads`."""
        ...

    def decide(self, site: Site, budget: Tensor) -> Decision:
        """Choose the tokens that stay.

        Args:
            site: The image at the site.
            budget: Most tokens that may stay, int64 0-d or [1]; below 1 counts as 1.

        Returns:
            The decision; `keep` holds at most `budget` tokens.
        """
        ...


def key_slots(site: Site, rows: Tensor) -> Tensor:
    """Key index P + m of each row m, int64 [R]."""
    return rows + site.first_key


def received_attention(site: Site, rows: Tensor) -> Tensor:
    """Mean attention that each visual token receives from chosen rows, over those and all heads.

    Args:
        site: The image at the site.
        rows: Rows that look, 0..L-1, int64 [R].

    Returns:
        Scores, float32 [B, N].
    """
    query_rows = site.query.index_select(2, rows)  # [B, H, R, D]
    attention = attention_rows(query_rows, site.key, key_slots(site, rows))
    attention = _mean_of_rows(attention)
    return attention.index_select(1, key_slots(site, site.visual_rows))  # [B, N]


def received_at_next_layer(site: Site, rows: Tensor) -> Tensor:
    """The same in the layer at the site, over the rows of this prefill.

    Args:
        site: The image at the site.
        rows: Rows that look, 0..L-1, int64 [R].

    Returns:
        Scores, float32 [B, N].

    Raises:
        ShapeError: The site has no next layer.
    """
    if site.next_layer is None:
        raise ShapeError(
            "a decision got no next layer",
            expected="Site.next_layer",
            do='name "next_layer" in the `reads` of the method',
        )
    attention = attention_rows(site.next_layer.query(rows), site.next_layer.key(), rows)
    return _mean_of_rows(attention).index_select(1, site.visual_rows)  # [B, N]


def _mean_of_rows(attention: Tensor) -> Tensor:
    """Mean over heads and rows, [B, H, R, S] -> [B, S]."""
    attention = mean_over(attention, 1)  # [B, R, S]
    return mean_over(attention, 1)
