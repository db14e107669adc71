"""ATP-LLaVA beyond its decisions: the paper's numbers, the thresholds, the training functions."""

import numpy as np
import pytest
import torch

from patchsieve.contract.errors import PatchsieveError, ShapeError
from patchsieve.pruning.decoder.atp import ATP, Scores, hard_keep, self_score
from patchsieve.pruning.decoder.spatial import gather_patches, spatial_scores
from patchsieve.pruning.decoder.thresholds import Thresholds, score_maps
from patchsieve.pruning.decoder.training import (
    atp_loss,
    average_tokens,
    joint_mask,
    soft_mask,
    target_loss,
)
from patchsieve.pruning.rows import attention_rows
from tests.references.attention import attention_map
from tests.support.pruning_sites import make_site

# Sites and survivors of the paper's table 2, with the averages that it reports rounded.
TABLE_2 = [
    ([4, 14, 24], [126, 88, 20], 143.875),
    ([1, 13, 25], [98, 79, 16], 87.875),
    ([1], [130], 143.9375),
    ([4, 14, 24], [162, 54, 18], 144.0),
    ([4, 14, 24], [136, 68, 34], 144.25),
]


def masks_of(counts, num_visual=576, batch=1):
    return [(torch.arange(num_visual) < n).float().expand(batch, -1) for n in counts]


@pytest.mark.parametrize(("sites", "counts", "average"), TABLE_2)
def test_average_tokens_are_those_of_table_2(sites, counts, average):
    assert average_tokens(counts, sites) == average
    assert average_tokens([torch.tensor([float(n)]) for n in counts], sites).item() == average


@pytest.mark.parametrize(
    ("sites", "counts", "loss"),
    [([4, 14, 24], [126, 88, 20], 3.847222), ([1, 13, 25], [98, 79, 16], 2.647569)],
)
def test_atp_loss_is_equation_12(sites, counts, loss):
    assert atp_loss(masks_of(counts), sites).item() == pytest.approx(loss, abs=1e-6)
    assert atp_loss(masks_of(counts, batch=3), sites).item() == pytest.approx(loss, abs=1e-6)


def test_target_loss_is_the_distance_of_the_batch_mean():
    low, high = masks_of([100, 50]), masks_of([200, 150])
    masks = [torch.cat(pair) for pair in zip(low, high, strict=True)]
    average = average_tokens([150, 100], [4, 14])
    assert target_loss(masks, [4, 14], 144).item() == pytest.approx(abs(average - 144), rel=1e-6)
    # The distance is taken after the mean: two samples on either side of the target cancel.
    assert target_loss(masks, [4, 14], average).item() == pytest.approx(0, abs=1e-4)


def test_losses_refuse_sites_that_do_not_pair():
    with pytest.raises(ShapeError):
        atp_loss(masks_of([10]), [4, 14])
    with pytest.raises(ShapeError):
        average_tokens([10, 5], [14, 4])
    with pytest.raises(ShapeError):
        average_tokens([10], [32])


