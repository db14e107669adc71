"""One answer: prefill with the decisions, decode token by token, and what the cache then holds."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from patchsieve.contract.plan import PseudoCls
from patchsieve.runtime.cache import Cache
from patchsieve.runtime.conversation import Images, State
from patchsieve.runtime.detokenize import TextStream
from patchsieve.runtime.inputs.chat_template import Message
from patchsieve.runtime.inputs.prompt import Prompt, expand
from patchsieve.runtime.loaded import Loaded
from patchsieve.runtime.pipeline import Prefill
from patchsieve.runtime.positions import number_rows
from patchsieve.runtime.pseudo_cls import Words, cosines, pool, to_other_tokens
from patchsieve.runtime.result import since
from patchsieve.runtime.rows import TEXT, Rows
from patchsieve.runtime.sampling import Sampler
from patchsieve.runtime.turn import Turn


class Answer:
    """Prefill and decode of one turn.

    Args:
        model: The loaded bundle.
        cache: The conversation's.
        state: What it holds; afterwards, with the answer.
        images: The conversation's images, those of this turn last.
        turn: What is asked for, and the result to fill.
    """

    def __init__(
        self, model: Loaded, cache: Cache, state: State, images: Images, turn: Turn
    ) -> None:
        self.model, self.cache, self.state, self.images = model, cache, state, images
        self.turn, self.result = turn, turn.result
        self._step_ms: list[float] = []  # of each token after the first
        self._device_ms: list[float] = []  # the same steps on the GPU's clock

    def pieces(self, prompt: Prompt, asked: tuple[Message, ...]) -> Iterator[str]:
        """Yield the answer's text as it comes.

        Args:
            prompt: What this turn feeds, each image one token.
            asked: The conversation up to here, for the turn that continues it.
        """
        history = self._history(prompt)
        rows, hidden = self._feed(prompt)
        done = self.model.pipeline.prefill(hidden, rows, self.cache, self.turn)
        self._note_prefill(done)
        prompt_mark = self.cache.mark()
        options, token_ids = self.turn.options, self.result.token_ids
        sampler = Sampler(options, self.model.facts.tokens.eos_token_ids, history)
        stream = TextStream(self.model.bundle.prompts.tokenizer, options.stop)
        logits = done.logits
        while True:
            token = sampler.next_token(logits)
            token_ids.append(token)
            if len(token_ids) == 1:
                self.result.timings_ms["ttft"] = since(self.turn.start)
            if sampler.is_eos(token):
                self.result.finish_reason = "eos"
                break
            if piece := stream.push(token):
                yield piece
            if stream.stopped:
                self.result.finish_reason = "stop"
                break
            if len(token_ids) == options.max_new_tokens:
                break  # the last token is never fed: no logits after it are wanted
            logits = self._decode(token)
        if piece := stream.finish():
            yield piece
        self._note_answer(stream.text)
        self._settle(asked, history, prompt_mark)

    def _history(self, prompt: Prompt) -> list[int]:
        """Token ids before the answer, as penalties see them.

        Each image has all its visual tokens, pruned or not, as in transformers' processors.
        """
        whole = expand(prompt, self.model.facts.vision.num_visual).token_ids
        return [*self.state.history, *self.state.pending, *whole.tolist()]

    def _feed(self, prompt: Prompt) -> tuple[Rows, np.ndarray]:
        """Rows to feed and their embeddings, [1, L0, C]: this turn's, then side rows."""
        rows, hidden = self._rows(prompt)
        self.result.prompt_tokens = len(rows)
        self.result.visual_tokens = int((rows.image != TEXT).sum())
        pseudo = self.model.facts.plans[self.turn.plan].pseudo_cls
        if pseudo is not None and self.result.visual_tokens:
            start = time.perf_counter()
            side, self.result.words = self._side_rows(prompt, rows.images(), pseudo)
            rows = rows.with_side_rows()
            hidden = np.concatenate((hidden, side[None]), axis=1)  # [1, L0 + M, C]
            self.result.timings_ms["scorer"] = since(start)
        return rows, hidden

    def _decode(self, token: int) -> np.ndarray:
        """Feed one token of the answer and return the logits after it, [V]."""
        start = time.perf_counter()
        logits = self.model.pipeline.decode(token, self.cache)
        self._step_ms.append(since(start))
        self._device_ms += self.model.backend.device_ms().values()
        return logits

    def _note_prefill(self, done: Prefill) -> None:
        """Put survivors and times of a prefill into the result."""
        sites = (*self.state.sites, *done.sites)
        if sites and self.result.selection == "none":
            self.result.selection = "picked" if done.sites else "kept"
        self.state = State(sites=sites)
        self.result.timings_ms |= {
            "prefill": sum(done.stage_ms),
            "decide": sum(done.decide_ms),
            "prefill_per_stage": done.stage_ms,
            "decide_per_site": done.decide_ms,
            "device": self.model.backend.device_ms(),
        }

    def _note_answer(self, text: str) -> None:
        """Put the text, the times of its tokens and the use of the cache into the result."""
        times = self.result.timings_ms
        times["decode_per_token"] = float(np.median(self._step_ms)) if self._step_ms else None
        times["decode_steps"] = self._step_ms
        if self._device_ms:
            times["device"]["decode_per_token"] = float(np.median(self._device_ms))
        self.result.text, self.result.kv_bytes = text, self.cache.kv_bytes()

    def _rows(self, prompt: Prompt) -> tuple[Rows, np.ndarray]:
        """Rows to feed and their embeddings, [1, L0, C]: pending tokens, then the prompt."""
        facts, pending, seen = self.model.facts, self.state.pending, self.images
        shown = seen.features[len(seen.features) - len(prompt.image_positions) :]
        whole = expand(prompt, [len(features) for features in shown])
        ahead = len(pending)
        count = ahead + len(whole.token_ids)
        spans = [slice(ahead + begin, ahead + end) for begin, end in whole.image_spans]
        # The image token's own embedding is never used, and its id may lie outside the table.
        is_visual = np.concatenate((np.zeros(ahead, bool), whole.image_index >= 0))
        token_ids = np.concatenate((np.array(pending, np.int64), whole.token_ids))
        hidden = self.model.bundle.embed(np.where(is_visual, 0, token_ids))  # [L0, C]
        image, patch_ids, places = np.full(count, TEXT), np.full(count, -1), np.full(count, -1)
        is_instruction, sizes = np.zeros(count, bool), np.ones(count, np.float32)
        is_instruction[ahead + whole.instruction_rows] = True
        for number, span in enumerate(spans, len(seen.features) - len(spans)):
            hidden[span] = seen.features[number]
            image[span], patch_ids[span] = number, seen.patch_ids[number]
            places[span] = np.arange(span.stop - span.start)
            if seen.reduced:
                sizes[span] = seen.reduced[number].sizes()
        rule, axes = facts.position_rule(self.turn.plan), len(facts.text.rotary_sections)
        ids = [(span, patch_ids[span]) for span in spans]
        positions = self.cache.position + number_rows(count, ids, facts.vision, rule, axes)
        rows = Rows(
            position_ids=positions[:-1],
            image=image,
            patch_ids=patch_ids,
            places=places,
            is_instruction=is_instruction,
            sizes=sizes,
            side_of=np.full(count, TEXT),
            next_position=int(positions[-1].max()),
        )
        return rows, hidden[None]

    def _side_rows(
        self, prompt: Prompt, images: list[int], pseudo: PseudoCls
    ) -> tuple[np.ndarray, list[Words]]:
        """The pseudo-CLS of each image, [M, C], and the words that it is made of.

        Where the user asked nothing, it is the visual CLS.
        """
        model = self.model
        asked = prompt.instruction if prompt.has_question else prompt.instruction[:0]
        embeddings = model.bundle.embed(prompt.token_ids[asked])  # [T, C]
        question, spans = prompt.question() if prompt.has_question else ("", np.zeros((0, 2), int))
        if pseudo.needs_scorer:
            features, places = model.pipeline.score(question)  # [K, E], [K, 2]
        tokens = tuple(question[a:b] for a, b in spans)
        rows, words = [], []
        for image in images:
            cls, relevance = self.images.cls[image], None
            if pseudo.needs_scorer:
                assert cls.joint is not None  # the plan's vision graph gives it
                relevance = to_other_tokens(cosines(cls.joint, features), places, spans)  # [T]
            elif pseudo.text == "similarity":
                relevance = cosines(cls.features, embeddings)  # [T]
            selected = np.full(len(asked), pseudo.text == "all")
            if relevance is not None:
                selected = relevance >= pseudo.tau
            rows.append(pool(embeddings, selected, cls.features))
            words.append(Words(image, tokens, relevance, selected))
        return np.stack(rows), words

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
        self.state = State(
            asked=asked,
            is_answer_cached=reason != "stop",
            pending=pending,
            history=(*history, *said),
            sites=self.state.sites,
        )
