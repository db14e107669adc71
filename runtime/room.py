"""Whether a turn fits what a bundle and a cache reserve, asked before anything is touched."""

from __future__ import annotations

from dataclasses import dataclass

from patchsieve.contract.errors import CapacityError
from patchsieve.contract.manifest import Limits, Manifest
from patchsieve.runtime.cache import Cache


@dataclass(frozen=True)
class Need:
    """What a turn asks for.

    Attributes:
        text: Text tokens that it feeds.
        images: Images that it feeds.
        all_images: Images of the conversation with it.
        new_tokens: The most tokens of its answer.
    """

    text: int
    images: int
    all_images: int
    new_tokens: int


def check_limits(need: Need, limits: Limits) -> None:
    """Refuse a turn that asks for more than any request may.

    Raises:
        CapacityError: It asks for too many new tokens, images or text tokens.
    """
    for what, found, most, option in (
        ("new tokens", need.new_tokens, limits.max_new_tokens, "--max-new-tokens"),
        ("images", need.all_images, limits.max_images, "--max-images"),
        ("text tokens", need.text, limits.max_text_tokens, "--max-text-tokens"),
    ):
        if found > most:
            raise CapacityError(
                f"the request has too many {what} for this bundle",
                found=found,
                expected=f"at most {most}",
                do=f"shorten it, or export with a larger {option}",
            )


def check_room(need: Need, facts: Manifest, plan: str, cache: Cache, continues: bool) -> None:
    """Refuse a turn whose rows do not fit the cache of every stage.

    Args:
        need: What it asks for.
        facts: The bundle's manifest.
        plan: Name of the plan.
        cache: The conversation's.
        continues: The rows in the cache stay.

    Raises:
        CapacityError: A stage has too few free slots.
    """
    side_layer = facts.side_layer(plan)
    for stage, budget in zip(cache.stages, facts.budgets(plan), strict=True):
        used = stage.length if continues else 0
        # The last new token is answered but never fed; new ones overwrite side rows.
        side = need.images if stage.stage.last <= side_layer else 0
        needed = used + need.text + need.images * budget + max(need.new_tokens - 1, side)
        if needed > stage.slots:
            raise CapacityError(
                "the conversation is full",
                found=f"{needed} rows needed with this turn",
                expected=f"at most {stage.slots} in layers {stage.stage.first} to "
                f"{stage.stage.last - 1}",
                do="start another, ask for fewer new tokens, or export with a larger "
                "--max-text-tokens",
            )
