"""What `--precision` may say: parts, formats, types, exceptions; and which matrix gets which."""

from __future__ import annotations

import pytest

from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.formats import (
    FORMATS,
    PRESETS,
    Format,
    Formats,
    fits,
    names_matched,
    parse,
)
from patchsieve.contract.precision import Precision
from tests.support.damage import refused

Q = "layers.3.self_attn.q_proj"


def types(text: str, **options: bool) -> tuple[str, ...]:
    return parse(text, **options).types.kinds


@pytest.mark.parametrize("text", ["float32", "float16", "bfloat16", "tower=float16,head=float16"])
def test_a_type_alone_stores_every_matrix_in_it(text: str) -> None:
    chosen = parse(text)
    assert chosen.formats == Formats() and chosen.formats.used == ()
    assert chosen.types == Precision.parse(text)
    assert chosen.cache == chosen.types.decoder


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_names_parts_and_leaves_projector_and_embeddings(preset: str) -> None:
    chosen = parse(preset)
    parts = chosen.formats.parts
    assert {"tower", "scorer", "decoder", "head"} <= set(parts) and "projector" not in parts
    assert chosen.formats.has_step == (preset == "mixed")
    assert chosen.types.kinds == ("float32",) * 3
    assert types(preset, is_for_gpus=True) == ("float16",) * 3
    assert types(f"{preset}:bfloat16") == ("bfloat16",) * 3


def test_presets_are_what_the_documents_say() -> None:
    assert parse("int8").formats.parts == {
        "tower": "int8",
        "scorer": "int8",
        "decoder": "int8",
        "head": "int8-weights",
    }
    assert parse("mixed").formats.parts["step"] == "int4-32"
    assert parse("mixed").formats.parts["decoder"] == "int8"
    assert parse("int4").formats.parts["decoder"] == "int4-32"
    assert parse("int4", int4="int4-128").formats.parts["decoder"] == "int4-128"
    assert parse("int4", int4="int4-128").formats.parts["tower"] == "int8"


def test_parts_types_and_formats_are_three_facts() -> None:
    chosen = parse("tower=int8:float16,decoder=int4-64:bfloat16,head=float32,cache=bfloat16")
    assert chosen.types.kinds == ("float16", "bfloat16", "float32")
    assert chosen.formats.parts == {"tower": "int8", "decoder": "int4-64"}
    assert chosen.cache == "bfloat16"
    assert parse("int8,cache=int8").cache == "int8"
    assert parse("float16,decoder=int8").types.kinds == ("float16", "float32", "float16")


def test_a_part_that_is_named_wins_over_the_preset() -> None:
    chosen = parse(" int8 , tower = float32 ,head=float16, projector=int8,decoder=int4")
    assert chosen.formats.parts == {"scorer": "int8", "decoder": "int4-32", "projector": "int8"}
    assert chosen.types.kinds == ("float32", "float32", "float16")
    assert parse("mixed,step=float").formats.has_step is False
    assert parse("int8,step=int4-64").formats.parts["step"] == "int4-64"


def test_matrices_are_excepted_by_name_by_layer_and_by_pattern() -> None:
    formats = parse(
        "int4,layers.0=float,*.down_proj=int8,layers.3.self_attn.q_proj=int8-weights"
    ).formats
    assert formats.of("decoder", "layers.0.self_attn.q_proj", 64, 64) == "float"
    assert formats.of("decoder", "layers.10.self_attn.q_proj", 64, 64) == "int4-32"
    assert formats.of("decoder", "layers.5.mlp.down_proj", 64, 64) == "int8"
    assert formats.of("decoder", "layers.0.mlp.down_proj", 64, 64) == "int8"  # the last that fits
    assert formats.of("decoder", Q, 64, 64) == "int8-weights"
    assert formats.of("tower", "vision_tower.encoder.layers.0.mlp.fc1", 64, 64) == "int8"
    assert formats.of("projector", "multi_modal_projector.linear_1", 64, 64) == "float"
    assert set(formats.used) == {"int8", "int4-32", "int8-weights", "float"}


