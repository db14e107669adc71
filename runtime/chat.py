"""A conversation on one cache, turn by turn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from patchsieve.contract.errors import RequestError
from patchsieve.runtime.answer import Answer
from patchsieve.runtime.cache import Cache
from patchsieve.runtime.conversation import Images, State
from patchsieve.runtime.inputs.chat_template import Content, Message
from patchsieve.runtime.inputs.prompt import Prompt
from patchsieve.runtime.loaded import Loaded
from patchsieve.runtime.result import Result, since
from patchsieve.runtime.room import Need, check_limits, check_room
from patchsieve.runtime.sampling_options import options_of
from patchsieve.runtime.turn import Turn


class Asked(NamedTuple):
    """A question, read and found to fit.

    Attributes:
        messages: The conversation with it; a raw prompt is no part of one.
        prompt: Tokens to feed, each image still one of them.
        continues: They continue what the cache holds; otherwise the cache is emptied first.
        pixels: Its new images [B, 3, h, w], or None.
    """

    messages: tuple[Message, ...]
    prompt: Prompt
    continues: bool
    pixels: np.ndarray | None


class Chat:
    """A conversation that continues from its cache.

    Visual tokens that the first question about an image chose stay chosen; `repick=True` prefills
    the whole conversation again, from the image features that are still here.

    Args:
        model: The loaded bundle.
        plan: Name of the plan to follow.
        system: What the conversation begins with, where the chat template places it; it never
            judges visual tokens.

    Raises:
        RequestError: The template has no place for a system prompt, or it is no text.
    """

    def __init__(self, model: Loaded, plan: str, system: Content | None = None) -> None:
        self.model, self.plan = model, plan
        begin = [] if system is None else [model.bundle.prompts.system_message(system)]
        self.messages: list[Message] = begin
        self._has_system = system is not None
        self.cache: Cache | None = model.take_cache(plan)
        self._images = Images()
        self._state = State()
        self._is_streaming = self._is_closed = False
        self._is_choice_lost = False  # an answer that chose again was interrupted

    def ask(self, prompt: Content, image: Any = None, **options: Any) -> Result:
        """Ask, and wait for the whole answer. The options are those of `stream`."""
        result = Result()
        for _ in self.stream(prompt, image, result=result, **options):
            pass
        return result

    def stream(
        self,
        prompt: Content,
        image: Any = None,
        *,
        repick: bool = False,
        raw: bool = False,
        scores: bool = False,
        result: Result | None = None,
        **sampling: Any,
    ) -> Iterator[str]:
        """Ask, and yield the answer as it comes.

        Args:
            prompt: The user's words; `<image>` places an image, otherwise images come first. Or the
                parts of a message, as chat templates take them.
            image: One image, a list, or None.
            repick: Prefill again, so that this question chooses the visual tokens.
            raw: The prompt is the whole text, without a chat template; for a first turn.
            scores: Bring the scores of this turn's decisions into its result's sites.
            result: Filled at the end.
            **sampling: Fields of `SamplingOptions`; they override what the bundle asks.

        Raises:
            RequestError: The images, the prompt or the options cannot be used; another answer is
                still being streamed; or the conversation or the model was closed, also midway.
            CapacityError: The turn does not fit what is reserved; the conversation is unchanged.
        """
        with self._one_at_a_time():
            turn = self._turn(scores, result, sampling)
            asked = self._read(prompt, image, repick, raw, turn)
            with self._whole_or_not_at_all():
                self._see(asked.pixels, turn)
                if not asked.continues:
                    self._begin_again()
                answer = Answer(self.model, self._open_cache(), self._state, self._images, turn)
                for piece in answer.pieces(asked.prompt, asked.messages):
                    yield piece
                    self._open_cache()  # whoever read the piece may have closed the conversation
            self._settle(answer.state, asked.messages, turn, raw)

    @contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        """Refuse a second answer while one is streamed: both would write into one cache."""
        if self._is_streaming:
            raise RequestError(
                "an answer is still being streamed", do="finish or close it first, then ask"
            )
        self._is_streaming = True
        try:
            yield
        finally:
            self._is_streaming = False
            if self._is_closed:
                self._release()

    def _turn(self, scores: bool, result: Result | None, sampling: dict[str, Any]) -> Turn:
        start = perf_counter()
        result = Result() if result is None else result
        result.plan = self.plan
        return Turn(self.plan, options_of(sampling, self.model.facts), result, scores, start)

    def _read(self, prompt: Content, image: Any, repick: bool, raw: bool, turn: Turn) -> Asked:
        """Read a question and its images; refuse what does not fit, before anything is touched."""
        cache, facts, num_before = self._open_cache(), self.model.facts, len(self._images.features)
        sources = _as_list(image)
        pixels = self.model.preprocess(sources) if sources else None
        turn.result.timings_ms["preprocess"] = since(turn.start)
        messages = list(self.messages)
        if not raw:
            messages.append(self.model.bundle.prompts.user_message(prompt, len(sources)))
            tokens, continues = self._render(messages, num_before + len(sources), repick, turn)
        else:
            tokens, continues = self._raw(prompt, len(sources)), False
        need = Need(
            text=tokens.num_text + (len(self._state.pending) if continues else 0),
            images=len(tokens.image_positions),
            all_images=num_before + len(sources),
            new_tokens=turn.options.max_new_tokens,
        )
        check_limits(need, facts.limits)
        check_room(need, facts, self.plan, cache, continues)
        return Asked(tuple(messages), tokens, continues, pixels)

    def _raw(self, prompt: Content, num_images: int) -> Prompt:
        """Tokens of a raw prompt, which neither follows a turn nor a system prompt."""
        if self._has_system:
            raise RequestError(
                "a raw prompt takes no system prompt", do="write it into the raw prompt"
            )
        if self._open_cache().position > 0 or self.messages:
            raise RequestError(
                "a raw prompt cannot continue a conversation", do="start another for it"
            )
        return self.model.bundle.prompts.build_raw(prompt, num_images)

    def _render(
        self, messages: list[Message], num_images: int, repick: bool, turn: Turn
    ) -> tuple[Prompt, bool]:
        """Tokens to feed, and whether they continue what the cache holds.

        Args:
            messages: The conversation with the question.
            num_images: Images in all of it.
            repick: The question must choose visual tokens.
            turn: Its result takes a note where all is prefilled again.
        """
        prompts, state, result = self.model.bundle.prompts, self._state, turn.result
        has_past = self._open_cache().position > 0
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
        return prompts.build(messages, num_images), False

    @contextmanager
    def _whole_or_not_at_all(self) -> Iterator[None]:
        """Leave the conversation as it was if its turn fails or is interrupted.

        The rows of a turn that has begun again are gone for good: then the next turn prefills what
        `messages` holds, from image features that are still here.
        """
        cache, before, num_images = self._open_cache(), self._state, len(self._images.features)
        mark = cache.mark()
        try:
            yield
        except BaseException:
            self._images.forget(num_images)
            if self._state is before:
                cache.rewind(mark)
            else:
                cache.empty()
            raise

    def _settle(
        self, state: State, messages: tuple[Message, ...], turn: Turn, is_raw: bool
    ) -> None:
        """Take over what a whole turn left, and complete its result."""
        result = turn.result
        self._state, self._is_choice_lost = state, False
        if not is_raw:
            said = [{"type": "text", "text": result.text}]
            self.messages = [*messages, {"role": "assistant", "content": said}]
        result.images, result.sites = list(self._images.reduced), list(state.sites)
        result.notes += [
            f"the vision graph's bound capped image {one.image}: "
            f"{one.num_wanted} tokens wanted, {len(one.ids)} kept"
            for one in result.images
            if one.is_capped
        ]
        result.notes += [
            f"the budget of layer {site.layer} capped image {site.image}: "
            f"{site.num_wanted} tokens wanted, {len(site.kept)} kept"
            for site in result.sites
            if site.is_capped
        ]
        result.timings_ms["total"] = since(turn.start)

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

    def _see(self, pixels: np.ndarray | None, turn: Turn) -> None:
        """Run the tower over new images, and keep what it gives for a new prefill."""
        start, images = perf_counter(), self._images
        if pixels is not None:
            for seen in self.model.pipeline.see(pixels, turn.plan, turn.noise):
                images.add(seen)
        turn.result.timings_ms["vision"] = since(start)

    def _begin_again(self) -> None:
        """Empty the cache, so that the whole conversation is prefilled."""
        self._is_choice_lost |= bool(self._state.sites)
        self._state = State()
        self._open_cache().empty()


def _as_list(image: Any) -> list[Any]:
    if image is None:
        return []
    return list(image) if isinstance(image, (list, tuple)) else [image]
