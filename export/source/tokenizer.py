"""Tokenizer, chat template and special tokens of a checkpoint, as transformers loads them.

A token can be named in seven files, and which of them counts depends on the others and on the
version of transformers. So transformers loads the tokenizer, and the bundle gets what it loaded.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from patchsieve.contract.errors import BackendMissingError, UnsupportedModelError
from patchsieve.export.source.generation import read_generation, their_warnings_off
from patchsieve.export.source.processor import prompt_fields_from_checkpoint

_LOG = logging.getLogger(__name__)
_SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_SLOW_FILES = (*_SENTENCEPIECE_FILES, "vocab.json", "vocab.txt", "tekken.json")
# What transformers raises on files that it cannot use
_LOAD_ERRORS: tuple[type[Exception], ...] = (
    *(OSError, ValueError, LookupError, TypeError),
    *(AttributeError, ImportError, RuntimeError),
)
_SHOWN = 5  # tokens that a note names


def write_tokenizer(
    checkpoint: Path, out: Path, vocab_size: int | None = None, image_token: str = "<image>"
) -> dict[str, Any]:
    """Write `tokenizer.json` and, if there is one, `chat_template.jinja`.

    Args:
        checkpoint: A Hugging Face model directory.
        out: The bundle's directory, which exists.
        vocab_size: Rows of the embedding table, V; None leaves ids unchecked.
        image_token: Text that stands for an image if the checkpoint's files name none.

    Returns:
        `chat_template` (text or None), `special_tokens` (name -> text, what a template is given),
        `eos_token_ids` (list, empty if the checkpoint names none), `bos_token_id` (int or None),
        `image_token` (text), `image_token_id` (int) and `generation` (`manifest.Generation`).

    Raises:
        UnsupportedModelError: No tokenizer, an unreadable file, or an image token that the
            tokenizer does not have.
        BackendMissingError: The tokenizer is a sentencepiece model, and sentencepiece is absent.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    config = _read_json(checkpoint / "config.json")
    if not config:
        raise UnsupportedModelError(
            "the checkpoint has no config.json", found=str(checkpoint), do="give a model directory"
        )
    tokenizer = _load(checkpoint)
    chat_template = _chat_template(checkpoint, tokenizer)
    _write_files(out, tokenizer.backend_tokenizer, chat_template)
    special, ids = tokenizer.special_tokens_map, tokenizer.backend_tokenizer.get_vocab()
    image_token_id = config.get("image_token_id", config.get("image_token_index"))
    settings = _read_json(checkpoint / "tokenizer_config.json")
    _compare_bos(settings, _read_json(out / "tokenizer.json"), special.get("bos_token"))
    image_token = _image_token(checkpoint, tokenizer, image_token_id, ids, image_token)
    _name_tokens_beyond(ids, image_token, vocab_size)
    generation, ends = read_generation(checkpoint, vocab_size)
    return {
        "chat_template": chat_template,
        "special_tokens": special,
        "eos_token_ids": list(ends),
        "bos_token_id": ids.get(special.get("bos_token", "")),
        "image_token": image_token,
        "image_token_id": image_token_id,
        "generation": generation,
    }


def _write_files(out: Path, backend: Any, chat_template: str | None) -> None:
    """Write a tokenizer of the tokenizers library, and the template of a chat."""
    backend.no_truncation()
    backend.no_padding()
    # Not backend.save, whose error on a full disk is no OSError.
    (out / "tokenizer.json").write_text(backend.to_str(pretty=False), encoding="utf-8")
    if chat_template is not None:
        # No newline translation: the template's text is part of the prompt
        (out / "chat_template.jinja").write_bytes(chat_template.encode("utf-8"))


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
        raise UnsupportedModelError(
            f"{path.name} cannot be read",
            expected="a JSON object",
            do="download the checkpoint again",
        )
    return value


def _load(checkpoint: Path) -> Any:
    """The tokenizer that transformers loads, of the tokenizers library."""
    has_json = bool(_read_json(checkpoint / "tokenizer.json"))
    if not has_json:
        if not any((checkpoint / name).is_file() for name in _SLOW_FILES):
            raise UnsupportedModelError(
                "the checkpoint has no tokenizer",
                found=str(checkpoint),
                expected=f"tokenizer.json or one of {', '.join(_SLOW_FILES)}",
                do="copy the tokenizer's files beside the weights",
            )
        _check_sentencepiece(checkpoint)
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        _read_json(checkpoint / name)
    tokenizer = _from_pretrained(checkpoint)
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UnsupportedModelError(
            "the checkpoint's tokenizer has no fast form",
            found=type(tokenizer).__name__,
            expected="a tokenizer that transformers runs with the tokenizers library",
            do="save it as tokenizer.json",
        )
    if tokenizer.split_special_tokens:
        raise UnsupportedModelError(
            "the checkpoint's tokenizer splits special tokens, the image token too",
            found="split_special_tokens true in tokenizer_config.json",
            do="set it to false",
        )
    return tokenizer


