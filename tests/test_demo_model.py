"""The demo model: its scenes and questions are true, and a pruned bundle of it answers rightly."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from argparse import ArgumentTypeError, Namespace
from collections import Counter, defaultdict
from functools import cache
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoProcessor, LlavaForConditionalGeneration

import patchsieve
from examples.demo_model import make_data, train_pruned
from examples.demo_model.models import make_clip, make_llava, pixels
from examples.demo_model.pruned_prefix import PrunedPrefix
from examples.demo_model.questions import KINDS, NUMBERS, Asker, as_prompt
from examples.demo_model.save import check_free
from examples.demo_model.scenes import COLOURS, GRID, PATCH, SHAPES, make_scene, owner_map, render
from examples.demo_model.shared_prefix import run_questions
from examples.demo_model.train_language import Words, embed_prefix
from examples.demo_model.train_pruned import Pruner, read_answers
from examples.demo_model.train_tower_plan import weights_in
from examples.demo_model.training import Optimiser, State
from patchsieve.calibration.attention import install
from patchsieve.cli import main
from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.plan import MethodPlan, Plan, PseudoCls, SitePlan
from tests.support.models import make_checkpoint
from tests.support.tiny_bundles import largest_error, recorded_logits

ROOT = Path(__file__).resolve().parents[1]


@cache
def asked(count: int = 250) -> list[tuple[object, list]]:
    asker = Asker(5)
    scenes = [make_scene("held-out", index) for index in range(count)]
    return [(scene, asker.ask(scene, 20)) for scene in scenes]


def test_a_scene_is_the_same_each_time_and_no_split_shares_one() -> None:
    first, again = make_scene("train", 7), make_scene("train", 7)
    assert first == again
    assert np.array_equal(np.asarray(render(first)), np.asarray(render(again)))
    assert make_scene("held-out", 7) != first


def test_the_patch_at_an_objects_centre_is_its_own() -> None:
    for index in range(40):
        scene = make_scene("train", index)
        owners = owner_map(scene)
        assert owners.shape == (GRID, GRID)
        for number, thing in enumerate(scene.things):
            assert owners[int(thing.y // PATCH), int(thing.x // PATCH)] == number


def test_an_objects_pixels_have_its_colour() -> None:
    """A plain square's centre tells whether drawing and naming agree."""
    seen = 0
    for index in range(200):
        scene = make_scene("train", index)
        picture = np.asarray(render(scene)).astype(int)
        for thing in scene.things:
            if thing.shape not in ("square", "circle", "diamond") or thing.texture != "plain":
                continue
            around = picture[
                int(thing.y) - 2 : int(thing.y) + 3, int(thing.x) - 2 : int(thing.x) + 3
            ]
            colour = around.reshape(-1, 3).mean(0)
            nearest = min(COLOURS, key=lambda n: np.abs(np.array(COLOURS[n]) - colour).sum())
            seen += 1
            assert nearest == thing.colour, (index, thing)
    assert seen > 50


def test_counts_colours_and_positions_are_told_truly() -> None:
    """Answers worked out again, from the question's words alone."""
    checked = Counter()
    for scene, questions in asked():
        for question in questions:
            if found := re.search(r"How many (?:(\w+) )?(\w+) (?:are|can)", question.text):
                colour, noun = found.groups()
                shape = {"shapes": None, "crosses": "cross"}.get(noun, noun[:-1])
                hits = [
                    t
                    for t in scene.things
                    if colour in (None, t.colour) and shape in (None, t.shape)
                ]
                assert question.word == NUMBERS[len(hits)]
            elif found := re.search(r"What colour is the (\w+)\?", question.text):
                if found[1] == "background":
                    assert question.word == scene.ground
                else:
                    assert [t.colour for t in scene.things if t.shape == found[1]] == [
                        question.word
                    ]
            elif question.kind == "position":
                words = question.text.rstrip("?").split()
                thing = next(
                    t
                    for t in scene.things
                    if t.shape == words[-1] and words[-2] in ("the", t.colour)
                )
                side = (
                    f"{'bottom' if thing.y > 48 else 'top'} {'right' if thing.x > 48 else 'left'}"
                )
                assert question.word == side
            else:
                continue
            checked[question.kind] += 1
    assert min(checked[kind] for kind in ("count", "colour", "position", "ground")) > 50


