"""A checkpoint's generation settings: those that a bundle follows, and the names of the others."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from patchsieve.contract.errors import BundleError, UnsupportedModelError
from patchsieve.contract.model import Generation
from patchsieve.contract.reading import read_as

_LOG = logging.getLogger(__name__)
_FILE = "generation_config.json"
_SHOWN = 80  # characters of an entry that is named
# The entries that are followed, as JSON has them.
_KINDS: dict[str, Any] = {
    "eos_token_id": tuple[int, ...],
    "stop_strings": tuple[str, ...],
    "repetition_penalty": float,
    "no_repeat_ngram_size": int,
    "min_length": int,
    "min_new_tokens": int,
    "suppress_tokens": tuple[int, ...],
    "begin_suppress_tokens": tuple[int, ...],
    "bad_words_ids": tuple[tuple[int, ...], ...],
}
# What changes a greedy answer of transformers and is not followed: name -> values that change none.
_NOT_FOLLOWED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "guidance_scale": (1,),
    "sequence_bias": (),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "exponential_decay_length_penalty": (),
    "forced_eos_token_id": (),
    "constraints": (),
    "force_words_ids": (),
    "watermarking_config": (),
    "token_healing": (False,),
}
_OF_BEAMS = ("length_penalty", "early_stopping", "num_beam_groups", "diversity_penalty")
_OF_SAMPLING = (
    *("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p"),
    *("epsilon_cutoff", "eta_cutoff"),
)


def read_generation(
    checkpoint: Path, vocab_size: int | None = None
) -> tuple[Generation, tuple[int, ...]]:
    """What `generate` of transformers does by default with this checkpoint.

    It takes generation_config.json, and config.json only if there is no such file. What it does
    and a bundle does not is logged.

    Args:
        checkpoint: A Hugging Face model directory.
        vocab_size: Number of logits V; None leaves token ids unchecked.

    Returns:
        The settings, and the tokens that end an answer.

    Raises:
        UnsupportedModelError: The file cannot be read, or transformers refuses its content.
    """
    config = _load(checkpoint)
    values = _followed(config)
    ends = tuple(dict.fromkeys(values.pop("eos_token_id", ())))
    values["stop"] = values.pop("stop_strings", ())
    _check(values, vocab_size)
    changing, sampling = _not_followed(config)
    if changing:
        _LOG.warning("a bundle does not follow these entries of %s: %s", _FILE, ", ".join(changing))
    if sampling:
        _LOG.warning(
            "%s asks for sampling (%s): a bundle takes the likeliest token unless a request says"
            " otherwise (--temperature, --top-k, --top-p)",
            _FILE,
            ", ".join(sampling),
        )
    if not any(token < (vocab_size or token + 1) for token in ends):
        _LOG.warning(
            "the checkpoint names no end token that the model can say: answers end at"
            " max_new_tokens only, as in transformers; eos_token_id in %s names one",
            _FILE,
        )
    return Generation(**values, not_followed=(*changing, *sampling)), ends


def _followed(config: Any) -> dict[str, Any]:
    """The entries that are followed and set, each of its type."""
    values = {}
    for name, kind in _KINDS.items():
        value = getattr(config, name, None)
        if value is None:
            continue
        try:
            values[name] = read_as(kind, _tidy(name, value), name)
        except BundleError as error:
            raise UnsupportedModelError(
                f"{_FILE} cannot be followed: {error}", do=f"correct {name} in it, or remove it"
            ) from error
    return values


def _check(values: dict[str, Any], vocab_size: int | None) -> None:
    """Refuse what transformers refuses when it answers."""
    if values.get("repetition_penalty") == 0:
        raise _refuse("repetition_penalty = 0", "above 0", "correct repetition_penalty in it")
    words = values.get("bad_words_ids", ())
    beyond = [token for word in words for token in word if token >= (vocab_size or token + 1)]
    if beyond or not all(words):
        found = f"token {beyond[0]}" if beyond else "an empty list"
        raise _refuse(
            f"bad_words_ids with {found}",
            f"lists of tokens below {vocab_size}",
            "remove it from bad_words_ids",
        )
    if not all(values["stop"]):
        raise _refuse("an empty stop string", "texts", "remove it from stop_strings")


@contextlib.contextmanager
def their_warnings_off() -> Iterator[None]:
    """Keep transformers from warning of a file: what matters of it is said here, in one line."""
    from transformers.utils import logging as theirs

    level = theirs.get_verbosity()
    theirs.set_verbosity_error()
    try:
        yield
    finally:
        theirs.set_verbosity(level)


def _load(checkpoint: Path) -> Any:
    """The GenerationConfig that transformers gives the model."""
    import transformers

    is_there = (checkpoint / _FILE).is_file()
    # As `GenerationMixin.adjust_generation_fn` of transformers 5.24
    fallback: dict[str, Any] = {"config_file_name": "config.json", "_from_model_config": True}
    try:
        with their_warnings_off():
            return transformers.GenerationConfig.from_pretrained(
                checkpoint, local_files_only=True, **({} if is_there else fallback)
            )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UnsupportedModelError(
            f"transformers does not accept the checkpoint's {_FILE}",
            found=str(error)[:200],
            do="correct it, or remove it",
        ) from error


def _tidy(name: str, value: Any) -> Any:
    """As JSON lists; values that transformers passes over are left out."""
    if name in ("eos_token_id", "stop_strings") and not isinstance(value, (list, tuple)):
        value = [value]
    if isinstance(value, (list, tuple)):
        if name != "bad_words_ids":  # ids below 0 are no tokens
            value = [one for one in value if type(one) is not int or one >= 0]
        return [list(one) if isinstance(one, tuple) else one for one in value]
    if type(value) is int and value < 0 and _KINDS[name] is int:
        return 0  # switched off
    return value


def _not_followed(config: Any) -> tuple[list[str], list[str]]:
    """Entries that change greedy answers, and those that make answers a draw: "name = value"."""
    changing = [name for name, plain in _NOT_FOLLOWED.items() if _is_set(config, name, plain)]
    if "num_beams" in changing:
        changing += [name for name in _OF_BEAMS if _is_set(config, name)]
    if getattr(config, "cache_implementation", None) == "quantized":
        changing.append("cache_implementation")
    sampling = []
    if getattr(config, "do_sample", None) is True:
        sampling = ["do_sample", *(name for name in _OF_SAMPLING if _is_set(config, name))]
    return _spelt(config, changing), _spelt(config, sampling)


def _is_set(config: Any, name: str, plain: tuple[Any, ...] = ()) -> bool:
    value = getattr(config, name, None)
    return value is not None and value not in plain


def _spelt(config: Any, names: Iterable[str]) -> list[str]:
    """Each as "name = value", long values cut."""
    texts = [f"{name} = {getattr(config, name)}" for name in names]
    return [text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..." for text in texts]


def _refuse(found: str, expected: str, do: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{_FILE} cannot be followed", found=found, expected=expected, do=do
    )
