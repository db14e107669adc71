"""A bundle that came as links, as the hub's cache lays it down, runs as the same files do."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from PIL import Image

import patchsieve
from patchsieve.contract.errors import BundleError
from patchsieve.contract.external_data import read_relocated, relocated
from patchsieve.contract.links import locate
from patchsieve.contract.plan import MethodPlan, Plan, SitePlan
from patchsieve.export.reuse import reuse
from patchsieve.runtime.trt.library import collect_messages, parse
from tests.support import damage
from tests.support.bundles import command, command_json
from tests.support.damage import answer, as_snapshot, refused

WEIGHTS = "graphs/weights/layers.0.safetensors"
GRAPH = "graphs/cpu.stage_0.onnx"


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    return as_snapshot(damage.bundle(), tmp_path / "models--me--bundle")


@pytest.mark.parametrize("absolute", [False, True])
def test_a_snapshot_answers_as_its_files_do(absolute: bool, tmp_path: Path) -> None:
    repository = tmp_path / "models--me--bundle"
    snapshot = as_snapshot(damage.bundle(), repository, absolute=absolute)
    assert all(path.is_symlink() for path in snapshot.rglob("*") if path.is_file())
    (tmp_path / "link").symlink_to(snapshot)
    for path in (snapshot, tmp_path / "link"):
        assert answer(path, check="full") == answer(damage.bundle())
    assert answer(snapshot, target="reference") == answer(damage.bundle(), target="reference")


def test_a_bundle_in_a_folder_of_the_repository_answers_too(tmp_path: Path) -> None:
    shutil.copytree(damage.bundle(), tmp_path / "files" / "bundles" / "one")
    snapshot = as_snapshot(tmp_path / "files", tmp_path / "models--me--many")
    assert answer(snapshot / "bundles" / "one") == answer(damage.bundle())


def test_links_and_files_may_be_mixed(snapshot: Path) -> None:
    for name in (WEIGHTS, "graphs/cpu.stage_1.onnx"):
        content = (snapshot / name).read_bytes()
        (snapshot / name).unlink()
        (snapshot / name).write_bytes(content)
    assert answer(snapshot) == answer(damage.bundle())


def test_every_command_opens_a_snapshot(snapshot: Path, tmp_path: Path) -> None:
    image = tmp_path / "photo.png"
    Image.fromarray(damage.PHOTO).save(image)
    data = tmp_path / "data.json"
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a"}]
    data.write_text(json.dumps([{"id": 1, "image": image.name, "conversations": turns}]))
    few = ("--max-new-tokens", 2)
    code, said = command_json("run", snapshot, "--image", image, "--prompt", "x", *few)
    assert code == 0 and said["target"] == "cpu"
    shown = ("--image", image, "--prompt", "x", "-o", tmp_path / "shown.png")
    assert command("show", snapshot, *shown, *few)[0] == 0
    assert command("eval", snapshot, "--data", data, *few)[0] == 0
    assert command("profile", snapshot, "--runs", 1, "--warmup", 0, "--alone", *few)[0] == 0
    code, said = command_json("inspect", snapshot, "--check")
    assert code == 0 and said["checked_files"] == len(said["files"])
    checkpoint = damage.checkpoint()
    code, said = command_json("verify", snapshot, "--against", checkpoint, *few)
    assert code == 0 and said["passed"]


@pytest.mark.slow
def test_a_new_plan_leaves_the_blobs_as_they_are(snapshot: Path) -> None:
    blobs = damage.contents(snapshot.parents[1] / "blobs")
    plan = Plan((SitePlan(2, "fastv", {"keep_ratio": 0.25}),), MethodPlan("gtp", {"keep": 8}))
    plain = damage.copy(damage.bundle(), snapshot.parents[2] / "plain")
    for path in (snapshot, plain):
        reuse(path, plan, "both")
    assert answer(snapshot) == answer(plain)
    assert damage.contents(snapshot.parents[1] / "blobs") == blobs
    assert damage.contents(snapshot) == damage.contents(plain)
    left = [path for path in snapshot.parents[1].iterdir() if path.name.startswith(".")]
    assert not left


@pytest.mark.tensorrt
def test_tensorrt_reads_a_snapshots_weights_where_they_lie(snapshot: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    place = locate(snapshot)
    with collect_messages(trt) as messages:
        content = read_relocated(place, "graphs/reference.vision.onnx")
        _, network, _ = parse(trt, place.root / "vision.onnx", messages, content)
        assert network.num_outputs == 2
        content = content.replace(b"blobs/", b"blubs/")
        with pytest.raises(BundleError, match="keep the weights"):
            parse(trt, place.root / "vision.onnx", messages, content)


def leave(link: Path, outside: Path) -> None:
    """To a file elsewhere."""
    link.symlink_to(outside)


def leave_by_dots(link: Path, outside: Path) -> None:
    """To a file elsewhere, by way of the blobs."""
    repository = next(p for p in link.parents if p.name.startswith("models--"))
    way = os.path.relpath(repository / "blobs", link.parent)
    link.symlink_to(f"{way}/../../{outside.name}")


def to_another_repository(link: Path, outside: Path) -> None:
    """To a blob of another repository."""
    repository = next(p for p in link.parents if p.name.startswith("models--"))
    other = repository.with_name("models--you--bundle") / "blobs"
    other.mkdir(parents=True, exist_ok=True)
    shutil.copy(outside, other / "0")
    link.symlink_to(os.path.relpath(other / "0", link.parent))


def to_another_revision(link: Path, outside: Path) -> None:
    """To a file of another snapshot of the same repository."""
    other = next(p for p in link.parents if p.name == "snapshots") / "other"
    other.mkdir(exist_ok=True)
    shutil.copy(outside, other / "0")
    link.symlink_to(os.path.relpath(other / "0", link.parent))


def chain(link: Path, outside: Path) -> None:
    """To a blob that is itself a link."""
    blobs = next(p for p in link.parents if p.name.startswith("models--")) / "blobs"
    (blobs / "chain").unlink(missing_ok=True)
    (blobs / "chain").symlink_to(outside)
    link.symlink_to(os.path.relpath(blobs / "chain", link.parent))


def chain_inside(link: Path, outside: Path) -> None:
    """To another link of the snapshot, which leads to the right blob."""
    blobs = next(p for p in link.parents if p.name.startswith("models--")) / "blobs"
    shutil.copy(outside, blobs / "right")
    beside = blobs.parent / "snapshots" / "0123abc" / "beside"
    beside.unlink(missing_ok=True)
    beside.symlink_to("../../blobs/right")
    link.symlink_to(os.path.relpath(beside, link.parent))


def loop(link: Path, outside: Path) -> None:
    """To itself."""
    link.symlink_to(link.name)


def dangle(link: Path, outside: Path) -> None:
    """To a blob that is not there, as after half a download."""
    blobs = next(p for p in link.parents if p.name.startswith("models--")) / "blobs"
    link.symlink_to(os.path.relpath(blobs / "absent", link.parent))


def to_a_folder(link: Path, outside: Path) -> None:
    """To a folder among the blobs."""
    blobs = next(p for p in link.parents if p.name.startswith("models--")) / "blobs"
    (blobs / "folder").mkdir(exist_ok=True)
    link.symlink_to(os.path.relpath(blobs / "folder", link.parent))


@pytest.mark.parametrize(
    "harm",
    [
        leave,
        leave_by_dots,
        to_another_repository,
        to_another_revision,
        chain,
        chain_inside,
        loop,
        dangle,
        to_a_folder,
    ],
)
def test_a_link_that_is_not_one_step_to_an_own_blob_is_refused_with_the_remedy(
    harm: Callable[[Path, Path], None], snapshot: Path, tmp_path: Path
) -> None:
    for name in (WEIGHTS, GRAPH, "tokenizer.json", "preprocessor.json", "manifest.json"):
        link, before = snapshot / name, os.readlink(snapshot / name)
        outside = tmp_path / "outside"
        shutil.copy(link, outside)
        link.unlink()
        harm(link, outside)
        # Whether contents are compared or not.
        for check in ("hash", "size"):
            line = refused(
                lambda check=check: patchsieve.load(snapshot, check=check), BundleError, "is a link"
            )
            assert name in line and "local_dir=" in line and "cp -L" in line, line
        link.unlink()
        link.symlink_to(before)
    assert answer(snapshot) == answer(damage.bundle())


@pytest.mark.parametrize("folder", ["graphs", "graphs/weights"])
def test_a_folder_that_is_a_link_is_refused(folder: str, snapshot: Path) -> None:
    """To a place outside, among the blobs, and inside the snapshot itself."""
    blobs, outside = snapshot.parents[1] / "blobs", snapshot.parents[2] / "outside"
    for place in (outside, blobs / "folder", snapshot / "elsewhere"):
        shutil.move(snapshot / folder, place)
        (snapshot / folder).symlink_to(place)
        line = refused(lambda: patchsieve.load(snapshot), BundleError)
        assert "link" in line and "cp -L" in line
        (snapshot / folder).unlink()
        shutil.move(place, snapshot / folder)


def test_links_that_look_like_the_hubs_do_not_lead_elsewhere_outside_its_cache(
    tmp_path: Path,
) -> None:
    as_snapshot(damage.bundle(), tmp_path / "store")  # no models--
    refused(
        lambda: patchsieve.load(tmp_path / "store/snapshots/0123abc"), BundleError, "local_dir="
    )


def test_a_link_to_another_file_of_the_bundle_is_followed(tmp_path: Path) -> None:
    path = damage.copy(damage.bundle(), tmp_path / "bundle")
    (path / "store").mkdir()
    shutil.move(path / WEIGHTS, path / "store" / "0")
    (path / WEIGHTS).symlink_to("../../store/0")
    assert answer(path) == answer(damage.bundle())


def test_weights_are_named_as_onnx_would_name_them(snapshot: Path) -> None:
    place = locate(snapshot)
    for graph in ("graphs/cpu.stage_0.onnx", "graphs/reference.vision.onnx"):
        found = onnx.load_model_from_string(read_relocated(place, graph))
        expected = onnx.load(snapshot / graph, load_external_data=False)
        count = 0
        for tensor in expected.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    blob = (snapshot / "graphs" / entry.value).resolve()
                    entry.value, count = f"blobs/{blob.name}", count + 1
        assert found == expected and count


def test_weights_of_graphs_inside_graphs_and_of_constants_are_renamed() -> None:
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[1], data_location=1)
    tensor.external_data.add(key="location", value="weights/a")
    inner = onnx.helper.make_graph([], "inner", [], [], initializer=[tensor])
    node = onnx.helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    constant = onnx.helper.make_node("Constant", [], ["z"], value=tensor)
    model = onnx.helper.make_model(onnx.helper.make_graph([node, constant], "outer", [], []))
    made = relocated(model.SerializeToString(), "graphs/x.onnx", locate(Path("/nowhere")))
    text = str(onnx.load_model_from_string(made))
    assert text.count("graphs/weights/a") == 3 and '"weights/a"' not in text


@pytest.mark.parametrize("location", ["../../../outside", "/etc/passwd", "", "weights/\0"])
def test_a_graph_that_names_weights_elsewhere_is_refused(location: str, snapshot: Path) -> None:
    model = onnx.load(snapshot / GRAPH, load_external_data=False)
    stored = next(each for each in model.graph.initializer if each.external_data)
    stored.external_data[0].value = location
    stored.external_data[0].key = "location"
    content = model.SerializeToString()
    refused(lambda: relocated(content, GRAPH, locate(snapshot)), BundleError, "outside the bundle")


def test_a_graph_that_is_no_onnx_never_crashes_the_reader(snapshot: Path) -> None:
    place, draw = locate(snapshot), random.Random(0)
    whole = (snapshot / GRAPH).read_bytes()
    contents = [b"", b"\0" * 100, b"not onnx at all", b"\xff" * 50, b"\x3a\xff\xff\xff\xff\x7f"]
    for _ in range(300):
        changed = bytearray(whole[: draw.randrange(len(whole))])
        for _ in range(3):
            changed[draw.randrange(len(changed) or 1) :] += bytes([draw.randrange(256)])
        contents.append(bytes(changed))
    refusals = 0
    for content in contents:
        try:
            relocated(content, GRAPH, place)
        except BundleError as error:
            refusals += 1
            assert "\n" not in str(error)
    assert refusals > 10
