"""How the matrices of a model are stored, and what `--precision` may say of it.

Three facts are kept apart: the *type* that a part computes in (`patchsieve.contract.precision`),
the *format* of its matrices, and the type of the caches. Norms, biases, the patch embedding and all
else that is no matrix have their part's type.

To add a format: a row of `FORMATS`, a row of `PACKINGS` in export/weights.py that writes it, and
its spelling in `Lowering.Linear` of export/lowering.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.precision import BYTES, Precision


@dataclass(frozen=True)
class Format:
    """A way to store matrices.

    Attributes:
        name: As the manifest and `--precision` call it.
        bits: Of one number, without its scale; 0 for the bits of its part's type.
        block: Numbers along the input axis that share a scale; 0 if an output channel has one.
        is_dynamic: `cpu` computes in this format too: it rounds the rows that a matrix multiplies.
        is_float: Its numbers are floating point of `bits` bits: FP8 (E4M3) or FP4 (E2M1).
        is_proven: Engines with it have run, or run on a CPU. No GPU has run one that has not.
        error: Of what a matrix makes of a row, or a layer of matrices, over the row in the 2-norm:
            the mean over rows that `verify` allows. 0 if it keeps each number. Measured on the demo
            model and on tiny ones, int8 makes 0.005 to 0.03 and int4 0.05 to 0.2, at any depth; a
            matrix with wrong scales or in a wrong place makes 1 and more.
    """

    name: str
    bits: int = 0
    block: int = 0
    is_dynamic: bool = False
    error: float = 0.0
    is_float: bool = False
    is_proven: bool = True

    @property
    def rounds_rows(self) -> bool:
        """TensorRT computes in it too, where a scale for the rows is stored."""
        return self.is_dynamic or (self.is_float and not self.block)

    @property
    def has_levels(self) -> bool:
        """Its scales are FP8 themselves, with one of float32 for the whole matrix."""
        return self.is_float and self.block > 0

    def num_bytes(self, size_in: int, size_out: int, kind: str) -> int:
        """Bytes of a matrix with its scales, in a part of a type."""
        if not self.bits:
            return size_in * size_out * BYTES[kind]
        scales = size_out * (size_in // self.block if self.block else 1)
        stored = scales + BYTES["float32"] if self.has_levels else scales * BYTES[kind]
        return size_in * size_out * self.bits // 8 + stored

    def takes(self, size_in: int, size_out: int) -> bool:
        """Whether it can hold a matrix of these sizes."""
        if self.bits == 4 and size_out % 2:
            return False
        return not self.block or size_in % self.block == 0


FLOAT = "float"  # each number in the type of its part
INT8 = "int8"
INT8_WEIGHTS = "int8-weights"
INT4 = "int4"  # in `--precision`: int4-32 or int4-128, by the targets
INT4_CPU, INT4_GPU = "int4-32", "int4-128"
FP8, NVFP4 = "fp8", "nvfp4"
_ROWS = (
    Format(FLOAT),
    Format(INT8, bits=8, is_dynamic=True, error=0.1),
    Format(INT8_WEIGHTS, bits=8, error=0.1),
    Format("int4-32", bits=4, block=32, error=0.5),
    Format("int4-64", bits=4, block=64, error=0.5),
    Format("int4-128", bits=4, block=128, error=0.5),
    Format(FP8, bits=8, error=0.25, is_float=True, is_proven=False),
    Format(NVFP4, bits=4, block=16, error=0.5, is_float=True, is_proven=False),
)
FORMATS = {row.name: row for row in _ROWS}

# Keys of `--precision` that name a part. "decisions" are the decoder's layers before the plan's
# last site, whose rounding changes what survives; "step" is the decoder's copy for single rows.
TOWER, PROJECTOR, SCORER = "tower", "projector", "scorer"
DECODER, DECISIONS, STEP, HEAD = "decoder", "decisions", "step", "head"
CACHE = "cache"
_TYPED = {TOWER: "tower", DECODER: "decoder", HEAD: "head"}  # parts with a type of their own
_PARTS = (TOWER, PROJECTOR, SCORER, DECODER, DECISIONS, STEP, HEAD)
_LOW_HEAD = {HEAD: INT8_WEIGHTS}
PRESETS: dict[str, dict[str, str]] = {
    INT8: {TOWER: INT8, SCORER: INT8, DECODER: INT8} | _LOW_HEAD,
    INT4: {TOWER: INT8, SCORER: INT8, DECODER: INT4, DECISIONS: INT8} | _LOW_HEAD,
    "mixed": {TOWER: INT8, SCORER: INT8, DECODER: INT8, STEP: INT4} | _LOW_HEAD,
    FP8: {TOWER: FP8, SCORER: FP8, DECODER: FP8, HEAD: FP8},
    NVFP4: {TOWER: FP8, SCORER: FP8, DECODER: NVFP4, DECISIONS: FP8, HEAD: FP8},
}


@dataclass(frozen=True)
class Formats:
    """The format of each matrix.

    Attributes:
        parts: Of each part that is not stored in floating point.
        exceptions: Pairs of a matrix's name and its format; the last that fits counts. A name may
            be a pattern, or the beginning of names up to a dot.
        decided: The decoder's layers before the plan's last site, which have the format of
            "decisions" if it is among the parts.
    """

    parts: Mapping[str, str] = field(default_factory=dict)
    exceptions: tuple[tuple[str, str], ...] = ()
    decided: int = 0

    @property
    def has_step(self) -> bool:
        """The decoder has a second copy, which feeds single rows."""
        return STEP in self.parts

    @property
    def used(self) -> tuple[str, ...]:
        """Every format that something asks for, each once."""
        return tuple(dict.fromkeys([*self.parts.values(), *(kind for _, kind in self.exceptions)]))

    def of(self, part: str, name: str, size_in: int, size_out: int) -> str:
        """The format of a matrix.

        Args:
            part: One of the parts that `--precision` names.
            name: Of the matrix, without ".weight".
            size_in: Its input channels.
            size_out: Its output channels.

        Returns:
            A key of `FORMATS`; int8 weights where the format of the part cannot hold the sizes.
        """
        chosen = self.parts.get(part, FLOAT)
        if part == DECODER and DECISIONS in self.parts and _layer(name) < self.decided:
            chosen = self.parts[DECISIONS]
        for pattern, kind in self.exceptions:
            if fits(pattern, name):
                chosen = kind
        return chosen if FORMATS[chosen].takes(size_in, size_out) else INT8_WEIGHTS


def _layer(name: str) -> int:
    """The decoder layer of a matrix, such as layers.3.mlp.up_proj."""
    return int(name.split(".")[1])


def fits(pattern: str, name: str) -> bool:
    """Whether a pattern of `--precision` means a matrix."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


