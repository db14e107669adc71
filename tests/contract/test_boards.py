"""Which boards hold a model, its engines while they are built, and a request."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from patchsieve import cli
from patchsieve.contract import boards, engine_memory, files, sizes
from patchsieve.contract.boards import BOARDS, SYSTEM, Request
from patchsieve.contract.formats import FLOAT, parse
from patchsieve.contract.manifest import Limits
from patchsieve.contract.plan import Plan, SitePlan
from patchsieve.cost import MODELS, measures_of_config
from patchsieve.export.exporter import ExportOptions, export
from tests.support.models import save_checkpoint

RECORDED = Path(__file__).resolve().parents[1] / "recorded" / "jetson"
MIB = 1 << 20


def ram(name: str) -> tuple[int, int]:
    """Bytes used and seen, in a recording of tegrastats."""
    found = re.search(r"RAM (\d+)/(\d+)MB", (RECORDED / name).read_text())
    assert found is not None
    return int(found[1]) * MIB, int(found[2]) * MIB


@pytest.mark.parametrize(
    ("board", "recording"),
    [(0, "jetpack6.tegrastats_nano.txt"), (3, "jetpack6.tegrastats.txt")],
)
def test_a_board_has_no_more_memory_than_was_recorded(board: int, recording: str) -> None:
    _, seen = ram(recording)
    assert 0.95 * seen < BOARDS[board].free + SYSTEM <= seen


def test_the_system_takes_what_was_recorded() -> None:
    used, _ = ram("jetpack6.tegrastats_nano.txt")
    assert used < SYSTEM < 1.2 * used
    assert [board.name for board in BOARDS] == ["8 GB", "16 GB", "32 GB", "64 GB"]
    assert [board.memory for board in BOARDS] == [gib << 30 for gib in (8, 16, 32, 64)]


def llava(model: str, precision: str, cuts: tuple[int, ...] = ()) -> boards.Demand:
    """A request of 512 text tokens and an image to TensorRT, no pruning, 256 new tokens."""
    measured = measures_of_config(MODELS[model])
    text, slots = measured.text, 512 + 576 + 256
    chosen = parse(precision, is_for_gpus=True, int4="int4-128")
    kv = text.num_layers * 2 * text.num_kv_heads * text.head_dim * 2 * slots
    request = Request(cuts, num_visions=1, kv=kv, rows=512 + 576, slots=slots, images=1)
    found = sizes.groups(text, measured.vision)
    return boards.of_model(text, measured.vision, found, chosen, request, "tensorrt")


@pytest.mark.parametrize(
    ("model", "precision", "smallest"),
    [
        ("llava-1.5-7b", "int4", "8 GB"),
        ("llava-1.5-7b", "int8", "16 GB"),
        ("llava-1.5-7b", "float16", "32 GB"),
        ("llava-1.5-13b", "int4", "16 GB"),
        ("llava-1.5-13b", "int8", "32 GB"),
        ("llava-1.5-13b", "float16", "32 GB"),
        ("llava-1.5-13b", "float32", "64 GB"),
    ],
)
def test_llava_runs_on_boards_of(model: str, precision: str, smallest: str) -> None:
    fits = boards.fits(llava(model, precision))
    assert next(fit.memory for fit in fits if fit.run >= 0) == smallest
    assert [fit.run >= 0 for fit in fits] == sorted(fit.run >= 0 for fit in fits)


def test_the_sum_of_7b_in_int4_by_hand() -> None:
    demand = llava("llava-1.5-7b", "int4")
    assert demand.weights == pytest.approx(4.07e9, rel=0.01)
    assert demand.kv == 32 * 2 * 4096 * 2 * 1344
    rows = 1088 * (6 * 4096 + 3 * 11008) * 2
    scores = 2 * 4 * 32 * 1088 * 1344
    assert demand.activations == rows + scores + 576 * 4096 * 2 + 4 * 32064
    assert demand.running == sum((demand.weights, demand.kv, demand.activations, demand.libraries))
    nano = boards.fits(demand)[0]
    assert nano.free - demand.running == nano.run > 0.5e9
    # Undivided the decoder cannot be built there; in two it can.
    assert nano.build is not None and nano.build < 0
    layers = 32 * 202_375_168 * (0.5 + 2 / 128)
    head = 32064 * (4096 + 2)
    assert demand.building == pytest.approx(0.55e9 + 3.0 * layers + 1.7 * head, rel=1e-3)
    divided = boards.fits(llava("llava-1.5-7b", "int4", cuts=(16,)))[0]
    assert divided.build is not None and divided.build > 0.5e9


def test_building_takes_what_was_measured_and_not_much_more() -> None:
    """TensorRT-RTX 1.7.1, benchmarks/LOG.md of 2026-11-30: MB of weights, MB resident at most."""
    int8, int4 = "int8", "int4-128"
    measured: list[tuple[dict[str, int], int]] = [
        ({FLOAT: 810}, 1762),
        ({FLOAT: 1882}, 3445),
        ({int8: 405}, 1065),
        ({int8: 941}, 2016),
        ({int4: 209}, 1080),
        ({int4: 418, int8: 131}, 1671),
        ({int4: 627, int8: 131}, 2254),
    ]
    for weights, peak in measured:
        expected = engine_memory.expected({form: mb * 10**6 for form, mb in weights.items()})
        assert peak * 10**6 <= expected < 1.25 * peak * 10**6, weights


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engines of a model whose output matrix is its table of embeddings."""
    folder = tmp_path_factory.mktemp("boards")
    checkpoint = save_checkpoint(folder / "tiny", "qwen2-tied", layers=3)
    options = ExportOptions(
        plan=Plan((SitePlan(1, "fastv", {"keep_ratio": 0.5}),)),
        plan_name="half",
        targets=("tensorrt", "cpu"),
        precision="tower=float16,decoder=int8",
        limits=Limits(64, 32, 2),
    )
    export(str(checkpoint), folder / "bundle", options)
    return folder / "bundle"


def test_a_bundle_takes_what_its_measures_say(bundle: Path, capsys) -> None:
    facts = files.read(bundle)
    said = []
    for more in ([], ["--precision", "tower=float16,decoder=int8"]):
        assert cli.main(["cost", str(bundle), "--plan", "half", *more, "--json"]) == 0
        said.append(json.loads(capsys.readouterr().out))
    read, counted = said
    assert read["weights"] == counted["weights"]
    assert read["memory"]["kv"] == counted["memory"]["kv"] == read["kv_bytes_reserved"]
    table = facts.text.vocab_size * facts.text.hidden_size * 4
    for key in ("weights", "largest", "building"):
        headers = read["memory"][key] - counted["memory"][key]
        assert 0 <= headers < 40_000, key  # of safetensors files
    # The last engine holds the table, which is mapped beside it for the words of a prompt.
    assert counted["memory"]["weights"] == counted["weight_bytes"] + table
    assert boards.of_bundle(facts, "half").building == max(
        engine_memory.expectations(facts).values()
    )
    on_cpu = boards.of_bundle(facts, "half", "cpu")
    assert on_cpu.weights == sum(facts.files[path].size for path in facts.weights)
    assert (on_cpu.building, on_cpu.largest) == (0, 0)
    assert boards.of_bundle(facts, "none", "cpu").kv > on_cpu.kv
