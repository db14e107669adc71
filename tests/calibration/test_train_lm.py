"""Full fine-tuning: what is trained, what is written, and a bundle that answers as training did."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaConfig, LlavaForConditionalGeneration

from patchsieve.calibration import attention, train
from patchsieve.calibration import checkpoint as calibrate_module
from patchsieve.calibration import run as run_module
from patchsieve.calibration.encoder import Encoder
from patchsieve.calibration.model import PrunedLlava
from patchsieve.calibration.options import Losses, TrainingOptions
from patchsieve.calibration.samples import Sample, Samples, collate
from patchsieve.cli import main
from patchsieve.pruning.decoder.atp import ATP
from patchsieve.pruning.decoder.thresholds import Thresholds
from patchsieve.pruning.heads import load_heads
from patchsieve.runtime.model import Model
from patchsieve.runtime.records import Records
from tests.support.conversations import last_epoch, make_conversations
from tests.support.models import save_checkpoint

FRONT_MATTER = "---\nlicense: some-licence\ntags:\n- a---b\n---\n"
GRID, NUM_VISUAL, COUNT = (6, 6), 36, 8
# Few steps at high rates: they move every weight, and the thresholds into the scores.
TRAIN = ("--hidden", "8", "--batch-size", "3", "--target-tokens", "16", "--lambda-target", "1")
TRAIN += ("--learning-rate", "0.005", "--lm-learning-rate", "1e-3", "--percentile", "80")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA of 36 visual tokens and three layers, with a card and a licence."""
    folder = tmp_path_factory.mktemp("checkpoint")
    path = save_checkpoint(folder / "checkpoint", "vicuna-6x6", layers=3)
    (path / "README.md").write_text(f"{FRONT_MATTER}\n# A model\n")
    (path / "LICENSE.txt").write_text("Be kind.\n")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_conversations(tmp_path_factory.mktemp("data"), 6)


def calibrate(checkpoint: Path, data: Path, out: Path, *more: str) -> int:
    """Run the command."""
    argv = ["calibrate", str(checkpoint), "--data", str(data), "-o", str(out), "--json"]
    return main([*argv, "--train-lm", *TRAIN, *more])


def pruned(
    checkpoint: Path, encoder: Encoder, methods: dict[int, ATP] | None = None, **more: Any
) -> PrunedLlava:
    """The model with fresh heads at layers 1 and 2, all of it trained."""
    torch.manual_seed(1)
    if methods is None:
        methods = {site: ATP(Thresholds(8, GRID, initial=(0.12, 0.12))) for site in (1, 2)}
    llava = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    parts = encoder.trained.rotary_sections
    given = {"sections": parts, "train_lm": True} | more
    return PrunedLlava(llava, methods, range(NUM_VISUAL), GRID, Losses(10.0), **given)


# What is trained.


@pytest.mark.parametrize("is_saved", (False, True), ids=("kept", "checkpointed"))
def test_the_gradient_reaches_heads_language_model_and_projector_but_not_the_tower(
    checkpoint: Path, data: Path, is_saved: bool
) -> None:
    encoder = Encoder(str(checkpoint), "grid2d")
    samples, found = Samples(Records(data), encoder), []
    for checkpointing in {False, is_saved}:
        model = pruned(checkpoint, encoder).train()
        if checkpointing:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        model(**collate([samples[0], samples[1]]))["loss"].backward()
        found.append(dict(model.named_parameters()))
    for name, parameter in found[0].items():
        is_tower = "vision_tower" in name
        assert (parameter.grad is None) == is_tower, name
        assert is_tower or parameter.grad.abs().sum() > 0, name
    for name, parameter in found[-1].items():
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, found[0][name].grad, atol=1e-5), name


def test_only_answers_are_learned(checkpoint: Path, data: Path) -> None:
    encoder = Encoder(str(checkpoint), "grid2d")
    record, tokenizer = Records(data)[0], encoder.prompts.tokenizer
    labels = encoder(record).labels
    said = [m["content"][0]["text"] for m in record.messages if m["role"] == "assistant"]
    assert len(said) == 2
    text = tokenizer.decode(labels[labels != -100].tolist(), skip_special_tokens=True)
    assert text.split() == " ".join(said).split()


