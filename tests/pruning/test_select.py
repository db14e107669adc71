"""Keep rules on their own: counts, ties, budgets."""

import numpy as np
import pytest
import torch

from patchsieve.pruning.decoder.normalise import rank
from patchsieve.pruning.select import apply_budget, first_best, keep_top, num_to_keep
from tests.references.atp import normalised
from tests.references.selection import top, within_budget

TIED = [
    [0.0] * 9,
    [1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0],
    [-1.0, -1.0, 2.0, 2.0, 2.0, -3.0, -3.0, 0.0, -0.0],
    [5.0, 4.0, 3.0, 2.0, 1.0, 0.0, -1.0, -2.0, -3.0],
]


@pytest.mark.parametrize("row", TIED)
@pytest.mark.parametrize("number", range(1, 10))
def test_ties_go_to_the_lower_index(row, number):
    scores = torch.tensor([row, row[::-1]])
    expected = np.stack([top(r, number) for r in scores.tolist()])
    assert (keep_top(scores, number).numpy() == expected).all()
    assert (keep_top(scores, torch.tensor(number)).numpy() == expected).all()
    assert (keep_top(scores, torch.tensor([number, number])).numpy() == expected).all()


def test_many_ties_in_long_lists_keep_exact_counts():
    scores = torch.randint(0, 5, (4, 576), generator=torch.Generator().manual_seed(0)).float()
    counts = torch.tensor([1, 64, 200, 576])
    keep = keep_top(scores, counts)
    assert torch.equal(keep.sum(-1), counts)
    for row, score, count in zip(keep, scores, counts.tolist(), strict=True):
        assert (row.numpy() == top(score.tolist(), count)).all()


def test_counts_outside_the_list_are_brought_inside():
    scores = torch.tensor([[3.0, 1.0, 2.0]])
    assert keep_top(scores, torch.tensor([-4])).tolist() == [[True, False, False]]
    assert keep_top(scores, torch.tensor([7])).all()


@pytest.mark.parametrize("row", TIED)
def test_the_first_of_the_best_is_marked(row):
    assert first_best(torch.tensor([row])).tolist() == [top(row, 1).tolist()]


@pytest.mark.parametrize("row", TIED)
@pytest.mark.parametrize("budget", [1, 2, 3, 6, 9, 12])
def test_a_budget_cuts_the_lowest_priority_and_never_adds(row, budget):
    keep = torch.tensor([[False, True, True, False, True, True, True, False, True]])
    cut, num_wanted = apply_budget(keep, torch.tensor([row]), torch.tensor([budget]))
    expected = within_budget(keep[0].numpy(), np.array(row), budget)
    assert (cut[0].numpy() == expected).all()
    assert num_wanted.tolist() == [6]


@pytest.mark.parametrize(
    ("keep_ratio", "num_visual", "number"),
    [(0.5, 576, 288), (0.5, 575, 288), (0.1111, 576, 64), (0.001, 576, 1), (1.0, 1, 1)],
)
def test_a_fraction_rounds_half_up_and_keeps_one(keep_ratio, num_visual, number):
    assert num_to_keep(keep_ratio, num_visual) == number


@pytest.mark.parametrize("row", [*TIED, [2.0]])
def test_ranks_are_even_and_ties_favour_the_lower_index(row):
    got = rank(torch.tensor([row, row[::-1]]))
    for ranks, scores in zip(got, (row, row[::-1]), strict=True):
        expected = normalised(np.array(scores), "rank", False)
        np.testing.assert_allclose(ranks, expected, atol=1e-7)


def test_ranks_of_the_longest_list_are_exact():
    scores = torch.randn(1, 4096, generator=torch.Generator().manual_seed(0))
    order = rank(scores)[0].argsort()
    assert torch.equal(order, scores[0].argsort())
    tied = rank(torch.zeros(1, 4096))[0]
    assert (tied[:-1] > tied[1:]).all()


def test_a_rank_threshold_is_the_pruned_fraction():
    ranks = rank(torch.randn(1, 576, generator=torch.Generator().manual_seed(1)))
    for theta in (0.1, 0.25, 0.5, 0.9):
        assert int((ranks <= theta).sum()) == round(theta * 576)
