"""Folding leaves the float model the same function, and undoes what scaled channels do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPModel

from patchsieve.contract.formats import FORMATS
from patchsieve.export.families import family_of
from patchsieve.export.families.specs import DecoderSpec
from patchsieve.export.graphs.next_layer import NextLayer, Projections
from patchsieve.export.quantise.hints import Hints
from patchsieve.export.quantise.rounding import dequantise, quantise
from patchsieve.export.quantise.search import Reader, choose, predicted_error
from patchsieve.export.quantise.smoothing import Group, Smoothed, groups_of, smoothed
from patchsieve.export.quantise.statistics import InputStatistics, Statistics
from patchsieve.export.weights import Weight
from tests.support.models import TINY, tiny_llava
from tests.support.tiny_clip import WINDOW, save_clip

LAYER = (
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
)
CLOSE = 2e-5  # of a tensor's largest entry: rounding of float32 in a few layers


class Table:
    """A source in memory."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


def some_factors(source: Table) -> Any:
    """Factors that are no powers of two, between 1 / 30 and 30."""

    def factors(group: Group) -> Tensor:
        generator = torch.Generator().manual_seed(len(group.maker))
        size = len(source.read(f"{group.maker}.weight"))
        return 30 ** (2 * torch.rand(size, generator=generator) - 1)

    return factors


def weights(source: Table, formats: dict[str, str]) -> list[Weight]:
    """The tensors of a file; `formats` is by a part of a matrix's name."""
    found = []
    for name, tensor in source.tensors.items():
        is_matrix = tensor.dim() == 2
        kinds = (kind for part, kind in formats.items() if is_matrix and part in name)
        shape = tuple(tensor.shape)
        shape = shape[::-1] if is_matrix else shape
        found.append(Weight(name, name, shape, is_matrix, next(kinds, "float")))
    return found


# The same function.


@contextmanager
def recorded(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Outputs of layers, norms' readers left out: rows, queries, keys, values and logits."""
    seen: dict[str, Tensor] = {}
    endings = ("q_proj", "k_proj", "v_proj", "lm_head", "text_projection", "visual_projection")
    hooks = []
    for name, module in model.named_modules():
        is_layer = name.rpartition(".")[0].endswith("layers")
        if is_layer or name.endswith(endings):

            def hook(_: Any, __: Any, out: Any, name: str = name) -> None:
                seen[name] = (out[0] if isinstance(out, tuple) else out).detach().clone()

            hooks.append(module.register_forward_hook(hook))
    yield seen
    for each in hooks:
        each.remove()


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        error = (found[name] - tensor).abs().max() / tensor.abs().max()
        assert error < CLOSE, name


def fold(model: nn.Module, canonical: Any) -> Smoothed:
    """Fold every group of a model in place."""
    names = {name: canonical(name) for name in model.state_dict()}
    source = Table({names[name]: t.clone() for name, t in model.state_dict().items()})
    if is_tied(model):
        del source.tensors["lm_head.weight"]
    folded = Smoothed(source, groups_of(source.tensors), some_factors(source))
    changed = {name: folded.read(own) for name, own in names.items() if own in source.tensors}
    with torch.no_grad():
        for name, parameter in model.state_dict().items():
            if name in changed:
                parameter.copy_(changed[name])
    return folded


def is_tied(model: Any) -> bool:
    text = getattr(model.config, "text_config", None)
    return bool(getattr(text, "tie_word_embeddings", False))


@pytest.mark.parametrize("row", TINY)
def test_a_folded_model_has_the_same_rows_queries_keys_values_and_logits(row: str) -> None:
    model, _ = tiny_llava(row)
    side, tokens = model.config.vision_config.image_size, model.config.image_seq_length
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 90, (1, 12), generator=generator)
    image = torch.full((1, tokens), model.config.image_token_id)
    asked = {
        "input_ids": torch.cat((ids[:, :4], image, ids[:, 4:]), 1),
        "pixel_values": torch.randn(1, 3, side, side, generator=generator),
    }
    with torch.no_grad(), recorded(model) as before:
        model(**asked)
    folded = fold(model, family_of(model.config).canonical)
    text, vision = model.config.text_config, model.config.vision_config
    head = not is_tied(model)
    assert len(folded._made_by) == 3 * text.num_hidden_layers + 2 * vision.num_hidden_layers + head
    with torch.no_grad(), recorded(model) as after:
        model(**asked)
    assert_equal(after, before)


def test_a_folded_clip_has_the_same_rows_in_both_towers(tmp_path: Any) -> None:
    llava, _ = tiny_llava("llama")
    model = CLIPModel.from_pretrained(save_clip(tmp_path / "clip", llava)).eval()
    side = llava.config.vision_config.image_size
    asked = {
        "input_ids": torch.arange(WINDOW)[None] + 5,
        "pixel_values": torch.randn(1, 3, side, side),
    }
    with torch.no_grad(), recorded(model) as before:
        model(**asked)
    folded = fold(model, lambda name: name)
    makers = {group.maker for group in folded._read_by.values()}
    assert {"text_model.final_layer_norm", "text_model.encoder.layers.1.layer_norm2"} <= makers
    with torch.no_grad(), recorded(model) as after:
        model(**asked)
    assert_equal(after, before)


