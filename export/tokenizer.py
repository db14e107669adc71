"""Tokenizer, chat template and special tokens of a checkpoint -> bundle."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from patchsieve.errors import UnsupportedModelError

_LOG = logging.getLogger(__name__)
# The names that transformers hands to a chat template
_TEMPLATE_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_SLOW_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def write_tokenizer(checkpoint: Path, out: Path) -> dict[str, Any]:
    """Write `tokenizer.json` and, if there is one, `chat_template.jinja`.

    Args:
        checkpoint: A Hugging Face model directory.
        out: The bundle's directory, which exists.

    Returns:
        `chat_template` (text or None), `special_tokens` (name -> text, what a template is given),
        `eos_token_ids` (list, empty if the checkpoint names none), `bos_token_id` (int or None),
        `image_token` (text) and `image_token_id` (int).

    Raises:
        UnsupportedModelError: No tokenizer, an unreadable file, or an image token that the
            tokenizer does not have.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    config = _read_json(checkpoint / "config.json")
    if not config:
        raise UnsupportedModelError(
            "the checkpoint has no config.json", found=str(checkpoint), do="give a model directory"
        )
    source = checkpoint / "tokenizer.json"
    if source.is_file():
        target = out / "tokenizer.json"
        if source.resolve() != target.resolve():
            shutil.copyfile(source, target)
    else:
        _convert(checkpoint, out)
    tokenizer = _read_json(out / "tokenizer.json")
    ids = _token_ids(tokenizer)
    settings = _read_json(checkpoint / "tokenizer_config.json")
    special = _special_tokens(settings, _read_json(checkpoint / "special_tokens_map.json"))
    chat_template = _chat_template(checkpoint, settings)
    if chat_template is not None:
        # No newline translation: the template's text is part of the prompt
        (out / "chat_template.jinja").write_bytes(chat_template.encode("utf-8"))
    image_token_id = config.get("image_token_id", config.get("image_token_index"))
    bos_token_id = ids.get(special.get("bos_token", ""))
    _compare_bos(settings, tokenizer, special.get("bos_token"))
    return {
        "chat_template": chat_template,
        "special_tokens": special,
        "eos_token_ids": _eos_token_ids(checkpoint, config, ids.get(special.get("eos_token", ""))),
        "bos_token_id": bos_token_id,
        "image_token": _image_token(image_token_id, ids),
        "image_token_id": image_token_id,
    }


def _read_json(path: Path) -> dict[str, Any]:
    """The file's object, empty if there is no file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UnsupportedModelError(
            f"{path.name} cannot be read", found=str(error), do="download the checkpoint again"
        ) from error
    if not isinstance(value, dict):
        raise UnsupportedModelError(f"{path.name} cannot be read", expected="a JSON object")
    return value


def _convert(checkpoint: Path, out: Path) -> None:
    """Convert a sentencepiece or vocabulary file; only here is transformers needed."""
    if not any((checkpoint / name).is_file() for name in _SLOW_FILES):
        raise UnsupportedModelError(
            "the checkpoint has no tokenizer",
            found=str(checkpoint),
            expected=f"tokenizer.json or one of {', '.join(_SLOW_FILES)}",
            do="copy the tokenizer's files beside the weights",
        )
    import transformers

    # AutoTokenizer takes the generic class for LLaVA, which reads tokenizer.model but not the
    # vocab.json of Qwen2 (transformers 5.23): then the class that the checkpoint names is tried
    name = _read_json(checkpoint / "tokenizer_config.json").get("tokenizer_class")
    classes = [transformers.AutoTokenizer, getattr(transformers, str(name), None)]
    tokenizer, reason = None, ""
    for kind in filter(None, classes):
        try:
            tokenizer = kind.from_pretrained(checkpoint, local_files_only=True)
            break
        except (OSError, ValueError, LookupError, TypeError, ImportError) as error:
            reason = reason or str(error)
    if tokenizer is None:
        raise UnsupportedModelError(
            "the checkpoint's tokenizer cannot be converted to tokenizer.json",
            found=reason[:200],
            do="save it with AutoTokenizer(...).save_pretrained, or install sentencepiece",
        )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModelError(
            "the checkpoint's tokenizer has no fast form", found=type(tokenizer).__name__
        )
    backend.no_truncation()
    backend.no_padding()
    backend.save(str(out / "tokenizer.json"))


def _token_ids(tokenizer: dict[str, Any]) -> dict[str, int]:
    """Token -> id of a tokenizer.json; added tokens win, as in the tokenizers library."""
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, list):  # Unigram: pairs of token and score
        ids = {entry[0]: number for number, entry in enumerate(vocabulary)}
    else:
        ids = dict(vocabulary)
    for entry in tokenizer.get("added_tokens", []):
        ids[entry["content"]] = entry["id"]
    return ids


def _special_tokens(*sources: dict[str, Any]) -> dict[str, str]:
    """`bos_token` ... as strings; the first source that names one wins."""
    found: dict[str, str] = {}
    for source in sources:
        for name in _TEMPLATE_TOKENS:
            value = source.get(f"{name}_token")
            if isinstance(value, dict):  # a saved AddedToken
                value = value.get("content")
            if isinstance(value, str):
                found.setdefault(f"{name}_token", value)
    return found


def _chat_template(checkpoint: Path, settings: dict[str, Any]) -> str | None:
    """The template, looked for in the order of transformers' processors."""
    for name in ("processor_config.json", "chat_template.json"):
        template = _default_template(_read_json(checkpoint / name).get("chat_template"))
        if template is not None:
            return template
    jinja = checkpoint / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    return _default_template(settings.get("chat_template"))


def _default_template(value: object) -> str | None:
    """One template out of a string, a dict by name or a list of named ones."""
    if isinstance(value, list):
        value = {entry.get("name"): entry.get("template") for entry in value}
    if isinstance(value, dict):
        value = value.get("default")
    return value if isinstance(value, str) and value else None


def _eos_token_ids(checkpoint: Path, config: dict[str, Any], fallback: int | None) -> list[int]:
    sources = (
        _read_json(checkpoint / "generation_config.json").get("eos_token_id"),
        config.get("text_config", {}).get("eos_token_id"),
        config.get("eos_token_id"),
        fallback,
    )
    value = next((source for source in sources if source is not None), None)
    if value is None:
        _LOG.warning("the checkpoint names no end token: answers end at max_new_tokens only")
        return []
    return list(dict.fromkeys(value if isinstance(value, list) else [value]))


def _image_token(image_token_id: int | None, ids: dict[str, int]) -> str:
    token = next((token for token, number in ids.items() if number == image_token_id), None)
    if token is None:
        raise UnsupportedModelError(
            "the tokenizer has no image token",
            found=f"image_token_id {image_token_id} in config.json",
            expected=f"an id among the tokenizer's {len(ids)} tokens",
            do="add the image token to the tokenizer and save it again",
        )
    return token


def _compare_bos(settings: dict[str, Any], tokenizer: dict[str, Any], bos: str | None) -> None:
    """Warn where tokenizer_config.json and tokenizer.json disagree; the latter is followed."""
    wanted = settings.get("add_bos_token")
    if wanted is None or bos is None:
        return
    written = json.dumps(bos) in json.dumps(tokenizer.get("post_processor"))
    if bool(wanted) != written:
        _LOG.warning(
            "tokenizer_config.json says add_bos_token=%s but tokenizer.json %s it: followed is"
            " tokenizer.json",
            wanted,
            "adds" if written else "does not add",
        )
