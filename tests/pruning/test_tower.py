"""Methods inside the vision tower against whole-map NumPy, image by image, and their laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from patchsieve.contract.errors import PatchsieveError, ShapeError
from patchsieve.pruning.catalogue import in_tower
from patchsieve.pruning.encoder.evit import EViT
from patchsieve.pruning.encoder.gtp import GTP
from patchsieve.pruning.encoder.random import RandomPatches
from patchsieve.pruning.encoder.tome import ToMe
from patchsieve.pruning.encoder.topk import TopK
from patchsieve.pruning.encoder.walk import Tower, Walk
from patchsieve.pruning.projector.pooling import Pooling
from patchsieve.pruning.rollout import Layer
from patchsieve.pruning.schedules import TowerSchedule
from patchsieve.pruning.table import ENCODERS
from tests.references import tower as reference
from tests.support.tower_states import BATCH, CONTENTS, heads, states

GRID, LAYERS, HEADS, WIDTH, SIZE = (5, 5), 6, 2, 4, 12
SCALE = 0.5
CASES = {
    "gtp": (GTP, {}),
    "gtp identity": (GTP, {"identity_first": True}),
    "gtp summed": (GTP, {"value_heads": "summed"}),
    "gtp single": (GTP, {"fusion": "single"}),
    "gtp mean": (GTP, {"fusion": "mean"}),
    "gtp max": (GTP, {"fusion": "max"}),
    "gtp multiply": (GTP, {"fusion": "multiply"}),
    "topk": (TopK, {}),
    "topk cosine": (TopK, {"score": "cosine"}),
    "random": (RandomPatches, {}),
    "evit": (EViT, {}),
    "tome": (ToMe, {}),
    "tome plain": (ToMe, {"proportional": False}),
}
# A method without a row of its own is tried as it is.
CASES |= {name: (kind, {}) for name, kind in ENCODERS.items() if name not in CASES}


def walk_both(case: str, schedule: TowerSchedule, content: str, has_cls: bool):
    """Our walk through a tower of made-up layers, and the reference's, rows and all."""
    kind, options = CASES[case]
    method = kind(schedule=schedule, **options)
    patches = GRID[0] * GRID[1]
    noise = torch.rand(BATCH, patches, generator=torch.Generator().manual_seed(5))
    walk = Walk(Tower(GRID, LAYERS, has_cls), (method,), noise)
    rows = states(0, patches + has_cls, SIZE, content)
    images = [
        reference.Image(each.double().numpy(), has_cls, drawn.double().numpy())
        for each, drawn in zip(rows, noise, strict=True)
    ]
    walk.carried[0] = rows
    for image in images:
        image.carried = [image.rows]
    places = method.places(patches, LAYERS)
    options = {k: v for k, v in options.items() if k != "proportional"}
    for index in range(LAYERS):
        layer = [
            heads(states(3 * index + k, rows.shape[1], HEADS * WIDTH, content), HEADS) * 2
            for k in (1, 2, 3)
        ]
        bias = walk.bias()
        for number, image in enumerate(images):
            if bias is not None:
                np.testing.assert_allclose(bias[number, 0, 0], np.log(image.sizes), atol=1e-6)
            image.see(*(each[number].double().numpy() for each in layer), SCALE)
        walk.remember(Layer(layer[0], layer[1], SCALE, value=layer[2]))
        left = rows.shape[1] - has_cls
        for is_inside in (True, False):
            rows = walk.prune(index, rows, is_inside=is_inside)
        # At a place that drops nothing a method without merging still ends a group of layers.
        merges = case.startswith(("evit", "tome"))
        if places.get(index, left) < left or (index in places and not merges):
            for image in images:
                reference.METHODS[kind.name](image, places[index], **options)
    return walk, rows, images


@pytest.mark.parametrize("has_cls", [True, False])
@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("case", CASES)
def test_a_method_equals_its_reference(case: str, content: str, has_cls: bool) -> None:
    schedules = [TowerSchedule(keep=6), TowerSchedule(keep=16, group_layers=2)]
    if case.startswith(("gtp", "topk", "random")):
        schedules.append(TowerSchedule(keep=1, layers=(LAYERS - 1,)))
        schedules.append(TowerSchedule(counts=(25, 9), group_layers=3))  # the first drops nothing
    for schedule in schedules:
        walk, rows, images = walk_both(case, schedule, content, has_cls)
        tokens = walk.finish(rows)
        carried = walk.carried[0]
        for number, image in enumerate(images):
            order, ids = image.finish()
            expected = np.full(len(ids), -1) if case.startswith("tome") else ids
            np.testing.assert_allclose(tokens.rows[number], image.rows[order], atol=1e-5)
            np.testing.assert_allclose(carried[number], image.carried[0], atol=1e-5)
            if content == "equal" and case.startswith("gtp"):
                continue  # column sums that only rounding tells apart; "zero" has exact ties
            np.testing.assert_array_equal(tokens.ids[number], expected)
            np.testing.assert_array_equal(tokens.sources[number], image.sources(25))


@pytest.mark.parametrize("has_cls", [True, False])
@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("keep", [2, 9, 13, 24, 25])
def test_any_number_is_left_in_raster_order(name: str, keep: int, has_cls: bool) -> None:
    schedule = TowerSchedule(keep=keep, curve="geometric")
    walk, rows, _ = walk_both(name, schedule, "random", has_cls)
    tokens = walk.finish(rows)
    assert tokens.rows.shape == (BATCH, keep + has_cls, SIZE)
    for ids, sources in zip(tokens.ids.tolist(), tokens.sources.tolist(), strict=True):
        patches = [i for i in ids if i >= 0]
        assert patches == sorted(set(patches))
        went = {s for s in sources if s >= 0}
        assert went == set(range(has_cls, keep + has_cls))  # every token has a patch behind it
        if in_tower(name).merges:
            assert not patches and min(sources) >= 0
            first = [sources.index(row) for row in sorted(went)]
            assert first == sorted(first)
        else:
            assert all(sources[patch] == ids.index(patch) for patch in patches)
    if keep == 25 and not in_tower(name).merges:  # nothing dropped: nothing changed
        assert tokens.ids[0, has_cls:].tolist() == list(range(25))
        assert torch.equal(tokens.rows, states(0, 25 + has_cls, SIZE, "random"))


