"""A conversation on one cache, turn by turn."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from patchsieve.errors import CapacityError, RequestError
from patchsieve.runtime.cache import Cache
from patchsieve.runtime.chat_template import Message
from patchsieve.runtime.detokenize import TextStream
from patchsieve.runtime.prompt import Prompt, expand
from patchsieve.runtime.result import Result, SiteResult
from patchsieve.runtime.rows import TEXT, Rows
from patchsieve.runtime.sampling import Sampler, SamplingOptions

if TYPE_CHECKING:
    from patchsieve.runtime.model import Model


@dataclass(frozen=True)
class _State:
    """What the cache holds, in tokens and words.

    Attributes:
        asked: The conversation when its last answer began.
        is_answer_cached: The tokens of that answer are in the cache, but for `pending`.
        pending: Tokens generated but not fed.
        history: All token ids, each image once.
        sites: Survivors of each image.
    """

    asked: tuple[Message, ...] = ()
    is_answer_cached: bool = True
    pending: tuple[int, ...] = ()
    history: tuple[int, ...] = ()
    sites: tuple[SiteResult, ...] = ()


@dataclass
class _Images:
    """Features of the conversation's images, for a new prefill."""

    features: list[np.ndarray] = field(default_factory=list)  # [N, C] each
    patch_ids: list[np.ndarray] = field(default_factory=list)  # [N] each


