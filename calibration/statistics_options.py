"""What a collection of activation statistics is asked to do. Needs no torch.

The fields are named as the options of `patchsieve calibrate --statistics`, and their defaults are
its defaults.
"""

from __future__ import annotations

from dataclasses import dataclass

from patchsieve.contract.errors import PatchsieveError


@dataclass(frozen=True)
class StatisticsOptions:
    """Which rows the statistics are about.

    Attributes:
        records: Conversations to draw from the data; all of them if there are fewer.
        max_tokens: Rows of a conversation, of text and images together; later ones are cut off.
        seed: Seed by which they are drawn.
    """

    records: int = 64
    max_tokens: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers by which nothing would be fed."""
        for name, least in (("records", 1), ("max_tokens", 1), ("seed", 0)):
            if getattr(self, name) < least:
                option = f"--{name.replace('_', '-')}"
                raise PatchsieveError(
                    "statistics cannot be collected with this number",
                    found=f"{option} {getattr(self, name)}",
                    expected=f"at least {least}",
                    do=f"correct {option}",
                )
