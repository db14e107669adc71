"""The masked model: what masks weigh, which rows leave, where gradients reach."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from patchsieve.calibration.attention import biased
from patchsieve.calibration.encoder import Encoder
from patchsieve.calibration.model import PrunedLlava
from patchsieve.calibration.passes import GONE
from patchsieve.calibration.samples import Samples, collate
from patchsieve.calibration.thresholds import FixedCount
from patchsieve.pruning.decoder.atp import ATP
from patchsieve.runtime.records import Records
from tests.support.calibration import (
    GRID,
    LAYERS,
    SITES,
    methods,
    pruned,
)
from tests.support.models import save_checkpoint


def test_a_bias_that_travels_as_a_column_is_added_to_the_logits() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 7, 16), torch.randn(2, 2, 7, 16)
    bias = torch.tensor([0.0, -1.5, GONE, 0.25, 0.0, -20.0, 2.0]).expand(2, 7)
    out = torch.nn.functional.scaled_dot_product_attention(
        *biased(query, key, value, bias, 16**-0.5), scale=16**-0.5, enable_gqa=True
    )
    logits = query @ key.repeat_interleave(2, 1).transpose(-1, -2) / 4 + bias[:, None, None]
    expected = logits.softmax(-1) @ value.repeat_interleave(2, 1)
    assert out.shape[-1] % 8 == 0
    assert torch.allclose(out[..., :16], expected, atol=1e-5)  # sums in another order
    assert not out[..., 16:].any()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masks_of_one_leave_the_model_as_it_is(
    checkpoint: Path, samples: Samples, attention: str
) -> None:
    batch = collate([samples[0], samples[1]])
    llava = LlavaForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation=attention
    )
    own = {k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        expected = llava(**own).logits
        kept = pruned(checkpoint, methods(-1.0), attention)(**batch)["logits"]
        some = pruned(checkpoint, methods(0.5), attention)(**batch)["logits"]
    rows = batch["attention_mask"].bool()
    assert torch.allclose(kept[rows], expected[rows], atol=1e-4)
    assert not torch.allclose(some[rows], expected[rows], atol=1e-2)


def test_a_sample_is_no_other_beside_a_longer_one(checkpoint: Path, samples: Samples) -> None:
    model = pruned(checkpoint, methods(0.4))
    model.is_hard = True
    alone = collate([samples[1]])
    beside = collate([samples[0], samples[1]])
    assert beside["input_ids"].shape[1] > alone["input_ids"].shape[1]
    with torch.no_grad():
        one = model(**alone)["logits"][0]
        first = {site: record.alive[0] for site, record in model.last.sites.items()}
        two = model(**beside)["logits"][1]
    assert torch.allclose(one, two[: len(one)], atol=1e-4)
    for site, record in model.last.sites.items():
        assert torch.equal(record.alive[1], first[site])


@pytest.mark.parametrize(
    ("row", "attention"),
    [("vicuna-6x6", "sdpa"), ("vicuna-6x6", "eager"), ("mistral", "sdpa"), ("qwen2", "eager")],
)
def test_rows_that_leave_the_decoder_are_rows_that_weigh_nothing(
    row: str, data: Path, attention: str, tmp_path: Path
) -> None:
    """One image, none and two side by side; thresholds that images pass in different numbers."""
    pictures = sorted(data.parent.glob("*.png"))[:2]
    turns = [
        {"from": "human", "value": "<image>\n<image>\nWhich is it?"},
        {"from": "gpt", "value": "It is the second."},
    ]
    both = {"id": "both", "image": [str(path) for path in pictures], "conversations": turns}
    (tmp_path / "both.json").write_text(json.dumps([both]))
    checkpoint = save_checkpoint(tmp_path / "checkpoint", row)
    encode, records = Encoder(str(checkpoint)), Records(data)
    found = [encode(records[0]), encode(records[1]), encode(Records(tmp_path / "both.json")[0])]
    llava = LlavaForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation=attention
    )
    model = PrunedLlava(llava, methods(0.45, 0.7), encode.patch_ids.tolist(), encode.grid)
    model.is_hard = True
    batch = collate(found)
    results = []
    for drops in (False, True):
        model.drops = drops
        with torch.no_grad():
            logits = model(**batch)["logits"]
        sites = model.last.sites.values()
        results.append((logits, [record.alive for record in sites], model.last.rows(LAYERS - 1)))
    (masked, alive, all_rows), (dropped, same, rows) = results
    assert all_rows is None and rows.shape[1] < batch["input_ids"].shape[1]
    assert all(torch.equal(a, b) for a, b in zip(alive, same, strict=True))
    assert len({int(kept.sum()) for kept in alive[-1]}) > 1
    is_left = torch.zeros(len(found), masked.shape[1] + 1, dtype=torch.bool).scatter(1, rows, True)
    is_left = is_left[:, :-1]
    assert is_left.sum() == batch["attention_mask"].sum() - sum((~kept).sum() for kept in same[-1:])
    assert torch.allclose(masked[is_left], dropped[is_left], atol=1e-4)


def test_the_gradient_reaches_both_heads_and_nothing_of_the_model(
    checkpoint: Path, samples: Samples
) -> None:
    model = pruned(checkpoint, methods(), target_tokens=10.0)
    model(**collate([samples[0], samples[1]]))["loss"].backward()
    for name, parameter in model.thresholds.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for parameter in model.llava.parameters())


def test_gradient_checkpointing_changes_no_gradient(checkpoint: Path, samples: Samples) -> None:
    batch, found = collate([samples[0], samples[1]]), []
    for is_saved in (False, True):
        model = pruned(checkpoint, methods(), target_tokens=10.0).train()
        if is_saved:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        model(**batch)["loss"].backward()
        found.append([p.grad.clone() for p in model.thresholds.parameters()])
    for plain, recomputed in zip(*found, strict=True):
        assert torch.allclose(plain, recomputed, atol=1e-6)


def test_a_batch_without_images_trains_nothing_and_does_not_fail(checkpoint: Path) -> None:
    model = pruned(checkpoint, methods())
    ids = torch.tensor([[1, 5, 6, 7]])
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)["loss"].backward()
    assert all(not p.grad.any() for p in model.thresholds.parameters())


def test_of_equal_scores_a_fixed_number_keeps_as_many_the_lowest_first(
    checkpoint: Path, samples: Samples
) -> None:
    """A decoder that looks nowhere in particular: every score is 0.5."""
    fixed = {
        site: ATP(thresholds=FixedCount(count, GRID))
        for site, count in zip(SITES, (9, 2), strict=True)
    }
    model = pruned(checkpoint, fixed)
    for layer in model.llava.model.language_model.layers:
        torch.nn.init.zeros_(layer.self_attn.k_proj.weight)
    model.is_hard = True
    with torch.no_grad():
        model(**collate([samples[0]]))
    assert model.last is not None
    for site, count in zip(SITES, (9, 2), strict=True):
        assert model.last.sites[site].s_red[0].unique().tolist() == [0.5]
        assert model.last.survivors(site) == [list(range(count))]
