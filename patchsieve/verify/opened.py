"""Both sides of `verify` opened, and the request that both are given."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from patchsieve.contract import files, names
from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.graphs import STAGE, STEP
from patchsieve.contract.targets import CHECKABLE
from patchsieve.runtime.backend import Backend
from patchsieve.runtime.bundle import Bundle
from patchsieve.runtime.inputs.images import load_image
from patchsieve.runtime.inputs.prompt import Prompt
from patchsieve.runtime.model import Model
from patchsieve.runtime.ort.backend import OrtBackend
from patchsieve.runtime.result import Result
from patchsieve.runtime.sampling_options import PLAIN
from patchsieve.runtime.target import AUTO, Choice, choose
from patchsieve.verify import reference as hf
from patchsieve.verify.allowed import Allowed
from patchsieve.verify.low import Low
from patchsieve.verify.parts import TOLERANCE, allowed_error
from patchsieve.verify.recorder import Recorder


class Opened:
    """A bundle and its checkpoint.

    Args:
        bundle: The bundle's directory.
        checkpoint: A directory or a hub id.
        target: Which of the bundle's graphs, or "auto"; they run in ONNX Runtime on the CPU.
        threads: Of the bundle's backend.
        revision: Branch, tag or commit of a hub id; None for its main branch.

    Attributes:
        choice: The target, and why "auto" took it.
        low: What is compared more where matrices are rounded to int8 or int4; None elsewhere.
    """

    def __init__(
        self,
        bundle: Path,
        checkpoint: str,
        *,
        target: str = AUTO,
        threads: int | None = None,
        revision: str | None = None,
    ) -> None:
        self.choice = Choice(target)
        if target == AUTO:
            self.choice = choose(bundle, files.read(bundle), among=CHECKABLE)
            target = self.choice.target
        if target not in CHECKABLE:
            raise PatchsieveError(
                "verify cannot run this target: it runs graphs in ONNX Runtime",
                found=target,
                expected=", ".join(CHECKABLE),
                do="choose one of these with --target",
            )

        def recorder(opened: Bundle) -> Backend:
            facts = opened.manifest
            graphs = {facts.vision_graph(plan) for plan in facts.plans}
            graphs |= {name for name, graph in facts.graphs.items() if graph.kind in (STAGE, STEP)}
            self.allowed = Allowed(facts, opened.place.file)
            is_low = bool(self.allowed.formats)
            models = {graph: hf.tapped(opened.graph_path(graph), is_low) for graph in graphs}
            backend = OrtBackend(opened, threads=threads, models=models, device="cpu")
            self.recorder = Recorder(backend, keeps_steps=is_low)
            return self.recorder

        self.model = Model(bundle, target=target, backend=recorder)
        self.facts = self.model.facts
        self.reference = hf.Reference(checkpoint, revision)
        self._check_shapes(checkpoint)
        self.tolerance = allowed_error(self.facts)
        self.is_exact = self.tolerance == TOLERANCE["float32"]
        self.low: Low | None = None
        if self.allowed.formats:
            self.low = Low(self.reference, self.allowed, self.recorder, self.facts)

    def close(self) -> None:
        """Give back memory."""
        self.model.close()

    def _answer(
        self, images: list[Any], prompt: str, plan: str, raw: bool, count: int
    ) -> tuple[Result, str]:
        """The bundle's answer, or why it gave none although its graphs ran."""
        result = Result()
        options: dict[str, Any] = {"raw": raw, "max_new_tokens": count, "ignore_eos": True} | PLAIN
        answer = self.model.stream(images, prompt, plan=plan, result=result, **options)
        try:
            deque(answer, maxlen=0)
            return result, ""
        except PatchsieveError as error:
            if names.LOGITS not in self.recorder.values:
                raise
            return result, str(error)

    def _hf_inputs(self, images: list[Any], prompt: str, raw: bool) -> dict[str, np.ndarray]:
        message = self.model.bundle.prompts.user_message(prompt, len(images))
        pictures = [load_image(image) for image in images]
        return self.reference.inputs(pictures, prompt if raw else [dict(message)])

    def _prompt(self, prompt: str, num_images: int, raw: bool) -> Prompt:
        """The prompt that the bundle feeds, each image still one token."""
        prompts = self.model.bundle.prompts
        if raw:
            return prompts.build_raw(prompt, num_images)
        return prompts.build([prompts.user_message(prompt, num_images)], num_images)

    def _check_shapes(self, checkpoint: str) -> None:
        """Refuse another model's checkpoint at once."""
        text = self.reference.config.text_config
        ours: dict[str, Any] = {
            "hidden_size": self.facts.text.hidden_size,
            "num_hidden_layers": self.facts.text.num_layers,
            "vocab_size": self.facts.text.vocab_size,
            "num_attention_heads": self.facts.text.num_heads,
        }
        theirs = {name: getattr(text, name) for name in ours}
        ours["rotary_sections"] = list(self.facts.text.rotary_sections)
        theirs["rotary_sections"] = list(self.reference.sections)
        if ours != theirs:
            raise PatchsieveError(
                f"the bundle was not made from {checkpoint}",
                found=ours,
                expected=theirs,
                do="name the bundle's own checkpoint with --against",
            )
