"""Methods between tower and decoder against plain NumPy, image by image, and their laws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from patchsieve import plans
from patchsieve.contract.errors import PatchsieveError
from patchsieve.pruning import counts
from patchsieve.pruning.encoder.evit import EViT
from patchsieve.pruning.encoder.walk import Tokens, Tower, TowerMethod, Walk
from patchsieve.pruning.projector.divprune import most_diverse
from patchsieve.pruning.projector.prumerge import PruMergePlus, outliers
from patchsieve.pruning.rollout import Layer
from patchsieve.pruning.schedules import TowerSchedule
from patchsieve.pruning.table import PROJECTORS
from tests.references import after_tower as reference
from tests.references.tower import Image
from tests.support.tower_states import CONTENTS, heads, states

GRID, HEADS, WIDTH, SIZE, BATCH = (5, 5), 2, 4, 12, 2
PATCHES, SCALE = GRID[0] * GRID[1], 0.5
# Those that act on rows; pooling, which needs the grid, has its test beside the tower's.
ROWS = {name: kind for name, kind in PROJECTORS.items() if issubclass(kind, TowerMethod)}
CASES: dict[str, tuple[type[TowerMethod], dict[str, Any]]] = {
    "topk cosine": (PROJECTORS["topk"], {"score": "cosine"}),
    "visionzip patches alone": (PROJECTORS["visionzip"], {"class_token": False}),
    "dart seven pivots": (PROJECTORS["dart"], {"pivots": 7}),
    "prumerge four neighbours": (PROJECTORS["prumerge"], {"neighbours": 4}),
    "prumerge-plus four neighbours": (PROJECTORS["prumerge-plus"], {"neighbours": 4}),
}
CASES |= {name: (kind, {}) for name, kind in ROWS.items()}
FIXED = [case for case, (kind, _) in CASES.items() if not kind().adapts]


def made(
    case: str, count: int, content: str, has_cls: bool, batch: int = BATCH
) -> tuple[Tokens, list[Image]]:
    """What leaves our walk, and the reference's images."""
    kind, options = CASES[case]
    method = kind(schedule=TowerSchedule(keep=count, layers=(0,)), **options)
    noise = torch.rand(BATCH, PATCHES, generator=torch.Generator().manual_seed(5))[:batch]
    walk = Walk(Tower(GRID, 1, has_cls), (method,), noise)
    num_rows = PATCHES + has_cls
    rows, *layer = (
        states(seed, num_rows, width, content)[:batch]
        for seed, width in zip(range(4), (SIZE, *[HEADS * WIDTH] * 3), strict=True)
    )
    query, key, value = (heads(each, HEADS) * 2 for each in layer)
    walk.remember(Layer(query, key, SCALE, value=value))
    left = walk.prune_projected(walk.prune(0, rows, is_inside=False))
    images = []
    for number in range(batch):
        one = (each[number].double().numpy() for each in (query, key, value))
        image = Image(rows[number].double().numpy(), has_cls, noise[number].double().numpy())
        image.see(*one, SCALE)
        if count < PATCHES or method.adapts:
            reference.METHODS[kind.name](image, count, **options)
        images.append(image)
    return walk.finish(left), images


def counts_of(tokens: Tokens, has_cls: bool) -> list[int]:
    """Rows of each image that are no padding."""
    num_rows = tokens.rows.shape[1]
    if tokens.num_wanted is None:
        return [num_rows] * len(tokens.rows)
    return (tokens.num_wanted + has_cls).clamp(max=num_rows).tolist()


@pytest.mark.parametrize("has_cls", [True, False])
@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("case", CASES)
def test_a_method_equals_its_reference(case: str, content: str, has_cls: bool) -> None:
    for count in (3, 6, 16, 24, 25):
        tokens, images = made(case, count, content, has_cls)
        left = counts_of(tokens, has_cls)
        for number, image in enumerate(images):
            order, ids = image.finish()
            assert left[number] == len(order)
            rows = tokens.rows[number, : len(order)]
            np.testing.assert_allclose(rows, image.rows[order], atol=1e-4)
            np.testing.assert_array_equal(tokens.ids[number, : len(order)], ids)
            assert (tokens.ids[number, len(order) :] == -1).all()
            np.testing.assert_array_equal(tokens.sources[number], image.sources(PATCHES))


