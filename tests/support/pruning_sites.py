"""Seeded pruning sites, random and adversarial."""

from dataclasses import dataclass

import torch

from patchsieve.pruning.decoder.site import Site


@dataclass(frozen=True)
class MadeLayer:
    """A layer at the site: fixed matrices over the hidden rows, without norm and angles."""

    hidden: torch.Tensor  # [B, L, C]
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def query(self, rows):
        """[B, H, R, D]."""
        return self._heads(self.hidden[:, rows], self.num_heads, 1)

    def key(self):
        """[B, G, L, D]."""
        return self._heads(self.hidden, self.num_kv_heads, 2)

    def _heads(self, rows, heads, seed):
        g = torch.Generator().manual_seed(seed)
        weight = torch.randn(rows.shape[-1], heads * self.head_dim, generator=g)
        states = rows.float() @ weight
        return states.reshape(*rows.shape[:2], heads, self.head_dim).transpose(1, 2)


@dataclass(frozen=True)
class MadeSite(Site):
    """A site whose next layer follows from its hidden rows, also after `dataclasses.replace`."""

    def __post_init__(self):
        super().__post_init__()
        sizes = self.query.shape[1], self.key.shape[1], self.query.shape[3]
        made = None if self.hidden is None else MadeLayer(self.hidden, *sizes)
        object.__setattr__(self, "next_layer", made)


def make_site(
    seed=0,
    *,
    batch=1,
    heads=4,
    kv_heads=2,
    head_dim=8,
    cached=0,
    system=3,
    tokens=20,
    text=4,
    after=2,
    other_image=0,
    grid=(6, 6),
    with_cls=False,
    values="normal",
):
    """One image at a site: cached rows, then system | tokens | other image | text | after | side.

    The side row is the image's; methods that know none must not notice it. `values` is "normal",
    "small" (integers, so that ties are exact) or "zero".
    """
    g = torch.Generator().manual_seed(seed)
    rows = system + tokens + other_image + text + after

    def states(num_heads, num_rows):
        shape = (batch, num_heads, num_rows, head_dim)
        if values == "normal":
            return torch.randn(shape, generator=g)
        if values == "small":
            return torch.randint(-1, 2, shape, generator=g).float()
        return torch.zeros(shape)

    fed, present = rows + 1, cached + rows + 1
    query, key, value = states(heads, fed), states(kv_heads, present), states(kv_heads, present)
    lower = tuple((states(heads, fed), states(kv_heads, present)) for _ in range(2))
    patches = grid[0] * grid[1]
    ids = torch.randperm(patches, generator=g)[: tokens - with_cls].sort().values
    if with_cls:
        ids = torch.cat((torch.tensor([-1]), ids))
    noise = torch.rand(batch, tokens, generator=g)
    if values == "small":
        noise = (noise * 4).floor() / 4
    elif values == "zero":
        noise = torch.zeros_like(noise)
    return MadeSite(
        query=query,
        key=key,
        visual_rows=torch.arange(system, system + tokens),
        text_rows=torch.arange(rows - text - after, rows - after),
        patch_ids=ids,
        grid=grid,
        num_visual=patches,
        noise=noise,
        value=value,
        lower=lower,
        side_row=torch.tensor([rows]),
        last_row=torch.tensor([rows - 1]),
        hidden=torch.randn(batch, fed, 12, generator=g),
        sizes=torch.randint(1, 6, (batch, tokens), generator=g).float(),
        embeddings=torch.randn(batch, fed, 12, generator=g),
    )


SITES = {
    "random": {},
    "ties": {"values": "small"},
    "many ties": {"values": "small", "head_dim": 4, "heads": 1, "kv_heads": 1},
    "all equal": {"values": "zero"},
    "one token": {"tokens": 1},
    "one text row, nothing after": {"text": 1, "after": 0},
    "one head": {"heads": 1, "kv_heads": 1},
    "every head its own keys": {"kv_heads": 4},
    "cached rows": {"cached": 7},
    "another image in between": {"other_image": 9},
    "no system prompt": {"system": 0},
    "whole grid": {"tokens": 36},
    "wide grid": {"grid": (4, 9), "tokens": 30},
    "tall grid": {"grid": (8, 5), "tokens": 33},
    "class row": {"with_cls": True},
    "two in a batch": {"batch": 2},
}
