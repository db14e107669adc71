"""A checkpoint or a plan that cannot be exported is refused in one line, and nothing is written."""

from __future__ import annotations

import json
import os
import re
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from patchsieve.calibration.encoder import Encoder
from patchsieve.contract.errors import PatchsieveError, UnsupportedModelError
from patchsieve.contract.manifest import Limits
from patchsieve.contract.plan import MethodPlan, Plan, SitePlan
from patchsieve.cost.config import read_shape
from patchsieve.export.exporter import export
from patchsieve.export.source.checkpoint import Checkpoint
from patchsieve.export.source.quantised import LAYOUTS
from tests.support import damage
from tests.support.damage import refused
from tests.support.models import save_checkpoint

SUPPORTED = ("llava", "llama, mistral, qwen2", "clip_vision_model, siglip_vision_model")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that may be broken."""
    return damage.copy(damage.checkpoint(), tmp_path / "checkpoint")


def attempt(
    checkpoint: Path | str,
    kind: type[PatchsieveError] = PatchsieveError,
    match: str | None = None,
    make: Callable[[], dict[str, Any]] = dict,
    seen: list[str] | None = None,
) -> str:
    """The one line with which an export is refused; nothing is written."""
    place = Path(tempfile.mkdtemp(dir=damage.folder()))
    messages = [] if seen is None else seen
    line = refused(
        lambda: export(
            str(checkpoint),
            place / "new" / "bundle",
            damage.options(**make()),
            lambda what, _: messages.append(what),
        ),
        kind,
        match,
    )
    assert list(place.iterdir()) == []
    return line


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file."""
    data = json.loads(file.read_text(encoding="utf-8"))
    change(data)
    file.write_text(json.dumps(data), encoding="utf-8")


def edit_config(checkpoint: Path, **changes: Any) -> None:
    """Change config.json; `text_config__x` and `vision_config__x` reach inside."""

    def change(data: dict[str, Any]) -> None:
        for key, value in changes.items():
            part, _, name = key.rpartition("__")
            (data[part] if part else data)[name] = value

    edit(checkpoint / "config.json", change)


