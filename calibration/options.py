"""What a calibration is asked to do, refused here if it contradicts itself. Needs no torch.

The fields are named as the options of `patchsieve calibrate`, and their defaults are its defaults.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.plan import GRID2D, TRAINED_RULES
from patchsieve.pruning import catalogue
from patchsieve.pruning.entry import DECODER

METHODS = ("atp", "quantile", "fixed")


@dataclass(frozen=True)
class Data:
    """Conversations to learn from; `patchsieve.runtime.records` describes the files.

    Attributes:
        path: LLaVA's JSON or JSONL, or chat messages.
        held_out: Conversations on which survivors are counted; None for those of `path`.
        image_folder: Folder of relative image paths; None for the folder of each file.
        skip_missing: Skip records whose image does not exist; otherwise they are an error.
    """

    path: Path
    held_out: Path | None = None
    image_folder: Path | None = None
    skip_missing: bool = False


@dataclass(frozen=True)
class ScoreOptions:
    """How ATP scores tokens, recorded with the heads (see `patchsieve.pruning.decoder.atp.ATP`).

    Attributes:
        normalisation: How the scores are scaled: "minmax", "rank", "softmax" or "none".
        modality: The scores in S_red: "both", "self" or "cross".
        parts: Which rule keeps a token: "redundant", "spatial", or "both" (either is enough).
        causal: Eq. 3 over causal pairs only.
    """

    normalisation: str = "minmax"
    modality: str = "both"
    parts: str = "both"
    causal: bool = False

    def __post_init__(self) -> None:
        """Refuse what ATP does not know."""
        catalogue.entry(DECODER, "atp").check(vars(self))


@dataclass(frozen=True)
class LanguageModelOptions:
    """Whether the language model and the projector are trained too.

    Attributes:
        train_lm: Train them; the result is then a whole checkpoint.
        hard: Continue a checkpoint that was trained so, dropping tokens as a bundle does.
        positions: Positions of image tokens, "grid2d" or "original"; None for "grid2d".
        sections: Rotary frequencies of grid2d: "mrope" or "2d"; None for "mrope".
    """

    train_lm: bool = False
    hard: bool = False
    positions: str | None = None
    sections: str | None = None

    def __post_init__(self) -> None:
        """Refuse options that would have no effect."""
        if self.hard and not self.train_lm:
            raise PatchsieveError(
                "hard masks teach the language model alone", found="--hard", do="add --train-lm"
            )
        given = [name for name in ("positions", "sections") if getattr(self, name) is not None]
        if self.hard and given:
            raise PatchsieveError(
                "the positions are those of the checkpoint that --hard continues",
                found=f"--{given[0]}",
                do=f"remove --{given[0]}",
            )
        if given and not self.train_lm:
            raise PatchsieveError(
                "a frozen language model keeps the positions that it was trained with",
                found=f"--{given[0]}",
                do=f"add --train-lm, or remove --{given[0]}",
            )
        if self.sections is not None and self.positions == TRAINED_RULES[0]:
            raise PatchsieveError(
                "positions in sequence have no sections",
                found=f"--positions {self.positions} --sections {self.sections}",
                do="remove --sections, or take --positions grid2d",
            )

    @property
    def new_positions(self) -> str | None:
        """How rows are numbered if not as the checkpoint was trained."""
        return (self.positions or GRID2D) if self.train_lm and not self.hard else None


@dataclass(frozen=True)
class Losses:
    """Weights of the budget losses, added to the language model's own (eqs. 12-14).

    Attributes:
        target_tokens: N_target, mean visual tokens over all layers; None leaves eq. 13 out.
        lambda_atp: Weight of eq. 12; the paper's lies in [0.01, 0.1].
        lambda_target: Weight of eq. 13, which counts tokens; the paper's is 0.2.
        temperature: T of eqs. 9 and 10.
    """

    target_tokens: float | None = None
    lambda_atp: float = 0.05
    lambda_target: float = 0.2
    temperature: float = 50.0

    def __post_init__(self) -> None:
        """Refuse weights that no loss can have."""
        numbers = (self.lambda_atp, self.lambda_target, self.temperature)
        if not (min(numbers) >= 0 and self.temperature > 0):
            raise PatchsieveError(
                "the weights of the losses cannot be used",
                found=numbers,
                expected="no negative number, and a temperature above 0",
                do="correct --lambda-atp, --lambda-target or --temperature",
            )


@dataclass(frozen=True)
class TrainingOptions:
    """How training goes; see `transformers.TrainingArguments` for what most of it becomes.

    Attributes:
        steps: Optimiser steps; None for as many as the epochs take.
        epochs: Passes over the data.
        batch_size: Samples in a batch on each device.
        accumulate: Batches in an optimiser step.
        learning_rate: Learning rate of the heads; the paper's is 1e-4.
        lm_learning_rate: Learning rate of the language model and the projector, if they are
            trained; the paper's is 2e-5.
        lambda_atp: See `Losses`.
        lambda_target: See `Losses`.
        temperature: See `Losses`.
        bf16: Compute in bfloat16; thresholds and losses stay float32.
        gradient_checkpointing: Recompute activations in the backward pass instead of keeping them.
        workers: Processes that load data.
        save_steps: Steps between checkpoints from which training can resume.
        seed: Seed of the data's order and of new heads.
    """

    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 4
    accumulate: int = 1
    learning_rate: float = 1e-4
    lm_learning_rate: float = 2e-5
    lambda_atp: float = Losses.lambda_atp
    lambda_target: float = Losses.lambda_target
    temperature: float = Losses.temperature
    bf16: bool = False
    gradient_checkpointing: bool = False
    workers: int = 0
    save_steps: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers with which nothing can be trained."""
        self.losses(None)
        least = {"batch_size": 1, "accumulate": 1, "save_steps": 1, "workers": 0, "seed": 0}
        least |= {"learning_rate": 0, "lm_learning_rate": 0}
        wrong = [name for name, number in least.items() if not getattr(self, name) >= number]
        if self.steps is not None and self.steps < 1:
            wrong, least["steps"] = ["steps"], 1
        if wrong:
            option = f"--{wrong[0].replace('_', '-')}"
            raise PatchsieveError(
                "training cannot go on this number",
                found=f"{option} {getattr(self, wrong[0])}",
                expected=f"at least {least[wrong[0]]}",
                do=f"correct {option}",
            )
        if not self.epochs > 0:
            raise PatchsieveError(
                "training needs data",
                found=f"--epochs {self.epochs:g}",
                expected="above 0",
                do="correct --epochs",
            )

    def losses(self, target_tokens: float | None) -> Losses:
        """The weights of the losses, for a target."""
        return Losses(target_tokens, self.lambda_atp, self.lambda_target, self.temperature)