class Chat:
    """A conversation that continues from its cache.

    Visual tokens that the first question about an image chose stay chosen; `repick=True` prefills
    the whole conversation again, from the image features that are still here.

    Args:
        model: The loaded bundle.
        plan: Name of the plan to follow.
    """

    def __init__(self, model: Model, plan: str) -> None:
        self.model, self.plan = model, plan
        self.cache: Cache | None = model.take_cache(plan)
        self.messages: list[Message] = []
        self._images = _Images()
        self._state = _State()
        self._is_streaming = self._is_closed = False
        self._is_choice_lost = False  # an answer that chose again was interrupted

    def ask(self, prompt: str, image: Any = None, **options: Any) -> Result:
        """Ask, and wait for the whole answer. The options are those of `stream`."""
        result = Result()
        for _ in self.stream(prompt, image, result=result, **options):
            pass
        return result

    def stream(
        self,
        prompt: str,
        image: Any = None,
        *,
        repick: bool = False,
        raw: bool = False,
        result: Result | None = None,
        **sampling: Any,
    ) -> Iterator[str]:
        """Ask, and yield the answer as it comes.

        Args:
            prompt: The user's words; `<image>` places an image, otherwise images come first.
            image: One image, a list, or None.
            repick: Prefill again, so that this question chooses the visual tokens.
            raw: The prompt is the whole text, without a chat template; for a first turn.
            result: Filled at the end.
            **sampling: Fields of `SamplingOptions`.

        Yields:
            Pieces of text.

        Raises:
            RequestError: The images, the prompt or the options cannot be used; another answer is
                still being streamed; or the conversation or the model was closed, also midway.
            CapacityError: The turn does not fit what is reserved; the conversation stays as it was.
        """
        if self._is_streaming:
            raise RequestError(
                "an answer is still being streamed", do="finish or close it first, then ask"
            )
        self._is_streaming = True
        try:
            result = Result() if result is None else result
            with closing(self._turn(prompt, image, repick, raw, result, sampling)) as pieces:
                for piece in pieces:
                    yield piece
                    self._open_cache()  # whoever read the piece may have closed the conversation
        finally:
            self._is_streaming = False
            if self._is_closed:
                self._release()

    def _turn(
        self,
        prompt: str,
        image: Any,
        repick: bool,
        raw: bool,
        result: Result,
        sampling: dict[str, Any],
    ) -> Generator[str, None, None]:
        """One turn, whole or not at all."""
        start = time.perf_counter()
        result.plan = self.plan
        options = _options(sampling, self.model.facts.limits.max_new_tokens)
        cache = self._open_cache()
        sources = _as_list(image)
        pixels = self.model.preprocess(sources) if sources else None
        result.timings_ms["preprocess"] = _since(start)
        messages = list(self.messages)
        if not raw:
            messages.append(self.model.bundle.prompts.user_message(prompt, len(sources)))
        tokens, continues = self._tokenise(prompt, messages, len(sources), repick, raw, result)
        self._check_room(tokens, len(sources), options.max_new_tokens, continues)

        seen = len(self._images.features)
        mark: tuple[int, ...] | None = cache.mark()
        try:
            self._see(pixels, result)
            if not continues:
                mark = None
                self._is_choice_lost |= bool(self._state.sites)
                self._restart(cache)
            answer = _Answer(self, options, result, start)
            yield from answer.run(tokens, tuple(messages))
        except BaseException:
            del self._images.features[seen:], self._images.patch_ids[seen:]
            if mark is None:
                self._restart(cache)  # the next turn prefills what `messages` holds
            else:
                cache.rewind(mark)
            raise
        self._state, self._is_choice_lost = answer.state, False
        if not raw:
            said = [{"type": "text", "text": result.text}]
            self.messages = [*messages, {"role": "assistant", "content": said}]
        result.sites = list(self._state.sites)
        result.notes += [
            f"the budget of layer {site.layer} capped image {site.image}: "
            f"{site.num_wanted} tokens wanted, {len(site.kept)} kept"
            for site in result.sites
            if site.is_capped
        ]
        result.timings_ms["total"] = _since(start)

    def close(self) -> None:
        """Give the cache back for the next conversation.

        An answer that is still being streamed keeps it until its reader asks for the next piece,
        which is refused, or closes the stream.
        """
        self._is_closed = True
        if not self._is_streaming:
            self._release()

    def _release(self) -> None:
        if self.cache is not None:
            self.model.give_back(self.plan, self.cache)
            self.cache = None

    def _open_cache(self) -> Cache:
        self.model.check_open()
        if self.cache is None or self._is_closed:
            raise RequestError("this conversation is closed", do="start another")
        return self.cache

    def _tokenise(
        self,
        prompt: str,
        messages: list[Message],
        num_images: int,
        repick: bool,
        raw: bool,
        result: Result,
    ) -> tuple[Prompt, bool]:
        """Tokens to feed, and whether they continue what the cache holds."""
        prompts, state = self.model.bundle.prompts, self._state
        has_past = self._open_cache().position > 0
        if raw:
            if has_past or self.messages:
                raise RequestError(
                    "a raw prompt cannot continue a conversation", do="start another for it"
                )
            return prompts.build_raw(prompt, num_images), False
        if has_past and not self.messages:
            raise RequestError("a raw prompt cannot be continued", do="start another conversation")
        if has_past and not repick:
            suffix = prompts.continuation(
                state.asked, messages, is_answer_cached=state.is_answer_cached
            )
            if suffix is not None:
                return prompts.tokenize_suffix(suffix, messages), True
            result.notes.append("the chat template rewrites earlier turns: all was prefilled again")
        if self._is_choice_lost and not repick:
            result.notes.append(
                "the last answer was interrupted while it chose again: all was prefilled again"
            )
        if state.sites or self._is_choice_lost:
            result.selection = "repicked"
        return prompts.build(messages, len(self._images.features) + num_images), False

    def _check_room(
        self, tokens: Prompt, num_images: int, max_new_tokens: int, continues: bool
    ) -> None:
        """Refuse what does not fit, before anything is touched."""
        limits, cache = self.model.facts.limits, self._open_cache()
        images = len(tokens.image_positions)
        text = len(tokens.token_ids) - images + (len(self._state.pending) if continues else 0)
        total_images = len(self._images.features) + num_images
        for what, found, most, option in (
            ("new tokens", max_new_tokens, limits.max_new_tokens, "--max-new-tokens"),
            ("images", total_images, limits.max_images, "--max-images"),
            ("text tokens", text, limits.max_text_tokens, "--max-text-tokens"),
        ):
            if found > most:
                raise CapacityError(
                    f"the request has too many {what} for this bundle",
                    found=found,
                    expected=f"at most {most}",
                    do=f"shorten it, or export with a larger {option}",
                )
        budgets = self.model.facts.budgets(self.plan)
        for stage, budget in zip(cache.stages, budgets, strict=True):
            used = stage.length if continues else 0
            # The last new token is answered but never fed.
            needed = used + text + images * budget + max_new_tokens - 1
            if needed > stage.slots:
                raise CapacityError(
                    "the conversation is full",
                    found=f"{needed} rows needed with this turn",
                    expected=f"at most {stage.slots} in layers {stage.stage.first} to "
                    f"{stage.stage.last - 1}",
                    do="start another, ask for fewer new tokens, or export with a larger "
                    "--max-text-tokens",
                )

    def _see(self, pixels: np.ndarray | None, result: Result) -> None:
        start = time.perf_counter()
        if pixels is not None:
            features, ids = self.model.pipeline.see(pixels)
            self._images.features += list(features)
            self._images.patch_ids += list(ids)
        result.timings_ms["vision"] = _since(start)

    def _restart(self, cache: Cache) -> None:
        cache.rewind((0,) * len(cache.mark()))
        self._state = _State()