def test_answers_are_level_so_that_a_guess_pays_little() -> None:
    kinds, texts = defaultdict(Counter), defaultdict(Counter)
    for _, questions in asked():
        for question in questions:
            kinds[question.kind][question.word] += 1
            texts[question.text][question.word] += 1
    assert set(kinds) == set(KINDS)
    for kind, answers in kinds.items():
        if kind not in ("amount", "smallest", "largest"):  # few per scene: nothing to choose among
            most = answers.most_common(1)[0][1] / sum(answers.values())
            assert most < 1.5 / len(answers), (kind, answers)
    often = [answers for answers in texts.values() if sum(answers.values()) >= 10]
    guessed = sum(a.most_common(1)[0][1] for a in often) / sum(sum(a.values()) for a in often)
    assert guessed < 0.45


def test_every_word_of_the_questions_is_one_token() -> None:
    processor = _untrained()[1]
    for word in (*COLOURS, *SHAPES, *NUMBERS):
        pieces = processor.tokenizer.tokenize(f"It is {word}.")
        assert f"\u2581{word}" in pieces


@pytest.mark.slow
def test_the_tokenizers_are_numbered_alike_in_every_process() -> None:
    """The weights were trained in processes other than the one that saves the tokenizers."""
    said = "import json; from examples.demo_model import tokens; made = (tokens.clip_tokenizer(), "
    said += "tokens.language_tokenizer()); print(json.dumps([each.get_vocab() for each in made]))"
    words = [sys.executable, "-c", said]
    first, second = (
        subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    )
    assert json.loads(first) == json.loads(second)


@cache
def _untrained() -> tuple:
    model, processor = make_llava(make_clip()[0])
    make_checkpoint.set_random_weights(model, 3, 0.15)
    return model.eval(), processor


@torch.no_grad()
def test_questions_on_a_shared_picture_are_answered_as_if_each_were_asked_alone() -> None:
    model, processor = _untrained()
    words, scene = Words(processor), make_scene("held-out", 0)
    questions, short = Asker(1).ask(scene, 4), [True, False, True, False]
    ids, targets = words.batch([questions], [short])
    prefix = embed_prefix(model, words, pixels(scene)[None])
    logits = model.lm_head(run_questions(model, prefix, ids))[0]
    for row, question in enumerate(questions):
        prompt, answer = as_prompt(question, short[row])
        text = f"USER: <image>\n{prompt} ASSISTANT: {answer}"
        inputs = processor(images=render(scene), text=text, return_tensors="pt")
        alone = model(**inputs).logits[0]
        length = len(words.encode(question, short[row])[0]) - 1
        torch.testing.assert_close(logits[row, :length], alone[-length:], rtol=0, atol=2e-4)
        # What is learnt are the answer's tokens and the end mark, each one place ahead.
        told = targets[0, row][targets[0, row] >= 0]
        end = processor.tokenizer.eos_token_id
        assert told.tolist() == [*inputs.input_ids[0, -(len(told) - 1) :].tolist(), end]


MODEL = ROOT / "examples" / "demo_model"
LEAST, LEAST_PRUNED = 0.88, 0.72  # shares of right answers, below what was measured


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The untrained plan that `train_pruned` starts from."""
    path = tmp_path_factory.mktemp("demo") / "bundle"
    words = ["export", str(MODEL / "checkpoint"), "-o", str(path), "--method", "fastv"]
    words += ["--sites", "6", "--keep-ratio", "0.1", "--quiet"]
    assert main([*words, "--max-text-tokens", "64", "--max-new-tokens", "32"]) == 0
    return path


def _marks(bundle: Path, plan: str, is_blind: bool = False) -> float:
    model, right = patchsieve.load(bundle), []
    for scene, questions in asked()[:12]:
        picture = render(scene)
        if is_blind:
            picture = picture.point(lambda _: 128)
        for row, question in enumerate(questions[:8]):
            prompt, answer = as_prompt(question, is_short=row % 2 == 0)
            told = model.generate(picture, prompt, max_new_tokens=16, plan=plan)
            right.append(told.text == answer)
    return sum(right) / len(right)


@pytest.mark.slow
def test_the_committed_weights_answer_scenes_that_they_never_saw(bundle: Path) -> None:
    assert _marks(bundle, "none") > LEAST
    assert _marks(bundle, "none", is_blind=True) < 0.5


def test_a_pruned_bundle_of_the_committed_weights_answers_too(bundle: Path) -> None:
    assert _marks(bundle, "fastv-6-10") > LEAST_PRUNED


@pytest.mark.slow
def test_the_demo_keeps_what_is_asked_and_answers_right(tmp_path: Path) -> None:
    """What `make demo` shows: two questions on one scene keep different patches."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    question, other = (
        re.findall(rf"^{n} := (.*)$", makefile, re.M)[0] for n in ("QUESTION", "OTHER")
    )
    words = ["export", str(MODEL / "atp"), "-o", str(tmp_path / "bundle"), "--method", "atp"]
    assert main([*words, "--max-text-tokens", "64", "--max-new-tokens", "32", "--quiet"]) == 0
    model, scene = patchsieve.load(tmp_path / "bundle"), make_scene("held-out", 53)
    owners, kept = owner_map(scene).ravel(), []
    for text, name, answer in (
        (question, "purple cross", "The cross is dotted."),
        (other, "purple star", "The purple star is striped."),
    ):
        (thing,) = [index for index, one in enumerate(scene.things) if one.name == name]
        pruned = model.generate(MODEL / "scene.png", text, max_new_tokens=16)
        full = model.generate(MODEL / "scene.png", text, max_new_tokens=16, plan="none")
        assert (pruned.text, full.text) == (answer, answer)
        survivors = pruned.sites[-1].kept
        assert np.mean(owners[survivors] == thing) > 0.7 and len(survivors) < 144 / 15
        kept.append(set(survivors))
    assert len(kept[0] & kept[1]) <= 1


