"""What a user asks of an export, refused at once where it cannot be done."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from patchsieve.contract import names
from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.formats import FLOAT, INT4_CPU, INT4_GPU, Chosen, parse
from patchsieve.contract.manifest import Limits
from patchsieve.contract.plan import NO_PRUNING, Plan, check_plan_name
from patchsieve.contract.targets import TARGETS, USUAL, WITH_ATTENTION_FORMS, WITH_ENGINES, known

# Measured with ONNX Runtime 1.32, 32 heads x 128 and 2 threads: one row on 700 in 0.5 against 0.7
# ms, a prefill of 640 rows in 240 against 64; at 16 heads x 64 neither gains. TensorRT-RTX 1.7.1
# says "cache has type Int8 but must have type Float, Half, or BFloat16".
_INT8_CACHE = (
    "int8 caches do not pay: ONNX Runtime's make prefill 3 times slower, TensorRT takes none in "
    "place, and each layer would need measured ranges"
)


@dataclass(frozen=True)
class ExportOptions:
    """What `export` makes of a checkpoint.

    Attributes:
        plan: What prunes where.
        plan_name: The plan's name in the bundle.
        cuts: Further layers at which to divide the decoder, for plans to come.
        build_memory: Bytes that building any engine may take: the decoder is divided at as many
            more layers as that needs. None leaves it at the sites and `cuts`.
        targets: For which to write graphs.
        precision: Type and format of each part, as `patchsieve.contract.formats.parse` reads it.
        statistics: File of activation statistics, which guides the rounding to int8 and int4; None
            for what the weights alone say.
        limits: What requests may ask for.
        attention: How TensorRT's graphs spell float16 and bfloat16 attention, one of
            `names.ATTENTION_FORMS`; None for the default, every one in parts.
        scorer: Where the CLIP comes from that compares the question with an image, for a plan whose
            pseudo_cls wants one (see `clip_source.open_source`).
        revision: Branch, tag or commit of a hub id; None for its main branch.
    """

    plan: Plan = field(default_factory=Plan)
    plan_name: str = NO_PRUNING
    cuts: tuple[int, ...] = ()
    build_memory: int | None = None
    targets: tuple[str, ...] = ("cpu",)
    precision: str = "float32"
    limits: Limits = field(default_factory=lambda: Limits(512, 256, 1))
    scorer: str | None = None
    revision: str | None = None
    attention: str | None = None
    statistics: Path | None = None

    def __post_init__(self) -> None:
        check_plan_name(self.plan_name)
        limits = self.limits
        if min(limits.max_text_tokens, limits.max_new_tokens, limits.max_images) < 1:
            raise PatchsieveError(
                "a limit is below 1",
                found=limits,
                expected="at least 1 each",
                do="raise --max-text-tokens, --max-new-tokens or --max-images",
            )
        if self.plan_name == NO_PRUNING and self.plan.prunes:
            raise PatchsieveError(
                "the plan named none prunes nothing", do="choose another --plan-name"
            )
        if not self.targets:
            raise PatchsieveError(
                "a bundle needs a target", expected=", ".join(TARGETS), do=f"give --targets {USUAL}"
            )
        if self.build_memory is not None and not set(self.targets) & set(WITH_ENGINES):
            raise PatchsieveError(
                "--build-memory has no effect: no engine is built for these targets",
                found=", ".join(self.targets),
                expected=f"one of {', '.join(WITH_ENGINES)} among --targets",
                do="remove --build-memory, or add such a target to --targets",
            )
        for target in self.targets:
            _check_precision(target, self.chosen)
        _check_statistics(self)
        _check_attention(self)

    @cached_property
    def chosen(self) -> Chosen:
        """What `precision` says."""
        rows = [known(target) for target in self.targets]
        is_for_gpus = all(row.device != "cpu" for row in rows)
        has_small_blocks = not is_for_gpus and all(INT4_CPU in row.formats for row in rows)
        int4 = INT4_CPU if has_small_blocks else INT4_GPU
        decided = max(self.plan.layers, default=0)
        return parse(self.precision, is_for_gpus=is_for_gpus, int4=int4, decided=decided)

    @property
    def attention_form(self) -> str | None:
        """How half-precision attention is spelt; None if no graph has a choice."""
        types = self.chosen.types
        is_half = {types.tower, types.decoder} != {"float32"}
        if not is_half or not any(known(t).attention_forms for t in self.targets):
            return None
        return self.attention or names.DECOMPOSED


def _check_precision(target: str, chosen: Chosen) -> None:
    """Refuse types, formats and caches that a target does not take."""
    row = known(target)
    if not set(chosen.types.kinds) <= set(row.precisions):
        raise PatchsieveError(
            f"the target {target} does not compute in this precision",
            found=chosen.types,
            expected=", ".join(row.precisions),
            do=f"leave {target} out of --targets, or choose another --precision",
        )
    absent = [form for form in chosen.formats.used if form not in row.formats]
    if absent:
        raise PatchsieveError(
            f"the target {target} does not take this format of weights",
            found=", ".join(absent),
            expected=", ".join(row.formats),
            do=f"leave {target} out of --targets, or choose another --precision",
        )
    if chosen.formats.has_step and row.compiler is not None:
        raise PatchsieveError(
            f"the target {target} has one copy of the decoder",
            found=f"a second one for single rows, {chosen.formats.parts['step']}",
            expected="targets that ONNX Runtime runs",
            do=f"leave {target} out of --targets, or give --precision int8 or int4",
        )
    if chosen.cache != chosen.types.decoder:
        raise PatchsieveError(
            _INT8_CACHE if chosen.cache == "int8" else "the caches have the type of the decoder",
            found=f"cache={chosen.cache[:20]}",
            expected=chosen.types.decoder,
            do="leave cache= out of --precision",
        )


def _check_statistics(options: ExportOptions) -> None:
    if options.statistics is not None and set(options.chosen.formats.used) <= {FLOAT}:
        raise PatchsieveError(
            "--statistics has no effect: every matrix is stored in floating point",
            found=options.precision,
            expected="a part in int8 or int4",
            do="leave --statistics out, or give --precision int8, int4 or mixed",
        )


def _check_attention(options: ExportOptions) -> None:
    if options.attention not in (None, *names.ATTENTION_FORMS):
        raise PatchsieveError(
            "unknown --attention",
            found=options.attention,
            expected=", ".join(names.ATTENTION_FORMS),
            do="give one of these to --attention",
        )
    if options.attention is not None and options.attention_form is None:
        raise PatchsieveError(
            "--attention has no effect: no target and part of this export has a choice",
            found=f"{', '.join(options.targets)} in {options.chosen.types}",
            expected=f"float16 or bfloat16 for {' or '.join(WITH_ATTENTION_FORMS)}",
            do="leave --attention out, or change --targets or --precision",
        )
