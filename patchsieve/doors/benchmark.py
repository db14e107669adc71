"""Requests of a benchmark, answered by a bundle.

Knows the words in which lmms-eval's tasks say how to generate, and not lmms-eval itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from patchsieve.contract.errors import CapacityError, PatchsieveError, RequestError
from patchsieve.doors.account import Account
from patchsieve.runtime.model import Model
from patchsieve.runtime.result import Result

_FOLLOWED = {
    "max_new_tokens",
    "until",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "min_new_tokens",
    "num_beams",
}
_AS_THEY_ARE = (*("top_k", "top_p", "repetition_penalty"), "no_repeat_ngram_size", "min_new_tokens")
OVERSIZED = ("refuse", "empty")


@dataclass(frozen=True)
class Request:
    """One question of a task.

    Attributes:
        task: Its name.
        doc: Which of its documents.
        prompt: The words; a placeholder per image, or none: then the images come first.
        arguments: What the task says of the answer's generation.
    """

    task: str
    doc: object
    prompt: str
    arguments: Mapping[str, Any]

    @property
    def where(self) -> str:
        """What an error calls it."""
        return f"question {self.doc} of {self.task}"


@dataclass
class Benchmark:
    """A loaded bundle that answers requests and keeps account of them.

    Args:
        model: The bundle.
        plan: Which of its plans; None for its default.
        max_new_tokens: Most tokens of an answer, where a task allows more; None for no such bound.
        oversized: "refuse" questions that do not fit the bundle, or answer "empty" and count them.
        seed: Of the first sampled answer; the next takes the next number.
    """

    model: Model
    plan: str | None = None
    max_new_tokens: int | None = None
    oversized: str = "refuse"
    seed: int = 0
    accounts: dict[str, Account] = field(default_factory=dict)
    not_followed: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Refuse what no request could use."""
        limit = self.model.facts.limits.max_new_tokens
        if self.oversized not in OVERSIZED:
            raise RequestError(
                "questions that do not fit the bundle cannot be treated so",
                found=f"oversized={self.oversized}",
                expected=" or ".join(OVERSIZED),
                do="correct oversized in --model_args",
            )
        if self.max_new_tokens is not None and not 0 < self.max_new_tokens <= limit:
            raise RequestError(
                "the bundle cannot hold answers of this length",
                found=f"max_new_tokens={self.max_new_tokens}",
                expected=f"1 to {limit}",
                do="correct max_new_tokens in --model_args, or export with --max-new-tokens",
            )
        self.model.chat(plan=self.plan).close()  # refuses an unknown plan

    def check(self, requests: Sequence[Request]) -> None:
        """Refuse before the first answer what can be known then: hours may lie before the last.

        Raises:
            RequestError: An argument cannot be followed, or a prompt is none.
            CapacityError: An answer or a text is longer than the bundle reserves.
        """
        for request in requests:
            with _naming(request):
                self.options(request.arguments)
                self._check_text(request.prompt)

    def answer(self, request: Request, images: Sequence[Any]) -> Result:
        """Answer one request; an image is whatever `Model.generate` takes.

        Raises:
            PatchsieveError: What `Model.generate` refuses, with the question's name in front.
        """
        account = self.accounts.setdefault(request.task, Account())
        with _naming(request):
            options = self.options(request.arguments)
            try:
                result = self.model.generate(
                    list(images), request.prompt, plan=self.plan, seed=self.seed, **options
                )
            except CapacityError:
                if self.oversized == "refuse":
                    raise
                account.questions += 1
                account.unanswered += 1
                return Result()
        self.seed += options["temperature"] > 0
        account.add(self.model.facts, result)
        return result

    def options(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """What a task says of generation, as `Model.generate` takes it.

        A task that names no length gets what the bundle reserves. `do_sample` decides, as in
        Hugging Face; where it is absent, a temperature above 0 does.

        Raises:
            RequestError: The task wants a search over several beams.
            CapacityError: It wants longer answers than the bundle reserves.
        """
        told = {key: value for key, value in arguments.items() if value is not None}
        self.not_followed |= set(told) - _FOLLOWED
        if told.get("num_beams", 1) != 1:
            raise RequestError(
                "a bundle does not search over several beams",
                found=f"num_beams {told['num_beams']}",
                expected="1",
                do="set num_beams to 1 in --gen_kwargs",
            )
        limit = self.model.facts.limits.max_new_tokens
        most = told.get("max_new_tokens", limit)
        if self.max_new_tokens is not None:
            most = min(most, self.max_new_tokens)
        if most > limit:
            raise CapacityError(
                "the task's answers are longer than this bundle reserves",
                found=f"max_new_tokens {most}",
                expected=f"at most {limit}",
                do=f"export with --max-new-tokens {most}, or bound them by max_new_tokens={limit} "
                "in --model_args",
            )
        temperature = told.get("temperature", 1.0 if told.get("do_sample") else 0.0)
        options: dict[str, Any] = {
            "max_new_tokens": most,
            "temperature": temperature if told.get("do_sample", True) else 0.0,
        }
        if stop := _stop(told.get("until", ())):
            options["stop"] = stop  # without, an answer ends at the checkpoint's own stop strings
        return options | {key: told[key] for key in _AS_THEY_ARE if key in told}

    def _check_text(self, text: str) -> None:
        """The text must fit, whatever images come."""
        if self.oversized == "empty" or not text.strip():
            return
        prompts, limit = self.model.bundle.prompts, self.model.facts.limits.max_text_tokens
        images = text.count(prompts.image_token)
        prompt = prompts.build([prompts.user_message(text, images)], images)
        found = len(prompt.token_ids) - images
        if found > limit:
            raise CapacityError(
                "the request has too many text tokens for this bundle",
                found=found,
                expected=f"at most {limit}",
                do=f"export with --max-text-tokens {found}, or leave such questions empty by "
                "oversized=empty in --model_args",
            )

    def total(self) -> Account:
        """All tasks together."""
        return sum(self.accounts.values(), Account())


def load(
    bundle: str | Path,
    *,
    plan: str | None = None,
    target: str = "auto",
    threads: int | None = None,
    **options: Any,
) -> Benchmark:
    """Load a bundle for a benchmark; the options are those of `Benchmark`."""
    return Benchmark(Model(bundle, target=target, threads=threads), plan, **options)


def _stop(until: object) -> tuple[str, ...]:
    """Stop strings; lmms-eval writes one as a string, and none as an empty one."""
    texts = (until,) if isinstance(until, str) else until
    if not isinstance(texts, (list, tuple)):
        raise RequestError(
            "the task's until holds no stop strings",
            found=repr(until),
            expected="a string or a list of them",
            do="correct until in the task or in --gen_kwargs",
        )
    return tuple(text for text in texts if text)


@contextmanager
def _naming(request: Request) -> Iterator[None]:
    """Put the question's name in front of an error."""
    try:
        yield
    except PatchsieveError as error:
        raise error.at(request.where) from error
