"""The cost model: the papers' figures, an independent count, schedules, and the command."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import papers
from patchsieve.cli import main, plan_options
from patchsieve.cli.cost_spellings import COSTS_ONLY, places_of
from patchsieve.contract import files, manifest, model
from patchsieve.contract.errors import PatchsieveError, ShapeError, UnsupportedModelError
from patchsieve.contract.graphs import Graph, Tensor, identify
from patchsieve.contract.plan import Plan, SitePlan
from patchsieve.contract.precision import Precision
from patchsieve.cost import (
    PAPERS,
    RUNTIME,
    Convention,
    DecoderShape,
    ModelShape,
    Schedule,
    TowerShape,
    after_tower,
    cost,
    geometric,
    in_decoder,
    in_tower,
    ivtp,
    linear,
    no_pruning,
    of_plan,
    resampler,
    shape_of_config,
)
from patchsieve.cost.flops import decoder_layer, tower_layer
from patchsieve.cost.methods import layerwise
from patchsieve.pruning import catalogue
from patchsieve.pruning.entry import DECODER, ENCODER, PROJECTOR, RECIPE
from patchsieve.pruning.recipes import Size
from patchsieve.pruning.schedules import num_to_keep

LLAVA = papers.LLAVA_7B
TOY = ModelShape(
    vision=TowerShape(
        hidden_size=6,
        intermediate_size=10,
        num_layers=4,
        num_layers_run=3,
        image_size=12,
        patch_size=4,
    ),
    text=DecoderShape(
        vocab_size=17,
        hidden_size=8,
        intermediate_size=12,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=3,
    ),
    num_visual=9,
    projector_in=6,
)


class Naive:
    """A transformer reduced to the loops of its matrix products; each multiply-add adds 2."""

    def __init__(self) -> None:
        self.flops = 0

    def matmul(self, rows: int, inner: int, columns: int) -> None:
        for _ in range(rows):
            for _ in range(columns):
                for _ in range(inner):
                    self.flops += 2

    def attention(self, rows: int, heads: int, width: int) -> None:
        for _ in range(heads):
            self.matmul(rows, width, rows)  # q k^T
            self.matmul(rows, rows, width)  # softmax v

    def tower(self, shape: TowerShape, attention: list[int], mlp: list[int]) -> None:
        d, m = shape.hidden_size, shape.intermediate_size
        patches = shape.num_patches
        self.matmul(patches, shape.num_channels * shape.patch_size * shape.patch_size, d)
        for n, n_mlp in zip(attention, mlp, strict=True):
            for _ in ("q", "k", "v", "out"):
                self.matmul(n, d, d)
            self.attention(n, 2, d // 2)
            self.matmul(n_mlp, d, m)
            self.matmul(n_mlp, m, d)

    def decoder(self, shape: DecoderShape, rows: list[int], scored: int) -> None:
        d, m, wide = shape.hidden_size, shape.intermediate_size, shape.head_dim
        for n in rows:
            self.matmul(n, d, shape.num_heads * wide)  # q
            self.matmul(n, d, shape.num_kv_heads * wide)  # k
            self.matmul(n, d, shape.num_kv_heads * wide)  # v
            self.attention(n, shape.num_heads, wide)
            self.matmul(n, shape.num_heads * wide, d)  # o
            for _ in ("gate", "up"):
                self.matmul(n, d, m)
            self.matmul(n, m, d)
        self.matmul(scored, d, shape.vocab_size)


def test_formulas_equal_the_loops_of_a_toy_model() -> None:
    tower = in_tower(TOY, [7, 5, 4], placement="mid")
    schedule = replace(in_decoder(TOY, [3, 1], [1, 2], tower), side_layers=2)
    for convention, images, text in ((PAPERS, 1, 5), (RUNTIME, 2, 4)):
        ours = cost(TOY, schedule, text, images=images, convention=convention)
        vision, llm = Naive(), Naive()
        for _ in range(images):
            vision.tower(TOY.vision, [10, 8, 6], [8, 6, 5])
            if convention.projections:
                vision.matmul(4, 6, 8)
                vision.matmul(4, 8, 8)
        side = images if convention.pseudo_cls else 0
        rows = [4 * images + text + side, 3 * images + text + side, 1 * images + text]
        llm.decoder(TOY.text, rows, rows[-1] if convention.lm_head == "all" else 1)
        assert (ours.flops.vision, ours.flops.llm) == (vision.flops, llm.flops)
        kept_rows = (4 + 3 + 1) * images + 3 * text
        assert ours.kv_bytes == kept_rows * 2 * 2 * 3 * 2  # k and v, G, D, bytes


def test_grouped_query_attention_reduces_to_the_formula_of_the_papers() -> None:
    d, m, n = 4096, 11008, 700
    assert decoder_layer(LLAVA.text, n) == 2 * (4 * n * d**2 + 2 * n**2 * d + 3 * n * d * m)
    grouped = replace(LLAVA.text, num_kv_heads=8)
    saved = decoder_layer(LLAVA.text, n) - decoder_layer(grouped, n)
    assert saved == 2 * 2 * n * d * (d - 8 * 128)  # k and v only
    full, small = (
        cost(LLAVA, no_pruning(LLAVA), 9),
        cost(replace(LLAVA, text=grouped), no_pruning(LLAVA), 9),
    )
    assert small.kv_bytes * 4 == full.kv_bytes


# methods' golden values in T: ViT, LLM, total at 512 text tokens.
GOLDEN = {
    "LLaVA-1.5": (0.36603, 14.99762, 15.36366),
    "TopK": (0.19114, 7.78530, 7.97644),
    "Qwen-VL": (0.36603, 7.78530, 8.15417),
    "IVTP": (0.2029, 7.9508, 8.2335),
}


@pytest.mark.parametrize("method", GOLDEN)
def test_parts_of_ivtp_table_9_have_their_golden_values(method: str) -> None:
    schedule, more = papers.methods(LLAVA)[method]
    flops = cost(LLAVA, schedule, 512).flops
    assert more == 0
    ours = [count / 1e12 for count in (flops.vision, flops.llm, flops.total)]
    assert ours == pytest.approx(GOLDEN[method], abs=6e-5)


def test_scorer_of_ivtp_is_six_windows_of_clip_text() -> None:
    schedule = ivtp(LLAVA)
    assert schedule.windows == 6
    assert cost(LLAVA, schedule, 512).flops.scorer / 1e12 == pytest.approx(0.07979, abs=5e-6)
    assert cost(LLAVA, resampler(LLAVA, 64), 512).flops.scorer / 1e12 == pytest.approx(
        0.00284, abs=5e-6
    )


def test_the_papers_count_leaves_out_what_makes_the_pseudo_cls() -> None:
    schedule, with_row = ivtp(LLAVA), replace(PAPERS, pseudo_cls=True)
    papers_count = cost(LLAVA, schedule, 512)
    more = cost(LLAVA, schedule, 512, convention=with_row)
    row = more.flops.llm - papers_count.flops.llm
    assert row / 1e12 == pytest.approx(0.0050, abs=1.5e-4)  # twelve layers of one row
    layer = more.flops.vision - papers_count.flops.vision
    assert layer == tower_layer(LLAVA.vision, 121)
    assert more.kv_bytes == papers_count.kv_bytes
    assert more.vision_tokens == (*papers_count.vision_tokens, 121)
    assert len(papers_count.vision_tokens) == 23
    executed = cost(LLAVA, schedule, 512, convention=RUNTIME).flops
    assert [papers_count.flops.total / 1e12, executed.total / 1e12] == pytest.approx(
        [8.2335, 8.0966], abs=5e-5
    )


def test_every_figure_is_within_its_tolerance_or_explained() -> None:
    figures = papers.figures()
    outside = {f.why for f in figures if not f.is_within}
    assert outside == {papers.ROWS_13B, papers.QWEN_VL, papers.TABLE_6}
    explained = (Path(papers.__file__).parents[1] / "docs" / "papers.md").read_text("utf-8")
    for why in outside:
        assert f"## {why}" in explained
    for figure in figures:  # an explanation that is no longer needed goes
        if figure.why in (papers.ROWS_13B, papers.QWEN_VL):
            assert not figure.is_within, figure


def test_tolerances_are_those_that_the_project_promises() -> None:
    for figure in papers.figures():
        if figure.table == "IVTP table 9" and figure.column == "total":
            assert abs(figure.deviation) <= 0.005
        if figure.table == "IVTP table 9" and figure.column == "ViT":
            assert abs(figure.deviation) <= 0.02
        if figure.table == "IVTP table 2" and figure.why is None:
            assert abs(figure.deviation) <= 0.01
        if figure.table in ("IVTP table 1", "IVTP table 3") and figure.why is None:
            assert abs(figure.ours - figure.paper) <= 0.06
        if figure.column == "KV memory":
            assert abs(figure.deviation) <= 0.002


@pytest.mark.parametrize(
    ("sites", "counts", "mean"),
    [
        ([4, 14, 24], [126, 88, 20], 143.875),
        ([1, 13, 25], [98, 79, 16], 87.875),
        ([1], [130], 143.9375),
        ([4, 14, 24], [162, 54, 18], 144.0),
        ([4, 14, 24], [136, 68, 34], 144.25),
    ],
)
def test_mean_tokens_of_atp_table_2_are_exact(
    sites: list[int], counts: list[int], mean: float
) -> None:
    ours = cost(LLAVA, in_decoder(LLAVA, counts, sites), 40)
    assert ours.average_tokens == mean
    assert ours.kv_bytes == 32 * (mean + 40) * 2 * 4096 * 2


@pytest.mark.parametrize(
    ("row", "text", "saved"),
    [
        ("ATP 144", 0, 0.753),
        ("ATP 88", 0, 0.850),
        ("ATP 144", 40, 0.706),
        ("ATP 144", 64, 0.680),
        ("ATP 144", 128, 0.620),
    ],
)
def test_equations_15_and_16_give_their_golden_values(row: str, text: int, saved: float) -> None:
    whole, fraction = papers.reduction(*papers.RETAINED[row][:2], text)
    assert fraction == pytest.approx(saved, abs=5e-4)
    if text == 0:
        assert whole == pytest.approx(2.986, abs=5e-4)
        if row == "ATP 144":
            assert whole * (1 - fraction) == pytest.approx(0.737, abs=5e-4)


def test_geometric_and_linear_schedules_have_their_golden_counts() -> None:
    assert geometric(576, 120, 8) == [473, 389, 320, 263, 216, 178, 146, 120]
    assert geometric(120, 64, 4) == [103, 88, 75, 64]
    assert geometric(576, 576, 3) == [576] * 3
    assert linear(576, 64, 2) == [320, 64]
    counts = linear(576, 64, 23)
    steps = {a - b for a, b in zip([576, *counts], counts, strict=False)}
    assert counts[-1] == 64 and steps <= {22, 23}
    for wrong in ((10, 11, 2), (10, 0, 2), (10, 5, 0)):
        with pytest.raises(PatchsieveError):
            geometric(*wrong)


def test_default_schedule_of_ivtp_prunes_at_the_end_of_each_group() -> None:
    schedule = ivtp(LLAVA)
    tower = [576, 473, 389, 320, 263, 216, 178, 146]
    assert schedule.vision[:23] == tuple(tower[layer // 3] + 1 for layer in range(23))
    assert schedule.vision[23:] == (121,)  # for the scorer's class token
    assert schedule.vision_mlp == schedule.vision
    decoder = [120, 103, 88, 75, 64]
    assert schedule.llm == tuple(decoder[min(layer // 3, 4)] for layer in range(32))
    given = ivtp(LLAVA, counts=[400] * 8 + [300, 200, 100, 50])
    assert (given.vision[3], given.llm[0], given.llm[12]) == (401, 400, 50)


@pytest.mark.parametrize("num_kept", [16, 64, 128, 512])
@pytest.mark.parametrize("group_layers", [2, 3, 4, 5, 6, 7, 8, 23])
def test_ivtp_takes_any_last_count_and_group(num_kept: int, group_layers: int) -> None:
    schedule = ivtp(LLAVA, num_kept, group_layers=group_layers)
    last = 12 // min(group_layers, 12) * min(group_layers, 12)  # groups of 5 end at 5 and 10
    assert schedule.llm[last - 1] > schedule.llm[last] == schedule.llm[-1] == num_kept
    assert list(schedule.llm) == sorted(schedule.llm, reverse=True)
    assert schedule.side_layers == last


def test_placement_in_a_tower_layer_orders_the_cost() -> None:
    flops = [
        cost(LLAVA, in_tower(LLAVA, layerwise(LLAVA, 64), placement=place), 64).flops.vision
        for place in ("start", "mid", "end")
    ]
    assert flops == sorted(flops) and len(set(flops)) == 3
    assert flops[0] / 1e12 == pytest.approx(0.19114, abs=1e-5)
    assert flops[1] / 1e12 == pytest.approx(0.1968, abs=2e-4)


def test_plan_costs_its_ratio_its_budget_or_its_survivors() -> None:
    plan = Plan((SitePlan(2, "fastv", {"keep_ratio": 0.5}), SitePlan(8, "random")))
    schedule, is_exact = of_plan(LLAVA, plan)
    assert is_exact and schedule.llm == (576,) * 2 + (288,) * 30
    atp = Plan((SitePlan(4, "atp", {}, 130), SitePlan(14, "atp", {}, 90)))
    assert of_plan(LLAVA, atp)[1] is False
    assert of_plan(LLAVA, atp)[0].llm[4] == 130
    assert of_plan(LLAVA, atp, [126, 88])[0].llm[14] == 88
    with pytest.raises(PatchsieveError, match="--survivors"):
        of_plan(LLAVA, Plan((SitePlan(4, "atp"),)))


def test_absent_entries_of_a_config_have_llava_defaults() -> None:
    assert (LLAVA.num_visual, LLAVA.projector_in) == (576, 1024)
    assert (LLAVA.vision.num_layers, LLAVA.vision.num_layers_run) == (24, 23)
    mistral = shape_of_config({"model_type": "llava", "text_config": {"model_type": "mistral"}})
    assert (mistral.text.num_kv_heads, mistral.text.intermediate_size) == (8, 14336)
    several = shape_of_config({"model_type": "llava", "vision_feature_layer": [-2, 3]})
    assert (several.vision.num_layers_run, several.projector_in) == (23, 2048)
    whole = shape_of_config({"model_type": "llava", "vision_feature_select_strategy": "full"})
    assert whole.num_visual == 577


def test_config_defaults_are_those_of_transformers() -> None:
    import transformers

    text = {"hidden_size": 512, "num_attention_heads": 32}
    for kind in ("llama", "mistral", "qwen2"):
        for tower in ("clip_vision_model", "siglip_vision_model"):
            raw = {"model_type": "llava", "text_config": {"model_type": kind} | text}
            raw["vision_config"] = {"model_type": tower, "hidden_size": 96}
            theirs = transformers.LlavaConfig.from_dict(json.loads(json.dumps(raw)))
            ours, t, v = shape_of_config(raw), theirs.text_config, theirs.vision_config
            assert ours.text.vocab_size == t.vocab_size
            assert ours.text.intermediate_size == t.intermediate_size
            assert ours.text.num_layers == t.num_hidden_layers
            assert ours.text.num_kv_heads == t.num_key_value_heads
            assert ours.vision.intermediate_size == v.intermediate_size
            assert ours.vision.num_layers == v.num_hidden_layers
            assert ours.vision.num_patches == (v.image_size // v.patch_size) ** 2
    bare = transformers.LlavaConfig()
    assert LLAVA.vision.intermediate_size == bare.vision_config.intermediate_size
    assert LLAVA.text.vocab_size == bare.text_config.vocab_size


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: shape_of_config({"model_type": "llama"}), UnsupportedModelError),
        (lambda: shape_of_config([]), UnsupportedModelError),
        (
            lambda: shape_of_config({"model_type": "llava", "text_config": {"model_type": "x"}}),
            UnsupportedModelError,
        ),
        (
            lambda: shape_of_config({"model_type": "llava", "text_config": {"hidden_size": "4"}}),
            PatchsieveError,
        ),
        (
            lambda: shape_of_config({"model_type": "llava", "vision_feature_layer": -40}),
            PatchsieveError,
        ),
        (lambda: replace(TOY.text, num_kv_heads=3), PatchsieveError),
        (lambda: replace(TOY.vision, num_layers_run=9), PatchsieveError),
        (lambda: Schedule((3,), (3, 3), (3,)), ShapeError),
        (lambda: Schedule((3,), (3,), (0,)), ShapeError),
        (lambda: Convention(lm_head="first"), PatchsieveError),
        (lambda: in_decoder(TOY, [3, 4], [1, 2]), PatchsieveError),
        (lambda: in_decoder(TOY, [3], [0]), ShapeError),
        (lambda: in_decoder(TOY, [3], [3]), ShapeError),
        (lambda: in_decoder(TOY, [3, 2], [1]), ShapeError),
        (lambda: in_tower(TOY, [10, 5, 4]), PatchsieveError),
        (lambda: in_tower(TOY, [5], [0], "inside"), PatchsieveError),
        (lambda: after_tower(TOY, 10), PatchsieveError),
        (lambda: ivtp(TOY), PatchsieveError),
        (lambda: cost(TOY, no_pruning(LLAVA), 5), ShapeError),
        (lambda: cost(TOY, no_pruning(TOY), -1), PatchsieveError),
        (lambda: cost(TOY, no_pruning(TOY), 5, precision="int8"), PatchsieveError),
        (lambda: num_to_keep(1.5, 9), PatchsieveError),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        make()


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "llava"}')
    return str(path)


def test_command_prints_one_json_object(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--method atp --sites 4,14,24 --survivors 126,88,20 --text-tokens 64 --json"
    assert main(["cost", "--config", config, *words.split()]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["schema_version"] == 1
    assert set(told["flops"]) == {"vision", "llm", "scorer", "total"}
    assert told["flops"]["total"] == sum(told["flops"][p] for p in ("vision", "llm", "scorer"))
    assert told["tokens_per_layer"]["llm"] == [576] * 4 + [126] * 10 + [88] * 10 + [20] * 8
    assert told["tokens_per_layer"]["vision"] == [577] * 23
    assert told["average_tokens"] == 143.875
    assert told["kv_bytes"] == (143.875 + 64) * 524288
    assert told["unpruned"]["kv_bytes"] == 640 * 524288
    assert told["ratio"] == told["flops"]["total"] / told["unpruned"]["flops"]["total"]


EVERYWHERE = [(entry.name, entry.place) for entry in catalogue.ENTRIES if entry.place != RECIPE]
EVERYWHERE += [("ivtp", RECIPE), ("none", RECIPE), *((n, PROJECTOR) for n in COSTS_ONLY)]
WORDS = {ENCODER: "tower", PROJECTOR: "output", DECODER: "decoder"}


@pytest.mark.parametrize(("method", "place"), [p for p in EVERYWHERE if p != ("ivtp", DECODER)])
@pytest.mark.parametrize("convention", ["papers", "runtime"])
def test_command_counts_every_method_at_every_place(
    config: str, method: str, place: str, convention: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["cost", "--config", config, "--method", method, "--convention", convention]
    if place in WORDS:
        assert WORDS[place] in places_of(method)
        words += ["--place", WORDS[place]]
    if place == DECODER:
        words += ["--sites", "2", "--survivors", "64"]
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ratio"] < 1 or method == "none"
    is_exported = method == "none" or catalogue.find(place, method) is not None
    assert told["is_costs_only"] is not is_exported
    left = {"none": 576, "gtp": 120, "prumerge-plus": 288}.get(method, 64)  # as export has it
    assert told["tokens_per_layer"]["llm"][-1] == left
    assert main(words) == 0
    assert "unpruned" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--config absent.json",
        "--config CONFIG bundle",
        "--config CONFIG --method fastv",
        "--config CONFIG --method atp --sites 4",
        "--config CONFIG --method fastv --sites 40 --keep-ratio 0.5",
        "--config CONFIG --method fastv --sites 2 --place tower",
        "--config CONFIG --method none --sites 2",
        "--config CONFIG --method tome --visual-tokens 64 --keep-ratio 0.5",
        "--config CONFIG --method pooling --visual-tokens 600",
        "--config CONFIG --method ivtp --survivors 5,4",
        "--config CONFIG --method ivtp --text-tokens -1",
        "--config CONFIG --sites 2",
        "--config CONFIG --method fastv --sites 2 --plan p.json",
        "--config CONFIG --plan p.json --visual-tokens 64",
        "--config CONFIG --survivors 64",
        "--config CONFIG --encoder gtp --survivors 64",
        "--config CONFIG --encoder gtp --place tower",
        "--config CONFIG --encoder gtp --visual-tokens 64",
        "--config CONFIG --method gtp --fusion mean",
        "--config CONFIG --method fastv --sites 2 --num-keep 64",
        "--config CONFIG --method fastv --sites 2 --placement mid",
        "--config CONFIG --method fastv --sites 2 --survivors 64 --keep-ratio 0.5",
        "--config CONFIG --method topk --sites 3 --num-keep 64 --visual-tokens 64",
        "--config CONFIG --method tome --sites 3 --num-keep 64",
        "--config CONFIG --method tome --place tower --sites 3",
        "--config CONFIG --encoder gtp --projector pooling",
        "--config CONFIG --encoder gtp --projector topk --projector-keep 120",
    ],
)
def test_mistakes_of_the_command_are_one_line(
    config: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [config if word == "CONFIG" else word for word in words.split()]
    assert main(["cost", *given]) == 2
    told = capsys.readouterr()
    assert told.out == "" and len(told.err.splitlines()) == 1


# Options of export, what cost called the same before, and tokens at the decoder's layers.
SPELLINGS = {
    "gtp": ("--encoder gtp", "--method gtp", "--method gtp --place tower --visual-tokens 120"),
    "gtp 64": ("--encoder gtp --encoder-keep 64", "--method gtp --visual-tokens 64"),
    "gtp groups": (
        "--encoder gtp --encoder-keep 64 --encoder-group 5",
        "--method gtp --visual-tokens 64 --group-layers 5",
    ),
    "evit": ("--encoder evit", "--method evit --place tower", "--method evit --visual-tokens 64"),
    "tome": ("--encoder tome --encoder-keep 36", "--method tome --visual-tokens 36"),
    "topk": (
        "--encoder topk --encoder-layers 4,9 --encoder-counts 300,64",
        "--method topk --place tower --sites 4,9 --survivors 300,64",
    ),
    "pooling": ("--projector pooling --projector-keep 36", "--method pooling --visual-tokens 36"),
    "output": (
        "--projector topk --projector-keep 144",
        "--method topk --place output --keep-ratio 0.25",
    ),
    "decoder topk": (
        "--method topk --sites 3,6 --num-keep 64",
        "--method topk --place decoder --sites 3,6 --visual-tokens 64",
        "--method topk --place decoder --sites 3,6 --survivors 64,64",
    ),
    "decoder tome": ("--method tome --sites 3 --num-keep 300",),
    "fastv": ("--method fastv --sites 2 --keep-ratio 0.5", "--method fastv --sites 2"),
    "atp": (
        "--method atp --sites 4,14 --survivors 126,88",
        "--method atp --sites 4,14 --budget 126,88",
    ),
    "both": ("--encoder gtp --method fastv --sites 2", "--method fastv --sites 2 --encoder gtp"),
    "ivtp": (
        "--method ivtp",
        "--method ivtp --visual-tokens 64",
        "--method ivtp --num-keep 64 --group-layers 3 --decoder-layers 12",
    ),
    "ivtp counts": (
        "--method ivtp --num-keep 64 --group-layers 5",
        "--method ivtp --group-layers 5 --survivors 421,308,225,164,120,88,64",
    ),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_the_options_of_export_and_their_older_spellings_count_alike(
    config: str, case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As does the plan that export makes of them, from a file."""
    lines = [*SPELLINGS[case]]
    if "atp" not in case:
        parser = argparse.ArgumentParser()
        parser.add_argument("--plan")
        plan_options.add_arguments(parser)
        args = parser.parse_args(lines[0].split())
        plan = plan_options.plan_of(args, lambda: Size(576, 32))
        (tmp_path / "plan.json").write_text(json.dumps(plan.to_dict()))
        lines.append(f"--plan {tmp_path / 'plan.json'}")
    told = []
    for words in lines:
        assert main(["cost", "--config", config, *words.split(), "--json"]) == 0
        told.append(json.loads(capsys.readouterr().out))
        assert told[-1]["is_costs_only"] == ("--decoder-layers" in words)
    shown = [[one[k] for k in ("flops", "tokens_per_layer", "kv_bytes")] for one in told]
    assert all(one == shown[0] for one in shown)
    assert shown[0][0]["total"] < told[0]["unpruned"]["flops"]["total"]


