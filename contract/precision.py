"""In which floating-point type each part of a model computes and is stored."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from patchsieve.contract.errors import PatchsieveError

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}  # of one number


@dataclass(frozen=True)
class Precision:
    """One type for each part. Sums of norms, rotary angles and decisions are float32 in all.

    Attributes:
        tower: Vision tower and projector; its features are cast to the decoder's type at the end.
        decoder: Embedding table, layers, hidden rows, queries and caches.
        head: Last norm and output matrix. Logits are float32 always.

    Raises:
        PatchsieveError: A type is unknown.
    """

    tower: str = "float32"
    decoder: str = "float32"
    head: str = "float32"

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in BYTES:
                raise PatchsieveError(
                    "unknown precision",
                    found=kind[:60],
                    expected=", ".join(BYTES),
                    do="give one of these to --precision",
                )

    @classmethod
    def parse(cls, text: str) -> Precision:
        """Read "float16", or "tower=float16,decoder=bfloat16,head=float32".

        A tower that is not named is float32, a decoder too; a head that is not named is as the
        decoder, because both may be one table.
        """
        if "=" not in text:
            return cls(text, text, text)
        named: dict[str, str] = {}
        for word in text.split(","):
            part, _, kind = (each.strip() for each in word.partition("="))
            if part not in PARTS or part in named:
                raise PatchsieveError(
                    "cannot read the precision",
                    found=text[:120],
                    expected=f"one of {', '.join(BYTES)}, or each part once: "
                    "tower=float16,decoder=bfloat16,head=float32",
                    do="correct --precision",
                )
            named[part] = kind
        named.setdefault("head", named.get("decoder", cls.head))
        return cls(**named)

    def __str__(self) -> str:
        """As `parse` reads it, the short form where all parts have one type."""
        if len(set(self.kinds)) == 1:
            return self.decoder
        return ",".join(f"{part}={kind}" for part, kind in asdict(self).items())

    @property
    def kinds(self) -> tuple[str, str, str]:
        """The types of tower, decoder and head."""
        return (self.tower, self.decoder, self.head)


PARTS = tuple(asdict(Precision()))


def stored_as(kind: str) -> str:
    """The numpy type that holds a precision: numpy has no bfloat16, so its bits are a uint16."""
    return "uint16" if kind == "bfloat16" else kind