def test_layers_before_the_last_site_may_have_a_format_of_their_own() -> None:
    for text, early in (("int4", "int8"), ("int4,decisions=float", "float"), ("int8", "int8")):
        formats = parse(text, decided=3).formats
        late = formats.parts["decoder"]
        found = [formats.of("decoder", f"layers.{i}.mlp.up_proj", 64, 64) for i in (0, 2, 3, 11)]
        assert found == [early, early, late, late]
    step = parse("mixed,decisions=float", decided=3).formats
    assert step.of("step", "layers.0.mlp.up_proj", 64, 64) == "int4-32"
    named = parse("int4,layers.0=int4-64", decided=3).formats
    assert named.of("decoder", "layers.0.mlp.up_proj", 64, 64) == "int4-64"


@pytest.mark.parametrize(
    ("sizes", "form"),
    [((64, 64), "int4-64"), ((96, 64), "int8-weights"), ((64, 63), "int8-weights")],
)
def test_a_matrix_that_blocks_do_not_fit_is_stored_in_int8(sizes: tuple, form: str) -> None:
    assert parse("decoder=int4-64").formats.of("decoder", Q, *sizes) == form
    assert parse("decoder=float,layers.3=int4-64").formats.of("decoder", Q, *sizes) == form


def test_a_pattern_means_names_up_to_a_dot() -> None:
    assert fits("layers.1", "layers.1.mlp.up_proj") and not fits(
        "layers.1", "layers.11.mlp.up_proj"
    )
    assert fits("*.up_proj", "layers.11.mlp.up_proj") and fits("lm_head", "lm_head")
    assert fits("layers.[01].mlp", "layers.1.mlp.up_proj")


@pytest.mark.parametrize(
    ("form", "sizes", "kind", "count"),
    [
        ("float", (64, 32), "float16", 64 * 32 * 2),
        ("int8", (64, 32), "float32", 64 * 32 + 32 * 4),
        ("int8-weights", (64, 32), "float16", 64 * 32 + 32 * 2),
        ("int4-32", (64, 32), "float32", 64 * 32 // 2 + 2 * 32 * 4),
        ("int4-64", (64, 32), "bfloat16", 64 * 32 // 2 + 32 * 2),
        ("int4-128", (256, 32), "float16", 256 * 32 // 2 + 2 * 32 * 2),
    ],
)
def test_bytes_are_those_of_numbers_and_scales(
    form: str, sizes: tuple[int, int], kind: str, count: int
) -> None:
    assert FORMATS[form].num_bytes(*sizes, kind) == count


def test_a_seven_billion_decoder_in_int4_is_near_half_a_byte_a_weight() -> None:
    per = FORMATS["int4-128"].num_bytes(4096, 11008, "float16") / (4096 * 11008)
    assert per == pytest.approx(0.5 + 2 / 128)


def test_every_format_but_float_has_an_error_that_verify_allows() -> None:
    for form in FORMATS.values():
        assert (form.error > 0) == bool(form.bits), form.name
        assert form.error < 1  # a matrix with wrong scales makes at least this much
    assert Format("x").takes(7, 9)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ",",
        ",tower=int8",
        "int8,",
        "int9",
        "float8",
        "int8:int8",
        "int8:",
        "float:float64",
        "int4-16",
        "tower",
        "tower=",
        "=int8",
        "tower=int8,tower=int8",
        "tower=int8,decoder",
        "layers.0=int3",
        "mixed:float64",
        "step=mixed",
        "decoder=int8:float8",
        "x" * 5000,
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(text: str) -> None:
    line = refused(lambda: parse(text), PatchsieveError, "precision")
    assert "correct --precision" in line


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("int8,projector=float16", "projector"),
        ("decoder=float16,step=int4:float32", "step"),
        ("tower=float16,scorer=int8:float32", "scorer"),
    ],
)
def test_a_part_without_a_type_of_its_own_is_refused_one(text: str, part: str) -> None:
    line = refused(lambda: parse(text), PatchsieveError, "type")
    assert f"the {part} has a type" in line and "leave the type" in line


@pytest.mark.parametrize("text", ["int8,layers.0=float16", "int8,*.up_proj=int4:float16"])
def test_a_matrix_has_the_type_of_its_part(text: str) -> None:
    line = refused(lambda: parse(text), PatchsieveError, "type")
    assert "float16" in line and "--precision" in line


def test_a_name_that_no_matrix_has_is_refused() -> None:
    formats = parse("int8,layers.99=float").formats
    line = refused(lambda: names_matched(formats, [Q, "lm_head"]), PatchsieveError, "matrix")
    assert "layers.99" in line and Q in line
    names_matched(parse("int8,layers.3=float,lm_head=float").formats, [Q, "lm_head"])
