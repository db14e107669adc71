"""What `cost` says of memory: weights by part and format, and the boards that hold a request."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from patchsieve import cost as costs
from patchsieve import memory
from patchsieve.cli.cost_spellings import Chosen as Plans
from patchsieve.contract import boards, formats, sizes, stored
from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.formats import FLOAT, Chosen
from patchsieve.contract.manifest import Manifest
from patchsieve.contract.plan import NO_PRUNING, Plan
from patchsieve.contract.targets import TARGETS
from patchsieve.cost.flops import kv_bytes_per_token
from patchsieve.export.options import ExportOptions

_USUAL = "float16"  # without a bundle


@dataclass(frozen=True)
class Subject:
    """The model that is counted.

    Attributes:
        measures: Of its parts.
        manifest: Of the bundle; None for a config.
        bundle: Its directory.
        precision: As --precision says; None for that of the bundle.
        targets: What the model is to run on.
        numbers: Types and formats, under a plan; None for those that the bundle has.
    """

    measures: costs.Measures
    manifest: Manifest | None
    bundle: Path | None
    precision: str | None
    targets: tuple[str, ...]
    numbers: Chosen | None = None

    @property
    def shape(self) -> costs.ModelShape:
        """What the FLOPs depend on."""
        if self.manifest is None or self.bundle is None:
            return self.measures.shape
        return costs.from_bundle(self.bundle, self.manifest)

    def under(self, plan: Plan | costs.Schedule) -> Subject:
        """The same under a plan, on whose sites formats may depend.

        Raises:
            PatchsieveError: The targets do not take the precision.
        """
        if self.precision is None:
            return self
        given = plan if isinstance(plan, Plan) else Plan()
        name = "counted" if given.prunes else NO_PRUNING
        options = ExportOptions(given, name, targets=self.targets, precision=self.precision)
        return replace(self, numbers=options.chosen)

    @property
    def cache_type(self) -> str:
        """Type of keys and values."""
        if self.numbers is not None:
            return self.numbers.cache
        assert self.manifest is not None  # without a bundle there are numbers
        return self.manifest.cache_type


def subject(args: argparse.Namespace, manifest: Manifest | None) -> Subject:
    """The model that the arguments name.

    Raises:
        PatchsieveError: It cannot be read, or an option has no effect.
    """
    if manifest is None:
        named = args.model is not None
        config = costs.MODELS[args.model] if named else None
        measures = costs.measures_of_config(config) if named else costs.read_measures(args.config)
    else:
        is_tied = bool(manifest.weights) and not stored.has_own_head(args.bundle, manifest)
        measures = costs.Measures(manifest.text, manifest.vision, is_tied)
    targets = _targets(args, manifest)
    text = args.precision or (None if manifest else _USUAL)
    if text is None and args.targets is not None:
        raise PatchsieveError(
            "--targets has no effect on what a bundle holds",
            found=args.targets,
            do="add --precision, or remove --targets",
        )
    return Subject(measures, manifest, args.bundle, text, targets)


def _targets(args: argparse.Namespace, manifest: Manifest | None) -> tuple[str, ...]:
    """As asked; else a bundle's own; else TensorRT's, or the CPU for two copies of the decoder."""
    if args.targets is not None:
        names = list(TARGETS) if args.targets == "all" else args.targets.split(",")
        return tuple(dict.fromkeys(name.strip() for name in names))
    if manifest is not None and manifest.targets:
        return tuple(manifest.targets)
    has_step = formats.parse(args.precision or _USUAL).formats.has_step
    return ("cpu",) if has_step else ("tensorrt",)


def facts(
    model: Subject, plans: Plans, pruned: costs.Cost, text_tokens: int, images: int
) -> dict[str, Any]:
    """Weights by part and format, and boards, for JSON.

    Args:
        model: The model.
        plans: What prunes.
        pruned: What a prefill costs.
        text_tokens: Of the request.
        images: Of the request.
    """
    manifest, numbers = model.manifest, model.numbers
    if numbers is None and manifest is not None and model.bundle is not None:
        rows = stored.shares(model.bundle, manifest)
        name = plans.name if plans.name in manifest.plans else manifest.default_plan
        demand = boards.of_bundle(manifest, name)
        if manifest.plans[name] is not plans.plan:
            demand = replace(demand, kv=_kv(model, pruned))
        return memory.weights(rows) | memory.places(demand)
    assert numbers is not None
    found = _groups(model, plans, numbers)
    rows = sizes.shares(found, numbers.types, numbers.formats)
    plan = plans.plan if isinstance(plans.plan, Plan) else Plan()
    seen = text_tokens + images * pruned.llm_tokens[0]
    request = boards.Request(
        cuts=plan.layers if manifest is None else manifest.cuts,
        num_visions=1 + plan.has_vision,
        kv=_kv(model, pruned),
        rows=seen,
        slots=seen + _new_tokens(manifest),
        images=images,
    )
    text, vision = model.measures.text, model.measures.vision
    target = boards.target_of(model.targets)
    demand = boards.of_model(text, vision, found, numbers, request, target)
    return memory.weights(rows) | memory.places(demand)


def _groups(model: Subject, plans: Plans, numbers: Chosen) -> list[sizes.Group]:
    """The tensors of a model, a scorer among them where the plan wants one."""
    text = model.measures.text
    sized = text.hidden_size, text.vocab_size
    head = numbers.formats.of(formats.HEAD, "lm_head", *sized)
    scorer = None
    if model.manifest is not None and model.bundle is not None:
        scorer = costs.scorer_of(model.bundle, model.manifest)
    elif isinstance(plans.plan, Plan):
        pseudo = plans.plan.pseudo_cls
        scorer = sizes.TextTower() if pseudo is not None and pseudo.needs_scorer else None
    found = sizes.groups(
        text,
        model.measures.vision,
        scorer=scorer,
        has_step=numbers.formats.has_step,
        has_own_head=not model.measures.is_tied or head != FLOAT,
    )
    formats.names_matched(numbers.formats, sizes.names(found))
    return found


def _kv(model: Subject, pruned: costs.Cost) -> int:
    """KV bytes of the prefill and of the new tokens."""
    per_token = kv_bytes_per_token(model.shape.text, model.cache_type)
    layers = model.measures.text.num_layers
    return pruned.kv_bytes + layers * per_token * _new_tokens(model.manifest)


def _new_tokens(manifest: Manifest | None) -> int:
    return boards.NEW_TOKENS if manifest is None else manifest.limits.max_new_tokens