def test_a_batch_without_images_gives_every_trained_part_a_gradient(
    checkpoint: Path, data: Path
) -> None:
    """Else several processes wait for one another."""
    model = pruned(checkpoint, Encoder(str(checkpoint)))
    ids = torch.tensor([[1, 5, 6, 7]])
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)["loss"].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_with_hard_masks_the_budget_alone_reaches_the_thresholds(
    checkpoint: Path, data: Path
) -> None:
    """The language loss is that of the bundle, and its gradient the decoder's alone."""
    encoder = Encoder(str(checkpoint))
    samples, found = Samples(Records(data), encoder), {}
    for weight in (0.0, 1.0):
        model = pruned(checkpoint, encoder).train()
        model.losses, model.is_hard = Losses(5.0, 0.0, weight), True
        loss = model(**collate([samples[0], samples[1]]))["loss"]
        loss.backward()
        assert model.last is not None
        assert not all(record.alive.all() for record in model.last.sites.values())
        found[weight] = loss, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert found[1.0][0] > found[0.0][0] + 1  # tokens above the target
    for name, gradient in found[0.0][1].items():
        other = found[1.0][1][name]
        if name.startswith("thresholds."):
            assert not gradient.any() and other.any(), name
        else:
            assert gradient.any() and torch.equal(gradient, other), name


@pytest.mark.parametrize("positions", ("grid2d", "original"))
def test_rows_that_leave_the_decoder_take_no_gradient_with_them(
    checkpoint: Path, data: Path, positions: str
) -> None:
    """Dropped with every layer run twice, and masked."""
    encoder = Encoder(str(checkpoint), positions)
    samples, found = Samples(Records(data), encoder), []
    for drops in (False, True):
        model = pruned(checkpoint, encoder).train()
        model.is_hard, model.drops = True, drops
        if drops:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        model(**collate([samples[0], samples[1]]))["loss"].backward()
        assert (model.last.rows(2) is not None) == drops
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], atol=1e-5), name


@pytest.mark.parametrize("train_lm", (True, False))
def test_heads_and_language_model_have_rates_of_their_own(
    checkpoint: Path, data: Path, tmp_path: Path, train_lm: bool
) -> None:
    encoder = Encoder(str(checkpoint))
    model = pruned(checkpoint, encoder, train_lm=train_lm)
    options = TrainingOptions(learning_rate=3e-4, lm_learning_rate=7e-6)
    samples = Samples(Records(data), encoder)
    made = train.HeadsTrainer(model, samples, options, tmp_path).create_optimizer()
    rates = {id(p): group["lr"] for group in made.param_groups for p in group["params"]}
    heads = {id(p) for p in model.thresholds.parameters()}
    assert all(rates[one] == 3e-4 for one in heads)
    others = {id(p) for p in model.parameters() if p.requires_grad} - heads
    assert bool(others) == train_lm and all(rates[one] == 7e-6 for one in others)
    assert len(rates) == len(heads | others)
    assert all(group["weight_decay"] == 0 for group in made.param_groups)


def test_positions_of_a_sample_do_not_change_beside_a_longer_one(
    checkpoint: Path, data: Path
) -> None:
    encoder = Encoder(str(checkpoint), "grid2d", "2d")
    samples = Samples(Records(data), encoder)
    model = pruned(checkpoint, encoder)
    with torch.no_grad():
        alone = model(**collate([samples[1]]))["logits"][0]
        beside = model(**collate([samples[0], samples[1]]))["logits"][1]
        flat = model(**collate([replace(samples[1], position_ids=None)]))["logits"][0]
    assert len(beside) > len(alone)
    assert torch.allclose(alone, beside[: len(alone)], atol=1e-4)
    assert not torch.allclose(alone, flat, atol=1e-2)


def test_positions_on_several_axes_are_kept_from_the_kernel() -> None:
    seen: dict[str, Any] = {}

    def kernel(module: Any, query: Any, key: Any, value: Any, mask: Any, **given: Any) -> Any:
        seen.update(given)
        return query, None

    module = torch.nn.Module()
    module.layer_idx = 0  # type: ignore[assignment]
    rows = torch.zeros(1, 2, 3, 8)
    wrapped = attention._with_pass(kernel)
    wrapped(module, rows, rows, rows, None, position_ids=torch.zeros(1, 3, 3))
    assert "position_ids" not in seen
    wrapped(module, rows, rows, rows, None, position_ids=torch.zeros(1, 3))
    assert "position_ids" in seen


