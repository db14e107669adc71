"""What the answers to a benchmark took: visual tokens and KV bytes, beside those of no pruning."""

from __future__ import annotations

from dataclasses import dataclass

from patchsieve.contract.manifest import Manifest
from patchsieve.contract.plan import NO_PRUNING
from patchsieve.evaluation.answers import mean_visual_tokens
from patchsieve.runtime.result import Result


@dataclass
class Account:
    """What the answers to one task took, in sums.

    Attributes:
        questions: How many were asked.
        shown: Those with an image, over which visual tokens are averaged.
        visual_tokens: Of an answer: averaged over the decoder's layers, all images together.
        visual_tokens_full: The same with nothing pruned.
        kv_bytes: Used at the end of an answer.
        kv_bytes_full: The same with nothing pruned.
        new_tokens: Generated.
        seconds: Spent on answers.
        cut: Answers that ended because they reached their most tokens.
        unanswered: Questions that do not fit the bundle; their answer is empty.
    """

    questions: int = 0
    shown: int = 0
    visual_tokens: float = 0.0
    visual_tokens_full: int = 0
    kv_bytes: int = 0
    kv_bytes_full: int = 0
    new_tokens: int = 0
    seconds: float = 0.0
    cut: int = 0
    unanswered: int = 0

    def add(self, facts: Manifest, result: Result) -> None:
        """Count one answer."""
        # Without a plan before the decoder `images` is empty, and all have one number of tokens.
        images = len(result.images) or result.visual_tokens // facts.num_visual(result.plan)
        full = images * facts.num_visual(NO_PRUNING)
        rows = result.prompt_tokens - result.visual_tokens + full + len(result.token_ids) - 1
        self.questions += 1
        self.shown += images > 0
        self.visual_tokens += mean_visual_tokens(facts, result)
        self.visual_tokens_full += full
        self.kv_bytes += result.kv_bytes["used"]
        self.kv_bytes_full += rows * sum(facts.row_bytes(stage) for stage in facts.stages)
        self.new_tokens += len(result.token_ids)
        self.seconds += result.timings_ms["total"] / 1e3
        self.cut += result.finish_reason == "length"

    def __add__(self, other: Account) -> Account:
        """Both together."""
        return Account(**{key: value + vars(other)[key] for key, value in vars(self).items()})

    def means(self) -> dict[str, float]:
        """Per answer, and what a reader of marks must know of."""
        answered = max(self.questions - self.unanswered, 1)
        shown = max(self.shown, 1)
        return {
            "visual_tokens": self.visual_tokens / shown,
            "visual_tokens_unpruned": self.visual_tokens_full / shown,
            "kv_bytes": self.kv_bytes / answered,
            "kv_bytes_unpruned": self.kv_bytes_full / answered,
            "answers_cut": self.cut,
            "unanswered": self.unanswered,
        }

    def sentence(self) -> str:
        """The same for the eye."""
        means = self.means()
        said = (
            f"{self.questions} questions; {means['visual_tokens']:.1f} visual tokens per layer, "
            f"{means['visual_tokens_unpruned']:.1f} unpruned; KV {means['kv_bytes'] / 1e6:.2f} MB, "
            f"{means['kv_bytes_unpruned'] / 1e6:.2f} MB unpruned"
        )
        if self.cut:
            said += f"; {self.cut} answers reached their most tokens"
        if self.unanswered:
            said += f"; {self.unanswered} did not fit the bundle and count as empty answers"
        return said