@dataclass(frozen=True)
class Chosen:
    """What `--precision` says, whole.

    Attributes:
        types: Type of each part.
        formats: Format of each matrix.
        cache: Type of the caches.
    """

    types: Precision
    formats: Formats
    cache: str


def parse(
    text: str, *, is_for_gpus: bool = False, int4: str = INT4_CPU, decided: int = 0
) -> Chosen:
    """Read `--precision`: a type, a format or a preset, then parts and matrices by name.

    Examples: "float16", "int4", "mixed", "int4:float16,head=float16",
    "tower=int8,decoder=int4-64,layers.0=float,*.down_proj=int8". A format may be followed by the
    type that its part computes in. Without it the type is float16 if every target is a GPU, float32
    otherwise.

    Args:
        text: What the user gave.
        is_for_gpus: No target runs on a CPU.
        int4: What "int4" means for the targets.
        decided: The decoder's layers before the plan's last site.

    Raises:
        PatchsieveError: It cannot be read.
    """
    whole, named = _words(text)
    kind, _, given = whole.partition(":")
    parts = dict.fromkeys(_TYPED, whole)
    if kind in PRESETS:
        parts = {
            key: f"{value}:{given}" if given else value for key, value in PRESETS[kind].items()
        }
    elif not whole:
        parts = {}
    parts |= {key: value for key, value in named.items() if key in _PARTS}
    default = "float16" if is_for_gpus else "float32"
    split = {key: _split(value, text, int4) for key, value in parts.items()}
    low = any(kind is None for _, kind in split.values())
    types = {key: kind or default for key, (_, kind) in split.items() if key in _TYPED}
    types.setdefault(TOWER, default if low else "float32")
    types.setdefault(DECODER, default if low else "float32")
    types.setdefault(HEAD, types[DECODER])
    precision = Precision(**types)
    _check_types(split, precision, text)
    rest = {k: v for k, v in named.items() if k not in (*_PARTS, CACHE)}
    exceptions = tuple((k, _excepted(k, v, text, int4)) for k, v in rest.items())
    stored = {key: n for key, (n, _) in split.items() if n != FLOAT or key == DECISIONS}
    formats = Formats(stored, exceptions, decided)
    return Chosen(precision, formats, named.get(CACHE, precision.decoder))


