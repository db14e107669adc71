"""ATP's learned thresholds on disk: the directory that `--heads` names.

    config.json        format, version, sites, the options of the scores and of the modules
    heads.safetensors  for each site: layer.{site}.trunk.{weight,bias}, .head_r.*, .head_s.*

Everything that the thresholds were learned with is in config.json, so that export decides as
training did. `budgets` is optional: tokens per image and site that calibration proposes to reserve.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchsieve.contract.errors import PatchsieveError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "patchsieve-atp-heads"
VERSION = 1
_LARGEST = 1 << 16
CONFIG, TENSORS = "config.json", "heads.safetensors"


@dataclass(frozen=True)
class HeadsConfig:
    """What the thresholds of one model were learned with.

    Attributes:
        sites: Decoder layers, ascending.
        grid: Height and width of the score maps that the modules take.
        hidden: Width of the modules.
        activation: Of the modules: None, "relu" or "gelu".
        scores: Options of the ATP method: normalisation, causal, granularities, spatial_lambda,
            modality, and parts where not both.
        budgets: Proposed tokens per image to reserve after each site; empty if unknown.
    """

    sites: tuple[int, ...]
    grid: tuple[int, int] = (24, 24)
    hidden: int = 64
    activation: str | None = None
    scores: dict[str, Any] = field(default_factory=dict)
    budgets: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check what a hand-written file could get wrong."""
        if not self.sites or any(a >= b for a, b in zip(self.sites, self.sites[1:], strict=False)):
            raise PatchsieveError(
                "the heads' sites are not ascending layers",
                found=list(self.sites),
                do="correct sites in config.json",
            )
        numbers = (*self.sites, *self.grid, self.hidden, *self.budgets)
        if len(self.grid) != 2 or not all(type(n) is int and 0 < n < _LARGEST for n in numbers):
            raise PatchsieveError(
                "the heads' sizes are no possible whole numbers",
                found=f"sites {self.sites}, grid {self.grid}, hidden {self.hidden}"[:120],
                expected=f"1 to {_LARGEST - 1}",
                do="correct config.json, or learn the heads again",
            )
        if self.budgets and len(self.budgets) != len(self.sites):
            raise PatchsieveError(
                "the heads propose budgets for other sites than they have",
                found=f"{len(self.budgets)} budgets",
                expected=f"{len(self.sites)}, or none",
                do="correct budgets in config.json, or remove them",
            )


def save_heads(directory: Path, config: HeadsConfig, tensors: dict[str, Tensor]) -> None:
    """Write a heads directory; `tensors` by the names above."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    data = {"format": FORMAT, "version": VERSION} | asdict(config)
    save_file(tensors, directory / TENSORS)
    (directory / CONFIG).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def load_heads(directory: Path) -> tuple[HeadsConfig, dict[str, Tensor]]:
    """Read a heads directory."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = load_config(directory)
    try:
        return config, load_file(directory / TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise _unreadable(directory, error) from error


def load_config(directory: Path) -> HeadsConfig:
    """Read what a heads directory says of itself, without its tensors and without torch."""
    try:
        data = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no JSON
        raise _unreadable(directory, error) from error
    is_object = isinstance(data, dict)
    found = (data.pop("format", None), data.pop("version", None)) if is_object else "no object"
    if found != (FORMAT, VERSION):
        raise PatchsieveError(
            f"{directory} holds no heads of this version",
            found=found,
            expected=(FORMAT, VERSION),
            do="correct --heads, or learn them again with patchsieve calibrate",
        )
    try:
        tuples = {k: tuple(data[k]) for k in ("sites", "grid", "budgets") if k in data}
        return HeadsConfig(**(data | tuples))
    except TypeError as error:
        raise PatchsieveError(
            f"{directory / CONFIG} is not well formed",
            found=error,
            do="copy the heads again, or learn them with patchsieve calibrate",
        ) from error


def _unreadable(directory: Path, error: Exception) -> PatchsieveError:
    return PatchsieveError(
        f"cannot read the heads in {directory}",
        found=error,
        expected=f"a directory with {CONFIG} and {TENSORS}",
        do="correct --heads",
    )