# A trained checkpoint, and its bundle.


@dataclass
class Run:
    """A training: the model as it was in memory at the end, and what was written.

    Attributes:
        model: The model.
        checkpoint: What the command wrote.
        report: What the command printed.
    """

    model: PrunedLlava
    checkpoint: Path
    report: dict[str, Any]


@pytest.fixture(scope="module")
def trained(
    checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Run]:
    """Trains once what a name says.

    "grid2d" has positions on a grid, in float32; "original" has them in a row, in bfloat16, with
    less memory; "hard" is a hard finish of "grid2d", which is not told of its positions.
    """
    made: dict[str, Run] = {}
    measure = run_module.measure

    def train(name: str) -> Run:
        folder, models = tmp_path_factory.mktemp(name), []

        def keep(model: PrunedLlava, *rest: Any) -> Any:
            models.append(model)
            return measure(model, *rest)

        start, more = checkpoint, ("--sites", "1,2", "--steps", "12")
        if name == "original":
            more = ("--sites", "2", "--target-tokens", "28", "--steps", "12", "--bf16")
            more += ("--gradient-checkpointing", "--positions", "original")
        if name == "hard":
            start, more = once("grid2d").checkpoint, (*more[:2], "--steps", "10", "--hard")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run_module, "measure", keep)
            said = capture(lambda: calibrate(start, data, folder / "trained", *more))
        return Run(models[0].eval(), folder / "trained", json.loads(said))

    def once(name: str) -> Run:
        if name not in made:
            made[name] = train(name)
        return made[name]

    return once


@pytest.fixture(params=("grid2d", "original", "hard"))
def run(request: pytest.FixtureRequest, trained: Callable[[str], Run]) -> Run:
    """Each training in turn."""
    return trained(request.param)


