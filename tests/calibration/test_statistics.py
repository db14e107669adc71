"""Activation statistics against Hugging Face's own model under hooks, and runs that break off."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from patchsieve.calibration import layerwise
from patchsieve.calibration.encoder import Encoder
from patchsieve.calibration.options import Data
from patchsieve.calibration.rotary import install_sections
from patchsieve.calibration.samples import Sample, Samples
from patchsieve.calibration.statistics import Collected, collect
from patchsieve.calibration.statistics_options import StatisticsOptions
from patchsieve.cli import main
from patchsieve.contract.errors import PatchsieveError
from patchsieve.export.job import plan_export
from patchsieve.export.options import ExportOptions
from patchsieve.export.quantise.statistics import Statistics
from patchsieve.export.source.checkpoint import read_config
from patchsieve.runtime.records import Records
from tests.support.conversations import make_conversations
from tests.support.models import save_checkpoint

KINDS = ("mean", "square", "largest")
FEW = StatisticsOptions(records=5, seed=3)
# Rows of tests.support.models; "grid2d" is the first, trained with positions on a grid.
ROWS = (
    "llama",
    "grid2d",
    "llama-gqa-tied-linear-rope",
    "llama-biases",
    "qwen2",
    "mistral",
    "clip-full",
    "clip-two-layers",
    "siglip",
    "qwen2-siglip-two-layers",
)


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations with one image, with two and with none, of one turn and of two."""
    path = make_conversations(tmp_path_factory.mktemp("talks"), 4)
    records = json.loads(path.read_text())
    for images in ((), ("1.png", "2.png")):
        parts = [{"type": "image", "path": name} for name in images]
        parts.append({"type": "text", "text": "What is on the table?"})
        answer = {"role": "assistant", "content": "Nothing."}
        records.append({"messages": [{"role": "user", "content": parts}, answer]})
    path.write_text(json.dumps(records))
    return path


def run(checkpoint: Path, data: Path, out: Path, options: StatisticsOptions = FEW, **more: Any):
    """Collect; gives the report and the file."""
    made = collect(str(checkpoint), Data(data), options, out, **more)
    return made, Statistics.read(out)


def fed(checkpoint: Path, data: Path, options: StatisticsOptions) -> Iterator[Sample]:
    samples = Samples(Records(data), Encoder(str(checkpoint)))
    chosen = random.Random(options.seed).sample(range(len(samples)), options.records)
    return (samples[number] for number in sorted(chosen))


@torch.no_grad()
def reference(checkpoint: Path, data: Path, options: StatisticsOptions) -> dict[str, list[Tensor]]:
    """What every `nn.Linear` of Hugging Face's model reads: mean, mean square and largest."""
    encoder = Encoder(str(checkpoint))
    model = encoder.family.load(encoder.directory, encoder.config, None, dtype=torch.float32).eval()
    install_sections(model.model.language_model, encoder.trained.rotary_sections)
    rows: dict[str, list[Tensor]] = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            name = encoder.family.canonical(f"{path}.weight").removesuffix(".weight")
            module.register_forward_pre_hook(
                lambda _, x, name=name: rows.setdefault(name, []).append(x[0].flatten(0, -2))
            )
    for sample in fed(checkpoint, data, options):
        most, positions = options.max_tokens, sample.position_ids
        model(
            input_ids=sample.input_ids[None],
            pixel_values=sample.pixel_values,
            position_ids=None if positions is None else positions[None],
        )
        for name, found in rows.items():
            if name.startswith(("layers.", "lm_head")):
                found[-1] = found[-1][:most]
    whole = {name: torch.cat(found).double().abs() for name, found in rows.items()}
    return {name: [x.mean(0), x.square().mean(0), x.amax(0)] for name, x in whole.items()}


def checkpoint_of(row: str, folder: Path) -> Path:
    path = save_checkpoint(folder / "checkpoint", "llama" if row == "grid2d" else row)
    if row == "grid2d":
        config = json.loads((path / "config.json").read_text())
        config["patchsieve"] = {"position_rule": "grid2d", "rotary_sections": [2, 3, 3]}
        (path / "config.json").write_text(json.dumps(config))
    return path