@dataclass(frozen=True)
class CalibrationOptions:
    """What is learned, and within which budget of tokens.

    Attributes:
        sites: Layers at whose input to prune, ascending.
        method: "atp" learns heads, "quantile" fixes constant thresholds, "fixed" keeps the same
            number of tokens for every image, the best by ATP's scores.
        target_tokens: Mean visual tokens over all layers; quantile and fixed keep one share of the
            tokens at every site to meet it.
        counts: For quantile and fixed, instead of `target_tokens`: tokens that each site leaves.
        percentile: Share of images, in per cent, whose survivors fit the reserved tokens.
        hidden: Width of a threshold module.
        heads: Directory of heads to continue from; None for new ones.
        initial_theta_r: theta_r of new heads.
        initial_theta_s: theta_s of new heads; None for the method's own.
        scores: How tokens are scored.
        language_model: Whether the language model is trained too.
        training: How training goes.
    """

    sites: tuple[int, ...]
    method: str = METHODS[0]
    target_tokens: float | None = None
    counts: tuple[float, ...] | None = None
    percentile: float = 99.0
    hidden: int = 64
    heads: Path | None = None
    initial_theta_r: float = 0.12
    initial_theta_s: float | None = None
    scores: ScoreOptions = field(default_factory=ScoreOptions)
    language_model: LanguageModelOptions = field(default_factory=LanguageModelOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)

    def __post_init__(self) -> None:
        """Refuse options that contradict each other or would have no effect."""
        self._check_method()
        self._check_scores()
        self._check_budget()
        check_sites(self.sites)
        if not 0 < self.percentile <= 100:
            raise PatchsieveError(
                "--percentile is a percentage",
                found=self.percentile,
                expected="above 0, up to 100",
                do="correct --percentile",
            )

    @property
    def trains(self) -> bool:
        """Whether something learns."""
        return self.method == "atp" or self.language_model.train_lm

    @property
    def batch_size(self) -> int:
        """Samples of one pass, whether something learns or not."""
        return self.training.batch_size

    def _check_method(self) -> None:
        if self.method not in METHODS:
            raise PatchsieveError(
                "calibrate does not know this method",
                found=self.method,
                expected=", ".join(METHODS),
                do="choose another --method",
            )
        if self.language_model.train_lm and self.method == "quantile":
            raise PatchsieveError(
                "--train-lm changes the scores, so constants that were fixed to them would be "
                "wrong",
                found="--method quantile",
                expected="atp or fixed",
                do="train with --method atp, then fix constants of the trained checkpoint",
            )
        if self.heads is not None and self.method != "atp":
            raise PatchsieveError(
                "only atp learns heads",
                found=f"--method {self.method} --heads",
                do="remove --heads, or take --method atp",
            )

    def _check_scores(self) -> None:
        """Refuse scores that the method has no constant threshold for, or does not read."""
        scores = self.scores
        if self.method != "atp" and scores.normalisation == "none":
            raise PatchsieveError(
                "scores that are not normalised have no constant threshold",
                found=f"--method {self.method} --normalisation none",
                expected="minmax, rank or softmax",
                do="choose another --normalisation, or take --method atp",
            )
        if self.method == "fixed" and scores.normalisation == "rank":
            raise PatchsieveError(
                "ranks tie, so that no threshold lets a fixed number through",
                found="--method fixed --normalisation rank",
                expected="minmax or softmax",
                do="choose another --normalisation",
            )
        if self.method != "atp" and scores.parts != "both":
            raise PatchsieveError(
                f"--method {self.method} has no spatial pruning to leave out or to use alone",
                found=f"--parts {scores.parts}",
                do="remove --parts, or learn heads with --method atp",
            )
        if self.method == "fixed" and scores.modality != "both":
            raise PatchsieveError(
                "fixed numbers go by both scores",
                found=f"--modality {scores.modality}",
                do="remove --modality",
            )

    def _check_budget(self) -> None:
        """Refuse a budget that is missing, given twice, or of another method."""
        if (self.counts is None) == (self.target_tokens is None):
            raise PatchsieveError(
                "calibrate needs one budget of tokens",
                found="none" if self.counts is None else "--target-tokens and --counts",
                expected="--target-tokens, or --counts with --method quantile or fixed",
                do="give one of them",
            )
        if self.counts is None:
            return
        if self.method == "atp":
            raise PatchsieveError(
                "learned heads find the number of tokens of each site themselves",
                found="--counts --method atp",
                do="give --target-tokens, or --method quantile or fixed",
            )
        if len(self.counts) != len(self.sites):
            raise PatchsieveError(
                "--counts and --sites do not pair",
                found=f"{len(self.counts)} numbers for {len(self.sites)} sites",
                expected="one number for each site",
                do="correct --counts",
            )
        if self.method == "fixed" and any(count % 1 for count in self.counts):
            raise PatchsieveError(
                "every image keeps a whole number of tokens",
                found=", ".join(f"{count:g}" for count in self.counts),
                expected="whole numbers with --method fixed",
                do="round --counts, or take --method quantile, whose counts are means",
            )


def check_sites(sites: tuple[int, ...], layers: int | None = None) -> None:
    """Refuse layers that cannot prune one after the other.

    Args:
        sites: The layers.
        layers: How many the decoder has; None if that is not known yet.
    """
    ascending = bool(sites) and list(sites) == sorted(set(sites)) and sites[0] > 0
    if not ascending or (layers is not None and sites[-1] >= layers):
        last = "" if layers is None else f" to {layers - 1}"
        raise PatchsieveError(
            "the sites cannot be used",
            found=", ".join(map(str, sites)) or "none",
            expected=f"ascending layers from 1{last}",
            do="correct --sites",
        )
