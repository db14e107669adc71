"""Whether the output matrix is the table of embeddings is decided as transformers decides it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from patchsieve.contract.errors import UnsupportedModelError
from patchsieve.export.exporter import ExportOptions, export
from patchsieve.runtime.model import Model
from tests.references.masked_llava import MaskedLlava, user_message
from tests.support.damage import refused
from tests.support.models import save_checkpoint
from tests.support.tiny_bundles import LIMITS, largest_error, pictures, recorded_logits
from tests.support.tolerances import LOGITS_FLOAT32

pytestmark = pytest.mark.slow  # an export for each test

QUESTION = "What is on the table?"
COUNT = 8
# Flags of config.json and of its text_config, None where absent; has the file its own matrix?
ROWS: dict[str, tuple[bool | None, bool | None, bool]] = {
    "text-says-tied-but-a-matrix-is-stored": (False, True, True),
    "both-say-tied-but-a-matrix-is-stored": (True, True, True),
    "only-the-top-says-tied": (True, False, False),
    "only-the-top-says-tied-and-the-text-nothing": (True, None, False),
    "only-the-text-says-tied": (False, True, False),
    "the-text-says-tied-and-the-top-nothing": (None, True, False),
    "none-says-tied": (False, False, True),
}


def checkpoint(path: Path, top: bool | None, text: bool | None, has_matrix: bool) -> Path:
    """A tiny checkpoint with these flags, with or without lm_head.weight."""
    save_checkpoint(path, "llama", layers=2)

    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    for part, flag in ((config, top), (config["text_config"], text)):
        part.pop("tie_word_embeddings", None)
        if flag is not None:
            part["tie_word_embeddings"] = flag
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    file = path / "model.safetensors"
    tensors = load_file(file)
    heads = [name for name in tensors if name.endswith("lm_head.weight")]
    assert len(heads) == 1
    if not has_matrix:
        del tensors[heads[0]]
    save_file(tensors, file, {"format": "pt"})
    return path


@pytest.mark.parametrize("row", ROWS)
def test_the_output_matrix_is_the_one_that_transformers_uses(tmp_path: Path, row: str) -> None:
    top, text, has_matrix = ROWS[row]
    source = checkpoint(tmp_path / "checkpoint", top, text, has_matrix)
    export(str(source), tmp_path / "bundle", ExportOptions(limits=LIMITS))
    reference = MaskedLlava(source)
    table, head = reference.decoder.embed_tokens.weight, reference.model.lm_head.weight
    assert torch.equal(table, head) != has_matrix
    prompt = reference.prompt([user_message(QUESTION, 1)])
    expected, expected_logits = reference.generate(prompt, pictures(1), COUNT)
    model = Model(tmp_path / "bundle", target="cpu", threads=1, check="size")
    logits = recorded_logits(model)
    result = model.generate(pictures(1), QUESTION, max_new_tokens=COUNT)
    model.close()
    assert result.token_ids == expected
    assert largest_error(logits, expected_logits) < LOGITS_FLOAT32


def test_an_absent_output_matrix_that_no_flag_ties_is_refused(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "checkpoint", False, False, False)
    refused(
        lambda: export(str(source), tmp_path / "bundle", ExportOptions(limits=LIMITS)),
        UnsupportedModelError,
        "no lm_head.weight",
    )
