"""The file of activation statistics: what is written comes back, what is damaged is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from patchsieve.contract.errors import PatchsieveError
from patchsieve.export.quantise.statistics import FORMAT, VERSION, InputStatistics, Statistics

NAMES = ("layers.0.mlp.down_proj", "lm_head")
ABOUT = {"checkpoint": "a", "records": 2, "rows": 30, "seed": 1}


def inputs(seed: int = 0, size: int = 6) -> dict[str, InputStatistics]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: InputStatistics(*torch.rand(3, size, generator=generator).unbind()) for name in NAMES
    }


def stored(path: Path, about: object = None, **replaced: torch.Tensor) -> Path:
    """A file whose tensors or metadata are replaced after it was written."""
    Statistics(**ABOUT, inputs=inputs()).write(path)
    tensors = load_file(path) | {name.replace("_of_", "."): t for name, t in replaced.items()}
    full = {"format": FORMAT, "version": VERSION} | ABOUT if about is None else about
    save_file(tensors, path, {"patchsieve": json.dumps(full)})
    return path


def test_what_is_written_comes_back_and_equal_ones_are_equal_bytes(tmp_path: Path) -> None:
    given = Statistics(**ABOUT, inputs=inputs())
    for name in ("one", "two"):
        given.write(tmp_path / name)
    read = Statistics.read(tmp_path / "one")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert {name: getattr(read, name) for name in ABOUT} == ABOUT
    for name in NAMES:
        for kind in ("mean", "square", "largest"):
            assert torch.equal(getattr(read.of(name), kind), getattr(given.inputs[name], kind))
    assert read.of("layers.1.mlp.down_proj") is None
    assert read.of("lm_head", 6) is not None
    with pytest.raises(PatchsieveError, match=r"do not fit.*found: 6 .*expected: 7 channels"):
        read.of("lm_head", 7)


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_truncated_files_are_refused(tmp_path: Path, length: int) -> None:
    path = stored(tmp_path / "statistics")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(PatchsieveError, match=r"cannot read the statistics.*what to do"):
        Statistics.read(path)


def test_files_that_are_absent_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(PatchsieveError, match="cannot read the statistics"):
            Statistics.read(path)


@pytest.mark.parametrize(
    "about", [{}, [1], "text", {"format": FORMAT, "version": VERSION + 1} | ABOUT, ABOUT]
)
def test_files_of_another_kind_or_version_are_refused(tmp_path: Path, about: object) -> None:
    with pytest.raises(PatchsieveError, match="does not hold statistics of this version"):
        Statistics.read(stored(tmp_path / "statistics", about))


@pytest.mark.parametrize(
    ("replaced", "says"),
    [
        ({"lm_head_of_mean": torch.full((6,), float("nan"))}, r"lm_head\.mean.*nan in channel 0"),
        ({"lm_head_of_square": torch.tensor([0.0, float("inf")] * 3)}, "inf in channel 1"),
        ({"lm_head_of_largest": -torch.ones(6)}, "-1 in channel 0"),
        ({"lm_head_of_largest": torch.ones(5)}, r"float32 \[5\].*expected: torch.float32 \[6\]"),
        ({"lm_head_of_mean": torch.ones(2, 3)}, r"float32 \[2, 3\]"),
        ({"lm_head_of_mean": torch.ones(6).half()}, "float16"),
        ({"other_of_mean": torch.ones(6)}, "not complete"),
        ({"lm_head_of_more": torch.ones(6)}, "not complete"),
    ],
)
def test_damaged_statistics_are_refused_by_name(
    tmp_path: Path, replaced: dict[str, torch.Tensor], says: str
) -> None:
    path = stored(tmp_path / "statistics", **replaced)
    with pytest.raises(PatchsieveError, match=says) as refused:
        Statistics.read(path)
    assert str(path) in str(refused.value) and refused.value.do


def test_statistics_that_are_not_finite_are_not_written() -> None:
    broken = inputs() | {"lm_head": InputStatistics(*torch.full((3, 6), float("inf")).unbind())}
    with pytest.raises(PatchsieveError, match=r"lm_head\.mean"):
        Statistics(**ABOUT, inputs=broken)
