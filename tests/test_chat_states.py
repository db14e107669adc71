"""What a conversation is between its turns: busy, interrupted, closed; and what it refuses."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from patchsieve.errors import RequestError
from patchsieve.runtime.bundle import Bundle
from patchsieve.runtime.model import Model
from patchsieve.runtime.ort import OrtBackend
from patchsieve.runtime.sampling import SamplingOptions
from tests.tiny_bundles import pictures

ROW = "llama-gqa-tied-linear-rope"
QUESTION = "What is on the table?"
FASTV = [{"layer": 1, "method": "fastv", "params": {"keep_ratio": 0.5}}]
FEW: dict[str, Any] = {"max_new_tokens": 12, "ignore_eos": True}


@pytest.fixture
def model(tiny: Any) -> Model:
    """One bundle for all tests: each closes its conversations."""
    return tiny(ROW).model(FASTV)


def refused(match: str) -> Any:
    """The block raises one line that matches."""
    return pytest.raises(RequestError, match=rf"\A[^\n]*{match}[^\n]*\Z")


# Requests


@pytest.mark.parametrize("prompt", (None, 7, b"bytes", ["a", "b"], {"role": "user"}))
@pytest.mark.parametrize("is_raw", (False, True))
def test_a_prompt_that_is_no_string_is_refused_by_its_type(model, prompt, is_raw: bool) -> None:
    kind = type(prompt).__name__
    with refused(f"the prompt is not text.*type {kind}"):
        model.generate(None if is_raw else pictures(1), prompt, raw=is_raw)


@pytest.mark.parametrize("image", (7, {"image": 1}, {1}, object(), [[1]], iter(())))
def test_an_image_that_is_none_is_refused_by_its_type(model, image) -> None:
    inner = image[0] if isinstance(image, list) else image
    with refused(f"cannot read an image.*type {type(inner).__name__}"):
        model.generate(image, QUESTION)


def test_an_unknown_option_is_answered_with_the_known_ones(model) -> None:
    known = ", ".join(option.name for option in fields(SamplingOptions))
    with refused(f"unknown option of a request.*found: foo, bar.*expected: {known}"):
        model.generate(None, QUESTION, foo=1, max_new_tokens=3, bar=2)


def test_a_bundle_is_checked_by_hash_or_by_size_and_a_typo_is_refused(model) -> None:
    for check in ("hashes", "Hash", "", None, True, ["size"]):
        with refused("bad check.*'hash' or 'size'"):
            Bundle(model.bundle.path, "cpu", check=check)
    for check in ("hash", "size"):
        Bundle(model.bundle.path, "cpu", check=check)


def test_threads_below_one_are_refused(model) -> None:
    for threads in (0, -3, 1.5, True, "2"):
        with refused("bad threads.*a whole number >= 1"):
            OrtBackend(model.bundle, threads=threads)
    assert OrtBackend(model.bundle).options.intra_op_num_threads >= 1
