"""What a calibration refuses before it begins, and how it divides a budget."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from patchsieve.calibration.survivors import budgets, geometric_counts
from patchsieve.cli import main
from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.plan import SitePlan
from patchsieve.export.methods import build_method
from patchsieve.pruning.decoder.training import average_tokens


def test_geometric_counts_average_to_the_target() -> None:
    counts = geometric_counts(576, (4, 14, 24), 32, 144.0)
    assert average_tokens(counts, (4, 14, 24), 32, 576) == pytest.approx(144.0, abs=1e-6)
    assert counts[0] / 576 == pytest.approx(counts[1] / counts[0])
    with pytest.raises(PatchsieveError, match="cannot reach"):
        geometric_counts(576, (16,), 32, 144.0)


def test_budgets_are_percentiles_of_the_survivors() -> None:
    counts = {2: [3, 9, 4, 5], 1: [10, 10, 10, 12]}
    assert budgets(counts, 100) == (12, 9)
    assert budgets(counts, 75) == (10, 5)


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
