"""A conversation on one cache, turn by turn."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np

from patchsieve.contract.errors import CapacityError, RequestError
from patchsieve.contract.manifest import Manifest
from patchsieve.runtime.answer import Answer
from patchsieve.runtime.cache import Cache
from patchsieve.runtime.conversation import Images, State
from patchsieve.runtime.inputs.chat_template import Message
from patchsieve.runtime.inputs.prompt import Content, Prompt
from patchsieve.runtime.result import ImageResult, Result, since
from patchsieve.runtime.sampling import SamplingOptions
from patchsieve.runtime.turn import Turn

if TYPE_CHECKING:
    from patchsieve.runtime.model import Model


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

    def __init__(self, model: Model, plan: str, system: Content | None = None) -> None:
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
            **sampling: Fields of `SamplingOptions`; they go before what the bundle asks.

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
            with closing(
                self._turn(prompt, image, repick, raw, scores, result, sampling)
            ) as pieces:
                for piece in pieces:
                    yield piece
                    self._open_cache()  # whoever read the piece may have closed the conversation
        finally:
            self._is_streaming = False
            if self._is_closed:
                self._release()

    def _turn(
        self,
        prompt: Content,
        image: Any,
        repick: bool,
        raw: bool,
        scores: bool,
        result: Result,
        sampling: dict[str, Any],
    ) -> Generator[str, None, None]:
        """One turn, whole or not at all."""
        start = time.perf_counter()
        result.plan = self.plan
        options = _options(sampling, self.model.facts)
        turn = Turn(self.plan, options, result, scores, start)
        cache = self._open_cache()
        sources = _as_list(image)
        pixels = self.model.preprocess(sources) if sources else None
        result.timings_ms["preprocess"] = since(start)
        messages = list(self.messages)
        if not raw:
            messages.append(self.model.bundle.prompts.user_message(prompt, len(sources)))
        tokens, continues = self._tokenise(prompt, messages, len(sources), repick, raw, result)
        self._check_room(tokens, len(sources), options.max_new_tokens, continues)

        seen = len(self._images.features)
        mark: tuple[int, ...] | None = cache.mark()
        try:
            self._see(pixels, turn)
            if not continues:
                mark = None
                self._is_choice_lost |= bool(self._state.sites)
                self._restart(cache)
            answer = Answer(self, turn)
            yield from answer.run(tokens, tuple(messages))
        except BaseException:
            self._images.forget(seen)
            if mark is None:
                self._restart(cache)  # the next turn prefills what `messages` holds
            else:
                cache.rewind(mark)
            raise
        self._state, self._is_choice_lost = answer.state, False
        if not raw:
            said = [{"type": "text", "text": result.text}]
            self.messages = [*messages, {"role": "assistant", "content": said}]
        result.images, result.sites = list(self._images.reduced), list(self._state.sites)
        result.notes += [
            f"the budget of layer {site.layer} capped image {site.image}: "
            f"{site.num_wanted} tokens wanted, {len(site.kept)} kept"
            for site in result.sites
            if site.is_capped
        ]
        result.timings_ms["total"] = since(start)

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
        prompt: Content,
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
            if self._has_system:
                raise RequestError(
                    "a raw prompt takes no system prompt", do="write it into the raw prompt"
                )
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
        side_layer = self.model.facts.side_layer(self.plan)
        for stage, budget in zip(cache.stages, budgets, strict=True):
            used = stage.length if continues else 0
            # The last new token is answered but never fed; new ones take the place of side rows.
            side = images if stage.stage.last <= side_layer else 0
            needed = used + text + images * budget + max(max_new_tokens - 1, side)
            if needed > stage.slots:
                raise CapacityError(
                    "the conversation is full",
                    found=f"{needed} rows needed with this turn",
                    expected=f"at most {stage.slots} in layers {stage.stage.first} to "
                    f"{stage.stage.last - 1}",
                    do="start another, ask for fewer new tokens, or export with a larger "
                    "--max-text-tokens",
                )

    def _see(self, pixels: np.ndarray | None, turn: Turn) -> None:
        start, images = time.perf_counter(), self._images
        if pixels is not None:
            first = len(images.features)
            seen = self.model.pipeline.see(pixels, turn.plan, turn.noise)
            images.features += list(seen.features)
            images.patch_ids += list(seen.ids)
            images.cls += seen.cls
            images.reduced += [
                ImageResult(number, each.tolist(), went.tolist())
                for number, (each, went) in enumerate(
                    zip(seen.ids, seen.sources, strict=False), first
                )
            ]
        turn.result.timings_ms["vision"] = since(start)

    def _restart(self, cache: Cache) -> None:
        cache.rewind((0,) * len(cache.mark()))
        self._state = State()


def _options(sampling: dict[str, Any], facts: Manifest) -> SamplingOptions:
    """Options of a request: its own, then what the bundle asks of every answer.

    Without a number of new tokens it is the usual, or what is reserved.
    """
    known = [option.name for option in fields(SamplingOptions)]
    unknown = [name for name in sampling if name not in known]
    if unknown:
        raise RequestError(
            "unknown option of a request", found=", ".join(unknown), expected=", ".join(known)
        )
    usual = min(SamplingOptions.max_new_tokens, facts.limits.max_new_tokens)
    return SamplingOptions(**{"max_new_tokens": usual} | facts.generation.options() | sampling)


def _as_list(image: Any) -> list[Any]:
    if image is None:
        return []
    return list(image) if isinstance(image, (list, tuple)) else [image]
