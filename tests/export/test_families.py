"""A model family is one object, and all that export knows of one it asks that object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import LlavaConfig

from patchsieve.contract.errors import UnsupportedModelError
from patchsieve.export.exporter import export
from patchsieve.export.families import FAMILIES, check_structure, family_of
from patchsieve.export.families.llava import Llava
from patchsieve.export.source.checkpoint import read_config
from tests.support import damage

LLAVA = FAMILIES["llava"]


class TwinConfig(LlavaConfig):
    """LLaVA's config under another name."""

    model_type = "twin"


class Twin(Llava):
    """LLaVA under another name, whose tensors are stored under a prefix."""

    model_type = "twin"

    def canonical(self, name: str) -> str:
        return super().canonical(name.removeprefix("twin."))

    def config(self, raw: dict[str, Any], path: Path) -> Any:
        return TwinConfig.from_dict(raw)


@pytest.mark.slow
def test_another_family_is_one_object_and_its_line_in_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = damage.copy(damage.checkpoint(), tmp_path / "checkpoint")
    ours = export(str(checkpoint), tmp_path / "llava", damage.options())
    raw = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(raw | {"model_type": "twin"}))
    tensors = load_file(checkpoint / "model.safetensors")
    save_file({f"twin.{name}": t for name, t in tensors.items()}, checkpoint / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match="expected: .*model_type llava"):
        read_config(checkpoint)
    monkeypatch.setitem(FAMILIES, "twin", Twin())
    theirs = export(str(checkpoint), tmp_path / "twin", damage.options())
    assert {k: v for k, v in theirs.files.items() if k.startswith("graphs/")} == {
        k: v for k, v in ours.files.items() if k.startswith("graphs/")
    }


def test_the_list_of_what_is_supported_names_every_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "twin", Twin())
    with pytest.raises(UnsupportedModelError, match="llava.*; or .*model_type twin"):
        check_structure({"model_type": "llava_next"})


@pytest.mark.parametrize("decoder", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("tower", ["clip_vision_model", "siglip_vision_model", None])
def test_absent_entries_are_read_as_transformers_reads_them(decoder: str, tower: str) -> None:
    """`cost` reads a config.json without transformers, export with it: to the same sizes."""
    raw: dict[str, Any] = {"model_type": "llava", "text_config": {"model_type": decoder}}
    if tower is not None:
        raw["vision_config"] = {"model_type": tower}
    plain, theirs = LLAVA.plain(raw), LlavaConfig.from_dict(json.loads(json.dumps(raw)))
    assert family_of(plain) is family_of(theirs) is LLAVA
    assert LLAVA.vision(plain) == LLAVA.vision(theirs)
    sizes = LLAVA.decoder_sizes(plain)
    assert sizes == LLAVA.decoder_sizes(theirs)
    spec = LLAVA.decoder(theirs)
    assert sizes == {name: getattr(spec, name) for name in sizes}


@pytest.mark.parametrize(
    ("part", "entry"),
    [
        ("text_config", {"hidden_size": "4"}),
        ("text_config", {"num_key_value_heads": 0}),
        ("text_config", {"head_dim": 2.5}),
        ("vision_config", {"layer_norm_eps": [1]}),
        ("vision_config", {"hidden_act": 3}),
        ("vision_config", {"patch_size": True}),
    ],
)
def test_an_entry_of_another_type_is_refused_without_transformers(
    part: str, entry: dict[str, Any]
) -> None:
    with pytest.raises(UnsupportedModelError, match=f"cannot have this {next(iter(entry))}"):
        LLAVA.plain({"model_type": "llava", part: entry})