def edit_tensors(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the weights."""
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors")


# The model's structure.


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "llava_next"),
        ("model_type", "llava_onevision"),
        ("model_type", "llama"),
        ("model_type", None),
        ("model_type", ["llava"]),
        ("text_config__model_type", "gemma2"),
        ("text_config__model_type", "phi3"),
        ("text_config__model_type", "mixtral"),
        ("text_config__model_type", 7),
        ("vision_config__model_type", "dinov2"),
        ("vision_config__model_type", "clip"),
        ("model_type", "qwen2_vl"),
    ],
)
def test_an_unsupported_structure_is_refused_with_what_is_supported(
    key: str, value: Any, checkpoint: Path
) -> None:
    edit_config(checkpoint, **{key: value})
    line = attempt(checkpoint, UnsupportedModelError)
    assert "found: " in line and "expected: " in line
    assert all(words in line for words in SUPPORTED) and "what to do: " in line, line


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"text_config": None}, "not well formed"),
        ({"text_config": "llama"}, "not well formed"),
        ({"vision_config": [1]}, "not well formed"),
        ({"text_config__hidden_size": "many"}, "."),
        ({"text_config__hidden_size": 128}, "does not fit"),
        ({"text_config__num_hidden_layers": 5}, "lacks 9 of"),
        ({"text_config__vocab_size": 100}, "does not fit"),
        ({"text_config__num_key_value_heads": 1}, "does not fit"),
        ({"text_config__head_dim": 5}, "does not accept .*head_dim"),
        ({"vision_config__num_attention_heads": 3}, "does not accept .*attention heads"),
        ({"text_config__hidden_act": "swishy"}, "activation"),
        ({"projector_hidden_act": "swishy"}, "activation"),
        ({"vision_config__hidden_act": "swishy"}, "activation"),
        ({"vision_config__num_hidden_layers": 9}, "lacks"),
        ({"vision_config__patch_size": 4}, "does not fit"),
        ({"vision_feature_layer": 99}, "vision_feature_layer"),
        ({"vision_feature_layer": -99}, "vision_feature_layer"),
        ({"vision_feature_layer": [-2, 17]}, "vision_feature_layer"),
        ({"vision_feature_layer": []}, "vision_feature_layer"),
        ({"vision_feature_select_strategy": "cls"}, "transformers does not accept"),
        ({"vision_config__image_size": 64}, "image processor does not yield"),
        ({"image_token_index": 77777}, "no image token"),
    ],
)
def test_a_config_that_does_not_fit_its_weights_is_refused(
    changes: dict[str, Any], match: str, checkpoint: Path
) -> None:
    edit_config(checkpoint, **changes)
    attempt(checkpoint, PatchsieveError, match)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "long_factor": [1.0] * 8,
            "short_factor": [1.0] * 8,
            "original_max_position_embeddings": 64,
        },
    ],
)
def test_rotary_positions_that_depend_on_the_length_are_refused(rope, checkpoint: Path) -> None:
    edit_config(checkpoint, text_config__rope_parameters=rope)
    line = attempt(checkpoint, UnsupportedModelError, "rotary")
    assert rope["rope_type"] in line and "default, linear, llama3, yarn" in line


def test_a_window_smaller_than_the_reservation_is_refused(tmp_path: Path) -> None:
    window = {"sliding_window": 32}
    path = save_checkpoint(tmp_path / "mistral", "mistral", text=window)
    line = attempt(path, UnsupportedModelError, "at most 32 .*sliding window")
    assert "what to do: lower --max-text-tokens" in line


@pytest.mark.parametrize("content", ["", "{", "null", "[]", "3", "[" * 100_000, "1" * 5_000])
@pytest.mark.parametrize(
    "name", ["config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"]
)
def test_a_json_file_that_is_malformed_is_refused(
    name: str, content: str, checkpoint: Path
) -> None:
    assert (checkpoint / name).is_file()
    (checkpoint / name).write_text(content)
    attempt(checkpoint)


# Files.


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for name in ("absent", "a" * 300, "", "nul\0"):
        attempt(tmp_path / name if name else "", match="no such checkpoint")
    (tmp_path / "file").write_text("x")
    attempt(tmp_path / "file", match="no such checkpoint")
    (tmp_path / "empty").mkdir()
    attempt(tmp_path / "empty", match="config.json")


def test_missing_shards_are_counted(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "sharded", shard_size="300KB")
    shards = sorted(path.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    line = attempt(path, match="incomplete")
    assert shards[1].name in line and "download it again" in line


@pytest.mark.parametrize(
    "weight_map",
    [None, [], "x", {"a": 1}, {"a": "../../etc/passwd"}, {"a": "/etc/passwd"}, {"a": ""}],
)
def test_an_index_that_names_no_shards_is_refused(weight_map, checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    attempt(checkpoint, match="cannot use")


def test_no_weights_at_all_are_refused(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    attempt(checkpoint, match="no weights")


def header(size: int, text: bytes) -> bytes:
    """The start of a safetensors file."""
    return struct.pack("<Q", size) + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        header(1 << 62, b"{}"),
        header(100, b"{}"),
        header(2, b"{}") + b"\0" * 10,
        header(8, b"not json"),
        header(70, b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,99999999999]}}      '),
        header(66, b'{"a":{"dtype":"F32","shape":[99999999],"data_offsets":[0,4]}}     ')
        + b"\0" * 4,
    ],
)
def test_a_weights_file_with_a_corrupt_header_is_refused(content: bytes, checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(content)
    attempt(checkpoint)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pointer_of_git_lfs_is_called_one(name: str, checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    (checkpoint / name).write_bytes(pointer)
    attempt(checkpoint, match="pointer of Git LFS.*git lfs pull")


@pytest.mark.parametrize(
    ("present", "remedy"),
    [
        (["model.fp16.safetensors"], "rename the variant model.fp16.safetensors to model.safetens"),
        (
            ["model.safetensors.index.fp16.json", "model.fp16-00001-of-00002.safetensors"],
            "index.fp16.json to model.safetensors.index.json",
        ),
        (["pytorch_model.fp16.bin"], "rename the variant .* to pytorch_model.bin"),
        (["model-00001-of-00002.safetensors"], "download the index of the shards too"),
        (["consolidated.safetensors"], "save_pretrained of transformers"),
        (["adapter_model.safetensors"], "merge_and_unload"),
        (["llava-q4.gguf"], "save_pretrained of transformers"),
        (["checkpoint-90/", "checkpoint-500/", "training_args.bin"], "such as checkpoint-500"),
    ],
)
def test_weights_that_transformers_does_not_read_are_named_with_the_way_out(
    present: list[str], remedy: str, checkpoint: Path
) -> None:
    (checkpoint / "model.safetensors").unlink()
    for name in present:
        if name.endswith("/"):
            (checkpoint / name).mkdir()
        else:
            (checkpoint / name).write_bytes(b"x")
    line = attempt(checkpoint, match="no weights")
    assert all(name.rstrip("/") in line for name in present)
    assert re.search(f"what to do: .*{remedy}", line), line


# Quantised weights, adapters, LLaVA's original format.

WEIGHT = "1.mlp.up_proj.weight"
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def quantised(kind: str, tensors: dict[str, torch.Tensor]) -> None:
    """One layer as a method of quantisation stores it, in short: only the names are right."""
    name = find(tensors, WEIGHT)
    weight, base = tensors.pop(name), name.removesuffix("weight")
    rows, columns = weight.shape
    packed = torch.zeros(columns // 8, rows, dtype=torch.int32)
    scales = torch.ones(1, rows, dtype=torch.float16)
    tensors |= {
        "bitsandbytes": {
            name: torch.zeros(rows * columns // 2, 1, dtype=torch.uint8),
            f"{name}.absmax": torch.ones(rows),
            f"{name}.quant_map": torch.ones(16),
        },
        "int8": {name: weight.to(torch.int8), f"{base}SCB": torch.ones(rows)},
        "awq": {f"{base}qweight": packed, f"{base}qzeros": packed.clone(), f"{base}scales": scales},
        "gptq": {f"{base}qweight": packed, f"{base}g_idx": torch.zeros(columns)},
        "compressed-tensors": {f"{base}weight_packed": packed, f"{base}weight_scale": scales},
        "fp8": {name: weight.to(torch.float8_e4m3fn), f"{base}weight_scale_inv": scales},
    }[kind]


@pytest.mark.parametrize("is_said", [True, False])
@pytest.mark.parametrize(
    "kind", ["bitsandbytes", "int8", "awq", "gptq", "compressed-tensors", "fp8"]
)
def test_quantised_weights_are_refused_by_their_method(
    kind: str, is_said: bool, checkpoint: Path
) -> None:
    method = "bitsandbytes" if kind == "int8" else kind
    edit_tensors(checkpoint, lambda tensors: quantised(kind, tensors))
    if is_said:
        edit_config(checkpoint, quantization_config={"quant_method": method})
    is_known = is_said and method in LAYOUTS
    match = "up_proj" if is_known else f"are quantised with .*{method}"
    line = refused(lambda: Checkpoint(checkpoint), UnsupportedModelError, match)
    assert "the checkpoint that it was quantised from" in line
    assert ("dequantize()" in line) == (method == "bitsandbytes")


def test_calibrate_refuses_damaged_weights_too(checkpoint: Path) -> None:
    """Hugging Face would fill the layer with noise and continue."""
    edit_tensors(checkpoint, lambda tensors: quantised("awq", tensors))
    edit_config(checkpoint, quantization_config={"quant_method": "awq"})
    refused(lambda: Encoder(str(checkpoint)), UnsupportedModelError, "scales does not fit")


def adapter(folder: Path, **changes: Any) -> None:
    """A LoRA adapter as peft saves it."""
    entry = {"peft_type": "LORA", "base_model_name_or_path": "llava-hf/llava-1.5-7b-hf", "r": 4}
    (folder / "adapter_config.json").write_text(json.dumps(entry | changes))
    name = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: torch.zeros(4, 64)}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "removed", [("config.json", "model.safetensors"), ("model.safetensors",), ()]
)
def test_an_adapter_is_refused_with_its_base_and_how_to_merge(
    removed: tuple[str, ...], checkpoint: Path
) -> None:
    """transformers adds one that lies beside a whole model to it, if peft is installed."""
    adapter(checkpoint)
    for name in removed:
        (checkpoint / name).unlink()
    line = attempt(checkpoint, UnsupportedModelError, "holds an adapter")
    assert "a LORA adapter of llava-hf/llava-1.5-7b-hf" in line and "merge_and_unload" in line
    assert ("remove adapter_config.json" in line) == ("config.json" not in removed)


def test_an_adapter_that_names_no_base_is_still_called_one(checkpoint: Path) -> None:
    adapter(checkpoint, base_model_name_or_path=None, peft_type="VERA")
    attempt(checkpoint, UnsupportedModelError, "a VERA adapter of a base that it does not name")


def flat(**changes: Any) -> dict[str, Any]:
    """The config.json of liuhaotian/llava-v1.5-7b, in short."""
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "hidden_size": 4096,
        "image_aspect_ratio": "pad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "model_type": "llava",
        "num_hidden_layers": 32,
    } | changes


@pytest.mark.parametrize(
    ("config", "way"),
    [
        (flat(), "convert_llava_weights_to_hf.py.* llava-hf/llava-1.5-7b-hf"),
        (flat(hidden_size=5120), "convert_llava_weights_to_hf.py.* llava-hf/llava-1.5-13b-hf"),
        (flat(model_type="llava_llama", architectures=None), "convert_llava_weights_to_hf.py"),
        ({"model_type": "llava_mistral", "hidden_size": 4096}, "convert_llava_weights_to_hf.py"),
        ({"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]}, "convert_llava"),
        ({"model_type": "llava", "hidden_size": 5120}, "llava-hf/llava-1.5-13b-hf"),
        (flat(image_aspect_ratio="anyres"), "LLaVA-NeXT .* is not supported"),
    ],
)
def test_the_original_format_is_named_by_export_and_by_cost(
    config: dict[str, Any], way: str, checkpoint: Path
) -> None:
    (checkpoint / "config.json").write_text(json.dumps(config))
    match = f"in LLaVA's original format.*{way}"
    attempt(checkpoint, UnsupportedModelError, match)
    refused(lambda: read_shape(checkpoint), UnsupportedModelError, match)


def test_original_weights_below_a_converted_config_are_named(checkpoint: Path) -> None:
    save_file({"model.mm_projector.0.weight": torch.zeros(4, 4)}, checkpoint / "model.safetensors")
    attempt(checkpoint, UnsupportedModelError, "lacks .*convert_llava_weights_to_hf.py")


@pytest.mark.parametrize("part", [0.01, 0.5, 0.999999])
def test_a_truncated_weights_file_is_refused(part: float, checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    os.truncate(file, int(file.stat().st_size * part))
    attempt(checkpoint, match="cannot read the weights file .*download it again")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"\x80\x04N."])
def test_a_corrupt_bin_file_is_refused(content: bytes, checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(content)
    attempt(checkpoint, match="weights file")


def test_a_bin_file_that_would_run_code_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    (checkpoint / "model.safetensors").unlink()
    torch.save({"a": Attack()}, checkpoint / "pytorch_model.bin")
    attempt(checkpoint, match="weights file")
    assert not (tmp_path / "ran").exists()


def test_a_missing_tensor_is_named(checkpoint: Path) -> None:
    name = "language_model.model.layers.2.mlp.up_proj.weight"
    edit_tensors(checkpoint, lambda tensors: tensors.pop(find(tensors, "2.mlp.up_proj.weight")))
    line = attempt(checkpoint, UnsupportedModelError, "lacks 1 of")
    assert name.rsplit("model.", 1)[1] in line


def test_a_tensor_of_another_shape_is_named(checkpoint: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[find(tensors, "1.mlp.up_proj.weight")] = torch.zeros(3, 5)

    edit_tensors(checkpoint, change)
    line = attempt(checkpoint, UnsupportedModelError, "layers.1.mlp.up_proj.weight")
    assert "found: [3, 5]" in line


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.bool])
def test_a_tensor_of_integers_is_quantised_and_refused(
    dtype: torch.dtype, checkpoint: Path
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = find(tensors, "1.mlp.up_proj.weight")
        tensors[name] = tensors[name].to(dtype)

    edit_tensors(checkpoint, change)
    attempt(checkpoint, UnsupportedModelError, "not stored in floating point")


def find(tensors: dict[str, torch.Tensor], end: str) -> str:
    """The tensor of the decoder whose name ends so."""
    return next(name for name in tensors if name.endswith(end) and "language" in name)


def test_a_missing_tokenizer_is_refused_before_the_weights_are_written(checkpoint: Path) -> None:
    for file in checkpoint.glob("tokenizer*"):
        file.unlink()
    seen: list[str] = []
    attempt(checkpoint, UnsupportedModelError, "no tokenizer", seen=seen)
    assert seen and not any("weights" in what for what in seen)


def test_a_missing_image_processor_is_refused(checkpoint: Path) -> None:
    for name in ("processor_config.json", "preprocessor_config.json"):
        (checkpoint / name).unlink(missing_ok=True)
    attempt(checkpoint, UnsupportedModelError, "no image processor")


# The plan and the limits.


def site(layer: Any, method: Any = "fastv", budget: Any = None, **params: Any) -> Plan:
    """A plan of one site."""
    return Plan((SitePlan(layer, method, params, budget),))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: site(0), "index of a decoder layer"),
        (lambda: site(-1), "index of a decoder layer"),
        (lambda: site(1.5), "index of a decoder layer"),
        (lambda: site(True), "index of a decoder layer"),
        (lambda: site("2"), "index of a decoder layer"),
        (lambda: site(4), "outside the decoder"),
        (lambda: site(5), "outside the decoder"),
        (lambda: site(2**40), "outside the decoder"),
        (lambda: Plan((SitePlan(3, "fastv"), SitePlan(1, "fastv"))), "out of order or repeated"),
        (lambda: Plan((SitePlan(2, "fastv"), SitePlan(2, "fastv"))), "out of order or repeated"),
        (lambda: site(2, keep_ratio=0), "keep_ratio"),
        (lambda: site(2, keep_ratio=-0.5), "keep_ratio"),
        (lambda: site(2, keep_ratio=1.5), "keep_ratio"),
        (lambda: site(2, keep_ratio=float("nan")), "keep_ratio"),
        (lambda: site(2, keep_ratio=float("inf")), "keep_ratio"),
        (lambda: site(2, keep_ratio="half"), "has the wrong type"),
        (lambda: site(2, keep_ratio=None), "has the wrong type"),
        (lambda: site(2, keep_ratio=[0.5]), "has the wrong type"),
        (lambda: site(2, "random", keep_ratio=0), "keep_ratio"),
        (lambda: site(2, rows="first"), "rows"),
        (lambda: site(2, rows=["last"]), "rows"),
        (lambda: site(2, unknown=1), "do not fit"),
        (lambda: site(2, "random", rows="last"), "do not fit"),
        (lambda: site(2, "none"), "unknown method"),
        (lambda: site(2, "ATP"), "unknown method"),
        (lambda: site(2, ""), "unknown method"),
        (lambda: site(2, None), "not well formed"),
        (lambda: site(2, budget=0), "budget"),
        (lambda: site(2, budget=-1), "budget"),
        (lambda: site(2, budget=1.5), "budget"),
        (lambda: site(2, budget=True), "budget"),
        (lambda: site(2, budget=17), "larger than what enters it"),
        (lambda: site(2, budget=2**40), "larger than what enters it"),
        (
            lambda: Plan((SitePlan(1, "fastv", {}, 4), SitePlan(2, "fastv", {}, 8))),
            "larger than what enters it",
        ),
        (lambda: site(2, "atp"), "needs its thresholds"),
        (lambda: site(2, "atp", theta_r=0.5), "needs its thresholds"),
        (lambda: site(2, "atp", theta_r=0.5, theta_s=0.5, heads="x"), "needs its thresholds"),
        (lambda: site(2, "atp", heads="absent"), "cannot read the heads"),
        (lambda: site(2, "atp", theta_r=0.5, theta_s=0.9, normalisation="l2"), "normalisation"),
        (lambda: site(2, "atp", theta_r=0.5, theta_s=0.9, granularities=[0]), "spatial score"),
        (lambda: site(2, "atp", theta_r=0.5, theta_s=0.9, wrong=1), "do not fit"),
        (lambda: site(2, "atp", theta_r="x", theta_s=0.9), "."),
        (lambda: site(2, "atp", theta_r=float("nan"), theta_s=0.9), "."),
        (lambda: Plan(encoder=MethodPlan("x")), "unknown method inside the vision tower"),
        (lambda: Plan(projector=MethodPlan("x")), "unknown method between tower and decoder"),
        (lambda: Plan(position_rule="compact"), "unknown position rule"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(make: Callable[[], Plan], match: str) -> None:
    attempt(damage.checkpoint(), match=match, make=lambda: {"plan": make()})


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "3", '{"sites": 1}', '{"sites": [1]}', '{"sites": [{}]}', '{"site": []}',
     '{"sites": [{"layer": 1, "method": "fastv", "ratio": 1}]}', "[" * 100_000, "1" * 5_000],
)  # fmt: skip
def test_a_plan_file_that_is_malformed_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(text)
    refused(lambda: Plan.from_file(tmp_path / "plan.json"), match="plan|site")
    refused(lambda: Plan.from_file(tmp_path / "absent.json"), match="cannot read the plan")
    refused(lambda: Plan.from_file(tmp_path), match="cannot read the plan")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"limits": Limits(0, 16, 1)}, "below 1"),
        ({"limits": Limits(16, 0, 1)}, "below 1"),
        ({"limits": Limits(16, 16, -1)}, "below 1"),
        ({"limits": Limits(5000, 16, 1)}, "at most 4096 .positions"),
        ({"limits": Limits(16, 2**40, 1)}, "at most 4096 .positions"),
        ({"limits": Limits(16, 16, 300)}, "at most 4096 .positions"),
        ({"cuts": (0,)}, "outside the decoder"),
        ({"cuts": (-1,)}, "outside the decoder"),
        ({"cuts": (4,)}, "outside the decoder"),
        ({"cuts": (99,)}, "outside the decoder"),
        ({"targets": ()}, "needs a target"),
        ({"targets": ("abacus",)}, "unknown target"),
        ({"targets": ("cpu", "")}, "unknown target"),
        ({"precision": "int7"}, "cannot read the precision"),
        ({"plan_name": "a/b"}, "part of file names"),
        ({"plan_name": "n" * 65}, "part of file names"),
        ({"plan_name": "none"}, "named none"),
    ],
)
def test_options_that_cannot_be_are_refused(changes: dict[str, Any], match: str) -> None:
    attempt(damage.checkpoint(), match=match, make=lambda: changes)


# Heads.


@pytest.mark.parametrize(
    "change",
    [
        {"format": "x"},
        {"version": 2},
        {"sites": []},
        {"sites": 3},
        {"sites": [2, 1]},
        {"sites": ["a"]},
        {"sites": [None, 1]},
        {"sites": [1]},
        {"grid": [4]},
        {"grid": [-4, 4]},
        {"grid": 4},
        {"hidden": 0},
        {"hidden": 2**40},
        {"hidden": "x"},
        {"hidden": 9},
        {"activation": "tanh"},
        {"scores": []},
        {"scores": {"thresholds": 1}},
        {"scores": {"unknown": 1}},
        {"budgets": [1, 2, 3]},
        {"budgets": [0]},
        {"unknown": 1},
        None,
    ],
)
def test_heads_that_do_not_fit_are_refused(change: dict[str, Any] | None, tmp_path: Path) -> None:
    from patchsieve.pruning.decoder.thresholds import Thresholds
    from patchsieve.pruning.heads import HeadsConfig, save_heads

    heads = tmp_path / "heads"
    module = Thresholds(8, (4, 4))
    tensors = {f"layer.2.{name}": value for name, value in module.state_dict().items()}
    save_heads(heads, HeadsConfig(sites=(2,), grid=(4, 4), hidden=8), tensors)
    if change is None:
        os.truncate(heads / "heads.safetensors", 100)
    else:
        edit(heads / "config.json", lambda data: data.update(change))
    attempt(damage.checkpoint(), make=lambda: {"plan": site(2, "atp", heads=str(heads))})
