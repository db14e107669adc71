"""Ask a loaded bundle, pruned and unpruned, and gather what a page shows."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from typing import Any

from patchsieve.errors import CapacityError
from patchsieve.page.shown import Answer, Asked, Picture, Place, Shown, View
from patchsieve.plan import NO_PRUNING
from patchsieve.runtime.model import Model
from patchsieve.runtime.result import Result, SiteResult


def collect(
    model: Model,
    images: Sequence[Any],
    prompts: Sequence[str],
    *,
    plan: str | None = None,
    raw: bool = False,
    progress: Callable[[str, float], None] = lambda *_: None,
    **options: Any,
) -> Shown:
    """Answer each prompt about all images, with the plan and without pruning.

    Args:
        model: The loaded bundle.
        images: Paths, or whatever `Model.generate` takes; at least one.
        prompts: Each is a conversation of its own.
        plan: Which plan; the bundle's default otherwise.
        raw: The prompts are whole texts, without chat template.
        progress: Told what is being run.
        **options: `max_new_tokens` and other fields of `SamplingOptions`.

    Returns:
        What a page shows.

    Raises:
        RequestError: An image, a prompt or an option cannot be used, or does not fit the bundle.
    """
    facts = model.facts
    plan = plan or facts.default_plan
    options = {"raw": raw} | options
    notes: list[str] = []
    asked = []
    for number, prompt in enumerate(prompts):
        progress(f"prompt {number + 1}, plan {plan}", number / len(prompts))
        result = model.generate(list(images), prompt, plan=plan, scores=True, **options)
        unpruned = None
        if facts.plans[plan].sites:
            progress(f"prompt {number + 1}, unpruned", (number + 0.5) / len(prompts))
            unpruned = _unpruned(model, images, prompt, options, notes)
        views = [_view(facts.plans[plan], facts.vision, result, i) for i in range(len(images))]
        asked.append(Asked(prompt, _answer(result), unpruned, tuple(views)))
        notes += result.notes
    if not facts.plans[plan].sites:
        notes.append(f"the plan {plan} prunes nothing: every token reaches every layer")
    pixels = model.preprocess(images)  # [M, 3, h, w]
    device = model.backend.describe()
    return Shown(
        bundle=model.bundle.path.resolve().name,
        checkpoint=facts.checkpoint,
        machine=f"{model.bundle.target}, {facts.precision}, {device['library']}, "
        f"{device['device']}",
        plan=plan,
        num_visual=facts.vision.num_visual,
        pictures=tuple(
            _picture(model, source, values) for source, values in zip(images, pixels, strict=True)
        ),
        asked=tuple(asked),
        notes=tuple(dict.fromkeys(notes)),
    )


def _unpruned(
    model: Model, images: Sequence[Any], prompt: str, options: dict[str, Any], notes: list[str]
) -> Answer | None:
    """The answer without pruning; None and a note where engines reserve too little for it."""
    try:
        return _answer(model.generate(list(images), prompt, plan=NO_PRUNING, **options))
    except CapacityError as error:
        notes.append(f"the unpruned model was not asked: {error}")
        return None


def _answer(result: Result) -> Answer:
    return Answer(
        plan=result.plan,
        text=result.text,
        num_tokens=len(result.token_ids),
        prompt_tokens=result.prompt_tokens,
        kv_used=result.kv_bytes["used"],
        kv_reserved=result.kv_bytes["reserved"],
        ttft_ms=result.timings_ms["ttft"],
        total_ms=result.timings_ms["total"],
    )


def _view(plan: Any, vision: Any, result: Result, image: int) -> View:
    methods = {site.layer: site.method for site in plan.sites}
    num_patches = vision.grid[0] * vision.grid[1]
    return View(
        tuple(
            _place(site, methods[site.layer], num_patches)
            for site in result.sites
            if site.image == image
        )
    )


def _place(site: SiteResult, method: str, num_patches: int) -> Place:
    scores: list[float | None] = [None] * num_patches
    for patch, score in site.scores or []:
        if patch >= 0:  # a CLS row is no patch
            scores[patch] = score
    return Place(
        layer=site.layer,
        method=method,
        num_before=site.num_visual_before,
        num_after=len(site.kept),
        num_wanted=site.num_wanted,
        kept=tuple(patch for patch in site.kept if patch >= 0),
        scores=tuple(scores),
    )


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
