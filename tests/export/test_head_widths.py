"""Heads of a width that no fused kernel takes give what Hugging Face gives, on every target."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from patchsieve.contract.manifest import Limits
from patchsieve.contract.plan import NO_PRUNING, Plan, SitePlan
from patchsieve.contract.targets import CHECKABLE
from patchsieve.export.exporter import ExportOptions, export
from patchsieve.runtime.model import Model
from patchsieve.runtime.ort.backend import OrtBackend
from tests.support.models import save_checkpoint
from tests.support.tiny_bundles import largest_error, pictures, recorded_logits
from tests.support.tolerances import LOWERED_FLOAT32

QUESTION = "What is on the table?"
FASTV = Plan((SitePlan(1, "fastv", {"keep_ratio": 0.5}),))
# Ten is no multiple of 8, and half of it is odd; the tower's heads are 33 wide.
WIDTHS = {"layers": 2, "vision_layers": 2, "vision_hidden": 66, "text": {"head_dim": 10}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("widths") / "checkpoint", **WIDTHS)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    out = checkpoint.with_name("bundle")
    options = ExportOptions(
        plan=FASTV, plan_name="fastv", targets=CHECKABLE, limits=Limits(64, 16, 1)
    )
    export(str(checkpoint), out, options)
    return out


@pytest.fixture(scope="module")
def hugging_face(checkpoint: Path) -> tuple[list[int], list[torch.Tensor]]:
    """Greedy tokens, and the logits [V] of each."""
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = LlavaForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(text=text, images=pictures(1), return_tensors="pt")
    said = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=8,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = said.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens, [logits[0].numpy() for logits in said.logits]


@pytest.mark.parametrize("target", CHECKABLE)
def test_heads_of_any_even_width_answer_as_hugging_face(
    bundle: Path, hugging_face, target: str
) -> None:
    model = Model(bundle, target=target, backend=lambda b: OrtBackend(b, threads=1, device="cpu"))
    logits = recorded_logits(model)
    found = model.generate(pictures(1), QUESTION, max_new_tokens=8, plan=NO_PRUNING)
    assert found.token_ids == hugging_face[0]
    assert largest_error(logits[: len(hugging_face[1])], hugging_face[1]) < LOWERED_FLOAT32
    pruned = model.generate(pictures(1), QUESTION, max_new_tokens=8, plan="fastv")
    assert len(pruned.sites[0].kept) == 8
    model.close()