def test_losses_train_the_thresholds():
    torch.manual_seed(0)
    module = Thresholds(hidden=8, grid=(6, 6), initial=(0.12, 0.12))
    site = make_site(0, tokens=36)
    s_self, s_cross, s_red, s_spatial = ATP(module).score(site)
    theta_r, theta_s = module(s_self, s_cross, site.patch_ids, site.grid)
    mask = joint_mask(s_red, s_spatial, theta_r, theta_s)
    (atp_loss([mask], [4], 36) + target_loss([mask], [4], 9, 32, 36)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


@pytest.mark.parametrize(
    ("granularities", "theta", "count"),
    [
        *[
            ((2, 4, 8), *pair)
            for pair in zip(
                (0, 0.2, 0.3, 0.5, 0.7, 0.85, 0.93, 0.96),
                (144, 144, 36, 36, 36, 9, 9, 0),
                strict=True,
            )
        ],
        ((3, 6, 12), 0.5, 64),
        ((3, 6, 12), 0.7, 16),
        ((3, 6, 12), 0.93, 4),
    ],
)
def test_spatial_thresholds_reveal_nested_grids(granularities, theta, count):
    scores = spatial_scores((24, 24), granularities)
    assert int((scores > theta).sum()) == count


@pytest.mark.parametrize(
    ("stride", "score"),
    [
        (2, 0.25),
        (3, 0.666667),
        (4, 0.8125),
        (6, 0.916667),
        (8, 0.953125),
        (12, 0.979167),
        (24, 0.994792),
    ],
)
def test_spatial_score_of_one_stride_is_equation_5(stride, score):
    scores = spatial_scores((24, 24), (stride,))
    assert scores.max().item() == pytest.approx(score, abs=1e-6)
    assert int((scores > 0).sum()) == (24 // stride) ** 2


def test_the_coarsest_set_is_centred_and_gaps_keep_their_scores():
    scores = spatial_scores((24, 24))
    coarsest = (scores > 0.9).reshape(24, 24).nonzero()
    assert set(coarsest.flatten().tolist()) == {3, 11, 19}
    ids = torch.tensor([-1, 0, 25, 75, 575])
    assert gather_patches(scores, ids).tolist() == pytest.approx([0, 0, 0.25, 0.953125, 0.8125])


def test_soft_masks_above_a_half_are_the_hard_rule():
    g = torch.Generator().manual_seed(0)
    s_red, s_spatial = torch.rand(4, 576, generator=g), spatial_scores((24, 24))
    theta_r, theta_s = torch.rand(4, 1, generator=g), torch.rand(4, 1, generator=g)
    for temperature in (10.0, 50.0, 100.0):
        soft = joint_mask(s_red, s_spatial, theta_r, theta_s, temperature)
        assert torch.equal(soft > 0.5, hard_keep(s_red, s_spatial, theta_r, theta_s))
    assert soft_mask(theta_r, theta_r).tolist() == [[0.5]] * 4


def test_the_best_token_stays_when_nothing_passes():
    s_red = torch.tensor([[0.2, 0.9, 0.9], [0.1, 0.1, 0.1]])
    one = torch.ones(2, 1)
    keep = hard_keep(s_red, torch.zeros(3), one, one)
    assert keep.tolist() == [[False, True, False], [True, False, False]]


def test_equal_thresholds_do_not_pass():
    half = torch.full((1, 1), 0.5)
    keep = hard_keep(torch.tensor([[0.5, 0.6]]), torch.tensor([0.5, 0.0]), half, half)
    assert keep.tolist() == [[False, True]]


def test_self_score_counts_unused_pairs_only_when_not_causal():
    site = make_site(3)
    literal, causal = self_score(site), self_score(site, causal=True)
    torch.testing.assert_close(literal[:, 0], causal[:, 0])  # every query is at or after the first
    assert (literal - causal).abs().max() > 0.1


def test_attention_rows_are_rows_of_the_full_map():
    site = make_site(4, cached=5)
    rows = torch.tensor([0, 7, 11])
    got = attention_rows(site.query[:, :, rows], site.key, rows + 5)
    np.testing.assert_allclose(got, attention_map(site)[:, :, rows], atol=1e-6)
    assert (got[:, :, 0, 6:] == 0).all()


def test_thresholds_start_by_keeping_almost_everything():
    torch.manual_seed(0)
    module = Thresholds()
    scores = torch.rand(2, 1, 576)
    theta_r, theta_s = module(scores[0], scores[1], torch.arange(576), (24, 24))
    assert theta_r.shape == theta_s.shape == (1, 1)
    assert 0.05 < theta_r.item() < 0.25
    assert 0.8 < theta_s.item() < 0.95  # the coarsest grids alone


def test_scores_lie_on_the_raster_with_zeros_for_pruned_patches():
    maps = score_maps(
        torch.tensor([[9.0, 1.0, 2.0]]),
        torch.tensor([[8.0, 3.0, 4.0]]),
        torch.tensor([-1, 1, 5]),
        (2, 3),
    )
    assert maps.tolist() == [[[[0, 1, 0], [0, 0, 2]], [[0, 3, 0], [0, 0, 4]]]]


@pytest.mark.parametrize(
    "options", [{"hidden": 0}, {"grid": (0, 24)}, {"activation": "tanh"}, {"initial": (0.1, 1.0)}]
)
def test_threshold_modules_refuse_wrong_options(options):
    with pytest.raises(PatchsieveError, match="what to do"):
        Thresholds(**options)


def test_a_row_without_a_patch_scores_nothing_even_where_patch_0_scores():
    values = torch.tensor([0.7, 0.2])
    assert gather_patches(values, torch.tensor([-1, 0, 1])).tolist() == pytest.approx([0, 0.7, 0.2])


def test_a_part_alone_keeps_its_own_best_where_nothing_passes() -> None:
    red, high = torch.tensor([[0.9, 0.5, 0.1]]), torch.tensor([[2.0]])
    scores = Scores(red, red, red, torch.tensor([0.0, 0.2, 0.2]))
    for parts, best in (("both", 0), ("redundant", 0), ("spatial", 1)):
        keep, margin = ATP(parts=parts).judge(scores, high, high)
        assert keep.tolist() == [[number == best for number in range(3)]]
        assert margin.argmax() == best
