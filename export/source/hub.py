"""Find a checkpoint: a local directory, or a hub id of which only what is read is downloaded."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.trained import KEY
from patchsieve.export.source.quantised import SETTINGS
from patchsieve.export.source.weight_files import (
    INDEX,
    ORDER,
    choose,
    no_weights,
    read_json,
    shards,
)

Result = TypeVar("Result")
ADAPTER = "adapter_config.json"
# Files of a checkpoint, other than weights, that export, calibrate and verify read.
_SMALL = (
    "README.md",  # its card names the licence
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    ADAPTER,
    *SETTINGS,
)
# Weights to ask for if the hub's listing cannot be had: what is cached is all that comes then.
_UNLISTED = (ORDER[0], ORDER[1], "model-*-of-*.safetensors")


def locate(
    checkpoint: str,
    revision: str | None = None,
    check: Callable[[Path], object] | None = None,
) -> Path:
    """Find a checkpoint: a local directory, or a hub id that is cached or can be downloaded.

    Args:
        checkpoint: A directory or a hub id.
        revision: A branch, tag or commit of the hub's repository (default: its main branch).
        check: Called with a folder that holds all but the weights, before they are downloaded; it
            raises for a checkpoint that cannot be used.

    Raises:
        PatchsieveError: There is no such checkpoint, or it cannot be had.
    """
    path = Path(checkpoint)
    if checkpoint and os.path.isdir(path):
        if revision is not None:
            raise PatchsieveError(
                "--revision has no effect: the checkpoint is a local directory",
                found=checkpoint,
                expected="a hub id",
                do="remove --revision",
            )
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", checkpoint) or os.path.exists(path):
        raise PatchsieveError(
            "there is no such checkpoint",
            found=repr(checkpoint),
            expected="a directory with config.json, or a hub id such as llava-hf/llava-1.5-7b-hf",
            do="correct the path or the id",
        )
    return _reached(lambda: _download(checkpoint, revision, check), checkpoint, revision)


def _download(name: str, revision: str | None, check: Callable[[Path], object] | None) -> Path:
    """The snapshot of a repository, with the files that are read and no others.

    The files without weights come first, because they name the weights.
    """

    def get(*files: str) -> Path:
        from huggingface_hub import snapshot_download

        allowed = [*_SMALL, *files]
        return Path(snapshot_download(name, revision=revision, allow_patterns=allowed))

    listed = _listing(name, revision)
    if listed is None:
        return get(*_UNLISTED)
    folder = get()
    if check is not None:
        check(folder)
    if ADAPTER in listed:
        return folder  # refused by its reader, so its weights are not needed
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    explicit = config.get("transformers_weights")
    chosen = choose(listed, explicit)
    if chosen is None:
        raise no_weights(name, {file.partition("/")[0] for file in listed}, explicit)
    files = [chosen]
    if chosen.endswith(INDEX):
        files += shards(get(chosen) / chosen)
    heads = config[KEY].get("heads") if isinstance(config.get(KEY), dict) else None
    if isinstance(heads, str):
        files.append(f"{heads}/*")
    return get(*files)


def _listing(name: str, revision: str | None) -> set[str] | None:
    """Files of a repository; None if the hub does not answer, and the cache must do."""
    from huggingface_hub import list_repo_files
    from huggingface_hub.errors import (
        HTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return set(list_repo_files(name, revision=revision))
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise
    except (HTTPError, OfflineModeIsEnabled, ConnectionError):
        return None


def _reached(get: Callable[[], Result], name: str, revision: str | None) -> Result:
    """Run what asks the hub, its errors in one line with what to do."""
    from huggingface_hub import errors

    try:
        return get()
    except errors.GatedRepoError as error:
        do = f"accept its terms at https://huggingface.co/{name}, then run `hf auth login`"
        raise _refused(name, "its owner asks for an account", do) from error
    except errors.RepositoryNotFoundError as error:
        do = "check the name; if it is private, run `hf auth login`"
        raise _refused(name, "no such repository, or a private one", do) from error
    except errors.RevisionNotFoundError as error:
        do = "give --revision a branch, a tag or a commit of it"
        raise _refused(name, f"no revision {revision!r}", do) from error
    except errors.LocalEntryNotFoundError as error:
        found = "no connection, and it is not in the cache, or not whole"
        do = "connect to the network (without HF_HUB_OFFLINE), or pass a local directory"
        raise _refused(name, found, do) from error
    except (errors.HTTPError, errors.HFValidationError, OSError) as error:
        do = "check the name and the network, or pass a local directory"
        raise _refused(name, (str(error).splitlines() or [type(error).__name__])[0], do) from error


def _refused(name: str, found: str, do: str) -> PatchsieveError:
    return PatchsieveError(f"cannot get the checkpoint {name} from the hub", found=found, do=do)