def _words(text: str) -> tuple[str, dict[str, str]]:
    """What is said of the whole, "" if nothing, and of each name."""
    words = [word.strip() for word in text.split(",")]
    whole = "" if "=" in words[0] else words.pop(0)
    named: dict[str, str] = {}
    for word in words:
        key, mark, value = (each.strip() for each in word.partition("="))
        if not (mark and key and value) or key in named:
            raise _unreadable(text)
        named[key] = value
    if not (whole or named) or text.lstrip().startswith(",") or whole.endswith(":"):
        raise _unreadable(text)
    return whole, named


def _split(value: str, text: str, int4: str) -> tuple[str, str | None]:
    """Format and type of "int4", "int4:float16", "float16" or "float"; None for no type."""
    if value in BYTES:
        return FLOAT, value
    name, mark, kind = value.partition(":")
    name = int4 if name == INT4 else name
    if name not in FORMATS or (mark and kind not in BYTES):
        raise _unreadable(text)
    return name, kind or None


def _excepted(name: str, value: str, text: str, int4: str) -> str:
    """Format of single matrices, which have no type of their own."""
    form, kind = _split(value, text, int4)
    if kind is not None:
        raise PatchsieveError(
            f"matrices have the type of their part: --precision gives {name[:80]} another type",
            found=f"{name[:80]}={value}",
            expected=f"a format alone, such as {name[:80]}={form}",
            do="leave the type out there, or give it to the part in --precision",
        )
    return form


def _check_types(
    split: Mapping[str, tuple[str, str | None]], precision: Precision, text: str
) -> None:
    """Refuse a type for a part that has the type of another."""
    same = dict.fromkeys((PROJECTOR, SCORER), precision.tower)
    same |= dict.fromkeys((DECISIONS, STEP), precision.decoder)
    for part, (_, kind) in split.items():
        if part in same and kind not in (None, same[part]):
            raise PatchsieveError(
                f"the {part} has a type that is not its own to choose",
                found=f"{part}={kind} in {text[:80]}",
                expected=same[part],
                do=f"leave the type of the {part} out of --precision",
            )


def names_matched(formats: Formats, names: Iterable[str]) -> None:
    """Refuse an exception that no matrix fits.

    Raises:
        PatchsieveError: A name is of no matrix.
    """
    known = list(names)
    for pattern, _ in formats.exceptions:
        if not any(fits(pattern, name) for name in known):
            raise PatchsieveError(
                "--precision names a matrix that the model does not have",
                found=pattern[:80],
                expected=f"{', '.join(_PARTS)}, or a name such as {known[0]} or *.down_proj",
                do="correct the name in --precision",
            )


def _unreadable(text: str) -> PatchsieveError:
    return PatchsieveError(
        "cannot read the precision",
        found=text[:120],
        expected=f"a type ({', '.join(BYTES)}), a format ({', '.join([INT4, *FORMATS])}) or a "
        f"preset ({', '.join(PRESETS)}); or parts, such as tower=int8,decoder=int4,head=float16",
        do="correct --precision",
    )
