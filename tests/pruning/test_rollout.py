"""Attention rollout as a chain of vectors equals the product of whole maps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from patchsieve.pruning.rollout import Layer, column_sums, importance, rollout_row, value_norms
from tests.references import rollout as reference

SCALE = 0.25


def group(seed: int, count: int, rows: int, *, kv_heads: int = 4, batch: int = 2) -> list[Layer]:
    """Layers with attention far from flat."""
    generator = torch.Generator().manual_seed(seed)

    def states(heads: int) -> torch.Tensor:
        return 2 * torch.randn(batch, heads, rows, 16, generator=generator)

    return [Layer(states(4), states(kv_heads), SCALE) for _ in range(count)]


def maps(layers: list[Layer]) -> list[np.ndarray]:
    """The layers' maps, whole."""
    return [
        reference.head_mean(
            layer.query.double().numpy(),
            layer.key.double().numpy(),
            layer.scale,
            None if layer.mask is None else layer.mask.numpy(),
        )
        for layer in layers
    ]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("identity_first", [False, True])
@pytest.mark.parametrize(("count", "rows"), [(1, 9), (2, 9), (3, 37), (6, 5), (3, 1)])
def test_a_chain_of_vectors_is_a_row_of_the_product(count, rows, identity_first, kv_heads) -> None:
    layers = group(count, count, rows, kv_heads=kv_heads)
    whole = reference.rollout(maps(layers), identity_first)
    for row in {0, rows - 1}:
        for given in (row, torch.tensor([row])):
            found = rollout_row(layers, given, identity_first=identity_first)
            np.testing.assert_allclose(found, whole[:, row], atol=1e-6)
    found = rollout_row(layers, None, identity_first=identity_first)
    np.testing.assert_allclose(found, whole.mean(1), atol=1e-6)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)


def test_a_causal_group_is_rolled_out_under_its_mask() -> None:
    rows = 11
    mask = torch.ones(rows, rows, dtype=torch.bool).tril()
    layers = [layer._replace(mask=mask) for layer in group(0, 3, rows, kv_heads=2)]
    whole = reference.rollout(maps(layers))
    np.testing.assert_allclose(rollout_row(layers, rows - 1), whole[:, rows - 1], atol=1e-6)
    np.testing.assert_allclose(rollout_row(layers, 3)[:, 4:], 0, atol=0)
    unmasked = [layer._replace(mask=None) for layer in layers]
    assert not np.allclose(rollout_row(unmasked, rows - 1), whole[:, rows - 1], atol=1e-3)


def test_the_identity_of_the_lowest_layer_counts() -> None:
    layers = group(1, 3, 9)
    plain, added = rollout_row(layers), rollout_row(layers, identity_first=True)
    assert (plain - added).abs().max() > 1e-3


def test_column_sums_keep_the_weights_and_the_images_apart() -> None:
    (layer,) = group(2, 1, 13, batch=3)
    weights = torch.rand(3, 13)
    found = column_sums(weights, layer.query, layer.key, SCALE)
    np.testing.assert_allclose(found.sum(-1), weights.sum(-1), rtol=1e-5)
    for image in range(3):
        one = slice(image, image + 1)
        alone = column_sums(weights[one], layer.query[one], layer.key[one], SCALE)
        np.testing.assert_allclose(alone, found[one], atol=1e-6)


@pytest.mark.parametrize("heads", ["concatenated", "summed"])
def test_scores_weigh_attention_by_value(heads) -> None:
    generator = torch.Generator().manual_seed(3)
    row, value = torch.rand(2, 7, generator=generator), torch.randn(2, 4, 7, 16)
    value[0, :, 2] = 0  # a value without length
    found = importance(row, value_norms(value, heads))
    expected = reference.scores(row.double().numpy(), value.double().numpy(), heads)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    nothing = importance(row, value_norms(torch.zeros_like(value), heads))
    assert (nothing == 0).all()