class _Answer:
    """Prefill and decode of one turn; `state` is what the cache holds at the end."""

    def __init__(self, chat: Chat, options: SamplingOptions, result: Result, start: float) -> None:
        self.chat, self.options, self.result, self.start = chat, options, result, start
        self.model, self.cache = chat.model, chat._open_cache()
        self.tokens = chat.model.facts.tokens
        self.rng = np.random.default_rng(options.seed)
        self.state = chat._state

    def run(self, prompt: Prompt, asked: tuple[Message, ...]) -> Iterator[str]:
        """Yield the answer's text as it comes."""
        result, before = self.result, self.state
        logits = self._prefill(prompt)
        prompt_mark = self.cache.mark()
        sampler = Sampler(self.options, self.tokens.eos_token_ids)
        stream = TextStream(self.model.bundle.prompts.tokenizer, self.options.stop)
        history = [*before.history, *before.pending, *prompt.token_ids.tolist()]
        decode_ms: list[float] = []
        while True:
            token = sampler.next_token(logits, history + result.token_ids)
            result.token_ids.append(token)
            if len(result.token_ids) == 1:
                result.timings_ms["ttft"] = _since(self.start)
            if sampler.is_eos(token):
                result.finish_reason = "eos"
                break
            if piece := stream.push(token):
                yield piece
            if stream.stopped:
                result.finish_reason = "stop"
                break
            if len(result.token_ids) == self.options.max_new_tokens:
                break
            step = time.perf_counter()
            logits = self.model.pipeline.decode(token, self.cache)
            decode_ms.append(_since(step))
        if piece := stream.finish():
            yield piece
        result.text = stream.text
        result.timings_ms["decode_per_token"] = float(np.median(decode_ms)) if decode_ms else None
        result.timings_ms["decode_steps"] = decode_ms
        result.kv_bytes = self.cache.kv_bytes()
        self._settle(asked, history, prompt_mark)

    def _prefill(self, prompt: Prompt) -> np.ndarray:
        chat, result, facts = self.chat, self.result, self.model.facts
        num_visual = facts.vision.num_visual
        rows, hidden = self._rows(prompt, num_visual)
        visual = int((rows.image != TEXT).sum())
        done = self.model.pipeline.prefill(hidden, rows, self.cache, chat.plan, self.rng)
        sites = (*self.state.sites, *done.sites)
        if sites and result.selection == "none":
            result.selection = "picked" if done.sites else "kept"
        self.state = _State(sites=sites)
        result.prompt_tokens, result.visual_tokens = len(rows), visual
        result.timings_ms |= {
            "prefill": sum(done.stage_ms),
            "decide": sum(done.decide_ms),
            "prefill_per_stage": done.stage_ms,
            "decide_per_site": done.decide_ms,
        }
        return done.logits

    def _rows(self, prompt: Prompt, num_visual: int) -> tuple[Rows, np.ndarray]:
        """Rows to feed and their embeddings, [1, L0, C]: pending tokens, then the prompt."""
        chat, pending = self.chat, self.state.pending
        whole = expand(prompt, num_visual)
        ahead = len(pending)
        count = ahead + len(whole.token_ids)
        image, patch_ids = np.full(count, TEXT), np.full(count, -1)
        is_instruction = np.zeros(count, bool)
        is_instruction[ahead + whole.instruction_rows] = True
        token_ids = np.concatenate((np.array(pending, np.int64), whole.token_ids))
        # The image token's own embedding is never used, and its id may lie outside the table.
        is_visual = np.concatenate((np.zeros(ahead, bool), whole.image_index >= 0))
        hidden = chat.model.bundle.embed(np.where(is_visual, 0, token_ids))  # [L0, C]
        first = len(chat._images.features) - len(whole.image_spans)
        for number, (begin, end) in enumerate(whole.image_spans, first):
            span = slice(ahead + begin, ahead + end)
            hidden[span] = chat._images.features[number]
            image[span], patch_ids[span] = number, chat._images.patch_ids[number]
        positions = self.cache.position + np.arange(count)
        return Rows(positions, image, patch_ids, is_instruction), hidden[None]

    def _settle(
        self,
        asked: tuple[Message, ...],
        history: list[int],
        prompt_mark: tuple[int, ...],
    ) -> None:
        """Note what the cache holds, for the next turn."""
        reason, said = self.result.finish_reason, tuple(self.result.token_ids)
        pending: tuple[int, ...] = ()
        if reason == "stop":
            # The text ends inside a token: the next turn feeds the answer again, from its text.
            self.cache.rewind(prompt_mark)
            said = ()
        elif reason == "eos":
            said = said[:-1]  # never fed; the template writes it where it belongs
        else:
            said, pending = said[:-1], said[-1:]
        self.state = _State(
            asked=asked,
            is_answer_cached=reason != "stop",
            pending=pending,
            history=(*history, *said),
            sites=self.state.sites,
        )


def _options(sampling: dict[str, Any], most: int) -> SamplingOptions:
    """Options of a request; without a number of new tokens, the usual or what is reserved."""
    known = [option.name for option in fields(SamplingOptions)]
    unknown = [name for name in sampling if name not in known]
    if unknown:
        raise RequestError(
            "unknown option of a request", found=", ".join(unknown), expected=", ".join(known)
        )
    usual = min(SamplingOptions.max_new_tokens, most)
    return SamplingOptions(**{"max_new_tokens": usual} | sampling)


def _as_list(image: Any) -> list[Any]:
    if image is None:
        return []
    return list(image) if isinstance(image, (list, tuple)) else [image]


def _since(start: float) -> float:
    return (time.perf_counter() - start) * 1e3
