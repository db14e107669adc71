"""A bundle as a model of lmms-eval: found by its entry point, run on a local task, offline."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from patchsieve.contract.errors import RequestError
from patchsieve.doors.benchmark import Benchmark
from patchsieve.runtime.model import Model
from tests.support.bundles import PHOTO, PLAN
from tests.support.installs import ROOT, build_wheel, environment, unpack

lmms_eval = pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")
pytest_plugins = ["tests.support.bundles"]

QUESTIONS = [
    {"question": "What is on the table?", "images": ["photo.jpg"]},
    {"question": "<image> or <image>?", "images": ["photo.jpg", "photo.jpg"]},
    {"question": "Two and two?", "images": []},
]
TASK = """
task: local_vqa
dataset_path: json
dataset_kwargs:
  data_files:
    test: questions.jsonl
test_split: test
output_type: generate_until
doc_to_visual: !function local.visual
doc_to_text: !function local.text
doc_to_target: answer
generation_kwargs: {max_new_tokens: 4, temperature: 0, do_sample: false, until: ["ASSISTANT:"]}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
FUNCTIONS = """
from pathlib import Path
from PIL import Image
def visual(doc):
    return [Image.open(Path(__file__).with_name(name)) for name in doc["images"]]
def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]
"""
PUBLIC = [
    "gqa",
    "llava_in_the_wild",
    "mmbench_en_dev",
    "mme",
    "mmvet",
    "pope",
    "scienceqa_img",
    "seedbench",
    "textvqa_val",
    "vizwiz_vqa_val",
    "vqav2_val",
]


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A folder with a task of three questions; the second shows more images than a bundle holds."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    shutil.copy(PHOTO, folder / "photo.jpg")
    (folder / "local_vqa.yaml").write_text(TASK)
    (folder / "local.py").write_text(FUNCTIONS)
    lines = [json.dumps(question | {"answer": "cup"}) for question in QUESTIONS]
    (folder / "questions.jsonl").write_text("\n".join(lines))
    return folder


def readme_line() -> list[str]:
    """The README's command, word by word."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^lmms-eval .*$", text, flags=re.M)
    return shlex.split(line, comments=True)[1:]


def test_the_command_of_the_readme_runs_a_task_on_a_bundle(
    tiny_bundle: Path, task: Path, tmp_path: Path
) -> None:
    installed = unpack(build_wheel(tmp_path), tmp_path / "installed")
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    words = readme_line()
    words[words.index("--tasks") + 1] = "local_vqa"
    words[words.index("--model_args") + 1] += ",oversized=empty,threads=1"
    words += ["--include_path", str(task), "--output_path", "out", "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-m", "lmms_eval", *words],
        cwd=tmp_path,
        env=environment() | offline | {"HF_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    (found,) = (tmp_path / "out").glob("*results.json")
    results: dict[str, Any] = json.loads(found.read_text())
    assert results["results"]["local_vqa"]["exact_match,none"] == 0
    took = results["throughput"]
    assert took["avg_visual_tokens"] == 10.4 and took["avg_visual_tokens_unpruned"] == 16
    assert took["avg_kv_bytes"] < took["avg_kv_bytes_unpruned"]
    assert took["avg_unanswered"] == 1
    assert "local_vqa: 3 questions; 10.4 visual tokens per layer" in done.stdout + done.stderr

    (samples,) = (tmp_path / "out").glob("*samples*.jsonl")
    told = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda one: one["doc_id"])
    model = Model(tiny_bundle, threads=1)
    for sample, question in zip(told, QUESTIONS, strict=True):
        if len(question["images"]) > 1:
            said, new = "", 0
        else:
            images = [PHOTO] * len(question["images"])
            result = model.generate(images, question["question"], max_new_tokens=4)
            said, new = result.text, len(result.token_ids)
        assert sample["filtered_resps"] == said
        assert sample["token_counts"][0].get("output_tokens", 0) == new
    model.close()


@pytest.mark.parametrize("name", PUBLIC)
def test_what_the_public_tasks_say_of_generation_is_followed(name: str, tiny_bundle: Path) -> None:
    from lmms_eval.utils import load_yaml_config

    folder = Path(lmms_eval.__file__).parent / "tasks"
    written = re.compile(rf'^task: "?{name}"?\s*$', flags=re.M)
    (path,) = [p for p in folder.rglob("*.yaml") if written.search(p.read_text("utf-8"))]
    config = load_yaml_config(str(path), mode="simple")
    assert config["output_type"] == "generate_until"
    model = Model(tiny_bundle, threads=1, check="size")
    benchmark = Benchmark(model, max_new_tokens=32)
    options = benchmark.options(config["generation_kwargs"])
    assert options["temperature"] == 0 and options["max_new_tokens"] <= 32
    assert benchmark.not_followed <= {"image_aspect_ratio"}
    model.close()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "--model_args cannot be used | found: no bundle"),
        ({"pretrained": "x"}, "--model_args cannot be used | found: pretrained"),
        ({"batch_size": "8"}, "found: --batch_size 8 | expected: 1"),
        ({"device": "cuda:0"}, "what to do: remove it"),
        ({"plan": 50}, "no such plan | found: 50"),
    ],
)
def test_a_mistake_in_the_arguments_is_one_line(
    given: dict[str, Any], said: str, tiny_bundle: Path
) -> None:
    from patchsieve.doors.lmms_eval import PatchsieveModel

    if "plan" in given or "batch_size" in given or "device" in given:
        given = {"bundle": str(tiny_bundle)} | given
    with pytest.raises(RequestError, match=re.escape(said)) as refused:
        PatchsieveModel(**given)
    assert "\n" not in str(refused.value)


def test_other_kinds_of_requests_are_refused_in_one_line(tiny_bundle: Path) -> None:
    from lmms_eval.api.instance import Instance

    from patchsieve.doors.lmms_eval import PatchsieveModel

    model = PatchsieveModel(str(tiny_bundle), plan=PLAN, batch_size="auto", device="cpu")
    about = {"task": "seedbench_ppl", "doc_id": 0, "repeats": 1}
    for kind in ("loglikelihood", "generate_until_multi_round"):
        asked = Instance(request_type=kind, arguments=("", ""), idx=0, metadata=about)
        with pytest.raises(RequestError, match=f"kind {kind} | found: seedbench_ppl"):
            getattr(model, kind)([asked])
    model.clean()
    with pytest.raises(RequestError, match="closed"):
        model.benchmark.model.generate(None, "?")
