"""One model in every way that checkpoints are stored: the same bundle, byte for byte."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.weights import FOLDER
from patchsieve.export.exporter import write_weights
from patchsieve.export.families import FAMILIES
from patchsieve.export.job import ExportOptions, plan_export
from patchsieve.export.source.checkpoint import Checkpoint, locate, read_config
from patchsieve.export.source.weight_files import ORDER
from patchsieve.verify.reference import Reference
from tests.support.models import save_checkpoint

ROW = {"structure": "llama", "layers": 2, "vision_layers": 2}

LLAVA = FAMILIES["llava"]


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("stored") / "checkpoint", **ROW)


def in_memory(name: str) -> str:
    """`model.language_model.layers...`, the modules' own names."""
    name = re.sub(r"^language_model\.lm_head\.", "lm_head.", name)
    name = re.sub(r"^language_model\.model\.", "model.language_model.", name)
    return re.sub(r"^(vision_tower|multi_modal_projector)\.", r"model.\1.", name)


def saved(name: str) -> str:
    """`language_model.model.layers...`."""
    return name


def older(name: str) -> str:
    """`vision_tower.vision_model...`, as checkpoints of 2023 have it."""
    return re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)


def newer(name: str) -> str:
    """The tower without `vision_model`."""
    return name.replace("vision_tower.vision_model.", "vision_tower.")


