"""IVTP as a recipe for models of every size, its scorer's sources, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from patchsieve.contract.errors import BackendMissingError, PatchsieveError
from patchsieve.contract.plan import Plan, PseudoCls, SitePlan
from patchsieve.export.graphs.scorer import TextScorer
from patchsieve.export.reuse import reuse
from patchsieve.export.source.clip import open_source
from patchsieve.export.weights import weights_of
from patchsieve.pruning.recipes import Size, ivtp
from tests.support.bundles import command
from tests.support.models import save_checkpoint, tiny_llava
from tests.support.tiny_clip import save_clip, text_features

pytest_plugins = ["tests.support.bundles"]

LLAVA = Size(num_patches=576, num_layers=32)


def shape(plan: Plan) -> tuple[int, list[int], list[int]]:
    """Tokens behind the tower, the decoder's sites, and the tokens behind each."""
    assert plan.encoder is not None
    return plan.encoder.params["keep"], plan.layers, [s.params["num_keep"] for s in plan.sites]


def test_the_papers_schedule_comes_out_for_llava() -> None:
    plan = ivtp(LLAVA)
    assert shape(plan) == (120, [3, 6, 9, 12], [103, 88, 75, 64])
    assert all(site.params["group"] == 3 for site in plan.sites)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@pytest.mark.parametrize("num_keep", [16, 64, 128, 192, 512, 576])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 6, 12, 99])
@pytest.mark.parametrize("num_layers", [2, 4, 12, 13, 40])
def test_any_count_and_group_makes_a_plan_that_fits(num_layers, group, num_keep) -> None:
    tower, sites, counts = shape(ivtp(Size(576, num_layers), num_keep, group=group))
    assert 576 >= tower >= counts[0] and counts == sorted(counts, reverse=True)
    assert counts[-1] == num_keep and sites[-1] < num_layers and sites[-1] <= 12
    own = min(group, 12, num_layers - 1)
    assert sites == [own * (k + 1) for k in range(len(sites))]


@pytest.mark.parametrize(("size", "keep"), [(LLAVA, 577), (LLAVA, 0), (Size(576, 1), 64)])
def test_models_that_are_too_small_are_refused(size: Size, keep: int) -> None:
    with pytest.raises(PatchsieveError):
        ivtp(size, keep)


def loaded(source: Any) -> TextScorer:
    """The graph's module on a source's weights."""
    module = TextScorer(source.text).eval()
    state = {}
    for weight in weights_of(module):
        tensor = source.tensors.read(weight.source)
        state[weight.name] = tensor.t() if weight.transposed else tensor
    module.load_state_dict(state)
    return module


@torch.no_grad()
def test_a_hugging_face_clip_scores_every_position(tmp_path: Path) -> None:
    from transformers import CLIPModel

    llava, _ = tiny_llava("llama", layers=2)
    source = open_source(str(save_clip(tmp_path / "clip", llava)))
    ids = torch.randint(0, source.text.vocab_size, (3, source.text.window))
    expected = text_features(CLIPModel.from_pretrained(tmp_path / "clip").eval(), ids)
    torch.testing.assert_close(loaded(source)(ids), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_open_clip_scores_every_position_and_cuts_text_alike(tmp_path: Path) -> None:
    reason = "open_clip is not installed (pip install open_clip_torch)"
    open_clip = pytest.importorskip("open_clip", reason=reason)
    from tokenizers import Tokenizer

    config = {
        "embed_dim": 24,
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": 32,
            "layers": 3,
            "width": 32,
            "head_width": 16,
            "patch_size": 8,
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 32,
            "heads": 2,
            "layers": 3,
        },
    }
    path, file = tmp_path / "tiny-clip.json", tmp_path / "tiny.pt"
    path.write_text(json.dumps(config), encoding="utf-8")
    open_clip.add_model_config(path)
    model = open_clip.create_model("tiny-clip").eval()
    noise = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(0, 0.15, generator=noise)
    torch.save(model.state_dict(), file)
    source = open_source(f"open_clip:{path}:{file}")
    tokenizer, ours = open_clip.get_tokenizer("tiny-clip"), Tokenizer.from_str(source.tokenizer)
    texts = ["A photo of a   cat's Red ball, 42!", "Äpfel \U0001f600 and “quotes”", "", "x" * 99]
    for text in texts:
        assert ours.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)
    ids = tokenizer(texts)
    x = model.transformer(
        model.token_embedding(ids) + model.positional_embedding, attn_mask=model.attn_mask
    )
    expected = model.ln_final(x) @ model.text_projection
    found = loaded(source)(ids)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    ends = found[torch.arange(len(ids)), ids.argmax(-1)]
    torch.testing.assert_close(ends, model.encode_text(ids), atol=1e-5, rtol=1e-5)
    projection = source.tensors.read("visual_projection.weight")
    assert np.array_equal(projection.t(), model.visual.proj)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("open_clip:ViT-B-32", PatchsieveError, "would be random"),
        ("nowhere at all", PatchsieveError, "no such checkpoint"),
    ],
)
def test_a_scorer_that_is_not_there_is_refused(source: str, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        open_source(source)


def test_an_absent_open_clip_is_named_with_its_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    with pytest.raises(BackendMissingError, match="pip install open_clip_torch"):
        open_source("open_clip")


def test_a_model_that_is_no_clip_is_refused(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "llava", "llama", layers=2)
    with pytest.raises(PatchsieveError, match="is no CLIP model"):
        open_source(str(checkpoint))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--method ivtp --num-keep 4", "add --scorer open_clip"),
        ("--method ivtp --num-keep 99", "change --num-keep"),
        ("--method ivtp --sites 3", "ivtp chooses its sites"),
        ("--method fastv --sites 1 --text all", "no such options"),
    ],
)
def test_the_command_line_says_what_mends_it(tmp_path: Path, words: str, message: str) -> None:
    checkpoint = save_checkpoint(tmp_path / "llava", "llama", layers=4)
    code, _, error = command("export", checkpoint, "-o", tmp_path / "b", *words.split())
    assert code == 2 and message in error.splitlines()[-1]
    assert not (tmp_path / "b").exists()


def test_a_bundle_whose_stages_do_not_give_the_queries_is_refused(tiny_bundle: Path) -> None:
    site = SitePlan(4, "ivtp", {"group": 2})
    with pytest.raises(PatchsieveError, match="do not give what ivtp at layer 4 reads"):
        reuse(tiny_bundle, Plan((site,), pseudo_cls=PseudoCls("all")), "late")


def test_words_cannot_be_compared_with_a_tower_without_a_class_token(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "siglip", "siglip", layers=4)
    words = ["export", checkpoint, "-o", tmp_path / "b", "--method", "ivtp", "--num-keep", "4"]
    code, _, error = command(*words)
    assert code == 2 and "no class token" in error and "--text all" in error
