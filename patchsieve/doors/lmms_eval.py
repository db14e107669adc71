"""A bundle as a model of lmms-eval: `lmms-eval --model patchsieve --model_args bundle=DIR`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger
from tqdm import tqdm

from patchsieve.contract.errors import RequestError
from patchsieve.doors.benchmark import Request, load

_ARGUMENTS = "bundle, plan, target, threads, max_new_tokens, oversized, seed"


class PatchsieveModel(lmms):
    """A bundle that answers the tasks of lmms-eval, one question at a time.

    Args:
        bundle: The bundle's directory.
        plan: Which of its plans; its default otherwise.
        target: What to run it as.
        threads: Threads of the CPU backend.
        max_new_tokens: Most tokens of an answer, where a task allows more.
        oversized: "refuse" questions that do not fit the bundle, or answer "empty" and count them.
        seed: Of sampled answers.
        batch_size: lmms-eval's; 1 or auto.
        device: lmms-eval's; `target` decides instead.
        unknown: Refused.
    """

    is_simple = True  # prompts as text beside their images, as LLaVA's marks were measured

    def __init__(
        self,
        bundle: str | None = None,
        plan: str | None = None,
        target: str = "auto",
        threads: int | None = None,
        max_new_tokens: int | None = None,
        oversized: str = "refuse",
        seed: int = 0,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if bundle is None or unknown:
            raise RequestError(
                "--model_args cannot be used",
                found=", ".join(unknown) or "no bundle",
                expected=f"bundle=DIR, and of {_ARGUMENTS}",
                do="correct --model_args",
            )
        if str(batch_size) not in ("1", "auto"):
            raise RequestError(
                "a bundle answers one question at a time",
                found=f"--batch_size {batch_size}",
                expected="1",
                do="set --batch_size 1",
            )
        if target in ("auto", "cpu") and str(device or "cpu") != "cpu":
            raise RequestError(
                "--device does not choose where a bundle runs",
                found=device,
                do="remove it, and name the target: --model_args ...,target=tensorrt",
            )
        self.benchmark = load(
            str(bundle),
            plan=None if plan is None else str(plan),  # lmms-eval reads plan=50 as a number
            target=target,
            threads=threads,
            max_new_tokens=max_new_tokens,
            oversized=oversized,
            seed=seed,
        )

    @property
    def device(self) -> torch.device:
        """Where lmms-eval counts requests of several processes; no model lies there."""
        return torch.device("cpu")

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answer every request, in order.

        Raises:
            PatchsieveError: A request cannot be used: before the first answer where that can be
                known then.
        """
        asked = [
            Request(instance.args[4], instance.args[3], instance.args[0], instance.args[1])
            for instance in requests
        ]
        self.benchmark.accounts.clear()  # lmms-eval sums up what each call tells
        self.benchmark.check(asked)
        if self.benchmark.not_followed:
            logger.warning(
                "patchsieve does not follow these generation arguments: "
                + ", ".join(sorted(self.benchmark.not_followed))
            )
        answers = []
        pairs = zip(requests, asked, strict=True)
        for instance, request in tqdm(
            pairs, total=len(asked), desc="patchsieve", disable=self.rank != 0
        ):
            result = self.benchmark.answer(request, self._images(instance))
            counts = TokenCounts(result.prompt_tokens, len(result.token_ids))
            answers.append(GenerationResult(result.text, counts))
        self._tell()
        return answers

    def _images(self, instance: Instance) -> list[Any]:
        _, _, doc_to_visual, doc, task, split = instance.args
        return list(doc_to_visual(self.task_dict[task][split][doc]) or [])

    def _tell(self) -> None:
        """Log what the answers took; the means come into lmms-eval's results too."""
        for task, account in self.benchmark.accounts.items():
            logger.info(f"{task}: {account.sentence()}")
        total = self.benchmark.total()
        plan = self.benchmark.plan or self.benchmark.model.facts.default_plan
        logger.info(
            "patchsieve "
            + json.dumps(
                {
                    "plan": plan,
                    "tasks": {task: own.means() for task, own in self.benchmark.accounts.items()},
                }
            )
        )
        log_metrics(
            total_elapsed_time=total.seconds,
            total_gen_tokens=total.new_tokens,
            avg_speed=total.new_tokens / total.seconds if total.seconds else 0.0,
            additional_metrics={"num_requests": total.questions, **total.means()},
        )

    def loglikelihood(self, requests: Sequence[Instance]) -> NoReturn:
        """Refuse: bundles give answers, not the likelihood of given ones."""
        _refuse("loglikelihood", requests, "a task of the kind generate_until")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> NoReturn:
        """Refuse: rounds whose prompts depend on answers are not followed."""
        _refuse("generate_until_multi_round", requests, "a task of the kind generate_until")

    def clean(self) -> None:
        """Give back the bundle's memory before the answers are judged."""
        self.benchmark.model.close()
        super().clean()


def _refuse(kind: str, requests: Sequence[Instance], expected: str) -> NoReturn:
    tasks = sorted({str(instance.task_name) for instance in requests})
    raise RequestError(
        f"patchsieve cannot answer requests of the kind {kind}",
        found=", ".join(tasks),
        expected=expected,
        do="remove these tasks",
    )
