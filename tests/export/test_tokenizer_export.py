import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from patchsieve.contract.errors import BackendMissingError, UnsupportedModelError
from patchsieve.contract.model import Generation
from patchsieve.export.source.tokenizer import write_tokenizer
from patchsieve.runtime.inputs.builder import PromptBuilder
from patchsieve.runtime.inputs.prompt import expand
from tests.support.models import tiny_llava
from tests.support.tiny_tokenizers import (
    IMAGE,
    SENTENCES,
    special_tokens,
    tokenizer,
    tokenizer_json,
)

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}\r\n{% endfor %}"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint"
    path.mkdir()
    image = tokenizer("llama").token_to_id(IMAGE)
    dump(
        path / "config.json",
        {"model_type": "llava", "image_token_index": image, "text_config": {"eos_token_id": 2}},
    )
    dump(
        path / "tokenizer_config.json",
        {
            "bos_token": {"__type": "AddedToken", "content": "<s>", "special": True},
            "eos_token": "</s>",
            "pad_token": None,
            "image_token": IMAGE,
        },
    )
    (path / "tokenizer.json").write_text(tokenizer_json("llama"), encoding="utf-8")
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    path = tmp_path / "bundle"
    path.mkdir()
    return path


def dump(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def update(path: Path, **values: object) -> None:
    dump(path, {**(json.loads(path.read_text()) if path.is_file() else {}), **values})


def test_the_tokenizer_and_its_facts_are_those_that_transformers_loads(
    checkpoint: Path, out: Path
) -> None:
    facts = write_tokenizer(checkpoint, out)
    written, given = (
        json.loads((path / "tokenizer.json").read_text()) for path in (out, checkpoint)
    )
    assert written == given
    assert facts == {
        "chat_template": None,
        "special_tokens": {"bos_token": "<s>", "eos_token": "</s>", "image_token": IMAGE},
        "eos_token_ids": [2],
        "bos_token_id": 1,
        "image_token": IMAGE,
        "image_token_id": tokenizer("llama").token_to_id(IMAGE),
        "generation": Generation(),
    }
    assert not (out / "chat_template.jinja").exists()


def test_what_export_writes_the_runtime_reads(checkpoint: Path, out: Path) -> None:
    (checkpoint / "chat_template.jinja").write_bytes(TEMPLATE.encode())
    facts = write_tokenizer(checkpoint, out)
    builder = PromptBuilder(
        out / "tokenizer.json",
        facts["chat_template"],
        image_token=facts["image_token"],
        image_token_id=facts["image_token_id"],
        special_tokens=facts["special_tokens"],
    )
    prompt = builder.build([builder.user_message("What?", 1)], 1)
    assert prompt.token_ids[0] == facts["bos_token_id"]
    assert (expand(prompt, 4).token_ids == facts["image_token_id"]).sum() == 4


def test_the_template_is_found_where_transformers_looks_in_its_order(
    checkpoint: Path, out: Path
) -> None:
    update(checkpoint / "tokenizer_config.json", chat_template="in tokenizer_config")
    assert write_tokenizer(checkpoint, out)["chat_template"] == "in tokenizer_config"
    (checkpoint / "chat_template.jinja").write_bytes(b"in jinja\r\n")
    # transformers reads the file as text, which turns \r\n into \n
    assert write_tokenizer(checkpoint, out)["chat_template"] == "in jinja\n"
    assert (out / "chat_template.jinja").read_bytes() == b"in jinja\n"
    dump(checkpoint / "chat_template.json", {"chat_template": "in json"})
    assert write_tokenizer(checkpoint, out)["chat_template"] == "in json"
    dump(checkpoint / "processor_config.json", {"chat_template": "in processor_config"})
    assert write_tokenizer(checkpoint, out)["chat_template"] == "in processor_config"


def test_of_several_named_templates_the_default_is_taken(checkpoint: Path, out: Path) -> None:
    named = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    update(checkpoint / "tokenizer_config.json", chat_template=named)
    assert write_tokenizer(checkpoint, out)["chat_template"] == "b"
    (checkpoint / "additional_chat_templates").mkdir()
    (checkpoint / "additional_chat_templates" / "rag.jinja").write_text("c")
    with pytest.raises(UnsupportedModelError, match="none of them named default.*found: rag"):
        write_tokenizer(checkpoint, out)
    (checkpoint / "chat_template.jinja").write_text("d")
    assert write_tokenizer(checkpoint, out)["chat_template"] == "d"
    dump(checkpoint / "chat_template.json", {"chat_template": "e"})
    with pytest.raises(UnsupportedModelError, match="chat templates.*what to do: keep one"):
        write_tokenizer(checkpoint, out)  # transformers refuses both kinds together


def test_end_tokens_come_from_the_file_that_generate_reads(checkpoint: Path, out: Path) -> None:
    dump(checkpoint / "generation_config.json", {"eos_token_id": [2, 5, 2]})
    assert write_tokenizer(checkpoint, out)["eos_token_ids"] == [2, 5]
    dump(checkpoint / "generation_config.json", {"eos_token_id": 4})
    assert write_tokenizer(checkpoint, out)["eos_token_ids"] == [4]
    (checkpoint / "generation_config.json").unlink()
    assert write_tokenizer(checkpoint, out)["eos_token_ids"] == [2]  # of text_config
    update(checkpoint / "config.json", eos_token_id=7)
    assert write_tokenizer(checkpoint, out)["eos_token_ids"] == [7]


def test_a_checkpoint_without_end_tokens_is_named(checkpoint: Path, out: Path, caplog) -> None:
    dump(checkpoint / "generation_config.json", {"bos_token_id": 1})
    with caplog.at_level(logging.WARNING):
        # Neither config.json's nor the tokenizer's: `generate` does not end there either
        assert write_tokenizer(checkpoint, out)["eos_token_ids"] == []
    assert (
        "names no end token" in caplog.text and "eos_token_id in generation_config" in caplog.text
    )


def test_special_tokens_are_those_that_transformers_hands_to_templates(
    checkpoint: Path, out: Path
) -> None:
    saved = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer("llama"), **special_tokens("llama"), pad_token="<unk>"
    )
    saved.save_pretrained(checkpoint)
    loaded = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    assert write_tokenizer(checkpoint, out)["special_tokens"] == loaded.special_tokens_map


