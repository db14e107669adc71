"""What calibration counts and writes is what a bundle does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from patchsieve.calibration.model import PrunedLlava
from patchsieve.calibration.samples import Samples, collate
from patchsieve.calibration.survivors import budgets, geometric_counts
from patchsieve.calibration.thresholds import FixedCount, constant_heads, go_on_from, scores_of
from patchsieve.calibration.train import head_tensors
from patchsieve.contract.manifest import Limits
from patchsieve.contract.plan import Plan, SitePlan
from patchsieve.export.exporter import ExportOptions, export
from patchsieve.export.reuse import reuse
from patchsieve.pruning.decoder.atp import ATP
from patchsieve.pruning.decoder.thresholds import Thresholds
from patchsieve.pruning.heads import HeadsConfig, save_heads
from patchsieve.runtime.model import Model
from tests.support.calibration import (
    GRID,
    LAYERS,
    NUM_VISUAL,
    SITES,
    calibrate,
    pruned,
)
from tests.support.tiny_bundles import recorded_logits


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, cut where the tests prune."""
    path = tmp_path_factory.mktemp("bundle") / "bundle"
    export(str(checkpoint), path, ExportOptions(cuts=SITES, limits=Limits(64, 16, 1)))
    return path


def loaded(bundle: Path, name: str, heads: dict[int, Path]) -> Model:
    """The bundle with the heads of each site as its default plan."""
    sites = tuple(SitePlan(site, "atp", {"heads": str(path)}) for site, path in heads.items())
    reuse(bundle, Plan(sites), name)
    return Model(bundle, threads=1, check="size")


def survivors_of_both(
    model: PrunedLlava, runtime: Model, samples: Samples
) -> dict[int, list[list[int]]]:
    """Survivors of every sample at each site, the same in training code and bundle.

    The logits after the question are equal to 1e-4.
    """
    model.is_hard = True
    seen = recorded_logits(runtime)
    kept: dict[int, list[list[int]]] = {site: [] for site in SITES}
    for index in range(len(samples)):
        record, sample = samples.records[index], samples[index]
        question = record.messages[0]["content"][1]["text"]
        seen.clear()
        result = runtime.generate(str(record.images[0]), question, max_new_tokens=1)
        with torch.no_grad():
            logits = model(**collate([sample]))["logits"][0]
        assert model.last is not None
        for site, decided in zip(SITES, result.sites, strict=True):
            assert model.last.survivors(site) == [decided.kept]
            kept[site].append(decided.kept)
        last = int((sample.labels != -100).nonzero()[0]) - 1
        assert np.abs(logits[last].numpy() - seen[0]).max() < 1e-4
    runtime.close()
    return kept


@pytest.mark.slow
def test_heads_of_one_rule_alone_keep_in_a_bundle_what_they_keep_in_training(
    checkpoint: Path, bundle: Path, samples: Samples, tmp_path: Path
) -> None:
    """One rule at each site; its other threshold would let other tokens through."""
    torch.manual_seed(3)
    chosen = {
        site: ATP(Thresholds(8, GRID, initial=(0.4, 0.3)), parts=parts)
        for site, parts in zip(SITES, ("redundant", "spatial"), strict=True)
    }
    for method in chosen.values():  # thresholds that differ from image to image
        torch.nn.init.normal_(method.thresholds.head_s.weight, std=10.0)
    model = pruned(checkpoint, chosen)
    heads = {site: tmp_path / method.parts for site, method in chosen.items()}
    for site, path in heads.items():
        scores = scores_of(model) | {"parts": chosen[site].parts}
        save_heads(path, HeadsConfig(SITES, GRID, 8, scores=scores), head_tensors(model))
    kept = survivors_of_both(model, loaded(bundle, "parts", heads), samples)
    # Counts adapt, so the equality says something; on 6 x 6 patches grids keep 9 or 1 of them.
    counts = [len({len(survivors) for survivors in kept[site]}) for site in SITES]
    assert counts[0] > 3 and counts[1] > 1


def test_constant_thresholds_keep_the_target_and_adapt_in_the_bundle_too(
    checkpoint: Path, bundle: Path, data: Path, samples: Samples, tmp_path: Path, printed
) -> None:
    out, another = tmp_path / "heads", tmp_path / "heads.partial"
    another.mkdir()  # of a training that was interrupted: not for constants to remove
    calibrate(checkpoint, data, out, "--method", "quantile", "--target-tokens", "18")
    report = printed()
    assert another.is_dir()
    assert report["average_tokens"] == pytest.approx(18, rel=0.02)
    assert all(site["fewest"] < site["most"] for site in report["sites"])
    model = pruned(checkpoint, {site: ATP(constant_heads(GRID)) for site in SITES})
    go_on_from(out, model)
    runtime = loaded(bundle, "quantile", dict.fromkeys(SITES, out))
    reserved = {site["layer"]: site["reserved"] for site in report["sites"]}
    assert runtime.facts.budgets("quantile")[1:] == list(reserved.values())
    kept = survivors_of_both(model, runtime, samples)
    for site in report["sites"]:
        counts = [len(survivors) for survivors in kept[site["layer"]]]
        assert (min(counts), max(counts)) == (site["fewest"], site["most"])
        assert budgets({0: counts}, 99) == (site["reserved"],)


def test_fixed_numbers_are_the_same_for_every_image_and_those_of_the_bundle(
    checkpoint: Path, bundle: Path, data: Path, samples: Samples, tmp_path: Path, printed
) -> None:
    """And they are the best by ATP's scores, as the training code ranks them."""
    out = tmp_path / "heads"
    calibrate(checkpoint, data, out, "--method", "fixed", "--target-tokens", "18")
    wanted = [round(n) for n in geometric_counts(NUM_VISUAL, SITES, LAYERS, 18.0)]
    for site, count in zip(printed()["sites"], wanted, strict=True):
        assert site["fewest"] == site["most"] == site["reserved"] == count
    fixed = zip(SITES, wanted, strict=True)
    model = pruned(checkpoint, {site: ATP(FixedCount(count, GRID)) for site, count in fixed})
    runtime = loaded(bundle, "fixed", dict.fromkeys(SITES, out))
    kept = survivors_of_both(model, runtime, samples)
    assert [{len(survivors) for survivors in kept[site]} for site in SITES] == [{n} for n in wanted]
