"""The true CLIP-L/336 tower, 576 visual tokens, in front of 16 decoder layers of width 1024."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from patchsieve.contract.manifest import Limits
from patchsieve.contract.plan import Plan
from patchsieve.export.exporter import ExportOptions, export
from patchsieve.runtime.model import Model
from tests.references.masked_llava import MaskedLlava, user_message
from tests.support.models import save_checkpoint
from tests.support.tiny_bundles import TinyBundle, largest_error, pictures, recorded_logits
from tests.support.tolerances import LOGITS_FLOAT32, NEAR_TIE

SHAPE = {
    "layers": 16,
    "hidden": 1024,
    "heads": 16,
    "kv_heads": 16,
    "vision_layers": 24,
    "vision_hidden": 1024,
    "image_size": 336,
    "std": 0.04,
}
SITES = [{"layer": 2, "method": "fastv", "params": {"keep_ratio": 0.25}, "budget": None}]
QUESTION, COUNT = "What is on the table?", 64


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Iterator[TinyBundle]:
    folder = tmp_path_factory.mktemp("large")
    checkpoint = save_checkpoint(folder / "checkpoint", patch_size=14, shard_size="400MB", **SHAPE)
    assert len(list(checkpoint.glob("*.safetensors"))) > 2
    options = ExportOptions(
        plan=Plan.from_dict({"sites": SITES}), plan_name="fastv", limits=Limits(128, 64, 1)
    )
    export(str(checkpoint), folder / "bundle", options)
    yield TinyBundle(checkpoint, folder / "bundle")
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def answers(large: TinyBundle) -> dict[str, object]:
    """Hugging Face's answers, so that both models need not be in memory at once."""
    reference = MaskedLlava(large.checkpoint)
    text = reference.prompt([user_message(QUESTION, 1)])
    none = reference.generate(text, pictures(1), COUNT)
    return {"none": none, "fastv": reference.ask(QUESTION, pictures(1), SITES)}


@pytest.mark.slow
def test_true_tower_gets_the_tokens_that_generate_gives(large, answers) -> None:
    expected, expected_logits = answers["none"]
    model = Model(large.path, threads=2, check="size")
    logits = recorded_logits(model)
    result = model.generate(pictures(1), QUESTION, max_new_tokens=COUNT, plan="none")
    assert result.visual_tokens == 576
    error = largest_error(logits, expected_logits)
    print(f"largest error of a logit: {error:.1e}")
    assert error < LOGITS_FLOAT32
    assert result.token_ids == expected


@pytest.mark.slow
def test_true_tower_pruned_equals_the_masked_run(large, answers) -> None:
    expected = answers["fastv"]
    model = Model(large.path, threads=2, check="size")
    logits = recorded_logits(model)
    result = model.generate(pictures(1), QUESTION, max_new_tokens=COUNT)
    (site,), (choice,) = result.sites, expected.choices
    assert len(site.kept) == 144
    differ = set(site.kept) ^ set(choice.kept)
    lowest = min(choice.scores[token] for token in choice.kept)
    assert all(abs(choice.scores[token] - lowest) < NEAR_TIE for token in differ)
    print(f"near-ties: {len(differ)}")
    assert differ or result.token_ids == expected.token_ids
    assert differ or largest_error(logits, expected.logits) < LOGITS_FLOAT32
    assert result.token_ids != answers["none"][0]  # pruning changes the answer
    dropped = result.kv_bytes["per_stage"]
    assert dropped[0]["slots_used"] - dropped[1]["slots_used"] == 576 - 144
