"""A hub id: what is read is downloaded, once, and what cannot be had is one line with the way out.

The hub is a table of files here: `list_repo_files` and `snapshot_download` are replaced.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from patchsieve.calibration import checkpoint as calibrate
from patchsieve.cli import main
from patchsieve.contract.errors import PatchsieveError
from patchsieve.export.source import hub as downloads
from patchsieve.export.source.checkpoint import locate, read_config
from patchsieve.export.source.quantised import SETTINGS

NAME = "some-one/llava"
LLAVA = json.dumps({"model_type": "llava"})
SMALL = {
    "config.json": LLAVA,
    "generation_config.json": "{}",
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{}",
    "preprocessor_config.json": "{}",
    "chat_template.json": "{}",
    "additional_chat_templates/tool.jinja": "",
    "README.md": "",
    "quantize_config.json": "{}",
    "hf_quant_config.json": "{}",
}
NEVER = {
    "training_args.bin": "",
    "trainer_state.json": "{}",
    "consolidated.safetensors": "",
    "checkpoint-500/config.json": LLAVA,
    "checkpoint-500/model-00001-of-00002.safetensors": "",
    "onnx/model.bin": "",
    "adapter/adapter_model.safetensors": "",
}


def shards(stem: str, end: str) -> dict[str, str]:
    """Two shards and their index."""
    names = [f"{stem}-{number:05}-of-00002{end}" for number in (1, 2)]
    index = json.dumps({"weight_map": {f"tensor.{name}": name for name in names}})
    return {f"{stem}{end}.index.json": index} | dict.fromkeys(names, "")


SAFETENSORS = shards("model", ".safetensors")
BIN = shards("pytorch_model", ".bin")


class Hub:
    """A repository, and what was asked of it."""

    def __init__(self, folder: Path, files: dict[str, str]) -> None:
        self.folder, self.files = folder, files
        self.revisions: list[str | None] = []
        self.error: Exception | None = None  # of the next call

    def list_repo_files(self, name: str, *, revision: str | None = None) -> list[str]:
        """Names of all files."""
        assert name == NAME
        self.revisions.append(revision)
        if self.error is not None:
            raise self.error
        return list(self.files)

    def snapshot_download(self, name: str, *, revision: str | None = None, **options: Any) -> str:
        """Put the files that are asked for into the folder."""
        assert name == NAME
        self.revisions.append(revision)
        if isinstance(self.error, errors.OfflineModeIsEnabled) and not self.folder.exists():
            raise errors.LocalEntryNotFoundError("nothing is cached\nand more")
        if self.error is None:
            for file in filter_repo_objects(self.files, **options):
                (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
                (self.folder / file).write_text(self.files[file])
        return str(self.folder)

    @property
    def downloaded(self) -> set[str]:
        """Files that lie in the folder."""
        found = (path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix() for path in found}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch) -> Iterator[Callable[..., Hub]]:
    def make(*parts: dict[str, str]) -> Hub:
        files = {name: text for part in parts for name, text in part.items()}
        made = Hub(tmp_path / "snapshot", files)
        monkeypatch.setattr(huggingface_hub, "list_repo_files", made.list_repo_files)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
        return made

    yield make


@pytest.mark.parametrize(
    ("stored", "read"),
    [
        ((SAFETENSORS, BIN), SAFETENSORS),
        (({"model.safetensors": ""}, SAFETENSORS, BIN), {"model.safetensors": ""}),
        (({"pytorch_model.bin": ""}, BIN), {"pytorch_model.bin": ""}),
        ((BIN,), BIN),
        (({"model.fp16.safetensors": ""}, BIN), BIN),
    ],
)
def test_what_is_read_is_downloaded_and_nothing_else(hub, stored: tuple, read: dict) -> None:
    remote = hub(SMALL, NEVER, *stored)
    assert locate(NAME, check=read_config) == remote.folder
    assert remote.downloaded == {*SMALL, *read}


def test_learned_heads_of_a_checkpoint_come_with_it(hub) -> None:
    config = json.dumps({"model_type": "llava", "patchsieve": {"heads": "heads"}})
    heads = {"heads/config.json": "{}", "heads/heads.safetensors": ""}
    remote = hub(SMALL | {"config.json": config}, NEVER, SAFETENSORS, heads)
    locate(NAME)
    assert remote.downloaded == {*SMALL, *SAFETENSORS, *heads}


def test_weights_that_the_config_names_are_downloaded(hub) -> None:
    config = json.dumps({"model_type": "llava", "transformers_weights": "other.safetensors"})
    remote = hub(SMALL | {"config.json": config, "other.safetensors": ""}, SAFETENSORS)
    locate(NAME)
    assert remote.downloaded == {*SMALL, "other.safetensors"}


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"model_type": "llava_onevision"}, "llava_onevision.*llama, mistral, qwen2"),
        ({"model_type": "llava", "mm_hidden_size": 1024}, "LLaVA's original format"),
    ],
)
def test_what_is_not_supported_is_refused_before_its_weights_are_downloaded(
    hub, config: dict[str, Any], match: str
) -> None:
    remote = hub(SMALL | {"config.json": json.dumps(config)}, SAFETENSORS)
    with pytest.raises(PatchsieveError, match=match):
        locate(NAME, check=read_config)
    assert remote.downloaded == set(SMALL)


def test_an_adapter_is_refused_without_its_weights(hub, tmp_path: Path, capsys) -> None:
    entry = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "a/base"})
    remote = hub({"adapter_config.json": entry, "adapter_model.safetensors": ""})
    assert main(["export", NAME, "-o", str(tmp_path / "bundle")]) == 2
    assert "a LORA adapter of a/base" in capsys.readouterr().err
    assert remote.downloaded == {"adapter_config.json"}


def test_a_repository_without_weights_is_refused_with_what_it_holds(hub) -> None:
    hub(SMALL, {"llava.gguf": "", "checkpoint-90/model.safetensors": ""})
    with pytest.raises(PatchsieveError, match="some-one/llava holds no weights.*llava.gguf"):
        locate(NAME)


@pytest.mark.parametrize("revision", ["v1.0", None])
def test_every_question_to_the_hub_names_the_revision(hub, revision: str | None) -> None:
    remote = hub(SMALL, SAFETENSORS)
    locate(NAME, revision)
    assert set(remote.revisions) == {revision}


@pytest.mark.parametrize(
    "command",
    [
        ["export", NAME, "-o", "{out}"],
        ["export", NAME, "-o", "{out}", "--method", "ivtp"],
        ["export", NAME, "-o", "{out}", "--method", "atp", "--sites", "1"],
        [
            "calibrate",
            NAME,
            "-o",
            "{out}",
            "--data",
            "{folder}/data.json",
            "--sites",
            "1",
            "--target-tokens",
            "8",
        ],
    ],
)
def test_every_command_asks_for_the_revision(hub, command: list[str], tmp_path: Path) -> None:
    remote = hub(SMALL | {"config.json": '{"model_type": "llava_next"}'})
    (tmp_path / "data.json").write_text("[{}]")
    words = [word.format(out=tmp_path / "out", folder=tmp_path) for word in command]
    assert main([*words, "--revision", "v1.0"]) == 2
    assert set(remote.revisions) == {"v1.0"}


def test_a_local_directory_has_no_revision(tmp_path: Path) -> None:
    with pytest.raises(PatchsieveError, match="--revision has no effect.*remove --revision"):
        locate(str(tmp_path), "v1.0")


def http_error(kind: type[errors.HfHubHTTPError]) -> errors.HfHubHTTPError:
    """An error of the hub, whose answer nobody reads."""
    made = kind.__new__(kind)
    made.args = ("404 Client Error\nRequest id",)
    return made


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (http_error(errors.RepositoryNotFoundError), "no such repository.*hf auth login"),
        (http_error(errors.GatedRepoError), "terms at https://huggingface.co/some-one/llava"),
        (http_error(errors.RevisionNotFoundError), "no revision 'v9'.*give --revision"),
        (errors.OfflineModeIsEnabled("offline"), "no connection.*connect to the network"),
    ],
)
def test_what_cannot_be_had_is_one_line_with_the_way_out(hub, error, match: str) -> None:
    hub(SMALL, SAFETENSORS).error = error
    with pytest.raises(PatchsieveError, match=f"cannot get the checkpoint {NAME}.*{match}") as got:
        locate(NAME, "v9")
    assert "\n" not in str(got.value)


def test_without_a_connection_the_cached_snapshot_serves(hub) -> None:
    remote = hub(SMALL, SAFETENSORS)
    locate(NAME)
    remote.error = errors.OfflineModeIsEnabled("offline")
    assert locate(NAME) == remote.folder


def test_a_trained_checkpoint_gets_every_small_file_that_is_downloaded() -> None:
    # Its weights are floats, so it has no settings of a quantisation.
    others = {calibrate.CARD, "config.json", downloads.ADAPTER, *SETTINGS}
    assert set(downloads._SMALL) - others <= set(calibrate._CARRIED)
