"""One answer: prefill with the decisions, decode token by token, and what the cache then holds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from patchsieve.contract.plan import PseudoCls
from patchsieve.runtime.conversation import State
from patchsieve.runtime.detokenize import TextStream
from patchsieve.runtime.inputs.chat_template import Message
from patchsieve.runtime.inputs.prompt import Prompt, expand
from patchsieve.runtime.positions import number_rows
from patchsieve.runtime.pseudo_cls import Words, cosines, pool, to_other_tokens
from patchsieve.runtime.result import since
from patchsieve.runtime.rows import TEXT, Rows
from patchsieve.runtime.sampling import Sampler
from patchsieve.runtime.turn import Turn

if TYPE_CHECKING:
    from patchsieve.runtime.chat import Chat


class Answer:
    """Prefill and decode of one turn; `state` is what the cache holds at the end."""

    def __init__(self, chat: Chat, turn: Turn) -> None:
        self.chat, self.turn, self.result = chat, turn, turn.result
        self.model, self.cache = chat.model, chat._open_cache()
        self.tokens = chat.model.facts.tokens
        self.state = chat._state

    def run(self, prompt: Prompt, asked: tuple[Message, ...]) -> Iterator[str]:
        """Yield the answer's text as it comes."""
        result, before = self.result, self.state
        logits = self._prefill(prompt)
        prompt_mark = self.cache.mark()
        # With all visual tokens of an image, pruned or not, as transformers' processors see them
        whole = expand(prompt, self.model.facts.vision.num_visual).token_ids
        history = [*before.history, *before.pending, *whole.tolist()]
        sampler = Sampler(self.turn.options, self.tokens.eos_token_ids, history)
        stream = TextStream(self.model.bundle.prompts.tokenizer, self.turn.options.stop)
        decode_ms: list[float] = []
        device_ms: list[float] = []  # the same steps on the GPU's clock
        while True:
            token = sampler.next_token(logits)
            result.token_ids.append(token)
            if len(result.token_ids) == 1:
                result.timings_ms["ttft"] = since(self.turn.start)
            if sampler.is_eos(token):
                result.finish_reason = "eos"
                break
            if piece := stream.push(token):
                yield piece
            if stream.stopped:
                result.finish_reason = "stop"
                break
            if len(result.token_ids) == self.turn.options.max_new_tokens:
                break
            step = time.perf_counter()
            logits = self.model.pipeline.decode(token, self.cache)
            decode_ms.append(since(step))
            device_ms += self.model.backend.device_ms().values()
        if piece := stream.finish():
            yield piece
        result.text = stream.text
        result.timings_ms["decode_per_token"] = float(np.median(decode_ms)) if decode_ms else None
        result.timings_ms["decode_steps"] = decode_ms
        if device_ms:
            result.timings_ms["device"]["decode_per_token"] = float(np.median(device_ms))
        result.kv_bytes = self.cache.kv_bytes()
        self._settle(asked, history, prompt_mark)

    def _prefill(self, prompt: Prompt) -> np.ndarray:
        chat, result = self.chat, self.result
        rows, hidden = self._rows(prompt)
        prompt_tokens, visual = len(rows), int((rows.image != TEXT).sum())
        pseudo = self.model.facts.plans[chat.plan].pseudo_cls
        if pseudo is not None and visual:
            start = time.perf_counter()
            side, result.words = self._side_rows(prompt, rows.images(), pseudo)
            rows = rows.with_side_rows()
            hidden = np.concatenate((hidden, side[None]), axis=1)  # [1, L0 + M, C]
            result.timings_ms["scorer"] = since(start)
        done = self.model.pipeline.prefill(hidden, rows, self.cache, self.turn)
        sites = (*self.state.sites, *done.sites)
        if sites and result.selection == "none":
            result.selection = "picked" if done.sites else "kept"
        self.state = State(sites=sites)
        result.prompt_tokens, result.visual_tokens = prompt_tokens, visual
        result.timings_ms |= {
            "prefill": sum(done.stage_ms),
            "decide": sum(done.decide_ms),
            "prefill_per_stage": done.stage_ms,
            "decide_per_site": done.decide_ms,
            "device": self.model.backend.device_ms(),
        }
        return done.logits

    def _rows(self, prompt: Prompt) -> tuple[Rows, np.ndarray]:
        """Rows to feed and their embeddings, [1, L0, C]: pending tokens, then the prompt."""
        chat, pending, facts = self.chat, self.state.pending, self.model.facts
        whole = expand(prompt, facts.num_visual(chat.plan))
        ahead = len(pending)
        count = ahead + len(whole.token_ids)
        image, patch_ids, places = np.full(count, TEXT), np.full(count, -1), np.full(count, -1)
        is_instruction, sizes = np.zeros(count, bool), np.ones(count, np.float32)
        is_instruction[ahead + whole.instruction_rows] = True
        token_ids = np.concatenate((np.array(pending, np.int64), whole.token_ids))
        # The image token's own embedding is never used, and its id may lie outside the table.
        is_visual = np.concatenate((np.zeros(ahead, bool), whole.image_index >= 0))
        hidden = chat.model.bundle.embed(np.where(is_visual, 0, token_ids))  # [L0, C]
        first = len(chat._images.features) - len(whole.image_spans)
        spans = [slice(ahead + begin, ahead + end) for begin, end in whole.image_spans]
        for number, span in enumerate(spans, first):
            hidden[span] = chat._images.features[number]
            image[span], patch_ids[span] = number, chat._images.patch_ids[number]
            places[span] = np.arange(span.stop - span.start)
            if chat._images.reduced:
                sizes[span] = chat._images.reduced[number].sizes()
        rule, axes = facts.position_rule(chat.plan), len(facts.text.rotary_sections)
        images = [(span, patch_ids[span]) for span in spans]
        positions = self.cache.position + number_rows(count, images, facts.vision, rule, axes)
        following, side_of = int(positions[-1].max()), np.full(count, TEXT)
        known = (positions[:-1], image, patch_ids, places, is_instruction, sizes)
        return Rows(*known, side_of, following), hidden[None]

    def _side_rows(
        self, prompt: Prompt, images: list[int], pseudo: PseudoCls
    ) -> tuple[np.ndarray, list[Words]]:
        """The pseudo-CLS of each image, [M, C], and the words that it is made of.

        Where the user asked nothing, it is the visual CLS.
        """
        model = self.chat.model
        asked = prompt.instruction if prompt.has_question else prompt.instruction[:0]
        embeddings = model.bundle.embed(prompt.token_ids[asked])  # [T, C]
        question, spans = prompt.question() if prompt.has_question else ("", np.zeros((0, 2), int))
        if pseudo.needs_scorer:
            features, places = model.pipeline.score(question)  # [K, E], [K, 2]
        tokens = tuple(question[a:b] for a, b in spans)
        rows, words = [], []
        for image in images:
            cls, relevance = self.chat._images.cls[image], None
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
