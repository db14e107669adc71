"""Ask a loaded bundle, pruned and unpruned, and gather what a page shows."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from patchsieve.contract.errors import CapacityError
from patchsieve.contract.manifest import Manifest
from patchsieve.contract.plan import NO_PRUNING, Plan
from patchsieve.runtime.model import Model
from patchsieve.runtime.pseudo_cls import Words
from patchsieve.runtime.result import ImageResult, Result, SiteResult
from patchsieve.show.agreement import sentences
from patchsieve.show.shown import Answer, Asked, Picture, Place, Shown, View, Word


def collect(
    model: Model,
    images: Sequence[Any],
    prompts: Sequence[str],
    *,
    plan: str | None = None,
    raw: bool = False,
    timed_runs: int = 3,
    progress: Callable[[str, float], None] = lambda *_: None,
    **options: Any,
) -> Shown:
    """Answer each prompt about all images, with the plan and without pruning.

    The first run of each is not timed: it pays for memory, caches and kernels that later runs find.
    Then both plans run in turn, so that a slow moment of the machine falls on both.

    Args:
        model: The loaded bundle.
        images: Paths, or whatever `Model.generate` takes; at least one.
        prompts: Each is a conversation of its own.
        plan: Which plan; the bundle's default otherwise.
        raw: The prompts are whole texts, without chat template.
        timed_runs: Runs of each prompt and plan whose median is shown; 0 shows no times.
        progress: Told what is being run.
        **options: `max_new_tokens` and other fields of `SamplingOptions`.

    Returns:
        What a page shows.

    Raises:
        RequestError: An image, a prompt or an option cannot be used, or does not fit the bundle.
    """
    plan = plan or model.facts.default_plan
    asker = _Asker(model, list(images), plan, {"raw": raw} | options, timed_runs)
    asked = [
        asker.ask(prompt, partial(_say, progress, number, len(prompts)))
        for number, prompt in enumerate(prompts)
    ]
    pictures = tuple(map(partial(_picture, model), images, model.preprocess(images)))
    return Shown(
        bundle=model.bundle.path.resolve().name,
        checkpoint=model.facts.checkpoint,
        machine=_machine(model),
        plan=plan,
        num_visual=model.facts.vision.num_visual,
        pictures=pictures,
        asked=tuple(asked),
        notes=tuple(dict.fromkeys([*asker.notes, *sentences(asked, pictures)])),
        timed_runs=timed_runs,
    )


def _say(
    progress: Callable[[str, float], None], number: int, count: int, what: str, part: float
) -> None:
    """Report what is run for one of some prompts, and which part of it is done."""
    progress(f"prompt {number + 1}, {what}", (number + part) / count)


@dataclass
class _Asker:
    """Asks about the same images, pruned and unpruned; `notes` are for the reader of the page."""

    model: Model
    images: list[Any]
    plan: str
    options: dict[str, Any]
    timed_runs: int
    notes: list[str] = field(default_factory=list)

    def ask(self, prompt: str, say: Callable[[str, float], None]) -> Asked:
        """Answer a prompt with the plan and without pruning; `say` hears what is being run."""
        facts = self.model.facts
        say(f"plan {self.plan}", 0.0)
        result = self._generate(prompt, self.plan, scores=True)
        answers = [_answer(result)]
        if facts.plans[self.plan].prunes:
            say("unpruned", 0.5)
            answers += self._unpruned(prompt)
        else:
            note = f"the plan {self.plan} prunes nothing: every token reaches every layer"
            self.notes.append(note)

        def again(plan: str) -> Result:
            say("timing", 0.9)
            return self._generate(prompt, plan)

        answers = timed(answers, again, self.timed_runs)
        views = [view(facts, result, prompt, number) for number in range(len(self.images))]
        self.notes += result.notes
        return Asked(prompt, answers[0], answers[1] if len(answers) > 1 else None, tuple(views))

    def _unpruned(self, prompt: str) -> list[Answer]:
        """The answer without pruning; none and a note if engines reserve too little for it."""
        try:
            return [_answer(self._generate(prompt, NO_PRUNING))]
        except CapacityError as error:
            self.notes.append(f"the unpruned model was not asked: {error}")
            return []

    def _generate(self, prompt: str, plan: str, **more: Any) -> Result:
        return self.model.generate(self.images, prompt, plan=plan, **self.options, **more)


def timed(answers: Sequence[Answer], ask: Callable[[str], Result], runs: int) -> list[Answer]:
    """Answers with the median times of some runs, their plans in turn.

    Args:
        answers: Of runs that were not timed, one for each plan.
        ask: Asks again with a plan.
        runs: How many times each.
    """
    if not runs:
        return list(answers)
    rounds = [[ask(answer.plan).timings_ms for answer in answers] for _ in range(runs)]
    return [
        replace(
            answer,
            ttft_ms=median(times["ttft"] for times in own),
            total_ms=median(times["total"] for times in own),
        )
        for answer, own in zip(answers, zip(*rounds, strict=True), strict=True)
    ]


def _machine(model: Model) -> str:
    device = model.backend.describe()
    where = f"{device['library']}, {device['device']}"
    return f"{model.bundle.target}, {model.facts.numbers}, {where}"


def _answer(result: Result) -> Answer:
    return Answer(
        plan=result.plan,
        text=result.text,
        num_tokens=len(result.token_ids),
        prompt_tokens=result.prompt_tokens,
        kv_used=result.kv_bytes["used"],
        kv_reserved=result.kv_bytes["reserved"],
        ttft_ms=None,  # a first run says little of time
        total_ms=None,
    )


def view(facts: Manifest, result: Result, prompt: str, image: int) -> View:
    """What became of one image, first before the decoder, then at its sites.

    Args:
        facts: The bundle's manifest.
        result: Of a request that asked for scores.
        prompt: Its words.
        image: Number of the image.
    """
    plan, vision = facts.plans[result.plan], facts.vision
    reduced = next((one for one in result.images if one.image == image), None)
    # The token that each patch is part of; a class token may come first.
    owner = np.arange(vision.num_patches) + vision.num_visual - vision.num_patches  # [R * C]
    kept = owner >= 0
    places = []
    if reduced is not None and plan.prunes_before:
        owner = np.array(reduced.sources)
        early = _before_the_decoder(plan, reduced, vision.num_visual)
        kept = np.isin(np.arange(len(owner)), early.kept)
        places.append(early)
    methods = {site.layer: site.method for site in plan.sites}
    for site in result.sites:
        if site.image == image:
            places.append(_place(site, methods[site.layer], owner, kept))
            owner = _merged(owner, site)
    words = next((one for one in result.words if one.image == image), None)
    return View(tuple(places), () if words is None else _words(prompt, words))


def _before_the_decoder(plan: Plan, reduced: ImageResult, num_visual: int) -> Place:
    """What the tower and the projector left of an image.

    If some tokens are still patches, only these count as kept, and the rest is fused into others.
    If none is, every patch that is part of a token counts as kept.
    """
    ids, sources = np.array(reduced.ids), np.array(reduced.sources)
    own = ids[ids >= 0]
    kept = np.sort(own) if len(own) else np.flatnonzero(sources >= 0)
    is_merged = np.bincount(sources[sources >= 0]).max() > 1
    methods = [part.method for part in (plan.encoder, plan.projector) if part is not None]
    return Place(
        layer=None,
        method=" and ".join(methods),
        num_before=num_visual,
        num_after=len(ids),
        num_wanted=len(ids) if reduced.num_wanted is None else reduced.num_wanted,
        kept=tuple(kept.tolist()),
        groups=tuple(reduced.sources) if is_merged else None,
    )


def _place(site: SiteResult, method: str, owner: np.ndarray, alive: np.ndarray) -> Place:
    """A decoder's site.

    Args:
        site: What was decided.
        method: By which method.
        owner: Token that each patch is part of, [R * C].
        alive: Patches that entered the decoder, bool [R * C].
    """
    scores, joined = dict(site.scores or []), _merged(owner, site)
    kept = alive & np.isin(joined, site.places)
    return Place(
        layer=site.layer,
        method=method,
        num_before=site.num_visual_before,
        num_after=len(site.kept),
        num_wanted=site.num_wanted,
        kept=tuple(np.flatnonzero(kept).tolist()),
        scores=tuple(
            scores.get(token) if is_alive else None
            for token, is_alive in zip(owner.tolist(), alive, strict=True)
        ),
        groups=None if site.merged is None else tuple(np.where(kept, joined, -1).tolist()),
    )


def _merged(owner: np.ndarray, site: SiteResult) -> np.ndarray:
    """Token that each patch is part of after a site, [R * C]."""
    into = dict(site.merged or [])
    return np.array([into.get(token, token) for token in owner.tolist()])


def _words(prompt: str, words: Words) -> tuple[Word, ...]:
    """The prompt in pieces: the question's tokens at their places, and the text between them.

    A token that is not found (a byte of a character, say) is part of the text around it.
    """
    relevance = [None] * len(words.tokens) if words.relevance is None else words.relevance.tolist()
    pieces, end = [], 0
    for text, weight, is_selected in zip(words.tokens, relevance, words.selected, strict=True):
        start = prompt.find(text, end) if text else -1
        if start < 0:
            continue
        is_known = weight is not None and np.isfinite(weight)
        pieces.append(Word(prompt[end:start], None, False))
        pieces.append(Word(text, weight if is_known else None, bool(is_selected)))
        end = start + len(text)
    pieces.append(Word(prompt[end:], None, False))
    return tuple(piece for piece in pieces if piece.text)


def _picture(model: Model, source: Any, values: Any) -> Picture:
    """A picture of pixels [3, h, w], cut to the patches that the tower makes of them."""
    vision = model.facts.vision
    rows, columns = vision.grid
    image = model.bundle.preprocessor.to_image(values)
    # SigLIP's 384 pixels are no multiple of its patch of 14: the rest is never seen.
    image = image.crop((0, 0, columns * vision.patch_size, rows * vision.patch_size))
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    name = os.path.basename(source) if isinstance(source, (str, os.PathLike)) else "image"
    return Picture(name, file.getvalue(), vision.grid)
