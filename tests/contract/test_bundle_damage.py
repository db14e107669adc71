"""A bundle that is damaged, forged or from the future is refused in one line and never crashes."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import stat
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

import patchsieve
from patchsieve.contract import files as bundle_files
from patchsieve.contract import manifest
from patchsieve.contract.errors import BundleError, CapacityError, PatchsieveError, RequestError
from patchsieve.export.reuse import reuse
from tests.support import damage
from tests.support.damage import answer, edit_manifest, put, refused, rewrite


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A copy of the tiny bundle that may be broken."""
    return damage.copy(damage.bundle(), tmp_path / "bundle")


def own_files() -> list[str]:
    """Every file that `cpu` needs, the manifest too."""
    return [
        name for name in damage.contents(damage.bundle()) if not name.startswith("graphs/reference")
    ]


def delete(file: Path, outside: Path) -> None:
    """The file is gone."""
    file.unlink()


def truncate(file: Path, outside: Path) -> None:
    """Its second half is gone."""
    os.truncate(file, file.stat().st_size // 2)


def empty(file: Path, outside: Path) -> None:
    """It has no bytes."""
    os.truncate(file, 0)


def flip(file: Path, outside: Path) -> None:
    """One bit of its middle is another."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x80
    file.write_bytes(content)


def lengthen(file: Path, outside: Path) -> None:
    """It has one byte more."""
    file.write_bytes(file.read_bytes() + b"\xff")


def make_directory(file: Path, outside: Path) -> None:
    """It is a directory."""
    file.unlink()
    file.mkdir()


def link_out(file: Path, outside: Path) -> None:
    """It is a link to the same content outside the bundle."""
    shutil.move(file, outside)
    file.symlink_to(outside)


def link_round(file: Path, outside: Path) -> None:
    """It is a link to itself."""
    file.unlink()
    file.symlink_to(file.name)


def make_pipe(file: Path, outside: Path) -> None:
    """It is a pipe, which would block who opens it."""
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize(
    "harm",
    [delete, truncate, empty, flip, lengthen, make_directory, link_out, link_round, make_pipe],
)
def test_each_file_in_turn_is_damaged_and_named(harm, tmp_path: Path) -> None:
    whole = damage.bundle()
    path = damage.copy(whole, tmp_path / "bundle")
    for name in own_files():
        harm(path / name, tmp_path / "outside")
        line = refused(lambda: answer(path), BundleError)
        # A manifest that cannot be read cannot be named by what it says.
        assert name in line or name == bundle_files.FILE_NAME, (name, line)
        if (path / name).is_dir() and not (path / name).is_symlink():
            (path / name).rmdir()
        else:
            (path / name).unlink(missing_ok=True)
        shutil.copyfile(whole / name, path / name)
        (tmp_path / "outside").unlink(missing_ok=True)
    assert answer(path) == answer(whole)


def test_a_flipped_byte_is_found_in_each_part_of_a_weights_file(bundle: Path) -> None:
    name = "graphs/weights/layers.0.safetensors"
    content = (bundle / name).read_bytes()
    for place in (0, 9, len(content) // 3, len(content) - 1):
        changed = bytearray(content)
        changed[place] ^= 1
        (bundle / name).write_bytes(changed)
        assert name in refused(lambda: patchsieve.load(bundle), BundleError)


def test_files_of_other_targets_are_not_looked_at(bundle: Path) -> None:
    for file in (bundle / "graphs").glob("reference.*"):
        file.unlink()
    assert answer(bundle) == answer(damage.bundle())
    refused(lambda: answer(bundle, target="reference"), BundleError, "damaged")


def test_a_folder_of_the_bundle_may_not_be_a_link_that_leaves_it(
    bundle: Path, tmp_path: Path
) -> None:
    shutil.move(bundle / "graphs", tmp_path / "elsewhere")
    (bundle / "graphs").symlink_to(tmp_path / "elsewhere")
    refused(lambda: patchsieve.load(bundle), BundleError, "link that leaves")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "3",
        '"manifest"',
        "{}",
        "[" * 100_000,
        '{"a":' * 100_000,
        "1" * 5_000,
        '{"schema_version": "1"}',
        '{"schema_version": true}',
        '{"schema_version": 0}',
        '{"schema_version": 1}',
        '{"schema_version": 1e400}',
        "\ufeff{}",
        "\0" * 100,
    ],
)
def test_a_manifest_that_is_none_is_refused(text: str, bundle: Path) -> None:
    (bundle / bundle_files.FILE_NAME).write_text(text, encoding="utf-8")
    refused(lambda: patchsieve.load(bundle), BundleError)


def test_a_manifest_that_is_not_text_or_not_small_is_refused(bundle: Path) -> None:
    (bundle / bundle_files.FILE_NAME).write_bytes(b"\xff\xfe{}")
    refused(lambda: patchsieve.load(bundle), BundleError)
    os.truncate(bundle / bundle_files.FILE_NAME, 1 << 40)  # sparse: no bytes on the disk
    refused(lambda: patchsieve.load(bundle), BundleError, "too large")


@pytest.mark.parametrize("version", [manifest.SCHEMA_VERSION + 1, 10**30])
def test_a_newer_schema_is_refused_with_what_to_do(version: int, bundle: Path) -> None:
    edit_manifest(bundle, lambda data: data.update(schema_version=version, novelty=[1]))
    refused(lambda: patchsieve.load(bundle), BundleError, "newer than this patchsieve.*upgrade")


@pytest.mark.parametrize("value", [None, "x", -1, 2**40, 2**70, 1.5, True, [], {}, "\ud800", ""])
def test_a_manifest_with_any_value_replaced_is_refused_or_works(value, tmp_path: Path) -> None:
    path = damage.copy(damage.bundle(), tmp_path / "bundle")
    original = json.loads((path / bundle_files.FILE_NAME).read_text(encoding="utf-8"))
    works = []
    for way in damage.leaves(original):
        data = copy.deepcopy(original)
        put(data, way, value)
        try:
            bundle_files.parse(json.dumps(data))
        except BundleError as error:
            assert "\n" not in str(error) and len(str(error)) < 1200, way
        else:
            works.append((way, data))
    assert len(works) < len(list(damage.leaves(original))) / 3
    for way, data in works:
        if way[0] in ("graphs", "files") and way[1:2] not in (("vision",), ("tokenizer.json",)):
            continue  # many of the same kind
        (path / bundle_files.FILE_NAME).write_text(json.dumps(data), encoding="utf-8")
        with contextlib.suppress(BundleError, RequestError):  # both are one line
            answer(path, check="size")


def test_a_manifest_that_lacks_any_part_of_its_tensors_is_refused_or_works(bundle: Path) -> None:
    """Each graph's entry, each side of it, each tensor, each key of a tensor is taken away."""
    original = json.loads((bundle / bundle_files.FILE_NAME).read_text(encoding="utf-8"))
    works = []
    for way in damage.leaves(original["graphs"]):
        if way[1:2] == ("identity",) and way[2:]:
            continue  # an absent number is none
        data = copy.deepcopy(original)
        place = data["graphs"]
        for step in way[:-1]:
            place = place[step]
        del place[way[-1]]
        try:
            bundle_files.parse(json.dumps(data))
        except BundleError as error:
            assert "\n" not in str(error), way
        else:
            works.append((way, data))
    # Entries and sides are needed always; so are names, types and shapes.
    assert not [way for way, _ in works if len(way) < 3 or way[-1] in ("name", "dtype", "shape")]
    odd = [(way, data) for way, data in works if way[0].startswith("decide.")]
    assert len(odd) > 3
    for way, data in odd:  # what is left is found when the graph is loaded
        (bundle / bundle_files.FILE_NAME).write_text(json.dumps(data), encoding="utf-8")
        line = refused(lambda: answer(bundle, check="size"), BundleError)
        assert way[0] in line


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../outside.onnx",
        "graphs/../../outside.onnx",
        "graphs\\..\\outside.onnx",
        "C:\\outside.onnx",
        "",
        ".",
        "graphs/\0.onnx",
        "graphs/\ud800.onnx",
        "a" * 300,
        "a/" * 1000 + "b",
    ],
)
@pytest.mark.parametrize("place", ["files", "graph", "tokenizer", "preprocessor", "embeddings"])
def test_a_name_that_leaves_the_bundle_is_refused(place: str, name: str, bundle: Path) -> None:
    def change(data) -> None:
        data["files"][name] = {"size": 1, "sha256": "0" * 64}
        if place == "graph":
            data["targets"]["cpu"]["vision"] = name
        elif place == "tokenizer":
            data["tokens"]["tokenizer"] = name
        elif place == "embeddings":
            data["embeddings"]["file"] = name
        elif place == "preprocessor":
            data["preprocessor"] = name

    edit_manifest(bundle, change)
    refused(lambda: patchsieve.load(bundle), BundleError, "outside the bundle|not well formed")