def test_proportional_attention_grows_with_a_tokens_patches() -> None:
    walk, _, images = walk_both("tome", TowerSchedule(keep=6), "random", True)
    bias = walk.bias()
    assert bias is not None and bias.shape == (BATCH, 1, 1, 7)
    np.testing.assert_allclose(bias.exp().sum(-1).squeeze(), 26, rtol=1e-5)  # the patches and CLS
    assert walk_both("tome plain", TowerSchedule(keep=6), "random", True)[0].bias() is None


def test_two_methods_follow_one_another_at_the_last_layer() -> None:
    last = TowerSchedule(keep=4, layers=(LAYERS - 1,))
    methods = (GTP(schedule=TowerSchedule(keep=9)), TopK(schedule=last))
    walk = Walk(Tower(GRID, LAYERS, True), methods)
    rows = states(0, 26, SIZE, "random")
    for index in range(LAYERS):
        layer = [
            heads(states(index, rows.shape[1], HEADS * WIDTH, "random"), HEADS) for _ in range(3)
        ]
        walk.remember(Layer(layer[0], layer[1], SCALE, value=layer[2]))
        rows = walk.prune(index, rows, is_inside=False)
    assert rows.shape[1] == 5


@pytest.mark.parametrize("grid", [(6, 6), (5, 5), (24, 24), (7, 4)])
@pytest.mark.parametrize("keep", [1, 4, 9, 16])
def test_pooling_is_adaptive_average_pooling(grid: tuple[int, int], keep: int) -> None:
    rows = torch.randn(2, grid[0] * grid[1], 3)
    side = int(keep**0.5)
    whole = rows.transpose(1, 2).reshape(2, 3, *grid)
    expected = torch.nn.functional.adaptive_avg_pool2d(whole, side).flatten(2).transpose(1, 2)
    method = Pooling(keep=keep)
    np.testing.assert_allclose(method.pool(rows, grid), expected, atol=1e-6)
    sources = method.sources(grid)
    assert set(sources) == set(range(keep)) and len(sources) == grid[0] * grid[1]
    ones = torch.zeros(1, grid[0] * grid[1], 1)
    ones[0, 0] = 1
    assert method.pool(ones, grid)[0, sources[0], 0] > 0


def test_schedules_of_the_papers() -> None:
    gtp = TowerSchedule(keep=120).places("gtp", 576, 23)
    assert list(gtp) == [2, 5, 8, 11, 14, 17, 20, 22]
    assert list(gtp.values()) == [473, 389, 320, 263, 216, 178, 146, 120]
    assert TowerSchedule().places("gtp", 576, 23) == gtp
    for group, number in ((2, 12), (3, 8), (4, 6), (6, 4), (23, 1), (99, 1)):  # table 8
        assert len(TowerSchedule(group_layers=group).places("gtp", 576, 23)) == number
    topk = TowerSchedule().places("topk", 576, 23)
    assert len(topk) == 23 and topk[22] == 64 and topk[0] == 554
    assert list(TowerSchedule().places("evit", 576, 12)) == [3, 6, 9]
    for keep in (16, 63, 257, 512):
        for name in ENCODERS:
            if (name, keep) == ("tome", 16):  # from 40 to 16 in the last layer: half stay at least
                with pytest.raises(PatchsieveError, match="every other token"):
                    TowerSchedule(keep=keep).places(name, 576, 23)
                continue
            assert TowerSchedule(keep=keep).places(name, 576, 23).popitem()[1] == keep


@pytest.mark.parametrize(
    "make",
    [
        lambda: TowerSchedule(keep=0),
        lambda: TowerSchedule(keep=True),
        lambda: TowerSchedule(keep=3, counts=(3,)),
        lambda: TowerSchedule(counts=("3",)),
        lambda: TowerSchedule(curve="steep"),
        lambda: TowerSchedule(keep=26).places("topk", 25, 6),
        lambda: TowerSchedule(layers=(6,)).places("topk", 25, 6),
        lambda: TowerSchedule(layers=(3, 2)).places("topk", 25, 6),
        lambda: TowerSchedule(counts=(9, 10), layers=(1, 2)).places("topk", 25, 6),
        lambda: TowerSchedule(counts=(9,), layers=(1, 2)).places("topk", 25, 6),
        lambda: EViT(TowerSchedule(keep=1)).places(25, 6),
        lambda: ToMe(TowerSchedule(keep=2, layers=(5,))).places(25, 6),
        lambda: GTP(fusion="median"),
        lambda: GTP(value_heads="first"),
        lambda: TopK(score="dot"),
        lambda: Pooling(keep=5).side((6, 6)),
        lambda: Pooling(keep=49).side((6, 6)),
        lambda: Pooling(place="inside"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(make) -> None:
    with pytest.raises(PatchsieveError) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_random_without_noise_is_refused() -> None:
    walk = Walk(Tower(GRID, 1, True), (RandomPatches(TowerSchedule(keep=3)),))
    walk.remember(Layer(*[heads(states(1, 26, HEADS * WIDTH, "random"), HEADS)] * 2, SCALE))
    with pytest.raises(ShapeError, match="no noise"):
        walk.prune(0, states(0, 26, SIZE, "random"), is_inside=False)