def test_a_decision_that_reads_the_next_layer_gets_the_same_queries_and_keys() -> None:
    source = layer(biased=True)
    spec = DecoderSpec(
        **dict.fromkeys(("vocab_size", "num_layers", "max_rows"), 8),
        hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2, head_dim=16,
        norm_eps=1e-6, activation="silu", qkv_bias=True, output_bias=False, mlp_bias=True,
        inv_freq=tuple(1 / (1 + i) for i in range(8)), rotary_scale=1.0,
    )  # fmt: skip
    folded = Smoothed(source, groups_of(source.tensors), some_factors(source))
    hidden, made = torch.randn(1, 5, 64), []
    for each in (source, folded):
        module = Projections(spec)
        for name, parameter in module.named_parameters():
            tensor = each.read(f"layers.0.{name}")
            is_matrix = tensor.dim() == 2
            parameter.data = tensor.t() if is_matrix else tensor
        ahead = NextLayer(spec, module, hidden, torch.arange(5))
        made.append({"query": ahead.query(torch.tensor([4])), "key": ahead.key()})
    assert_equal(made[1], made[0])


# Groups.


def test_groups_are_found_among_the_tensors_of_a_part() -> None:
    tensors = [f"layers.3.{name}" for name in LAYER]
    assert groups_of(tensors) == [
        Group(f"layers.3.{maker}", False, tuple(f"layers.3.{reader}" for reader in readers))
        for maker, readers in (
            ("input_layernorm", [f"self_attn.{name}_proj" for name in "qkv"]),
            ("post_attention_layernorm", ["mlp.gate_proj", "mlp.up_proj"]),
            ("mlp.up_proj", ["mlp.down_proj"]),
        )
    ]
    assert groups_of(["norm.weight"]) == []  # the head is the table of embeddings
    assert groups_of(["norm.weight", "lm_head.weight"]) == [Group("norm", False, ("lm_head",))]
    assert groups_of(t for t in tensors if "up_proj" not in t) == [
        Group("layers.3.input_layernorm", False, groups_of(tensors)[0].readers)
    ]


def test_only_groups_with_a_rounded_matrix_are_folded() -> None:
    source = layer()
    folded = smoothed(source, weights(source, {"k_proj": "int8"}))
    for name, tensor in source.tensors.items():
        is_changed = name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
        is_changed |= name.endswith("input_layernorm.weight")
        assert torch.equal(folded.read(name), tensor) != is_changed, name


# Scaled channels.


def layer(biased: bool = False, seed: int = 0) -> Table:
    """A decoder layer, 64 channels and 96 inside, in float32."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {}
    for name in LAYER:
        out = {"k": 32, "v": 32, "g": 96, "u": 96}.get(name.split(".")[1][0], 64)
        shapes[name] = (out, 96 if "down" in name else 64) if "proj" in name else (64,)
        if biased and "proj" in name:
            shapes[name.replace("weight", "bias")] = (out,)
    return Table(
        {
            f"layers.0.{name}": torch.randn(shape, generator=generator) * 0.1
            + (1.0 if len(shape) == 1 and "norm" in name else 0.0)
            for name, shape in shapes.items()
        }
    )


def statistics(seed: int = 1) -> Statistics:
    """Of the matrices of `layer`."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    for group in groups_of(layer().tensors):
        for name in group.readers:
            x = torch.randn(50, 96 if "down" in name else 64, generator=generator)
            x *= 1 + torch.arange(x.shape[1]) % 5
            largest = x.abs().amax(0)
            inputs[name] = InputStatistics(x.abs().mean(0), x.square().mean(0), largest)
    return Statistics("a", 1, 50, 0, inputs)


def scale_channels(source: Table, given: Statistics, by: float) -> tuple[Table, Statistics]:
    """Some channels of each group are larger, with the inverse in the matrices."""
    inputs = dict(given.inputs)

    def factors(group: Group) -> Tensor:
        factors = torch.ones(len(source.read(f"{group.maker}.weight")))
        factors[[3, 17, 40]] = 1 / by
        for name in group.readers:
            old = inputs[name]
            inputs[name] = InputStatistics(
                old.mean / factors, old.square / factors**2, old.largest / factors
            )
        return factors

    scaled = Smoothed(source, groups_of(source.tensors), factors)
    tensors = {name: scaled.read(name) for name in source.tensors}
    return Table(tensors), Statistics("a", 1, 50, 0, inputs)


