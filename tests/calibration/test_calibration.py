"""Training sees what a bundle sees: masks, survivors, gradients, and what the heads become."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from patchsieve.calibration.attention import biased
from patchsieve.calibration.encoder import Encoder
from patchsieve.calibration.model import PrunedLlava
from patchsieve.calibration.options import Losses
from patchsieve.calibration.passes import GONE
from patchsieve.calibration.samples import Samples, collate
from patchsieve.calibration.survivors import budgets, geometric_counts
from patchsieve.calibration.thresholds import FixedCount, learned_heads, scores_of
from patchsieve.calibration.train import head_tensors
from patchsieve.cli import main
from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.manifest import Limits
from patchsieve.contract.plan import Plan, SitePlan
from patchsieve.export.exporter import ExportOptions, export
from patchsieve.export.methods import build_method
from patchsieve.export.reuse import reuse
from patchsieve.pruning.decoder.atp import ATP
from patchsieve.pruning.decoder.thresholds import ConstantThresholds, Thresholds
from patchsieve.pruning.decoder.training import average_tokens
from patchsieve.pruning.heads import HeadsConfig, load_heads, save_heads
from patchsieve.runtime.model import Model
from patchsieve.runtime.records import Records
from tests.support.conversations import last_epoch, make_conversations
from tests.support.models import save_checkpoint
from tests.support.tiny_bundles import recorded_logits

SITES, GRID, LAYERS, NUM_VISUAL = (1, 3), (6, 6), 4, 36


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA of 36 visual tokens."""
    return save_checkpoint(tmp_path_factory.mktemp("calibration") / "checkpoint", "vicuna-6x6")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_conversations(tmp_path_factory.mktemp("data"), 12)


@pytest.fixture(scope="module")
def samples(checkpoint: Path, data: Path) -> Samples:
    return Samples(Records(data), Encoder(str(checkpoint)))


def methods(
    theta_r: float | None = None, theta_s: float = 1.0, sites: tuple[int, ...] = SITES
) -> dict[int, ATP]:
    """ATP at each site: constants, or heads of a fixed seed."""
    torch.manual_seed(1)
    return {
        site: ATP(
            thresholds=Thresholds(8, GRID, initial=(0.12, 0.12))
            if theta_r is None
            else ConstantThresholds(theta_r, theta_s)
        )
        for site in sites
    }