@pytest.mark.parametrize(
    ("way", "value", "match"),
    [
        (("targets", "cpu", "vision"), "graphs/absent.onnx", "not among the bundle's hashed"),
        (("tokens", "tokenizer"), "absent.json", "not among the bundle's hashed"),
        (("embeddings", "file"), "absent", "not among the bundle's hashed"),
        (("embeddings", "offset"), 10**9, "past its file"),
        (("embeddings", "shape"), [1 << 30, 64], "does not fit the decoder"),
        (("embeddings", "dtype"), "object", "does not fit the decoder"),
        (("precision",), "float8", "unknown precision"),
        (("precision",), "float16", "does not fit"),
        (("default_plan",), "absent", "lacks a plan"),
        (("vision", "num_visual"), 15, "not those of its tower"),
        (("vision", "num_visual"), 1 << 30, "not those of its tower"),
        (("vision", "image_size"), 64, "does not fit what the manifest says"),
        (("text", "num_kv_heads"), 2, "does not fit what the manifest says"),
        (("text", "head_dim"), 8, "does not fit what the manifest says"),
        (("text", "hidden_size"), 32, "does not fit"),
        (("text", "num_layers"), 5, "do not cover"),
        (("stages",), [], "do not cover"),
        (("stages", 0, "last"), 1, "do not cover"),
        (("stages", 0, "slots"), 0, "size that cannot be"),
        (("limits", "max_images"), 0, "size that cannot be"),
        (("limits", "max_new_tokens"), 2**31, "size that cannot be"),
        (("plans", "fastv", "sites", 0, "layer"), 1, "where the decoder is not divided"),
        (("plans", "fastv", "sites", 0, "layer"), 0, "index of a decoder layer"),
        (("plans", "fastv", "sites", 0, "budget"), 0, "budget of the site"),
        (("plans", "fastv", "sites", 0, "budget"), True, "budget of the site"),
        (("plans", "none", "sites"), [{"layer": 2, "method": "fastv"}], "named none prunes"),
        (("plans", "../x"), {"sites": []}, "part of file names"),
        (("plans", "fastv", "encoder"), "gtp", "encoder is neither null nor an object"),
        (("plans", "fastv", "position_rule"), "compact", "unknown position rule"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(way, value, match, bundle: Path) -> None:
    edit_manifest(bundle, lambda data: put(data, way, value))
    refused(lambda: patchsieve.load(bundle, check="size"), BundleError, match)


def test_a_decoder_of_billions_of_layers_is_refused_at_once(bundle: Path) -> None:
    def change(data) -> None:
        data["text"]["num_layers"] = data["stages"][1]["last"] = 2**31 - 1

    edit_manifest(bundle, change)
    refused(lambda: patchsieve.load(bundle), BundleError, "size that cannot be")


def test_limits_that_would_reserve_terabytes_are_refused_before_they_are_allocated(
    bundle: Path,
) -> None:
    edit_manifest(bundle, lambda data: data["limits"].update(max_text_tokens=2**31 - 1))
    model = patchsieve.load(bundle, check="size")
    refused(
        lambda: model.generate(None, "Hello", max_new_tokens=4),
        CapacityError,
        "does not fit this machine",
    )


def test_a_plan_whose_graph_is_absent_is_refused(bundle: Path) -> None:
    edit_manifest(bundle, lambda data: data["targets"]["cpu"].pop("decide.fastv.2"))
    refused(lambda: patchsieve.load(bundle), BundleError, "lacks a graph.*decide.fastv.2")


def test_a_method_unknown_here_runs_by_its_graph(bundle: Path) -> None:
    edit_manifest(
        bundle, lambda data: put(data, ("plans", "fastv", "sites", 0, "method"), "of-tomorrow")
    )
    assert answer(bundle) == answer(damage.bundle())


def test_an_unknown_target_is_refused_with_those_that_are_there(bundle: Path) -> None:
    line = refused(lambda: patchsieve.load(bundle, target="abacus"), BundleError)
    assert "cpu, reference" in line
    edit_manifest(bundle, lambda data: put(data, ("targets", "abacus"), data["targets"]["cpu"]))
    refused(lambda: patchsieve.load(bundle, target="abacus"), PatchsieveError, "abacus")


def test_a_graph_of_another_shape_than_the_manifest_says_is_refused(bundle: Path) -> None:
    name = "graphs/cpu.compact.onnx"
    rewrite(bundle, name, (bundle / "graphs/cpu.stage_0.onnx").read_bytes())
    refused(lambda: patchsieve.load(bundle), BundleError, "not those that the manifest lists")


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"not onnx at all", b"\x08\x0a" * 50])
def test_a_graph_that_is_no_onnx_is_refused(content: bytes, bundle: Path) -> None:
    rewrite(bundle, "graphs/cpu.stage_0.onnx", content)
    refused(lambda: patchsieve.load(bundle), BundleError, "ONNX Runtime .* fails at")


@pytest.mark.parametrize("location", ["../../outside", "/etc/passwd", "weights/../../../outside"])
def test_weights_outside_the_bundle_are_not_read(
    location: str, bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "outside").write_bytes(b"\0" * (1 << 20))
    name = "graphs/cpu.stage_0.onnx"
    model = onnx.load(bundle / name, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    rewrite(bundle, name, model.SerializeToString())
    refused(lambda: patchsieve.load(bundle), BundleError)


@pytest.mark.parametrize(
    ("key", "value"), [("offset", str(1 << 40)), ("length", "4"), ("offset", "-8")]
)
def test_weights_beyond_their_file_are_refused(key: str, value: str, bundle: Path) -> None:
    name = "graphs/cpu.stage_0.onnx"
    model = onnx.load(bundle / name, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == key:
                entry.value = value
    rewrite(bundle, name, model.SerializeToString())
    refused(lambda: patchsieve.load(bundle), BundleError)


def test_weights_that_are_not_numbers_give_one_line_and_the_model_stays_usable(
    bundle: Path,
) -> None:
    name = "graphs/weights/layers.3.safetensors"
    content = (bundle / name).read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    nans = np.full((len(content) - start) // 4, np.nan, np.float32).tobytes()
    rewrite(bundle, name, content[:start] + nans)
    model = patchsieve.load(bundle)
    for _ in range(2):
        refused(
            lambda: model.generate(damage.PHOTO, "Hello", max_new_tokens=4),
            PatchsieveError,
            "not finite",
        )


@pytest.mark.parametrize(
    "content", ["", "{", "null", "[]", "{}", '{"do_resize": 1}', "[" * 100_000, "1" * 5_000, "\0"]
)
@pytest.mark.parametrize("name", ["preprocessor.json", "tokenizer.json"])
def test_a_small_file_that_is_malformed_is_refused(name: str, content: str, bundle: Path) -> None:
    rewrite(bundle, name, content.encode())
    refused(lambda: patchsieve.load(bundle), BundleError)


@pytest.mark.parametrize("value", [None, "x", -1, 2**40, 1.5, [], {}, [0, 0], [2**40, 2**40]])
def test_a_preprocessor_with_any_value_replaced_is_refused_or_works(value, bundle: Path) -> None:
    original = json.loads((bundle / "preprocessor.json").read_text(encoding="utf-8"))
    for way in damage.leaves(original):
        data = copy.deepcopy(original)
        put(data, way, value)
        rewrite(bundle, "preprocessor.json", json.dumps(data).encode())
        with contextlib.suppress(BundleError, RequestError):
            answer(bundle, check="size")


def test_a_tokenizer_of_another_model_is_refused(bundle: Path) -> None:
    tokenizer = json.loads((bundle / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["added_tokens"] = []
    rewrite(bundle, "tokenizer.json", json.dumps(tokenizer).encode())
    refused(lambda: patchsieve.load(bundle), BundleError, "image token")


def test_a_token_beyond_the_embedding_table_is_refused(bundle: Path) -> None:
    tokenizer = json.loads((bundle / "tokenizer.json").read_text(encoding="utf-8"))
    extra = {**tokenizer["added_tokens"][0], "id": 5000, "content": "<beyond>"}
    tokenizer["added_tokens"].append(extra)
    rewrite(bundle, "tokenizer.json", json.dumps(tokenizer).encode())
    model = patchsieve.load(bundle)
    ids = model.bundle.prompts.tokenizer.encode("<beyond>", add_special_tokens=False).ids
    if max(ids) >= model.facts.text.vocab_size:
        refused(lambda: model.generate(None, "Hi <beyond>"), RequestError, "does not know")
    refused(lambda: model.bundle.embed(np.array([0, 5000])), RequestError, "does not know")


@pytest.mark.parametrize("template", ["{% for", "{{ 1 / 0 }}", "{{ messages.__class__ }}", ""])
def test_a_chat_template_that_fails_gives_one_line(template: str, bundle: Path) -> None:
    edit_manifest(bundle, lambda data: data["tokens"].update(chat_template=template))
    refused(lambda: answer(bundle), PatchsieveError)


@pytest.mark.parametrize("name", ["absent", "a file", "an empty folder", "nul\0", "n" * 300])
def test_what_is_no_bundle_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("x")
    (tmp_path / "an empty folder").mkdir()
    refused(lambda: patchsieve.load(tmp_path / name), BundleError, "not a bundle")


def test_a_bundle_runs_where_nothing_can_be_written(bundle: Path) -> None:
    files = [bundle, *bundle.rglob("*")]
    before = damage.contents(bundle)
    for path in files:
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    try:
        assert answer(bundle) == answer(damage.bundle())
        assert damage.contents(bundle) == before
        if os.geteuid() != 0:  # root writes everywhere
            refused(lambda: reuse(bundle, damage.RANDOM, "random"), PatchsieveError, "cannot write")
    finally:
        for path in files:
            path.chmod(path.stat().st_mode | stat.S_IWUSR)


def test_a_file_that_may_not_be_read_is_one_line(bundle: Path, monkeypatch) -> None:
    def denied(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(bundle_files, "hash_file", denied)
    refused(lambda: patchsieve.load(bundle), BundleError, "cannot read")


def test_a_bundle_can_be_moved_and_lie_anywhere(tmp_path: Path, monkeypatch) -> None:
    path = damage.copy(damage.bundle(), tmp_path / "first")
    place = tmp_path / "ein Ort mit Abständen" / "画像 & 'quotes' \"$HOME\" 🙂"
    place.parent.mkdir()
    path.rename(place)
    assert answer(place) == answer(damage.bundle())
    monkeypatch.chdir(place.parent)
    assert answer(Path(place.name)) == answer(damage.bundle())
    monkeypatch.chdir(place)
    assert answer(Path(".")) == answer(damage.bundle())
    assert answer(str(place)) == answer(damage.bundle())  # type: ignore[arg-type]
    (tmp_path / "link").symlink_to(place)
    assert answer(tmp_path / "link") == answer(damage.bundle())


def test_the_command_line_says_it_in_one_line_and_exits_2(bundle: Path) -> None:
    os.truncate(bundle / "graphs/cpu.stage_1.onnx", 100)
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "patchsieve", "run", str(bundle), "--prompt", "Hello"],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "graphs/cpu.stage_1.onnx" in done.stderr
