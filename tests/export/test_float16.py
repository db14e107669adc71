"""A bundle in half precision: how far its logits move, and that its cache is half as large."""

from __future__ import annotations

import numpy as np
import pytest

from patchsieve.contract.plan import Plan
from patchsieve.export.exporter import ExportOptions, export
from patchsieve.runtime.model import Model
from tests.support.tiny_bundles import LIMITS, pictures, recorded_logits
from tests.support.tolerances import LOGITS_FLOAT16

ROW = "qwen2"
SITES = [{"layer": 2, "method": "fastv", "params": {"keep_ratio": 0.5}, "budget": None}]


@pytest.fixture(scope="module")
def half(tiny, tmp_path_factory) -> Model:
    path = tmp_path_factory.mktemp("half") / "bundle"
    options = ExportOptions(
        plan=Plan.from_dict({"sites": SITES}),
        plan_name="fastv",
        precision="float16",
        limits=LIMITS,
    )
    export(str(tiny(ROW).checkpoint), path, options)
    return Model(path, threads=1)


def test_half_precision_logits_stay_near_those_of_float32(tiny, half: Model) -> None:
    whole = tiny(ROW).model()
    seen = [recorded_logits(model) for model in (whole, half)]
    for model in (whole, half):
        model.generate(pictures(2), "What is on the table?", max_new_tokens=1, plan="none")
    error = np.abs(seen[0][-1] - seen[1][-1]).max()
    print(f"largest error of a logit: {error:.1e}, deviation of a logit: {seen[0][-1].std():.2f}")
    assert 0 < error < LOGITS_FLOAT16


def test_half_precision_prunes_and_halves_the_cache(tiny, half: Model) -> None:
    image, question = pictures(1), "What is on the table?"
    found = half.generate(image, question, max_new_tokens=8)
    whole = tiny(ROW).model(SITES).generate(image, question, max_new_tokens=8)
    assert [len(site.kept) for site in found.sites] == [8]
    assert 2 * found.kv_bytes["used"] == whole.kv_bytes["used"]
    assert 2 * found.kv_bytes["reserved"] == whole.kv_bytes["reserved"]