@torch.no_grad()
def test_a_decoder_trains_on_what_its_bundle_sees(bundle: Path, tmp_path: Path) -> None:
    """Logits of each first token as in the pruned bundle; not so if other rows fall."""
    data = make_data.write(tmp_path, "calibration", 8)
    pruner = Pruner(MODEL / "checkpoint", bundle, "fastv-6-10", data)
    seen = recorded_logits(pruner.model)
    model = LlavaForConditionalGeneration.from_pretrained(
        MODEL / "checkpoint", dtype=torch.float32, attn_implementation="eager"
    )
    install(model.model.language_model)
    samples = [pruner[index] for index in range(8)]
    logits, labels = read_answers(model, samples)
    firsts = np.cumsum([0] + [int((s.labels != -100).sum()) for s in samples])
    assert firsts[-1] == len(labels)
    assert largest_error([*logits[firsts[:-1]].numpy()], seen) < 2e-3
    for sample in samples:
        (fallen,) = sample.gone.values()
        assert fallen.sum() == 144 - 14
        sample.gone[6] = torch.roll(fallen, 1)
    assert largest_error([*read_answers(model, samples)[0][firsts[:-1]].numpy()], seen) > 0.1


@pytest.mark.slow
@torch.no_grad()
def test_a_tower_trains_as_its_bundle_sees(tmp_path: Path) -> None:
    """Logits of each first token as in the bundle of the same plan, and the model's own weights."""
    gtp, pseudo = MethodPlan("gtp", {"keep": 30, "group_layers": 3}), PseudoCls(text="none")
    sites = tuple(SitePlan(i, "ivtp", {"num_keep": n}) for i, n in ((3, 24), (6, 20), (9, 16)))
    plan, file = Plan(sites, encoder=gtp, pseudo_cls=pseudo), tmp_path / "plan"
    file.write_text(json.dumps(plan.to_dict()))
    folder, bundle = MODEL / "checkpoint", tmp_path / "bundle"
    words = ["export", str(folder), "-o", str(bundle), "--plan", str(file), "--plan-name", "ivtp"]
    assert main([*words, "--max-text-tokens", "64", "--max-new-tokens", "4", "--quiet"]) == 0
    pruned = patchsieve.load(bundle)
    seen = recorded_logits(pruned)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    words = Words(AutoProcessor.from_pretrained(folder))
    make = PrunedPrefix(model, plan, words, 0, is_random=False)
    scene, questions = asked()[0]
    short = [row % 2 == 0 for row in range(6)]
    ids, targets = words.batch([questions[:6]], [short])
    rows, bias, places, kept = make(pixels(scene)[None])
    logits = model.lm_head(run_questions(model, rows, ids, None, bias, places))[0]
    firsts = [int(torch.nonzero(row >= 0)[0]) for row in targets[0]]
    for question, is_short in zip(questions, short, strict=False):
        text = as_prompt(question, is_short)[0]
        told = pruned.generate(render(scene), text, plan="ivtp", max_new_tokens=1)
        assert list(told.images[0].ids) == kept[0].tolist()
        for site in told.sites:
            alive = torch.nonzero(bias[site.layer, 0, words.image : words.image + 30] == 0)[:, 0]
            assert alive.tolist() == list(site.places)
    found = [logits[row, first].numpy() for row, first in enumerate(firsts)]
    assert largest_error(found, seen) < 2e-3
    shifted = run_questions(model, rows, ids, None, bias)  # positions without gaps
    assert largest_error([*model.lm_head(shifted)[0, range(6), firsts].numpy()], seen) > 0.1
    make.vision.multi_modal_projector.linear_1.weight.zero_()
    assert model.model.multi_modal_projector.linear_1.weight.abs().max() == 0


