"""generation_config.json: what a bundle follows gives `generate`'s tokens; the rest is named."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.generation.logits_process import (
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from patchsieve.contract.errors import BundleError, UnsupportedModelError
from patchsieve.contract.files import parse, read
from patchsieve.contract.model import Generation
from patchsieve.export.exporter import ExportOptions, export
from patchsieve.export.source.generation import read_generation
from patchsieve.runtime.model import Model
from patchsieve.runtime.result import Result
from tests.references.masked_llava import ANSWER, MaskedLlava, answer_message, user_message
from tests.support.bundles import PHOTO, command, command_json
from tests.support.models import save_checkpoint
from tests.support.tiny_bundles import LIMITS, pictures, recorded_logits

ROW = "llama-gqa-tied-linear-rope"
QUESTION = "What is on the table?"
COUNT = 12


@pytest.fixture(scope="module")
def hugging_face(tiny: Any) -> MaskedLlava:
    return tiny(ROW).hugging_face


@pytest.fixture(scope="module")
def loaded(tiny: Any) -> Model:
    return Model(tiny(ROW).path, threads=1, check="size")


@pytest.fixture
def model(loaded: Model) -> Iterator[Model]:
    """A bundle whose manifest a test may change."""
    facts = loaded.facts
    yield loaded
    loaded.facts = facts


def generate(hugging_face: MaskedLlava, images: list[Any], **settings: Any) -> list[int]:
    text = hugging_face.prompt([user_message(QUESTION, len(images))])
    inputs = hugging_face.hugging_face_inputs(text, images)
    said = hugging_face.model.generate(**inputs, do_sample=False, max_new_tokens=COUNT, **settings)
    return said[0, inputs.input_ids.shape[1] :].tolist()


# Each makes, of the answer without settings and the prompt's length, the settings of `generate`.
SETTINGS = {
    # Below 1 it rewards what was seen, so that there are rows to repeat
    "repetition_penalty": lambda said, prompt: {"repetition_penalty": 0.4},
    "no_repeat_ngram_size": lambda said, prompt: {
        "repetition_penalty": 0.2,
        "no_repeat_ngram_size": 2,
    },
    "suppress_tokens": lambda said, prompt: {"suppress_tokens": said[:2]},
    "begin_suppress_tokens": lambda said, prompt: {"begin_suppress_tokens": said[:1]},
    "bad_words_ids": lambda said, prompt: {"bad_words_ids": [said[:2], said[5:6]]},
    "min_new_tokens": lambda said, prompt: {"min_new_tokens": 8, "eos_token_id": said[2:4]},
    "min_length": lambda said, prompt: {"min_length": prompt + 8, "eos_token_id": said[3]},
    "all together": lambda said, prompt: {
        "repetition_penalty": 0.3,
        "no_repeat_ngram_size": 3,
        "min_new_tokens": 4,
        "suppress_tokens": said[:1],
        "eos_token_id": said[1:3],
    },
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("num_images", (1, 2))
def test_what_is_followed_gives_the_tokens_of_generate(
    model: Model, hugging_face: MaskedLlava, name: str, num_images: int
) -> None:
    images = pictures(num_images)
    plain = generate(hugging_face, images)
    text = hugging_face.prompt([user_message(QUESTION, num_images)])
    prompt = hugging_face.hugging_face_inputs(text, images).input_ids.shape[1]
    settings = SETTINGS[name](plain, prompt)
    expected = generate(hugging_face, images, **settings)
    others = {key: value for key, value in settings.items() if key != name}
    assert expected != generate(hugging_face, images, **(others if name in settings else {}))
    ends = settings.pop("eos_token_id", model.facts.tokens.eos_token_ids)
    ends = tuple(ends) if isinstance(ends, (list, tuple)) else (ends,)
    model.facts = replace(
        model.facts,
        tokens=replace(model.facts.tokens, eos_token_ids=ends),
        generation=Generation(**settings),
    )
    assert model.generate(images, QUESTION, max_new_tokens=COUNT).token_ids == expected


def test_a_request_overrides_what_the_checkpoint_asks(
    model: Model, hugging_face: MaskedLlava
) -> None:
    images = pictures(1)
    model.facts = replace(
        model.facts, generation=Generation(repetition_penalty=1.5, suppress_tokens=(5,))
    )
    asked = {"max_new_tokens": COUNT, "repetition_penalty": 1.0, "no_repeat_ngram_size": 2}
    found = model.generate(images, QUESTION, **asked).token_ids
    assert found == generate(hugging_face, images, no_repeat_ngram_size=2, suppress_tokens=[5])


def test_penalties_see_every_turn_with_all_visual_tokens(
    model: Model, hugging_face: MaskedLlava
) -> None:
    model.facts = replace(
        model.facts, generation=Generation(repetition_penalty=0.5, no_repeat_ngram_size=2)
    )
    penalties = (RepetitionPenaltyLogitsProcessor(0.5), NoRepeatNGramLogitsProcessor(2))
    logits = recorded_logits(model)
    chat, again = model.chat(), "Is there a cat or a dog?"
    first = chat.ask(QUESTION, pictures(1), max_new_tokens=COUNT, ignore_eos=True)
    second = Result()
    pieces = chat.stream(again, max_new_tokens=COUNT, ignore_eos=True, result=second)
    assert "".join(pieces) == second.text
    chat.close()
    del model.pipeline.prefill, model.pipeline.decode  # the recorder
    asked = [user_message(QUESTION, 1)]
    text = hugging_face.prompt(asked)
    ids = hugging_face.hugging_face_inputs(text, pictures(1)).input_ids[0].tolist()
    whole = hugging_face.prompt([*asked, answer_message(ANSWER), user_message(again, 0)])
    tokenizer = hugging_face.processor.tokenizer
    dot = tokenizer(".", add_special_tokens=False).input_ids
    rest = tokenizer("." + whole.rpartition(ANSWER)[2], add_special_tokens=False).input_ids
    said: list[list[int]] = [[], []]
    for turn in range(2):
        ids += rest[len(dot) :] if turn else []
        for row in logits[turn * COUNT : (turn + 1) * COUNT]:
            scores = torch.from_numpy(row).reshape(1, -1)
            for penalty in penalties:
                scores = penalty(torch.tensor([ids]), scores)
            said[turn].append(int(scores.argmax()))
            ids.append(said[turn][-1])
    assert [first.token_ids, second.token_ids] == said


# Export


def test_export_takes_the_settings_and_names_those_that_it_does_not_follow(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = save_checkpoint(tmp_path / "checkpoint", layers=1, vision_layers=2)
    plain = json.loads((checkpoint / "generation_config.json").read_text())
    said = generate(MaskedLlava(checkpoint), pictures(1))
    asked = {
        "repetition_penalty": 0.3,
        "no_repeat_ngram_size": 3,
        "begin_suppress_tokens": said[:1],
        "bad_words_ids": [[7], [8, 9]],
    }
    write = (checkpoint / "generation_config.json").write_text
    write(json.dumps(plain | asked))
    expected = generate(MaskedLlava(checkpoint), pictures(1))
    write(json.dumps(plain | asked | {"num_beams": 4, "do_sample": True, "temperature": 0.2}))
    bundle = tmp_path / "bundle"
    with caplog.at_level(logging.WARNING):
        export(str(checkpoint), bundle, ExportOptions(limits=LIMITS))
    assert "does not follow these entries of generation_config.json: num_beams = 4" in caplog.text
    assert "asks for sampling (do_sample = True, temperature = 0.2)" in caplog.text
    assert expected != said
    ask = ("run", bundle, "--image", PHOTO, "--prompt", QUESTION, "--max-new-tokens", COUNT)
    code, result = command_json(*ask)
    assert (code, result["token_ids"]) == (0, expected)
    code, result = command_json(*ask, "--repetition-penalty", 1)
    assert code == 0 and result["token_ids"] != expected
    _, text, _ = command("inspect", bundle)
    assert "repetition_penalty 0.3, no_repeat_ngram_size 3" in text
    assert "not followed: num_beams = 4, do_sample = True, temperature = 0.2" in text
    _, facts = command_json("inspect", bundle)
    assert facts["generation"]["bad_words_ids"] == [[7], [8, 9]]


def test_a_bundle_that_asks_nothing_says_nothing_and_older_ones_are_read(tiny: Any) -> None:
    path = tiny(ROW).path
    assert not {"generation", "attention"} & set(json.loads((path / "manifest.json").read_text()))
    facts = read(path)
    assert facts.generation == Generation()
    asking = replace(facts, generation=Generation(bad_words_ids=((1, 2), (3,)), stop=("END",)))
    assert parse(asking.to_json()) == asking


@pytest.mark.parametrize(
    "entry", [{"repetition_penalty": 0}, {"bad_words_ids": [[]]}, {"suppress_tokens": [-1]}]
)
def test_a_manifest_with_settings_that_cannot_be_is_refused(tiny: Any, entry: Any) -> None:
    data = json.loads((tiny(ROW).path / "manifest.json").read_text()) | {"generation": entry}
    with pytest.raises(BundleError):
        parse(json.dumps(data))


# Files


@pytest.fixture
def files(tmp_path: Path) -> Path:
    config = {"model_type": "llava", "text_config": {"repetition_penalty": 1.2, "eos_token_id": 6}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def asks(files: Path, **entries: Any) -> tuple[Generation, tuple[int, ...]]:
    (files / "generation_config.json").write_text(json.dumps(entries))
    return read_generation(files, 100)


def test_values_that_switch_off_or_never_act_are_none(files: Path) -> None:
    found, ends = asks(
        files,
        eos_token_id=[2, -1, 2],
        repetition_penalty=1,
        no_repeat_ngram_size=-1,
        suppress_tokens=[-1],
        num_beams=1,
        length_penalty=2.0,
        guidance_scale=1.0,
        temperature=0.7,
        forced_bos_token_id=3,
    )
    assert (found, ends) == (Generation(), (2,))


def test_config_json_counts_only_if_there_is_no_generation_config(files: Path) -> None:
    assert read_generation(files) == (Generation(repetition_penalty=1.2), (6,))
    assert asks(files, eos_token_id=2) == (Generation(), (2,))


@pytest.mark.parametrize(
    "entries, named",
    [
        ({"num_beams": 4, "length_penalty": 0.5}, ("num_beams = 4", "length_penalty = 0.5")),
        ({"penalty_alpha": 0.6, "top_k": 4}, ("penalty_alpha = 0.6",)),
        ({"encoder_repetition_penalty": 1.5}, ("encoder_repetition_penalty = 1.5",)),
        ({"encoder_no_repeat_ngram_size": 2}, ("encoder_no_repeat_ngram_size = 2",)),
        ({"forced_eos_token_id": 2}, ("forced_eos_token_id = 2",)),
        (
            {"exponential_decay_length_penalty": [3, 1.1]},
            ("exponential_decay_length_penalty = [3, 1.1]",),
        ),
        ({"sequence_bias": [[[4], -2.0]]}, ("sequence_bias = [[[4], -2.0]]",)),
        ({"guidance_scale": 1.5}, ("guidance_scale = 1.5",)),
        (
            {"do_sample": True, "top_p": 0.9, "typical_p": 0.5},
            ("do_sample = True", "top_p = 0.9", "typical_p = 0.5"),
        ),
    ],
    ids=str,
)
def test_entries_that_are_not_followed_are_named(
    files: Path, entries: dict[str, Any], named: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found, _ = asks(files, eos_token_id=2, **entries)
    assert found == Generation(not_followed=named)
    assert len(caplog.records) == 1 and ", ".join(named) in caplog.text


@pytest.mark.parametrize(
    "entries",
    [
        {"repetition_penalty": "1.5"},
        {"repetition_penalty": 0},
        {"no_repeat_ngram_size": 2.5},
        {"bad_words_ids": [[]]},
        {"bad_words_ids": [[100]]},
        {"bad_words_ids": [[-1]]},
        {"suppress_tokens": 5},
        {"eos_token_id": "</s>"},
        {"stop_strings": [""]},
        {"max_new_tokens": -1},
    ],
    ids=str,
)
def test_entries_that_cannot_be_are_refused_in_one_line(files: Path, entries: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"\A[^\n]*generation_config[^\n]*what to do"):
        asks(files, **entries)


def test_stop_strings_become_the_stop_of_a_request(files: Path) -> None:
    assert asks(files, eos_token_id=2, stop_strings="###")[0].options() == {"stop": ("###",)}