def test_a_checkpoint_with_a_vocabulary_and_merges_only_is_converted(
    checkpoint: Path, out: Path
) -> None:
    saved = tokenizer("qwen")
    saved.model.save(str(checkpoint))  # vocab.json and merges.txt
    (checkpoint / "tokenizer.json").unlink()
    added = {
        str(saved.token_to_id(token)): {"content": token, "special": True, "normalized": False}
        for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", IMAGE)
    }
    dump(
        checkpoint / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|im_end|>",
            "added_tokens_decoder": added,
        },
    )
    update(checkpoint / "config.json", model_type="llava", image_token_index=added_id(added))
    facts = write_tokenizer(checkpoint, out)
    assert facts["image_token"] == IMAGE
    builder = PromptBuilder(
        out / "tokenizer.json",
        None,
        image_token=IMAGE,
        image_token_id=facts["image_token_id"],
    )
    text = "<image>\nWhat colour is the cup? 中"
    loaded = Qwen2Tokenizer.from_pretrained(checkpoint, local_files_only=True)
    assert builder.build_raw(text, 1).token_ids.tolist() == loaded(text)["input_ids"]


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"legacy": False},
        {"legacy": True, "add_bos_token": True},
        {"add_bos_token": False},
        {"add_bos_token": True, "add_eos_token": True},
        {"add_prefix_space": False},
    ],
    ids=str,
)
def test_a_sentencepiece_model_is_converted_to_the_ids_that_transformers_gives(
    checkpoint: Path, out: Path, tmp_path: Path, flags: dict[str, bool]
) -> None:
    spm = pytest.importorskip("sentencepiece", reason="converting needs sentencepiece")
    pytest.importorskip("google.protobuf", reason="converting needs protobuf")
    (tmp_path / "text").write_text("\n".join(SENTENCES))
    spm.SentencePieceTrainer.Train(
        input=str(tmp_path / "text"),
        model_prefix=str(checkpoint / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    (checkpoint / "tokenizer.json").unlink()
    update(
        checkpoint / "tokenizer_config.json",
        tokenizer_class="LlamaTokenizer",
        **flags,
        added_tokens_decoder={"400": {"content": IMAGE, "special": True, "normalized": False}},
    )
    update(checkpoint / "config.json", model_type="llava", image_token_index=400)
    facts = write_tokenizer(checkpoint, out)
    assert facts["bos_token_id"] == 1 and facts["image_token"] == IMAGE
    assert facts["special_tokens"]["eos_token"] == "</s>"
    builder = PromptBuilder(
        out / "tokenizer.json", None, image_token=IMAGE, image_token_id=facts["image_token_id"]
    )
    loaded = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    for text in (
        "USER: <image>\nWhat colour is the cup? 中 ASSISTANT:",
        "<image> a  b",
        "a<image>",
    ):
        assert builder.build_raw(text, 1).token_ids.tolist() == loaded(text)["input_ids"]


def test_a_sentencepiece_model_asks_for_sentencepiece_and_for_nothing_else(
    checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(BackendMissingError, match="pip install sentencepiece$") as refused:
        write_tokenizer(checkpoint, out)
    assert "tiktoken" not in str(refused.value)


def added_id(added: dict[str, dict[str, object]]) -> int:
    return next(int(number) for number, entry in added.items() if entry["content"] == IMAGE)


def test_a_bos_that_the_two_files_disagree_about_is_named(
    checkpoint: Path, out: Path, caplog
) -> None:
    update(checkpoint / "tokenizer_config.json", add_bos_token=True)
    with caplog.at_level(logging.WARNING):
        write_tokenizer(checkpoint, out)
        assert "add_bos_token" not in caplog.text
        update(checkpoint / "tokenizer_config.json", add_bos_token=False)
        write_tokenizer(checkpoint, out)
    assert "add_bos_token=False but tokenizer.json adds it" in caplog.text


def added(content: str, **flags: bool) -> dict[str, object]:
    """An entry of `added_tokens_decoder`."""
    none = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    return {"content": content, "special": True, **none, **flags}


def decoder(**flags: bool) -> dict[str, dict[str, object]]:
    named = {"1200": added(IMAGE), "1201": added("<pad>"), "1202": added("<loc>", **flags)}
    return {"tokenizer_config.json": {"added_tokens_decoder": named}}


# What each file says besides what a saved processor says: `<loc>` is new, id 1202.
NEW_TOKENS = {
    "nowhere": {},
    "added_tokens_decoder": decoder(),
    "not special": decoder(special=False),
    "normalised": decoder(special=False, normalized=True),
    "lstrip": decoder(lstrip=True),
    "rstrip": decoder(rstrip=True),
    "single word": decoder(single_word=True, special=False),
    "added_tokens.json": {"added_tokens.json": {"<loc>": 1202}},
    "special_tokens_map.json": {
        "added_tokens.json": {"<loc>": 1202},
        "special_tokens_map.json": {
            "additional_special_tokens": ["<loc>"],
            "sep_token": "<sep>",
            "eos_token": {**added("<end>", rstrip=True)},
        },
    },
    "extra_special_tokens": {"tokenizer_config.json": {"extra_special_tokens": ["<loc>"]}},
    "extra by name": {"tokenizer_config.json": {"extra_special_tokens": {"loc_token": "<loc>"}}},
    "additional_special_tokens": {
        "tokenizer_config.json": {
            "additional_special_tokens": [{"__type": "AddedToken", **added("<loc>", rstrip=True)}]
        }
    },
    "eos_token": {"tokenizer_config.json": {"eos_token": "<loc>", "tokenizer_class": "X"}},
    "a slow class": {
        "tokenizer_config.json": {
            **decoder()["tokenizer_config.json"],
            "tokenizer_class": "LlamaTokenizer",
            "legacy": False,
            "add_prefix_space": False,
        }
    },
    "code of its own": {
        "tokenizer_config.json": {
            **decoder()["tokenizer_config.json"],
            "auto_map": {"AutoTokenizer": ["x.Y", None]},
        }
    },
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints without weights."""
    paths = {}
    for structure in ("llama", "qwen2"):
        path = paths[structure] = tmp_path_factory.mktemp("saved") / structure
        model, processor = tiny_llava(structure, layers=1, vision_layers=1)
        for part in (processor, model.config, model.generation_config):
            part.save_pretrained(path)
    return paths


@pytest.mark.parametrize("where", NEW_TOKENS)
@pytest.mark.parametrize("structure", ("llama", "qwen2"))
def test_tokens_count_wherever_transformers_reads_them(
    saved: dict[str, Path], tmp_path: Path, out: Path, structure: str, where: str
) -> None:
    path = Path(shutil.copytree(saved[structure], tmp_path / "files"))
    for name, entries in NEW_TOKENS[where].items():
        update(path / name, **entries)
    processor = AutoProcessor.from_pretrained(path, backend="pil")
    facts = write_tokenizer(path, out)
    assert facts["special_tokens"] == processor.tokenizer.special_tokens_map
    builder = PromptBuilder(
        out / "tokenizer.json",
        facts["chat_template"],
        image_token=facts["image_token"],
        image_token_id=facts["image_token_id"],
        special_tokens=facts["special_tokens"],
    )
    ours, theirs = builder.tokenizer, processor.tokenizer
    # AddedToken compares its text only
    assert str(ours.get_added_tokens_decoder()) == str(theirs.added_tokens_decoder)
    for text in ("Where is <loc> now?", "a <loc> b<loc>c <end>  d<sep>", "<loc>", " 中"):
        message = builder.user_message(text, 1)
        prompt = processor.apply_chat_template([message], add_generation_prompt=True)
        expected = theirs(prompt).input_ids
        assert builder.build([message], 1).token_ids.tolist() == expected
        for skipped in (False, True):
            said = theirs.decode(expected, skip_special_tokens=skipped)
            assert ours.decode(expected, skip_special_tokens=skipped) == said


def test_tokens_without_an_embedding_are_named(
    checkpoint: Path, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = tokenizer("llama").token_to_id(IMAGE)
    update(checkpoint / "tokenizer_config.json", extra_special_tokens=["<loc>"])
    with caplog.at_level(logging.WARNING):
        write_tokenizer(checkpoint, out, image)  # the image token needs none
    assert f"1 tokens of the tokenizer have no embedding in the model (ids from {image})" in (
        caplog.text
    )
    assert caplog.text.count("<loc>") == 1


@pytest.mark.parametrize(
    "name, content, line",
    [
        (
            "tokenizer_config.json",
            {"split_special_tokens": True},
            "splits special.*set it to false",
        ),
        (
            "tokenizer_config.json",
            {"image_token": "<s>"},
            "not that of config.json.*'<s>', token 1",
        ),
        ("processor_config.json", {"image_token": "</s>"}, "not that of config.json.*'</s>'"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json cannot be read"),
        ("added_tokens.json", "{", "added_tokens.json cannot be read"),
        ("special_tokens_map.json", "x", "special_tokens_map.json cannot be read"),
        ("generation_config.json", "{", "generation_config.json"),
        ("tokenizer.json", '{"version": "1.0"}', "does not load the checkpoint's tokenizer"),
        ("chat_template.json", {"template": "a"}, "does not accept the checkpoint's chat template"),
        ("chat_template.jinja", "{% for", "chat template does not compile.*line 1"),
    ],
    ids=str,
)
def test_files_that_cannot_be_followed_are_refused_in_one_line(
    checkpoint: Path, out: Path, name: str, content: object, line: str
) -> None:
    if isinstance(content, dict):
        if name == "processor_config.json":
            settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
            dump(
                checkpoint / "tokenizer_config.json",
                {key: value for key, value in settings.items() if key != "image_token"},
            )
        update(checkpoint / name, **content)
    else:
        (checkpoint / name).write_text(str(content))
    with pytest.raises(UnsupportedModelError, match=rf"\A[^\n]*{line}[^\n]*\Z"):
        write_tokenizer(checkpoint, out)


def test_missing_parts_are_refused_in_one_line(checkpoint: Path, out: Path) -> None:
    update(checkpoint / "config.json", image_token_index=99_999)
    with pytest.raises(UnsupportedModelError, match="no image token.*image_token_id 99999"):
        write_tokenizer(checkpoint, out)
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(UnsupportedModelError, match="no tokenizer .*what to do"):
        write_tokenizer(checkpoint, out)
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(UnsupportedModelError, match="config.json cannot be read"):
        write_tokenizer(checkpoint, out)
    (checkpoint / "config.json").unlink()
    with pytest.raises(UnsupportedModelError, match="no config.json"):
        write_tokenizer(checkpoint, out)


def test_a_tokenizer_file_that_transformers_cannot_read_is_refused(
    checkpoint: Path, out: Path
) -> None:
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "vocab.json").write_text("{}")
    with pytest.raises(UnsupportedModelError, match="does not load the checkpoint's tokenizer"):
        write_tokenizer(checkpoint, out)


@pytest.mark.parametrize(
    "module", ["inputs.builder", "sampling", "detokenize", "inputs.chat_template"]
)
def test_the_runtime_side_needs_no_training_library(module: str) -> None:
    code = (
        f"import sys, patchsieve.runtime.{module};"
        "print([m for m in ('torch', 'transformers', 'onnx') if m in sys.modules])"
    )
    root = Path(__file__).resolve().parents[2]
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"