def pruned(
    checkpoint: Path, chosen: dict[int, ATP], attention: str = "sdpa", **losses: Any
) -> PrunedLlava:
    llava = LlavaForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation=attention
    )
    return PrunedLlava(llava, chosen, range(NUM_VISUAL), GRID, Losses(**losses))


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


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, cut where the tests prune."""
    path = tmp_path_factory.mktemp("bundle") / "bundle"
    export(str(checkpoint), path, ExportOptions(cuts=SITES, limits=Limits(64, 16, 1)))
    return path


def loaded(bundle: Path, params: dict[str, Any], name: str) -> Model:
    """The bundle with ATP of these parameters at every site."""
    reuse(bundle, Plan(tuple(SitePlan(site, "atp", params) for site in SITES)), name)
    return Model(bundle, threads=1, check="size")


@pytest.mark.parametrize("parts", ("both", "redundant", "spatial"))
def test_the_hard_path_is_the_bundle(
    checkpoint: Path, bundle: Path, samples: Samples, tmp_path: Path, parts: str
) -> None:
    """Survivors of every image and site exactly; the logits behind the question to 1e-4.

    Constants, or heads of one part alone, whose other threshold would let other tokens through.
    """
    params: dict[str, Any] = {"theta_r": 0.45, "theta_s": 0.7}
    chosen = methods(**params)
    if parts != "both":
        torch.manual_seed(3)
        heads = {site: Thresholds(8, GRID, initial=(0.4, 0.3)) for site in SITES}
        for module in heads.values():  # thresholds that differ from image to image
            torch.nn.init.normal_(module.head_s.weight, std=10.0)
        chosen = {site: ATP(module, parts=parts) for site, module in heads.items()}
    model = pruned(checkpoint, chosen)
    if parts != "both":
        config = HeadsConfig(SITES, GRID, 8, scores=scores_of(model))
        save_heads(tmp_path / "heads", config, head_tensors(model))
        params = {"heads": str(tmp_path / "heads")}
    model.is_hard = True
    runtime = loaded(bundle, params, f"parts-{parts}")
    seen = recorded_logits(runtime)
    sizes = set()
    for index in range(len(samples)):
        record, sample = samples.records[index], samples[index]
        question = record.messages[0]["content"][1]["text"]
        seen.clear()
        result = runtime.generate(
            str(record.images[0]), question, max_new_tokens=1, plan=f"parts-{parts}"
        )
        with torch.no_grad():
            logits = model(**collate([sample]))["logits"][0]
        assert model.last is not None
        for site, decided in zip(SITES, result.sites, strict=True):
            assert model.last.survivors(site) == [decided.kept]
            sizes.add(len(decided.kept))
        last = int((sample.labels != -100).nonzero()[0]) - 1
        assert np.abs(logits[last].numpy() - seen[0]).max() < 1e-4
    # Counts adapt, so the equality says something; on 6 x 6 patches grids keep 9 or 1 of them.
    assert len(sizes) > (1 if parts == "spatial" else 3)
    runtime.close()


@pytest.mark.parametrize(("parts", "idle"), [("redundant", "head_s"), ("spatial", "head_r")])
def test_a_part_alone_learns_its_own_threshold(
    checkpoint: Path, data: Path, tmp_path: Path, printed, parts: str, idle: str
) -> None:
    """The option reaches the stored heads, and the other threshold is not touched."""
    out = tmp_path / "heads"
    short = (*TRAIN, "--steps", "4", "--parts", parts, "--initial-theta-r", "0.4")
    calibrate(checkpoint, data, out, *short)
    config, tensors = load_heads(out)
    assert printed() and config.scores["parts"] == parts
    start = (0.4, 0.88 if parts == "redundant" else 0.2)
    before = learned_heads(SITES, GRID, 8, start, parts)
    for site, module in before.items():
        for name in ("head_r", "head_s"):
            same = torch.equal(tensors[f"layer.{site}.{name}.bias"], getattr(module, name).bias)
            assert same == (name == idle), name


@pytest.mark.parametrize(("method", "counts"), [("fixed", [14.0, 7.0]), ("quantile", [14.5, 7.25])])
def test_counts_of_sites_can_be_given(
    checkpoint: Path, data: Path, tmp_path: Path, printed, method: str, counts: list[float]
) -> None:
    out, words = tmp_path / "heads", ",".join(map(str, counts))
    calibrate(checkpoint, data, out, "--method", method, "--counts", words)
    report = printed()
    assert report["target"] == pytest.approx(average_tokens(counts, SITES, LAYERS, NUM_VISUAL))
    for site, count in zip(report["sites"], counts, strict=True):
        assert site["mean tokens"] == pytest.approx(count, abs=0.2)
        assert method == "quantile" or site["fewest"] == site["most"] == site["reserved"] == count


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


def test_geometric_counts_average_to_the_target() -> None:
    counts = geometric_counts(576, (4, 14, 24), 32, 144.0)
    assert average_tokens(counts, (4, 14, 24), 32, 576) == pytest.approx(144.0, abs=1e-6)
    assert counts[0] / 576 == pytest.approx(counts[1] / counts[0])
    with pytest.raises(PatchsieveError, match="cannot reach"):
        geometric_counts(576, (16,), 32, 144.0)


def test_training_goes_on_from_stored_heads_that_judge_alike(
    checkpoint: Path, data: Path, tmp_path: Path, capsys
) -> None:
    """No step: what comes out is what went in. Other options are refused by name."""
    one, two = tmp_path / "one", tmp_path / "two"
    calibrate(checkpoint, data, one, *TRAIN[2:], "--steps", "3")
    calibrate(checkpoint, data, two, *TRAIN[2:], "--steps", "1", "--heads", str(one), *STILL)
    stored, again = (load_file(path / "heads.safetensors") for path in (one, two))
    for name, tensor in stored.items():
        assert torch.equal(tensor, again[name]), name
    argv = ["calibrate", str(checkpoint), "--data", str(data), "-o", str(tmp_path / "three")]
    argv += ["--json", "--sites", "1,3", "--target-tokens", "18", "--heads", str(one)]
    for words, says in ((("--causal",), "scores"), (("--method", "quantile"), "only atp")):
        capsys.readouterr()
        assert main([*argv, "--hidden", "8", *words]) == 2
        assert says in json.loads(capsys.readouterr().out)["error"]


def test_budgets_are_percentiles_of_the_survivors() -> None:
    counts = {2: [3, 9, 4, 5], 1: [10, 10, 10, 12]}
    assert budgets(counts, 100) == (12, 9)
    assert budgets(counts, 75) == (10, 5)


def calibrate(checkpoint: Path, data: Path, out: Path, *more: str) -> None:
    """Run the command."""
    argv = ["calibrate", str(checkpoint), "--data", str(data), "-o", str(out), "--json"]
    argv += ["--sites", "1,3", "--hidden", "8", "--batch-size", "6", *more]
    assert main(argv) == 0


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Callable[[], dict[str, Any]]:
    """The last of the objects that were printed; nothing else may be."""
    return lambda: [json.loads(line) for line in capsys.readouterr().out.splitlines()][-1]


def test_constant_thresholds_keep_the_target_and_still_adapt(
    checkpoint: Path, bundle: Path, data: Path, tmp_path: Path, printed
) -> None:
    out, another = tmp_path / "heads", tmp_path / "heads.partial"
    another.mkdir()  # of a training that was interrupted: not for constants to remove
    calibrate(checkpoint, data, out, "--method", "quantile", "--target-tokens", "18")
    report = printed()
    assert another.is_dir()
    assert report["average_tokens"] == pytest.approx(18, rel=0.02)
    assert all(site["fewest"] < site["most"] for site in report["sites"])
    runtime = loaded(bundle, {"heads": str(out)}, "quantile")
    records, counts = Records(data), {site: [] for site in SITES}
    for index in range(len(records)):
        record = records[index]
        question = record.messages[0]["content"][1]["text"]
        result = runtime.generate(
            str(record.images[0]), question, max_new_tokens=1, plan="quantile"
        )
        for site in result.sites:
            counts[site.layer].append(len(site.kept))
    reserved = {site["layer"]: site["reserved"] for site in report["sites"]}
    assert {site: budgets({site: counts[site]}, 99)[0] for site in SITES} == reserved
    assert runtime.facts.budgets("quantile")[1:] == list(reserved.values())
    runtime.close()


def test_fixed_numbers_are_the_same_for_every_image_and_those_of_the_bundle(
    checkpoint: Path, bundle: Path, data: Path, tmp_path: Path, printed
) -> None:
    """And they are the best by ATP's scores, as the training code ranks them."""
    out = tmp_path / "heads"
    calibrate(checkpoint, data, out, "--method", "fixed", "--target-tokens", "18")
    wanted = [round(n) for n in geometric_counts(NUM_VISUAL, SITES, LAYERS, 18.0)]
    for site, count in zip(printed()["sites"], wanted, strict=True):
        assert site["fewest"] == site["most"] == site["reserved"] == count
    runtime = loaded(bundle, {"heads": str(out)}, "fixed")
    model = pruned(
        checkpoint,
        {
            site: ATP(thresholds=FixedCount(count, GRID))
            for site, count in zip(SITES, wanted, strict=True)
        },
    )
    model.is_hard = True
    records, encode = Records(data), Encoder(str(checkpoint))
    for index in range(len(records)):
        record = records[index]
        question = record.messages[0]["content"][1]["text"]
        result = runtime.generate(str(record.images[0]), question, max_new_tokens=1, plan="fixed")
        with torch.no_grad():
            model(**collate([encode(record)]))
        kept = {site.layer: list(site.kept) for site in result.sites}
        assert kept == {site: model.last.survivors(site)[0] for site in SITES}
    runtime.close()


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


