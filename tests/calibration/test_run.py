"""Calibrations from data to heads: targets, resumption, what is printed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from patchsieve.calibration.thresholds import learned_heads
from patchsieve.cli import main
from patchsieve.pruning.decoder.training import average_tokens
from patchsieve.pruning.heads import load_heads
from tests.support.calibration import (
    GRID,
    LAYERS,
    NUM_VISUAL,
    SITES,
    TRAIN,
    calibrate,
)
from tests.support.conversations import last_epoch, make_conversations

STILL = ("--learning-rate", "0")


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


@pytest.mark.slow
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
    one, two, three = (load_heads(tmp_path / name)[1] for name in ("one", "two", "three"))
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
    assert last_epoch(out) == 60 * 2 * 3 / 12  # steps, processes, batch, records