@pytest.mark.parametrize("has_cls", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_tokens_leave_in_raster_order_and_an_image_alone_is_what_it_is_among_others(
    case: str, has_cls: bool
) -> None:
    for count in (3, 9, 24, 25):
        tokens, _ = made(case, count, "random", has_cls)
        assert tokens.rows.shape == (BATCH, count + has_cls, SIZE)
        for ids, sources in zip(tokens.ids.tolist(), tokens.sources.tolist(), strict=True):
            patches = [i for i in ids[has_cls:] if i >= 0]
            assert patches and patches == sorted(set(patches))
            assert patches == ids[has_cls : has_cls + len(patches)]  # what is no patch comes last
            assert all(sources[patch] == ids.index(patch) for patch in patches)
        alone, _ = made(case, count, "random", has_cls, batch=1)
        np.testing.assert_array_equal(alone.ids[0], tokens.ids[0])
        np.testing.assert_allclose(alone.rows[0], tokens.rows[0], atol=1e-6)


@pytest.mark.parametrize("case", FIXED)
def test_a_bound_of_all_tokens_changes_nothing(case: str) -> None:
    tokens, _ = made(case, PATCHES, "random", True)
    assert torch.equal(tokens.rows, states(0, PATCHES + 1, SIZE, "random"))
    assert tokens.ids[0].tolist() == [-1, *range(PATCHES)]


@pytest.mark.parametrize("case", CASES)
def test_after_a_method_that_fuses_as_many_are_left_as_were_asked_for(case: str) -> None:
    kind, options = CASES[case]
    method = kind(schedule=TowerSchedule(keep=6, layers=(1,)), **options)
    evit = EViT(TowerSchedule(keep=12, layers=(0,)))
    walk = Walk(Tower(GRID, 2, True), (evit, method), torch.rand(BATCH, PATCHES))
    rows = states(0, PATCHES + 1, SIZE, "random")
    for index in range(2):
        layer = [heads(states(k, rows.shape[1], HEADS * WIDTH, "random"), HEADS) for k in (1, 2, 3)]
        walk.remember(Layer(layer[0], layer[1], SCALE, value=layer[2]))
        for is_inside in (True, False):
            rows = walk.prune(index, rows, is_inside=is_inside)
    tokens = walk.finish(walk.prune_projected(rows))
    assert tokens.rows.shape[1] == tokens.ids.shape[1] == 6 + 1


@pytest.mark.parametrize("projector", ["topk", "divprune"])
def test_a_fused_token_is_not_left_alone(projector: str) -> None:
    plan = plans.build(encoder="evit", encoder_keep=60, projector=projector, projector_keep=1)
    with pytest.raises(PatchsieveError, match="too few tokens"):
        counts.before_decoder(plan, 576, 23)


def test_diverse_tokens_are_chosen_by_hand() -> None:
    angles = torch.tensor([0.0, 10.0, 90.0, 180.0, 185.0, 90.0]).deg2rad()
    rows = torch.stack((angles.cos(), angles.sin()), dim=-1)[None]
    distance = (1 - rows @ rows.transpose(1, 2)).round(decimals=5)
    # The nearest of 0 and of 10 degrees is 10 away, that of 180 and 185 only 5, 90 is there twice:
    # so 0 is first (10 ties with it, and is later), then 180, then 90, all others by distance.
    order = [0, 3, 2, 1, 4, 5]
    for count in range(1, 7):
        chosen = most_diverse(distance, count)[0].nonzero()[:, 0].tolist()
        assert chosen == sorted(order[:count])


def test_tokens_that_are_all_alike_are_chosen_from_the_first_on() -> None:
    for count in (1, 3, 6):
        chosen = most_diverse(torch.zeros(2, 6, 6), count)
        assert chosen.tolist() == [[place < count for place in range(6)]] * 2


@pytest.mark.parametrize("size", [36, 576])
def test_prumerge_plus_adds_patches_at_whole_distances(size: int) -> None:
    counts = range(1, size // 4)
    attention = torch.zeros(len(counts), size)
    for row, count in enumerate(counts):
        attention[row, size - 1 - count : size - 1] = 1.0  # quartiles of 0: these are outliers
    assert outliers(attention).sum(-1).tolist() == list(counts)
    wanted = PruMergePlus().wanted(attention)
    for row, count in enumerate(counts):
        step = max(1, int(int(size / count) / 3))
        expected = {*range(0, size - 1, step), *range(size - 1 - count, size - 1)}
        assert wanted[row].nonzero()[:, 0].tolist() == sorted(expected), count


def test_outliers_are_above_the_upper_whisker_and_one_is_never_missing() -> None:
    values = torch.randn(50, 37, generator=torch.Generator().manual_seed(0)).exp()
    low, high = np.percentile(values.double().numpy(), (25, 75), axis=-1, keepdims=True)
    expected = values.numpy() > high + 1.5 * (high - low)
    assert 0 < expected.sum() < expected.size / 4
    expected[~expected.any(-1), values[~expected.any(-1)].argmax(-1)] = True
    np.testing.assert_array_equal(outliers(values), expected)
    assert outliers(torch.ones(1, 9)).tolist() == [[True] + [False] * 8]
