"""A method before the decoder whose number of survivors depends on the image, against NumPy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from patchsieve.contract import names
from tests.export.test_tower_graphs import FEATURES, run_session, tower_session
from tests.support import adaptive
from tests.support.tiny_bundles import pictures
from tests.support.tower_bundles import Towers, method, reference_image, towers

__all__ = ["towers"]


def inside(layer: int, count: int, **options: Any) -> dict[str, Any]:
    return {"encoder": method("above", [layer], [count], **options)}


def after(count: int, **options: Any) -> dict[str, Any]:
    return {"projector": {"method": "above", "params": {"keep": count} | options}}


PLANS = {
    "inside": inside(1, 36),
    "inside, capped": inside(0, 9),
    "after": after(36),
    "after, capped": after(10),
    "after, fused": after(30, fuse=True),
    "after, fused and capped": after(6, fuse=True),
    "inside, one row": inside(2, 4, factor=30.0),
    "after topk": {"encoder": method("topk", [1], [20])} | after(20),
}


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    with adaptive.known():
        yield


@pytest.mark.parametrize("plan", PLANS)
def test_a_graph_gives_the_tokens_of_each_image_and_padding_up_to_the_bound(
    towers: Towers, plan: str
) -> None:
    pixels = towers.model.preprocess(pictures(4))
    found = run_session(tower_session(towers.checkpoint, PLANS[plan], torch.float32), pixels)
    bound = found[names.IMAGE_FEATURES].shape[1]
    counts = np.minimum(found[names.NUM_WANTED], bound)
    for image in range(4):
        features, ids, sources = reference_image(towers.hugging_face, pixels[image], PLANS[plan])
        assert counts[image] == len(features)
        made = found[names.IMAGE_FEATURES][image]
        assert np.isfinite(made).all()
        error = np.abs(made[: len(features)] - features).max() / np.abs(features).max()
        assert error < FEATURES
        np.testing.assert_array_equal(found[names.IMAGE_IDS][image][: len(ids)], ids)
        np.testing.assert_array_equal(found[names.IMAGE_IDS][image][len(ids) :], -1)
        np.testing.assert_array_equal(found[names.IMAGE_SOURCES][image], sources)
    is_capped = (found[names.NUM_WANTED] > bound).any()
    assert is_capped == ("capped" in plan)
    assert is_capped or len(set(counts.tolist())) > 1 or plan.endswith("one row")