def check_equal(found: Statistics, expected: dict[str, list[Tensor]]) -> None:
    """Every statistic to a hundred-thousandth."""
    for name, given in found.inputs.items():
        for kind, numbers in zip(KINDS, expected[name], strict=True):
            torch.testing.assert_close(
                getattr(given, kind).double(), numbers, rtol=1e-5, atol=0, msg=f"{name}.{kind}"
            )


@pytest.mark.slow_rows(
    "llama-gqa-tied-linear-rope",
    "llama-biases",
    "mistral",
    "clip-full",
    "clip-two-layers",
    "qwen2-siglip-two-layers",
)
@pytest.mark.parametrize("row", ROWS)
def test_statistics_are_those_of_hugging_faces_model(row: str, talks: Path, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(row, tmp_path)
    made, found = run(checkpoint, talks, tmp_path / "statistics")
    expected = reference(checkpoint, talks, FEW)
    run_in_tower = Encoder(str(checkpoint)).tower.num_layers_run
    for name in list(expected):  # the projector reads no later layer
        if name.startswith("vision_tower.encoder.") and int(name.split(".")[3]) >= run_in_tower:
            del expected[name]
    assert set(found.inputs) == set(expected)
    check_equal(found, expected)
    samples = list(fed(checkpoint, talks, FEW))
    assert (found.records, found.seed) == (5, 3)
    assert found.rows == made.rows == sum(len(sample.input_ids) for sample in samples)
    assert made.images == sum(len(sample.visual) for sample in samples)
    assert made.matrices == len(expected)
    assert not (tmp_path / "statistics.partial").exists()


def test_long_conversations_are_cut_off_even_inside_an_image(
    checkpoint: Path, talks: Path, tmp_path: Path
) -> None:
    options = StatisticsOptions(records=6, max_tokens=30)  # of 36 tokens of an image
    made, found = run(checkpoint, talks, tmp_path / "statistics", options)
    assert made.rows < 6 * 30 + 1
    check_equal(found, reference(checkpoint, talks, options))


def test_equal_seeds_make_equal_files_and_other_seeds_draw_others(
    checkpoint: Path, talks: Path, tmp_path: Path
) -> None:
    files = []
    for number, seed in enumerate((1, 1, 2)):
        run(checkpoint, talks, tmp_path / str(number), StatisticsOptions(records=3, seed=seed))
        files.append((tmp_path / str(number)).read_bytes())
    assert files[0] == files[1] != files[2]


def test_all_records_are_fed_if_there_are_fewer(
    checkpoint: Path, talks: Path, tmp_path: Path
) -> None:
    assert run(checkpoint, talks, tmp_path / "statistics", StatisticsOptions())[0].records == 6


class _Killed(BaseException):
    """What no code of ours catches."""


# The label of a step, and how many of its blocks are done: before any result, in the tower, with
# features of an earlier layer kept for the projector, in the projector, in the decoder, at the end.
@pytest.mark.parametrize(
    ("label", "blocks"),
    [
        ("embedding patches", 1),
        ("tower layer 2 of 3", 0),
        ("tower layer 3 of 3", 2),
        ("projecting images", 2),
        ("decoder layer 3 of 4", 0),
        ("decoder layer 4 of 4", 3),
        ("last norm", 5),
    ],
)
def test_a_run_that_was_killed_continues_to_the_same_file(
    label: str, blocks: int, talks: Path, tmp_path: Path
) -> None:
    checkpoint = checkpoint_of("clip-two-layers", tmp_path)
    calls: list[str] = []

    def die(what: str, _: float) -> None:
        calls.append(what)
        if calls.count(label) == blocks + 1:
            raise _Killed

    whole, out = tmp_path / "whole", tmp_path / "statistics"
    run(checkpoint, talks, whole)
    with pytest.raises(_Killed):
        run(checkpoint, talks, out, progress=die)
    assert not out.exists()
    again: list[str] = []
    run(checkpoint, talks, out, resume=True, progress=lambda what, _: again.append(what))
    assert out.read_bytes() == whole.read_bytes()
    assert again[1] == label  # after "reading the data"
    assert not out.with_name("statistics.partial").exists()


def test_a_broken_run_is_not_mixed_with_another(
    checkpoint: Path, talks: Path, tmp_path: Path
) -> None:
    out, folder = tmp_path / "statistics", tmp_path / "statistics.partial"

    def die(what: str, _: float) -> None:
        if what == "decoder layer 2 of 4":
            raise _Killed

    with pytest.raises(_Killed):
        run(checkpoint, talks, out, progress=die)
    with pytest.raises(PatchsieveError, match="holds a collection that was interrupted"):
        run(checkpoint, talks, out)
    other = StatisticsOptions(records=4, seed=3)
    with pytest.raises(PatchsieveError, match="the collection to resume had other options"):
        run(checkpoint, talks, out, other, resume=True)
    (rows,) = folder.glob("*.rows")  # one file at a time, but for features of the tower
    rows.write_bytes(rows.read_bytes()[:-4])
    with pytest.raises(PatchsieveError, match=r"cannot be resumed.*bytes of rows"):
        run(checkpoint, talks, out, resume=True)
    rows.unlink()
    with pytest.raises(PatchsieveError, match=r"cannot be resumed.*no \d+\.rows"):
        run(checkpoint, talks, out, resume=True)
    with pytest.raises(PatchsieveError, match="nothing to resume"):
        run(checkpoint, talks, tmp_path / "another", resume=True)


def test_one_layer_is_in_memory_at_a_time(
    talks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows are on the disk meanwhile."""
    alive: list[weakref.ref[Any]] = []
    load = layerwise.Step._load

    def counting(self: layerwise.Step) -> Any:
        assert not [module for module in alive if module() is not None]
        made = load(self)
        alive.append(weakref.ref(made))
        return made

    monkeypatch.setattr(layerwise.Step, "_load", counting)
    checkpoint = save_checkpoint(tmp_path / "checkpoint", "llama", layers=8)
    files: set[int] = set()

    def look(*_: Any) -> None:
        files.add(len(list((tmp_path / "statistics.partial").glob("*.rows"))))

    run(checkpoint, talks, tmp_path / "statistics", progress=look)
    assert len(alive) == 1 + 2 + 1 + 8 + 1
    assert max(files) == 2  # what a step reads, and what it writes


PEAK = """
import sys
from patchsieve.cli import main
from benchmarks.peak_memory import peak_memory
code = main(sys.argv[1:])
print(peak_memory() or 0)
sys.exit(code)
"""


@pytest.mark.slow
def test_the_peak_does_not_grow_with_the_number_of_layers(talks: Path, tmp_path: Path) -> None:
    peaks = []
    for layers in (2, 34):
        folder = tmp_path / str(layers)
        checkpoint = save_checkpoint(folder, "llama", layers=layers, hidden=512, heads=8)
        words = [str(checkpoint), "--data", str(talks), "--statistics", "-o", f"{folder}.s"]
        done = subprocess.run(
            [sys.executable, "-c", PEAK, "calibrate", *words, "--json"],
            capture_output=True,
            check=True,
            text=True,
            cwd=Path(__file__).resolve().parents[2],
        )
        peaks.append(int(done.stdout.splitlines()[-1]))
    if not all(peaks):
        pytest.skip("this system does not report the peak of a process")
    layer = 4 * (2.5 * 512**2 + 3 * 512 * 1408)  # bytes of float32 weights: 11 MB
    assert peaks[1] - peaks[0] < 3 * layer, peaks


# The command line.


def command(checkpoint: Path, data: Path, out: Path, *more: str) -> int:
    words = ["calibrate", str(checkpoint), "--data", str(data), "-o", str(out), *more]
    return main([*words, "--json"])


def test_the_command_writes_the_file_and_reports_it(
    checkpoint: Path, talks: Path, tmp_path: Path, printed
) -> None:
    out, same = tmp_path / "one", tmp_path / "two"
    assert command(checkpoint, talks, out, "--statistics", "--records", "5", "--seed", "3") == 0
    report = printed()
    assert report["statistics"] == str(out) and report["records"] == 5
    assert set(report) == {field for field in Collected.__dataclass_fields__ if field != "out"} | {
        "statistics",
        "schema_version",
    }
    run(checkpoint, talks, same)
    assert out.read_bytes() == same.read_bytes()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--statistics", "--sites", "1,3"), "--sites"),
        (("--statistics", "--method", "quantile"), "--method"),
        (("--statistics", "--target-tokens", "18"), "--target-tokens"),
        (("--statistics", "--train-lm"), "--train-lm"),
        (("--statistics", "--epochs", "2"), "--epochs"),
        (("--statistics", "--parts", "spatial"), "--parts"),
        (("--statistics", "--held-out", "x"), "--held-out"),
        (("--statistics", "--seed", "-1"), "at least 0"),
        (("--statistics", "--resume"), "nothing to resume"),
        (("--statistics", "--data", "no-such-file"), "cannot read the data"),
        (("--records", "5", "--sites", "1", "--target-tokens", "9"), "only statistics"),
        (("--target-tokens", "9"), "give --sites"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(
    checkpoint: Path, data: Path, tmp_path: Path, capsys, more: tuple[str, ...], says: str
) -> None:
    assert command(checkpoint, data, tmp_path / "out", *more) == 2
    captured = capsys.readouterr()
    error = json.loads(captured.out)
    assert says in error["error"] and error["do"] and "Traceback" not in captured.err
    assert not list(tmp_path.iterdir())


def test_an_output_that_exists_is_refused(checkpoint: Path, talks: Path, tmp_path: Path) -> None:
    (tmp_path / "statistics").write_text("")
    with pytest.raises(PatchsieveError, match="exists already"):
        run(checkpoint, talks, tmp_path / "statistics")


def test_data_without_an_image_is_refused(checkpoint: Path, talks: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps(json.loads(talks.read_text())[4:5]))
    with pytest.raises(PatchsieveError, match="without an image"):
        run(checkpoint, path, tmp_path / "statistics")


@pytest.mark.parametrize(
    ("name", "is_lost", "says"),
    [
        ("layers.1.mlp.up_proj.weight", False, r"layers\.1\.mlp\.down_proj\.mean"),
        ("layers.1.mlp.up_proj.weight", True, r"found: no layers\.1\.mlp\.up_proj\.weight"),
        ("embed_tokens.weight", True, r"found: no embed_tokens\.weight"),
    ],
)
def test_weights_that_are_not_finite_or_lost_are_named(
    name: str, is_lost: bool, says: str, talks: Path, tmp_path: Path
) -> None:
    """Before the layers that only carry what an infinite number made."""
    checkpoint = checkpoint_of("llama", tmp_path)
    tensors = load_file(checkpoint / "model.safetensors")
    (stored,) = [each for each in tensors if each.endswith(name)]
    tensors[stored][0, 0] = float("inf")
    if is_lost:
        del tensors[stored]
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(PatchsieveError, match=says):
        run(checkpoint, talks, tmp_path / "statistics")


@pytest.mark.parametrize("row", ["llama", "qwen2-siglip-two-layers"])
def test_every_matrix_of_an_export_has_statistics_of_its_size(
    row: str, talks: Path, tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(row, tmp_path)
    _, found = run(checkpoint, talks, tmp_path / "statistics")
    job = plan_export(checkpoint, read_config(checkpoint), ExportOptions())
    weights = [weight for file in job.weights for weight in file.weights]
    sizes = {w.source.removesuffix(".weight"): w.shape[0] for w in weights if w.transposed}
    sizes["lm_head"] = job.spec.hidden_size
    assert set(sizes) == set(found.inputs)
    assert all(found.of(name, size) is not None for name, size in sizes.items())