@pytest.fixture(scope="module")
def bundle(trained: Callable[[str], Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hard finish, exported from its checkpoint alone."""
    out = tmp_path_factory.mktemp("bundle") / "bundle"
    small = ("--max-text-tokens", "64", "--max-new-tokens", "16", "--quiet")
    argv = ["export", str(trained("hard").checkpoint), "-o", str(out), "--method", "atp"]
    assert main([*argv, *small]) == 0
    return out


def capture(call: Callable[[], int]) -> str:
    """The last line that a command prints, which must succeed."""
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert call() == 0
    return out.getvalue().splitlines()[-1]


@torch.no_grad()
def hard_answer(model: PrunedLlava, sample: Sample) -> tuple[list[int], dict[int, list[int]]]:
    """Greedy tokens behind the first question, and survivors, as the training code decides."""
    model.is_hard = True
    start = int((sample.labels != -100).nonzero()[0])
    rows, places, said = sample.input_ids[:start], sample.position_ids, []
    places = None if places is None else places[:start]
    for _ in range(COUNT):
        batch = collate([replace(sample, input_ids=rows, labels=rows, position_ids=places)])
        said.append(int(model(**batch)["logits"][0, -1].argmax()))
        if said[-1] == model.config.image_token_id:  # Hugging Face takes it for an image
            break
        rows = torch.cat((rows, torch.tensor(said[-1:])))
        places = None if places is None else torch.cat((places, places[-1:] + 1))
    assert model.last is not None
    return said, {site: model.last.survivors(site)[0] for site in model.methods}


@pytest.mark.slow
def test_the_bundle_answers_as_the_hard_path_of_training_does(
    trained: Callable[[str], Run], bundle: Path, data: Path, tmp_path: Path
) -> None:
    """Tokens and survivors of every sample, of the data and of pictures that were held out."""
    held_out = make_conversations(tmp_path / "held-out", 6, seed=9)
    run, runtime = trained("hard"), Model(bundle, threads=1)
    encoder = Encoder(str(run.checkpoint))
    config, _ = load_heads(run.checkpoint / "heads")
    run.model.budgets = dict(zip(config.sites, config.budgets, strict=True))
    assert list(config.sites) == runtime.facts.plans[runtime.facts.default_plan].layers
    sizes = set()
    for records in (Records(data), Records(held_out)):
        for index in range(len(records)):
            record = records[index]
            said, survivors = hard_answer(run.model, encoder(record))
            question = record.messages[0]["content"][1]["text"]
            result = runtime.generate(
                str(record.images[0]), question, max_new_tokens=COUNT, ignore_eos=True
            )
            assert {site.layer: site.kept for site in result.sites} == survivors
            assert result.token_ids[: len(said)] == said
            sizes |= {len(kept) for kept in survivors.values()}
    assert min(sizes) < NUM_VISUAL and len(sizes) > 1  # it prunes, and adapts
    runtime.close()


def test_the_checkpoint_decides_and_answers_as_the_model_in_memory(run: Run, data: Path) -> None:
    """As whoever exports it reads it: weights, positions and thresholds, all in float32."""
    encoder = Encoder(str(run.checkpoint))
    config, tensors = load_heads(run.checkpoint / "heads")
    chosen = {site: ATP(Thresholds(config.hidden, GRID)) for site in config.sites}
    again = pruned(run.checkpoint, encoder, methods=chosen).eval()
    train.load_heads_into(again, tensors)
    samples = Samples(Records(data), encoder)
    batch, found = collate([samples[0], samples[1], samples[2]]), []
    for model in (run.model, again):
        model.is_hard, model.budgets = True, {}
        with torch.no_grad():
            logits = model(**batch)["logits"]
        assert model.last is not None
        found.append((logits, {site: model.last.survivors(site) for site in config.sites}))
    assert found[0][1] == found[1][1]
    assert torch.allclose(found[0][0], found[1][0], atol=1e-4)  # eager or SDPA


def test_the_checkpoint_is_whole_and_says_its_positions(run: Run, checkpoint: Path) -> None:
    rule = run.report["position_rule"]
    config = json.loads((run.checkpoint / "config.json").read_text())
    before = json.loads((checkpoint / "config.json").read_text())
    assert config["patchsieve"]["position_rule"] == rule
    assert config["patchsieve"]["rotary_sections"] == ([2, 3, 3] if rule == "grid2d" else [])
    for each in (config, before):  # weights are written in float32, and nothing else is new
        for part in (each, each["text_config"], each["vision_config"]):
            assert part.pop("dtype", "float32") == "float32"
        each.pop("transformers_version")
    assert config == before | {"patchsieve": config["patchsieve"]}
    for name in ("tokenizer.json", "processor_config.json", "chat_template.jinja", "LICENSE.txt"):
        assert (run.checkpoint / name).read_bytes() == (checkpoint / name).read_bytes()
    assert LlavaConfig.from_pretrained(run.checkpoint).patchsieve["heads"] == "heads"
    weights, old = (load_file(p / "model.safetensors") for p in (run.checkpoint, checkpoint))
    assert weights.keys() == old.keys()
    for name, tensor in weights.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, old[name]) == ("vision_tower" in name), name
    assert not run.checkpoint.with_name("trained.partial").exists()
    first = json.loads((run.checkpoint / "log.jsonl").read_text().splitlines()[0])
    assert {"loss", "average_tokens"} <= set(first)


def test_the_card_of_the_checkpoint_follows_notes_and_its_licence_goes_on(
    trained: Callable[[str], Run], bundle: Path
) -> None:
    """A note for each training."""
    card = (trained("hard").checkpoint / "README.md").read_text()
    assert card.startswith(f"{FRONT_MATTER}> Trained by `patchsieve calibrate`")
    assert card.endswith("\n\n# A model\n") and card.count("> Trained by") == 2
    assert "\nlicense: some-licence\n" in (bundle / "README.md").read_text()


def test_a_hard_finish_needs_thresholds_and_keeps_positions(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*more: str) -> str:
        sites = ("--sites", "1,2", "--hard", *more)
        assert calibrate(checkpoint, data, tmp_path / "out", *sites) == 2
        assert not list(tmp_path.iterdir())
        return capsys.readouterr().err

    said = refused()
    assert str(checkpoint) in said and "--heads" in said
    assert "--positions" in refused("--positions", "original")
    argv = ["calibrate", str(checkpoint), "--data", str(data), "-o", str(tmp_path / "out")]
    assert main([*argv, *TRAIN, "--sites", "1,2", "--hard"]) == 2
    assert "--train-lm" in capsys.readouterr().err


def test_a_frozen_calibration_keeps_the_positions_of_the_checkpoint(run: Run, data: Path) -> None:
    encoder = Encoder(str(run.checkpoint))
    assert encoder.trained.position_rule == run.report["position_rule"]
    positions = encoder(Records(data)[0]).position_ids
    assert (positions is None) == (encoder.trained.position_rule == "original")
    again = Encoder(str(run.checkpoint), "original")
    assert again(Records(data)[0]).position_ids is None


@pytest.mark.slow
# Again, and interrupted.


def test_training_again_and_training_interrupted_give_the_same_model(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Cut off while a checkpoint is written, then while the result is: the old state goes on."""
    short = ("--sites", "1,2", "--steps", "6", "--save-steps", "2")
    one, two = tmp_path / "one", tmp_path / "two"
    assert calibrate(checkpoint, data, one, *short) == 0

    class Cut(Exception):
        """A power cut."""

    write = train.HeadsTrainer._save_optimizer_and_scheduler

    def torn(self: Any, folder: str) -> None:
        if self.state.global_step == 4:
            raise Cut
        write(self, folder)

    monkeypatch.setattr(train.HeadsTrainer, "_save_optimizer_and_scheduler", torn)
    with pytest.raises(Cut):
        calibrate(checkpoint, data, two, *short)
    partial = tmp_path / "two.partial"
    assert (partial / "checkpoint-4" / train.LANGUAGE_MODEL).is_file()  # and no more of it
    assert train.last_checkpoint(partial) == partial / "checkpoint-2"
    monkeypatch.undo()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    assert calibrate(checkpoint, data, two, *short) == 2  # not without --resume
    assert "was interrupted" in json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    for other in (("--positions", "original"), ("--seed", "9"), ("--target-tokens", "17")):
        assert calibrate(checkpoint, data, two, *short, *other, "--resume") == 2
        assert "other options" in json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    monkeypatch.setattr(calibrate_module, "save_heads", full)
    assert calibrate(checkpoint, data, two, *short, "--resume") == 2
    assert not two.exists() and sorted(p.name for p in tmp_path.iterdir()) == ["one", partial.name]
    monkeypatch.undo()
    assert calibrate(checkpoint, data, two, *short, "--resume") == 0
    assert not partial.exists()
    for file in ("model.safetensors", "heads/heads.safetensors"):
        first, second = load_file(one / file), load_file(two / file)
        assert first.keys() == second.keys()
        for name, tensor in first.items():
            assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--positions", "grid2d"), "keeps the positions"),
        (("--sections", "2d"), "keeps the positions"),
        (("--train-lm", "--method", "quantile"), "changes the scores"),
        (("--method", "fixed", "--modality", "self"), "both scores"),
        (("--train-lm", "--positions", "original", "--sections", "2d"), "no sections"),
    ],
)
def test_options_without_effect_are_refused(
    checkpoint: Path, data: Path, tmp_path: Path, capsys, options: tuple[str, ...], says: str
) -> None:
    argv = ["calibrate", str(checkpoint), "--data", str(data), "-o", str(tmp_path / "out")]
    argv += ["--sites", "1", "--target-tokens", "16", "--json"]
    assert main([*argv, *options]) == 2
    assert says in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.slow
def test_two_processes_train_one_model(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "trained"
    # On a CPU `accelerate launch --num_processes 2` starts a single process.
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    argv = ["-m", "patchsieve", "calibrate", str(checkpoint), "--data", str(data), "--json"]
    argv += ["-o", str(out), "--train-lm", *TRAIN, "--sites", "1,2", "--steps", "3"]
    done = subprocess.run(
        [*launch, *argv], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["checkpoint"] == str(out)
    assert last_epoch(out) == 3 * 2 * 3 / 6  # steps, processes, batch, records
    weights, old = (load_file(p / "model.safetensors") for p in (out, checkpoint))
    assert all(
        torch.equal(tensor, old[name]) == ("vision_tower" in name)
        for name, tensor in weights.items()
    )