@torch.no_grad()
def test_as_many_tokens_fall_behind_a_trained_tower_as_the_plan_says() -> None:
    model, processor = _untrained()
    sites = tuple(SitePlan(i, "ivtp", {"num_keep": n}) for i, n in ((3, 24), (9, 16)))
    plan = Plan(sites, encoder=MethodPlan("gtp", {"keep": 30}), pseudo_cls=PseudoCls())
    words = Words(processor)
    images = torch.stack([pixels(make_scene("held-out", index)) for index in range(2)])
    rows, bias, _, _ = PrunedPrefix(model, plan, words, 0)(images)
    left = (bias == 0).sum(-1) - (rows.shape[1] - 30)
    assert left.tolist() == [[30, 30]] * 3 + [[24, 24]] * 6 + [[16, 16]] * 3
    assert (bias[9] <= bias[3]).all()
    assert (bias[3, 0] != bias[3, 1]).any()
    few = Plan(sites[:1], encoder=MethodPlan("gtp", {"keep": 20}), pseudo_cls=PseudoCls())
    _, bias, _, _ = PrunedPrefix(model, few, words, 0, is_random=False)(images)
    assert (bias == 0).all()  # a site that wants more than there are


def test_trainings_refuse_what_they_cannot_follow(tmp_path: Path) -> None:
    model, processor = _untrained()
    words, gtp = Words(processor), MethodPlan("gtp", {"keep": 30})
    for plan in (
        Plan(encoder=gtp, position_rule="contiguous"),
        Plan((SitePlan(3, "fastv", {"keep_ratio": 0.5}),), encoder=gtp),
        Plan(projector=MethodPlan("pooling", {"keep": 36})),
    ):
        with pytest.raises(PatchsieveError, match="original positions"):
            PrunedPrefix(model, plan, words, 0)
    with pytest.raises(SystemExit, match="exists already"):
        check_free(tmp_path)
    assert weights_in("count=2,shape=0.5") == {"count": 2.0, "shape": 0.5}
    with pytest.raises(ArgumentTypeError, match="counts"):
        weights_in("counts=2")
    few: Any = SimpleNamespace(questions=[None] * 20)
    with pytest.raises(PatchsieveError, match="too few questions .* found: 10"):
        next(train_pruned.batches(few, 0, 2, 16))


def test_an_interrupted_training_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    options = Namespace(out=tmp_path / "trained", steps=500, falls="plan")

    def train(until: int, options: Namespace) -> Tensor:
        torch.manual_seed(0)
        model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4)])})
        optimiser = Optimiser(model, 1e-2)
        state = State(options, 0, 1, model, optimiser)
        rows = torch.randn(500, 4)
        for step in range(state.restore(), until):
            model["layers"][0](rows[step]).pow(2).sum().backward()
            optimiser.step(step / 500)
            state.keep(step + 1)
        return model["layers"][0].weight.detach()

    train(300, options)  # and then it is gone
    other = Namespace(**vars(options) | {"falls": "random"})
    with pytest.raises(SystemExit, match=r"trained.state is of another training .* 'plan'"):
        train(500, other)
    resumed = train(500, options)
    assert [path.name for path in tmp_path.iterdir()] == ["trained.state"]
    (tmp_path / "trained.state").unlink()
    assert torch.equal(train(500, options), resumed)

    numbers: Any = Counting(questions=[None] * 20)
    whole = list(islice(train_pruned.batches(numbers, 0, 1, 8), 6))
    rest = list(islice(train_pruned.batches(numbers, 0, 1, 8, done=3), 3))
    assert rest == whole[3:]


class Counting(SimpleNamespace):
    """Stands for a pruner; its samples are their numbers."""

    def __getitem__(self, index: int) -> int:
        return index


def test_the_committed_files_are_small() -> None:
    files = [path for path in MODEL.rglob("*.safetensors")]
    assert len(files) == 4
    assert sum(path.stat().st_size for path in files) < 40e6