STILL = ("--learning-rate", "0")
TRAIN = (
    "--steps",
    "150",
    "--learning-rate",
    "0.01",
    "--lambda-target",
    "1",
    "--target-tokens",
    "18",
)


def heads_of(folder: Path) -> dict[str, torch.Tensor]:
    from patchsieve.pruning.heads import load_heads

    return load_heads(folder)[1]


def test_training_reaches_its_target_on_held_out_data(
    checkpoint: Path, tmp_path: Path, printed
) -> None:
    data = make_conversations(tmp_path / "data", 24)
    held_out = make_conversations(tmp_path / "held-out", 12, seed=9)
    calibrate(checkpoint, data, tmp_path / "heads", *TRAIN, "--held-out", str(held_out))
    report = printed()
    assert report["average_tokens"] == pytest.approx(18, rel=0.05)
    lines = (tmp_path / "heads" / "log.jsonl").read_text().splitlines()
    assert {"loss", "average_tokens", "tokens_1", "theta_r_3"} <= set(json.loads(lines[0]))
    assert not (tmp_path / "heads.partial").exists()


def test_training_again_and_training_resumed_give_the_same_heads(
    checkpoint: Path, data: Path, tmp_path: Path, printed, monkeypatch
) -> None:
    short = ("--steps", "6", "--save-steps", "3", *TRAIN[2:])
    calibrate(checkpoint, data, tmp_path / "one", *short)
    calibrate(checkpoint, data, tmp_path / "two", *short)
    from patchsieve.calibration import train

    class Cut(Exception):
        """A power cut."""

    step = train.HeadsTrainer.training_step

    def stop_at_five(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 4:
            raise Cut
        return step(self, *args, **kwargs)

    monkeypatch.setattr(train.HeadsTrainer, "training_step", stop_at_five)
    with pytest.raises(Cut):
        calibrate(checkpoint, data, tmp_path / "three", *short)
    assert not (tmp_path / "three").exists()
    monkeypatch.setattr(train.HeadsTrainer, "training_step", step)
    calibrate(checkpoint, data, tmp_path / "three", *short, "--resume")
    printed()
    one, two, three = (heads_of(tmp_path / name) for name in ("one", "two", "three"))
    assert one.keys() == two.keys() == three.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name
        assert torch.allclose(tensor, three[name], atol=1e-6), name


def test_a_training_says_where_it_is_in_lines_for_people(
    checkpoint: Path, data: Path, tmp_path: Path, capsys
) -> None:
    """Not in Python's dictionaries; stdout holds the result alone."""
    argv = ["calibrate", str(checkpoint), "--data", str(data), "-o", str(tmp_path / "heads")]
    argv += ["--sites", "1,3", "--hidden", "8", "--batch-size", "2", *TRAIN, "--steps", "10"]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert "{" not in out + err and "it/s" not in out
    (line,) = [line for line in err.splitlines() if "step 10 of 10, loss" in line]
    assert line.startswith("100% training") and line.endswith("tokens on average")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--sites", "3,1"), "ascending layers"),
        (("--sites", "4"), "ascending layers"),
        (("--resume",), "nothing to resume"),
        (("--data", "no-such-file"), "cannot read the data"),
        (("--target-tokens", "3"), "cannot reach"),
        (("--target-tokens", "3", "--method", "quantile"), "cannot reach"),
        (("--percentile", "101"), "is a percentage"),
        (("--percentile", "0"), "is a percentage"),
        (("--method", "quantile", "--normalisation", "none"), "no constant threshold"),
        (("--method", "fixed", "--normalisation", "rank"), "ranks tie"),
        (("--method", "quantile", "--resume"), "only a training is resumed"),
        (("--counts", "14,7"), "one budget"),
        (("--method", "quantile", "--parts", "spatial"), "no spatial pruning"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_in_one_line(
    checkpoint: Path, data: Path, tmp_path: Path, capsys, more: tuple[str, ...], says: str
) -> None:
    argv = ["calibrate", str(checkpoint), "--data", str(data), "-o", str(tmp_path / "heads")]
    code = main([*argv, "--sites", "1,3", "--target-tokens", "18", "--json", *more])
    captured = capsys.readouterr()
    assert code == 2 and says in json.loads(captured.out)["error"]
    assert "Traceback" not in captured.err and not (tmp_path / "heads").exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ((), "one budget"),
        (("--counts", "14,7"), "find the number"),
        (("--counts", "14", "--method", "fixed"), "do not pair"),
        (("--counts", "14,7.5", "--method", "fixed"), "whole number"),
        (("--counts", "14,15", "--method", "fixed"), "do not rise"),
        (("--counts", "37,3", "--method", "quantile"), "do not rise"),
        (("--counts", "14,0", "--method", "fixed"), "above 0"),
    ],
)
def test_numbers_that_cannot_be_kept_are_refused(
    checkpoint: Path, data: Path, tmp_path: Path, capsys, more: tuple[str, ...], says: str
) -> None:
    argv = ["calibrate", str(checkpoint), "--data", str(data), "-o", str(tmp_path / "heads")]
    assert main([*argv, "--sites", "1,3", "--json", *more]) == 2
    assert says in capsys.readouterr().out