def _from_pretrained(checkpoint: Path) -> Any:
    import transformers

    # AutoTokenizer takes the generic class for LLaVA, which reads tokenizer.model but not the
    # vocab.json of Qwen2 (transformers 5.24): then the class that the checkpoint names is tried
    name = _read_json(checkpoint / "tokenizer_config.json").get("tokenizer_class")
    classes = [transformers.AutoTokenizer, getattr(transformers, str(name), None)]
    reason = ""
    with their_warnings_off():
        for kind in filter(None, classes):
            try:
                return kind.from_pretrained(
                    checkpoint, local_files_only=True, trust_remote_code=False
                )
            except _LOAD_ERRORS as error:
                reason = reason or f"{type(error).__name__}: {error}"
            except Exception as error:
                if type(error) is not Exception:  # what tokenizers raises has no type of its own
                    raise
                reason = reason or str(error)
    raise UnsupportedModelError(
        "transformers does not load the checkpoint's tokenizer",
        found=reason[:200],
        do="save it as tokenizer.json with AutoTokenizer(...).save_pretrained",
    )


def _check_sentencepiece(checkpoint: Path) -> None:
    """Refuse a sentencepiece model that cannot be read; transformers then points at tiktoken."""
    for name in _SENTENCEPIECE_FILES:
        path = checkpoint / name
        # Files of this name are tiktoken's too, lines of base64
        if not path.is_file() or path.read_bytes()[:1] != b"\n":
            continue
        if importlib.util.find_spec("sentencepiece") is None:
            raise BackendMissingError(
                f"the checkpoint's tokenizer is a sentencepiece model, {name}",
                found="no library sentencepiece",
                do="pip install sentencepiece",
            )
        import sentencepiece

        try:
            sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise UnsupportedModelError(
                f"{name} cannot be read",
                found=str(error)[:200],
                expected="a sentencepiece model",
                do="download the checkpoint again",
            ) from error


def _chat_template(checkpoint: Path, tokenizer: Any) -> str | None:
    """The template that AutoProcessor finds; if it finds none, the tokenizer's own."""
    from transformers import ProcessorMixin

    for name in ("processor_config.json", "chat_template.json"):
        _read_json(checkpoint / name)
    try:
        with their_warnings_off():
            settings, _ = ProcessorMixin.get_processor_dict(str(checkpoint), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedModelError(
            "transformers does not accept the checkpoint's chat templates",
            found=f"{type(error).__name__}: {error}"[:300],
            do="keep one, as chat_template.jinja",
        ) from error
    named = settings.get("chat_template")
    template = _default_template(tokenizer.chat_template if named is None else named)
    if template is None:
        _LOG.warning(
            "the checkpoint has no chat template: the bundle takes whole prompts only (--raw);"
            " to give it one, put chat_template.jinja beside the weights and export again"
        )
    else:
        _check_syntax(tokenizer, template)
    return template


def _check_syntax(tokenizer: Any, template: str) -> None:
    """Refuse a template that never compiles; one may well refuse the message tried here."""
    import jinja2

    message = {"role": "user", "content": [{"type": "text", "text": "a"}]}
    try:
        tokenizer.apply_chat_template([message], chat_template=template, tokenize=False)
    except jinja2.TemplateSyntaxError as error:
        raise UnsupportedModelError(
            "the checkpoint's chat template does not compile",
            found=f"line {error.lineno}: {error.message}"[:200],
            do="correct it, or put the right one in chat_template.jinja",
        ) from error
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError):
        pass


def _default_template(value: object) -> str | None:
    """One template out of a string, a dict by name or a list of named ones."""
    if isinstance(value, list):
        value = {entry.get("name"): entry.get("template") for entry in value}
    if isinstance(value, Mapping):
        if "default" not in value:
            raise UnsupportedModelError(
                "the checkpoint has several chat templates, none of them named default",
                found=", ".join(map(str, value)),
                do="copy the one to use to chat_template.jinja",
            )
        value = value["default"]
    return value if isinstance(value, str) and value else None


def _image_token(
    checkpoint: Path,
    tokenizer: Any,
    image_token_id: int | None,
    ids: dict[str, int],
    default: str,
) -> str:
    """The text of config.json's image token, which the processor must write."""
    token = next((token for token, number in ids.items() if number == image_token_id), None)
    if token is None:
        raise UnsupportedModelError(
            "the tokenizer has no image token",
            found=f"image_token_id {image_token_id} in config.json",
            expected=f"an id among the tokenizer's {len(ids)} tokens",
            do="add the image token to the tokenizer and save it again",
        )
    # As Hugging Face's processors decide
    fields = prompt_fields_from_checkpoint(checkpoint)
    written = getattr(tokenizer, "image_token", None) or fields.image_token or default
    if written != token and written in ids:
        raise UnsupportedModelError(
            "the processor's image token is not that of config.json",
            found=f"{written!r}, token {ids[written]}",
            expected=f"{token!r}, token {image_token_id}",
            do="set image_token_index in config.json to the former",
        )
    return token


def _name_tokens_beyond(ids: dict[str, int], image_token: str, vocab_size: int | None) -> None:
    """Name tokens that the model has no embedding for; the image token needs none."""
    if vocab_size is None:
        return
    beyond = [
        token for token, number in ids.items() if number >= vocab_size and token != image_token
    ]
    if beyond:
        beyond.sort(key=ids.__getitem__)
        more = ", ..." if len(beyond) > _SHOWN else ""
        _LOG.warning(
            "%d tokens of the tokenizer have no embedding in the model (ids from %d): prompts with"
            " them are refused: %s%s",
            len(beyond),
            vocab_size,
            ", ".join(beyond[:_SHOWN]),
            more,
        )


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