def test_the_demo_models_ivtp_has_the_sites_of_its_export(
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = Path(papers.__file__).parents[1] / "examples" / "demo_model" / "checkpoint"
    assert main(["cost", "--config", str(checkpoint), "--method", "ivtp", "--json"]) == 0
    llm = json.loads(capsys.readouterr().out)["tokens_per_layer"]["llm"]
    assert [layer for layer in range(1, 12) if llm[layer] < llm[layer - 1]] == [3, 6, 9]
    words = ["cost", "--config", str(checkpoint), "--method", "ivtp", "--decoder-layers", "12"]
    assert main(words) == 2
    assert "do not fit the decoder" in capsys.readouterr().err


def graph(name: str) -> tuple[str, Graph]:
    """A graph of a manifest, of which the cost reads the number of visual tokens."""
    features = Tensor("image_features", "float", ("images", 9, 8))
    identity = identify(name)
    assert identity is not None
    return name, Graph((), (features,), identity, ())


def make_bundle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A manifest without graphs: the cost of a bundle needs nothing else."""
    text = model.TextModel("llama", 17, 8, 12, 3, 4, 2, 3)
    sizes = (6, 10, 4, 3, 2, 12, 4, (3, 3), 9, 1)
    kinds = (True, True, False, 1e-5, "quick_gelu", (3,), "gelu", True)
    tower = model.VisionModel("clip_vision_model", *sizes, *kinds)
    half = Plan((SitePlan(1, "fastv", {"keep_ratio": 0.5}, 5),))
    adaptive = Plan((SitePlan(1, "atp", {"theta_r": 0.5, "theta_s": 0.9}, 4),))
    facts = manifest.Manifest(
        patchsieve_version="0.1.0",
        checkpoint="toy",
        precision=Precision(),
        text=text,
        vision=tower,
        tokens=model.Tokens("tokenizer.json", None, "<image>", 5, (2,), {}),
        embeddings=model.Embeddings("weights.bin", 0, "float32", (17, 8)),
        limits=manifest.Limits(64, 32, 2),
        stages=(manifest.Stage(0, 1, 114), manifest.Stage(1, 3, 106)),
        plans={"none": Plan(), "half": half, "adaptive": adaptive},
        default_plan="half",
        preprocessor="preprocessor.json",
        targets={},
        graphs=dict(map(graph, ("vision", "decide.half.1", "decide.adaptive.1"))),
        cache_forms={},
        cache_type="float32",
        weights={},
    )
    folder.mkdir()
    files.write(folder, facts)
    # It refuses a manifest without graphs, of which a cost needs none.
    monkeypatch.setattr("patchsieve.cli.cost.read", lambda path: facts)
    return folder


def test_command_costs_the_plans_of_a_bundle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = str(make_bundle(tmp_path / "bundle", monkeypatch))
    words = ["cost", bundle, "--json"]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    schedule = in_decoder(TOY, [5], [1])
    ours = cost(TOY, schedule, 64, images=2, precision="float32", convention=RUNTIME)
    assert told["flops"] == ours.flops.to_dict() and told["kv_bytes"] == ours.kv_bytes
    assert (told["plan"], told["precision"]) == ("half", "float32")
    assert (told["text_tokens"], told["images"], told["convention"]) == (64, 2, "runtime")
    per_row = 2 * 2 * 3 * 4  # k and v, G, D, bytes
    assert told["kv_bytes_reserved"] == ((96 + 2 * 9) + 2 * (96 + 2 * 5)) * per_row
    assert told["kv_bytes_reserved_unpruned"] == 3 * (96 + 2 * 9) * per_row
    words += ["--text-tokens", "5", "--images", "1", "--convention", "papers"]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    ours = cost(TOY, schedule, 5, precision="float32")
    assert told["flops"] == ours.flops.to_dict() and told["kv_bytes"] == ours.kv_bytes
    assert told["is_upper_bound"] is False
    assert main([*words, "--plan", "adaptive"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["is_upper_bound"] is True and told["tokens_per_layer"]["llm"] == [9, 4, 4]
    assert main([*words, "--plan", "adaptive", "--survivors", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["is_upper_bound"] is False
    assert main([*words, "--plan", "absent"]) == 2


def test_command_reads_a_plan_file(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    plan = Path(config).with_name("plan.json")
    site = {"layer": 2, "method": "fastv", "params": {"keep_ratio": 0.25}}
    plan.write_text(json.dumps({"sites": [site]}))
    assert main(["cost", "--config", config, "--plan", str(plan), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens_per_layer"]["llm"][2] == 144


def test_tower_layer_of_clip_is_the_formula_of_the_papers() -> None:
    d, m, n = 1024, 4096, 577
    assert tower_layer(LLAVA.vision, n) == 2 * (4 * n * d**2 + 2 * n**2 * d + 2 * n * d * m)