def test_constants_have_no_parts_to_choose() -> None:
    with pytest.raises(PatchsieveError, match="belongs to learned heads"):
        build_method(SitePlan(1, "atp", {"theta_r": 0.5, "theta_s": 0.5, "parts": "spatial"}))


def test_a_missing_image_is_an_error_or_counted_as_asked(checkpoint: Path, tmp_path: Path) -> None:
    path = make_conversations(tmp_path / "data", 3)
    (tmp_path / "data" / "1.png").unlink()
    encoder = Encoder(str(checkpoint))
    with pytest.raises(PatchsieveError, match=r"record 1 names an image that is not there"):
        Samples(Records(path), encoder)
    left = Samples(Records(path), encoder, skip_missing=True)
    assert (len(left), left.missing) == (2, 1)


def test_a_system_turn_is_trained_with_and_judges_no_token(checkpoint: Path, data: Path) -> None:
    record, encoder = Records(data)[1], Encoder(str(checkpoint))
    words = "What is on the table? Is it red?"
    system = {"role": "system", "content": [{"type": "text", "text": words}]}
    plain, begun = encoder(record), encoder(replace(record, messages=[system, *record.messages]))
    extra = len(begun.input_ids) - len(plain.input_ids)
    assert extra > 5 and begun.labels[extra:].tolist() == plain.labels.tolist()
    assert (begun.text[0] - extra).tolist() == plain.text[0].tolist()
    assert begun.input_ids[begun.text[0]].tolist() == plain.input_ids[plain.text[0]].tolist()


def test_an_image_after_the_first_question_is_refused(checkpoint: Path, data: Path) -> None:
    record = Records(data)[0]
    later = [*record.messages[:2], record.messages[0], record.messages[1]]
    twice = replace(record, messages=later, images=record.images * 2)
    with pytest.raises(PatchsieveError, match="after its first question"):
        Encoder(str(checkpoint))(twice)


@pytest.mark.slow
def test_two_processes_train_one_set_of_heads(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "heads"
    # On a CPU `accelerate launch --num_processes 2` starts a single process.
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = ["-m", "patchsieve", "calibrate", str(checkpoint), "--data", str(data)]
    command += ["-o", str(out), "--sites", "1,3", "--hidden", "8", "--json", "--batch-size", "3"]
    done = subprocess.run(
        [*launch, *command, *TRAIN], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["average_tokens"] == pytest.approx(18, rel=0.1)
    assert (out / "heads.safetensors").is_file()
    assert last_epoch(out) == 150 * 2 * 3 / 12  # steps, processes, batch, records