@pytest.mark.parametrize("kind", ["int8", "int8-weights", "int4-32"])
@pytest.mark.parametrize("biased", [True, False])
def test_scaled_channels_get_the_numbers_of_the_plain_checkpoint(kind, biased) -> None:
    plain = layer(biased)
    outliers, _ = scale_channels(plain, statistics(), 30.0)
    stored = weights(plain, {"proj": kind})
    sources = [smoothed(source, stored) for source in (plain, outliers)]
    for name in plain.tensors:
        one, other = (source.read(name) for source in sources)
        torch.testing.assert_close(other, one, rtol=1e-5, atol=0)
        before, after = (source.hints(name) for source in sources)
        assert (before.importance is None) == (after.importance is None)
        assert before.input_scale is None
        if before.importance is not None:
            torch.testing.assert_close(after.importance, before.importance)


def test_norms_are_stored_as_powers_of_two() -> None:
    source = layer()
    stored = weights(source, {"mlp.up_proj": "int4-32", "q_proj": "int8"})
    folded = smoothed(source, stored)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        size = folded.read(f"layers.0.{norm}.weight").abs()
        assert torch.equal(size, torch.exp2(torch.log2(size).round()))


@pytest.mark.parametrize("kind", ["int8", "int8-weights", "int4-32"])
def test_what_statistics_choose_errs_no_more_than_no_folding(kind) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(64, 96, generator=generator) * 0.1
    x = torch.randn(200, 64, generator=generator) * (1 + torch.arange(64) % 5)
    inputs = InputStatistics(x.abs().mean(0), x.square().mean(0), x.abs().amax(0))
    readers = [Reader(weight, FORMATS[kind])]
    unit = torch.rand(64, generator=generator) * 20 + 0.05  # a norm whose weights mislead
    found = choose(readers, inputs, unit, is_measured=True)
    # `choose` lets every output count alike, this measure by its size.
    plain = predicted_error(readers, inputs, torch.ones(64))
    assert predicted_error(readers, inputs, found) <= 1.05 * plain
    assumed = choose(readers, inputs, unit)
    assert predicted_error(readers, inputs, assumed) >= predicted_error(readers, inputs, found)


def test_dead_channels_do_no_harm() -> None:
    source = layer(biased=True)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        source.tensors[f"layers.0.{norm}.weight"][[0, 9]] = 0
    source.tensors["layers.0.mlp.up_proj.weight"][5] = 0
    source.tensors["layers.0.mlp.up_proj.bias"][5] = 0
    source.tensors["layers.0.self_attn.q_proj.weight"][:, 11] = 0
    for kind in ("int8", "int4-32"):
        folded = smoothed(source, weights(source, {"proj": kind}))
        for name in source.tensors:
            assert folded.read(name).isfinite().all(), name


def test_hints_are_of_the_folded_matrix() -> None:
    source, known = layer(), statistics()
    name = "layers.0.mlp.gate_proj"
    folded = smoothed(source, weights(source, {"gate_proj": "int8"}), known)
    factor, before, hints = folded.factor(name), known.of(name), folded.hints(f"{name}.weight")
    torch.testing.assert_close(hints.importance * factor**2, before.square)
    assert hints.input_scale == pytest.approx(float((before.largest / factor).max()) / 127)
    assert folded.factor("layers.0.self_attn.o_proj") is None
    assert folded.hints("layers.0.self_attn.o_proj.weight") == Hints()
    # What is in no folded group has the statistics as they are.
    other = folded.hints("layers.0.mlp.down_proj.weight")
    assert torch.equal(other.importance, known.of("layers.0.mlp.down_proj").square)


# What it is for.


@pytest.mark.parametrize("kind", ["int8", "int4-32"])
@pytest.mark.parametrize("measured", [True, False])
def test_outliers_cost_little_with_smoothing_and_much_without(kind: str, measured: bool) -> None:
    outliers, known = scale_channels(layer(), statistics(), 30.0)
    name = "layers.0.mlp.gate_proj"
    rows = torch.randn(200, 64) * known.of(name).square.sqrt()
    if not measured:  # the rows that are assumed
        rows = torch.randn(200, 64) * outliers.read("layers.0.post_attention_layernorm.weight")
    folded = smoothed(outliers, weights(outliers, {"gate_proj": kind}), known if measured else None)
    errors = [
        error(rows / factor, source.read(f"{name}.weight").t(), kind)
        for source, factor in ((outliers, 1.0), (folded, folded.factor(name)))
    ]
    print(f"relative error without {errors[0]:.4f}, with {errors[1]:.4f}")
    assert errors[1] < errors[0] / 2


def error(rows: Tensor, weight: Tensor, kind: str) -> float:
    """Of a product, relative, in int8 with rows rounded to 256 steps."""
    held = rows
    if kind == "int8":
        low = rows.min().clamp(max=0)
        step = (rows.max().clamp(min=0) - low) / 255
        held = ((rows - low) / step).round() * step + low
    stored = dequantise(*quantise(weight, FORMATS[kind], torch.float32))
    return float((held @ stored - rows @ weight).norm() / (rows @ weight).norm())
