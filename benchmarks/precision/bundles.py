"""Plans and precisions of the table, as bundles that patchsieve's own export makes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.accuracy.workshop import Workshop, digest, run
from patchsieve.contract.plan import NO_PRUNING

FLOAT32 = "float32"
PRECISIONS = (FLOAT32, "int8", "int4", "mixed")
BARS = {"int8": 0.5, "int4": 1.0, "mixed": 0.5}  # points that may be lost, by preset
LEAST_IN_COMMON = 0.98  # of the survivors
_LIMITS = ("--max-text-tokens", "48", "--max-new-tokens", "16")
_STATISTICS_RECORDS = 200


@dataclass(frozen=True)
class Case:
    """A plan on one of the demo model's checkpoints.

    Attributes:
        label: What the table calls it.
        checkpoint: Folder of the checkpoint, in that of the demo model.
        name: The plan's name in its bundle.
        words: Options of `export` that make it.
    """

    label: str
    checkpoint: str
    name: str = NO_PRUNING
    words: tuple[str, ...] = ()


_IVTP = ("--method", "ivtp", "--num-keep", "36")
_FASTV = ("--method", "fastv", "--sites", "6", "--keep-ratio", "0.25")
CASES = (
    Case("none", "checkpoint"),
    Case("FastV, a quarter kept at layer 6", "checkpoint", "fastv", _FASTV),
    Case("ATP, trained", "atp", "atp", ("--method", "atp")),
    Case("IVTP, a quarter left", "checkpoint", "ivtp", _IVTP),
)


@dataclass(frozen=True)
class Bundles:
    """Bundles of every precision, kept in a folder.

    Attributes:
        shop: Folder and questions.
        model: Folder of the demo model: `checkpoint`, `atp`, `clip`.
        has_statistics: int8 and int4 are guided by activation statistics.
    """

    shop: Workshop
    model: Path
    has_statistics: bool

    def of(self, case: Case, precision: str) -> Path:
        """The bundle that holds a plan in a precision, made if it is not there."""
        # One for each plan: the format of a layer may depend on the plan's last site.
        bundle = self._folder(precision) / case.name
        if not bundle.exists():
            bundle.parent.mkdir(parents=True, exist_ok=True)
            self._export(bundle, case, precision)
        return bundle

    def _folder(self, precision: str) -> Path:
        """A name that says the precision, as far as a folder's may, and a digest of it."""
        guided = self.has_statistics and precision != FLOAT32
        text = precision + (", statistics" if guided else "")
        word = re.sub(r"[^\w=-]+", "_", text)[:40]
        return self.shop.folder / "bundles" / f"{word}-{digest(text)}"

    def _export(self, bundle: Path, case: Case, precision: str) -> None:
        words = ["export", str(self.model / case.checkpoint), "-o", str(bundle), *_plan(case)]
        words += ["--scorer", str(self.model / "clip")] if case.name == "ivtp" else []
        words += ["--precision", precision, *_LIMITS, "--quiet"]
        if self.has_statistics and precision != FLOAT32:
            words += ["--statistics", str(self.statistics(case.checkpoint))]
        run(words)

    def statistics(self, checkpoint: str) -> Path:
        """Activation statistics of a checkpoint, on records of the split `calibration`."""
        path = self.shop.folder / "statistics" / f"{checkpoint}.safetensors"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            data = self.shop.questions("calibration", _STATISTICS_RECORDS, per_image=2)
            words = ["calibrate", str(self.model / checkpoint), "--data", str(data)]
            run([*words, "--statistics", "-o", str(path)])
        return path


def _plan(case: Case) -> Sequence[str]:
    return [*case.words, "--plan-name", case.name]


def size(bundle: Path) -> int:
    """Bytes on disk; a file under two names counts once."""
    found = {
        path.stat().st_ino: path.stat().st_size for path in bundle.rglob("*") if path.is_file()
    }
    return sum(found.values())
