"""The graph of each method between tower and decoder, against NumPy and the targets' parsers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from patchsieve.contract import names
from patchsieve.contract.plan import Plan
from patchsieve.contract.targets import TARGETS
from patchsieve.export.families import family_of
from patchsieve.export.graphs.vision import vision_graph
from patchsieve.export.lowering import lower, lowering
from patchsieve.export.operators import load, problems
from patchsieve.export.plan_graphs import plan_vision
from patchsieve.export.source.checkpoint import read_config
from patchsieve.pruning import catalogue
from patchsieve.pruning.entry import ADAPTS, PROJECTOR
from tests.export.test_tower_graphs import FEATURES, run_session, tower_session
from tests.support.models import save_checkpoint
from tests.support.tower_bundles import SHAPE, Towers, reference_image

METHODS = [
    entry.name
    for entry in catalogue.ENTRIES
    if entry.place == PROJECTOR and not entry.is_grid and not entry.draws
]
FORBIDDEN = {"NonZero", "Compress", "Unique", "Loop", "Scan", "If"}
CHECKED = {name: target.operators for name, target in TARGETS.items() if target.operators}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Towers:
    """A tiny checkpoint of 36 patches, without a bundle."""
    folder = tmp_path_factory.mktemp("after_tower")
    return Towers(save_checkpoint(folder / "checkpoint", **SHAPE), folder / "no bundle")


def plan_of(name: str, keep: int) -> dict[str, Any]:
    return {"projector": {"method": name, "params": {"keep": keep}}}


@pytest.mark.parametrize("keep", [9, 30])
@pytest.mark.parametrize("name", METHODS)
def test_a_graph_gives_the_tokens_that_its_paper_says(made: Towers, name: str, keep: int) -> None:
    pixels = np.random.default_rng(0).standard_normal((3, 3, 48, 48), np.float32)
    found = run_session(tower_session(made.checkpoint, plan_of(name, keep), torch.float32), pixels)
    adapts = names.NUM_WANTED in found
    assert adapts == (catalogue.entry(PROJECTOR, name).leaves == ADAPTS)
    assert found[names.IMAGE_FEATURES].shape[1] == keep
    counts = np.minimum(found[names.NUM_WANTED], keep) if adapts else [keep] * 3
    for image, count in enumerate(counts):
        features, ids, sources = reference_image(
            made.hugging_face, pixels[image], plan_of(name, keep)
        )
        assert len(ids) == count
        ours = found[names.IMAGE_FEATURES][image, :count]
        assert np.abs(ours - features).max() / np.abs(features).max() < FEATURES
        np.testing.assert_array_equal(found[names.IMAGE_IDS][image, :count], ids)
        np.testing.assert_array_equal(found[names.IMAGE_SOURCES][image], sources)
    assert len({tuple(each) for each in found[names.IMAGE_SOURCES].tolist()}) == 3


@pytest.mark.parametrize("name", METHODS)
def test_every_target_takes_every_node_of_a_graph(made: Towers, name: str) -> None:
    config: Any = read_config(made.checkpoint)
    facts = family_of(config).vision(config)
    width = config.text_config.hidden_size
    traced = vision_graph(
        plan_vision(Plan.from_dict(plan_of(name, 9)), facts, width, None, torch.float32)
    )
    assert not {node.op_type for node in traced.graph} & FORBIDDEN
    for target, table in CHECKED.items():
        model = ir.to_proto(lower(traced, lowering(target)))
        assert problems(model, load(table)) == [], target