def base(stored: Path, folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A copy of a checkpoint without its weights, and the weights."""
    shutil.copytree(stored, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder, load_file(stored / "model.safetensors")


def one_safetensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors")


def one_bin(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    torch.save(tensors, folder / "pytorch_model.bin")


def _sharded(folder: Path, tensors: dict[str, torch.Tensor], stem: str, write: Callable) -> None:
    ends = {"model": ".safetensors", "pytorch_model": ".bin"}
    weight_map = {}
    for number in range(3):
        shard = f"{stem}-{number + 1:05}-of-00003{ends[stem]}"
        part = {k: v for place, (k, v) in enumerate(tensors.items()) if place % 3 == number}
        write(part, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}{ends[stem]}.index.json").write_text(json.dumps(index))


def safetensors_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    _sharded(folder, tensors, "model", save_file)


def bin_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    _sharded(folder, tensors, "pytorch_model", torch.save)


def written(checkpoint: Path, folder: Path) -> dict[str, bytes]:
    """The weights files that an export of a checkpoint writes."""
    job = plan_export(checkpoint, read_config(checkpoint), ExportOptions())
    write_weights(job, folder, lambda *_: None)
    return {path.name: path.read_bytes() for path in (folder / FOLDER).iterdir()}


@pytest.mark.parametrize("spelling", (in_memory, saved, older, newer))
@pytest.mark.parametrize("store", (one_safetensors, safetensors_shards, one_bin, bin_shards))
def test_every_spelling_and_every_file_format_gives_the_same_weights(
    stored: Path, tmp_path: Path, spelling, store
) -> None:
    folder, tensors = base(stored, tmp_path / "checkpoint")
    store(folder, {spelling(name): tensor for name, tensor in tensors.items()})
    assert written(folder, tmp_path / "a") == written(stored, tmp_path / "b")


def test_spellings_are_really_different(stored: Path) -> None:
    tensors = load_file(stored / "model.safetensors")
    sets = {frozenset(map(spell, tensors)) for spell in (in_memory, older, newer)}
    assert len(sets) == 3
    assert len({frozenset(map(LLAVA.canonical, names)) for names in sets}) == 1


def test_missing_shard_is_one_line(stored: Path, tmp_path: Path) -> None:
    folder, tensors = base(stored, tmp_path / "checkpoint")
    safetensors_shards(folder, tensors)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(PatchsieveError, match="1 of 3 shards absent") as caught:
        Checkpoint(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("store", (one_safetensors, one_bin))
def test_truncated_weights_are_one_line(stored: Path, tmp_path: Path, store) -> None:
    folder, tensors = base(stored, tmp_path / "checkpoint")
    store(folder, tensors)
    file = next(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin"))
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(PatchsieveError, match="cannot read the weights file") as caught:
        Checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_weights_that_torch_wrote_before_1_6_are_read(stored: Path, tmp_path: Path) -> None:
    folder, tensors = base(stored, tmp_path / "checkpoint")
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    found = Checkpoint(folder, LLAVA)
    assert all(torch.equal(found.read(LLAVA.canonical(name)), tensors[name]) for name in tensors)


def table_of(folder: Path) -> torch.Tensor:
    """The embedding table that export reads."""
    return Checkpoint(folder, LLAVA).read("embed_tokens.weight")


def hugging_face_table(folder: Path) -> torch.Tensor:
    """The embedding table that transformers reads."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model.get_input_embeddings().weight.detach()


def test_of_contradictory_weights_those_of_transformers_are_read(
    stored: Path, tmp_path: Path, caplog
) -> None:
    folder, tensors = base(stored, tmp_path / "checkpoint")
    name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    stores = (one_safetensors, safetensors_shards, one_bin, bin_shards)
    for number, store in enumerate(stores):
        store(folder, tensors | {name: tensors[name] + number})
    named = "another.safetensors"
    save_file(tensors | {name: tensors[name] + 4}, folder / named)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": named}))
    read = []
    for chosen in (named, *ORDER):
        if chosen != named:
            (folder / "config.json").write_text(json.dumps(config))
        caplog.clear()
        table = table_of(folder)
        assert torch.equal(table, hugging_face_table(folder)), chosen
        read.append(round((table - tensors[name]).mean().item()))
        (note,) = [entry.getMessage() for entry in caplog.records if "is read" in entry.message]
        assert f"{chosen} is read, as transformers does, and not " in note
        (folder / chosen).unlink()
    assert read == [4, 0, 1, 2, 3]


def test_a_model_saved_over_shards_is_the_new_one(stored: Path, tmp_path: Path, caplog) -> None:
    """`save_pretrained` removes the old shards and leaves their index."""
    folder, tensors = base(stored, tmp_path / "checkpoint")
    safetensors_shards(folder, tensors)
    for shard in folder.glob("model-*"):
        shard.unlink()
    one_safetensors(folder, tensors)
    assert "embed_tokens.weight" in Checkpoint(folder, LLAVA)
    assert "and not model.safetensors.index.json" in caplog.text


def test_weights_alone_need_no_note(stored: Path, caplog) -> None:
    Checkpoint(stored)
    assert not caplog.text


def test_an_incomplete_index_goes_before_a_whole_bin(stored: Path, tmp_path: Path) -> None:
    """As in transformers, which then fails; the line names the way to the other weights."""
    folder, tensors = base(stored, tmp_path / "checkpoint")
    safetensors_shards(folder, tensors)
    one_bin(folder, tensors)
    next(folder.glob("model-*")).unlink()
    with pytest.raises(PatchsieveError, match="incomplete.*remove model.safetensors.index.json if"):
        Checkpoint(folder)


@pytest.mark.parametrize("name", ("../model.safetensors", "weights.bin", 7, "a/b.safetensors"))
def test_a_weights_file_named_by_the_config_is_one_beside_it(
    stored: Path, tmp_path: Path, name
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(stored, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": name}))
    with pytest.raises(PatchsieveError, match="that cannot be used.*transformers_weights"):
        Checkpoint(folder)


NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(
    ("entry", "name"),
    (
        (NF4, "bitsandbytes"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ("gptq", "gptq"),
        ({}, None),
        (None, None),
    ),
)
@pytest.mark.parametrize("place", ("", "text_config", "vision_config"))
def test_float_weights_below_a_left_over_quantisation_are_used(
    stored: Path, tmp_path: Path, caplog, entry, name, place: str
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(stored, folder)
    config = json.loads((folder / "config.json").read_text())
    (config[place] if place else config)["quantization_config"] = entry
    (folder / "config.json").write_text(json.dumps(config))
    assert read_config(folder).to_dict() == read_config(stored).to_dict()
    assert torch.equal(table_of(folder), table_of(stored))
    notes = [line for line in caplog.messages if "quantization_config" in line]
    assert len(notes) == (name is not None)
    for note in notes:
        assert f"({name})" in note and "stored in floating point" in note and place in note


def test_verify_reads_float_weights_below_a_left_over_quantisation(
    stored: Path, tmp_path: Path
) -> None:
    """transformers itself would ask for bitsandbytes."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(stored, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": NF4}))
    table = Reference(str(folder)).model.get_input_embeddings().weight
    assert torch.equal(table, hugging_face_table(stored))


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch) -> Path:
    """An empty cache of the hub, offline. The library reads its environment once, so its constants
    are set."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_hub_id_is_found_in_the_cache_without_a_network(stored: Path, hub_cache: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = hub_cache / "models--some-one--tiny-llava"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(stored, repository / "snapshots" / commit)
    found = locate("some-one/tiny-llava")
    assert found == repository / "snapshots" / commit
    assert read_config(found).model_type == "llava"


@pytest.mark.parametrize("name", ("some-one/absent", "no-such-folder", "a/b/c"))
def test_absent_checkpoint_is_one_line_that_names_it(hub_cache: Path, name: str) -> None:
    with pytest.raises(PatchsieveError, match=name) as caught:
        locate(name)
    assert "\n" not in str(caught.value)
