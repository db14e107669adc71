"""Export divides the decoder so that every engine is built in the memory that there is."""

from __future__ import annotations

import json
from itertools import combinations, pairwise
from pathlib import Path

import pytest

from benchmarks.build_memory import weights_of
from patchsieve.cli import main
from patchsieve.contract import boards, engine_memory, files, names, weights
from patchsieve.contract.engine_memory import expected
from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.formats import FLOAT, parse
from patchsieve.contract.sizes import Group, groups
from patchsieve.cost import MODELS, measures_of_config
from patchsieve.export.cuts import cuts_for, divide
from patchsieve.export.exporter import ExportOptions, export
from tests.support.models import save_checkpoint

LAYER, HEAD = 400, 260  # millions of bytes
MB = 10**6


def largest(num_layers: int, cuts: list[int]) -> int:
    """Millions of bytes of the largest stage."""
    edges = [0, *cuts, num_layers]
    assert edges == sorted(set(edges))
    sizes = [(last - first) * LAYER for first, last in pairwise(edges)]
    sizes[-1] += HEAD
    return max(sizes)


def divided(num_layers: int, cuts: list[int], most: int) -> list[int]:
    return divide(num_layers, cuts, LAYER, HEAD, most)


@pytest.mark.parametrize(
    ("most", "cuts", "wanted"),
    [
        (2061, [4, 14, 24], [4, 9, 14, 19, 24, 28]),  # LLaVA-1.5-7B on a board
        (9000, [4, 14, 24], [4, 14, 24]),  # nothing to do
        (660, [30], list(range(1, 32))),  # one layer each
        (13060, [], []),
        (13059, [], [16]),  # the head counts
    ],
)
def test_the_cuts_of_a_model_of_32_layers(most: int, cuts: list[int], wanted: list[int]) -> None:
    assert divided(32, cuts, most) == wanted


@pytest.mark.parametrize("most", [660, 800, 1059, 1060, 1300, 1700, 2000, 2300, 3500])
@pytest.mark.parametrize("cut", [[], [3]])
def test_no_fewer_cuts_and_no_smaller_stages_would_do(most: int, cut: list[int]) -> None:
    found = divided(8, cut, most)
    others = [sorted({*cut, *more}) for n in range(8) for more in combinations(range(1, 8), n)]
    fit = [(len(cuts), largest(8, cuts)) for cuts in others if largest(8, cuts) <= most]
    assert set(cut) <= set(found)
    assert len(found) == min(fit)[0]
    if not cut:  # else the largest stage may lie in the other part
        assert largest(8, found) == min(fit)[1]


def test_what_cannot_be_divided_is_named_with_the_memory_that_it_takes() -> None:
    chosen = parse("float16")
    tensors = [group(weights.LAYER, 200, index) for index in range(32)]
    tensors.append(group(weights.HEAD, 130))
    least = expected({FLOAT: 660 * MB})
    assert cuts_for(least, [30], tensors, chosen) == list(range(1, 32))
    with pytest.raises(PatchsieveError, match=r"one layer and the output head.*--build-memory 1.7"):
        cuts_for(least - 1, [], tensors, chosen)
    tensors.append(group(weights.TOWER, 500))
    with pytest.raises(PatchsieveError, match=r"the vision tower \(1.00 GB.*--build-memory 2.3,"):
        cuts_for(expected({FLOAT: 700 * MB}), [], tensors, chosen)


def group(part: weights.Part, numbers: int, layer: int | None = None) -> Group:
    """Some millions of numbers that are no matrix."""
    return Group(part, part.key, part.label, layer, numbers * MB, ())


@pytest.mark.parametrize(("precision", "num_cuts"), [("float16", 8), ("int8", 4), ("int4", 3)])
def test_fewer_cuts_do_for_fewer_bits(precision: str, num_cuts: int) -> None:
    # 2.95 GB hold 4 float16 layers of 0.69 GB each, 8 of 0.34 GB, 9 of 0.31 GB.
    measured = measures_of_config(MODELS["llava-1.5-7b"])
    tensors = groups(measured.text, measured.vision)
    chosen = parse(precision, is_for_gpus=True, int4="int4-128")
    found = cuts_for(int(3.5e9), [], tensors, chosen)
    assert len(found) == num_cuts
    edges = [*found, 32]
    counts = [each.num_bytes(chosen.types, chosen.formats) for each in tensors]
    engines = boards.engines_of(tensors, counts, edges)
    assert max(map(expected, engines.values())) <= 3.5e9


@pytest.fixture(scope="module", params=["llama", "qwen2-tied"])
def checkpoint(request, tmp_path_factory) -> Path:
    """A tiny checkpoint, with an output matrix of its own or without."""
    return save_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.slow
def test_a_bundle_is_cut_for_the_memory_and_counts_the_weights_that_graphs_hold(
    checkpoint: Path, tmp_path: Path
) -> None:
    whole = export(str(checkpoint), tmp_path / "whole", ExportOptions(targets=("tensorrt-rtx",)))
    graphs = whole.targets["tensorrt-rtx"]
    for graph in ("vision", "stage_0", "compact"):
        there = weights_of(tmp_path / "whole" / graphs[graph])
        headers = engine_memory.weight_bytes(whole, graph) - there
        assert 0 <= headers < 16_000, graph
    # One byte less than all of it, weights alone counted.
    memory = expected({FLOAT: weights_of(tmp_path / "whole" / graphs["stage_0"])}) - 1
    options = ExportOptions(targets=("tensorrt-rtx",), build_memory=memory)
    facts = export(str(checkpoint), tmp_path / "cut", options)
    assert len(facts.cuts) == 1
    told = engine_memory.expectations(facts)
    assert max(told.values()) < engine_memory.expectations(whole)[names.stage(0)]
    assert told["compact"] == expected({})


def test_the_command_line_takes_gigabytes_and_says_what_building_takes(
    tmp_path: Path, capsys
) -> None:
    checkpoint = save_checkpoint(tmp_path / "checkpoint", "llama")
    command = ["export", str(checkpoint), "-o", str(tmp_path / "bundle"), "--quiet", "--json"]
    rtx = ["--targets", "tensorrt-rtx"]
    for more, said in (
        (["--build-memory", "1"], "no engine is built for these targets"),
        ([*rtx, "--build-memory", "0.4"], "cannot be divided"),
    ):
        assert main([*command, *more]) == 2
        assert said in json.loads(capsys.readouterr().out)["error"]
    with pytest.raises(SystemExit):
        main([*command, *rtx, "--build-memory", "-1"])
    assert "expected gigabytes above 0" in capsys.readouterr().err
    assert main([*command, *rtx, "--build-memory", "1"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["cuts"] == []
    facts = files.read(tmp_path / "bundle")
    assert told["build_memory_bytes"] == engine_memory.expectations(facts)
    assert main(["export", "--reuse", str(tmp_path / "bundle"), "--build-memory", "1"]) == 2
    assert "nothing else | found: build_memory" in capsys.readouterr().err
