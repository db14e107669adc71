"""What physics allows: FLOPs over peak and bytes over bandwidth, before anything is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from patchsieve import cost as costs
from patchsieve.contract.manifest import Manifest
from patchsieve.contract.weights import HEAD, LAYER

# Dense float16 TFLOP/s and GB/s of memory, from the vendor's data sheets, by a part of the name.
PEAKS = {
    "H200": (989.0, 4800.0),
    "H100": (989.0, 3350.0),
    "A100": (312.0, 1935.0),
    "L40S": (362.0, 864.0),
    "RTX 4090": (165.2, 1008.0),
    "RTX 5090": (209.5, 1792.0),
    "AGX Orin": (42.5, 204.8),
    "Orin Nano": (8.5, 102.4),
}


@dataclass(frozen=True)
class Floor:
    """Least work of an answer under one plan.

    Attributes:
        prefill_flops: Of the decoder.
        vision_flops: Of tower and projector.
        decode_bytes: Weights of the decoder and the cache's rows, read for one token.
        visual_kv_bytes: Keys and values of visual tokens alone, as the papers count them.
    """

    vision_flops: int
    prefill_flops: int
    decode_bytes: int
    visual_kv_bytes: int

    def to_dict(self, peak: tuple[float, float] | None) -> dict[str, Any]:
        """With times where the device's peak is known."""
        times = None
        if peak is not None:
            times = {
                "vision": round(self.vision_flops / peak[0] / 1e9, 4),
                "prefill": round(self.prefill_flops / peak[0] / 1e9, 4),
                "per_token": round(self.decode_bytes / peak[1] / 1e6, 4),
            }
        return {**vars(self), "ms": times}


def peak_of(device: str) -> tuple[float, float] | None:
    """Peak of a device by its name; None if it is not in the table."""
    return next((peak for name, peak in PEAKS.items() if name in device), None)


def floors(facts: Manifest, text_tokens: int) -> dict[str, Floor]:
    """The floor of each plan of a bundle whose decisions keep exactly their budgets.

    Args:
        facts: The bundle's manifest.
        text_tokens: Rows of the prompt that are not visual.
    """
    shape = costs.from_manifest(facts)
    weights = decoder_weights(facts)
    first = facts.stages[0]
    row = facts.row_bytes(first) // first.num_layers  # keys and values of one row in one layer
    found = {}
    for name, plan in facts.plans.items():
        schedule, _ = costs.of_plan(shape, plan, text_tokens=text_tokens)
        flops = costs.cost(shape, schedule, text_tokens, convention=costs.RUNTIME).flops
        visual = row * sum(schedule.llm)
        found[name] = Floor(
            vision_flops=flops.vision,
            prefill_flops=flops.llm,
            decode_bytes=weights + visual + row * text_tokens * len(schedule.llm),
            visual_kv_bytes=visual,
        )
    return found


def decoder_weights(facts: Manifest) -> int:
    """Bytes of the decoder's layers and of the output matrix."""
    return sum(
        facts.files[path].size
        for path, entry in facts.weights.items()
        if entry.part in (LAYER.name, HEAD.name)
    )
