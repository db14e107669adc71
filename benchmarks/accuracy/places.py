"""Where a plan acts, and what it costs: what rows must share to be compared like with like."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

from patchsieve.calibration.encoder import Encoder
from patchsieve.contract.plan import Plan
from patchsieve.cost import RUNTIME, ModelShape, Schedule, ScorerShape, cost, no_pruning, of_plan
from patchsieve.cost.config import read_shape
from patchsieve.cost.methods import before_decoder
from patchsieve.runtime.records import Records

_SAMPLE = 200  # records whose first questions give the length of a prompt


def acts_in(plan: Plan) -> str:
    """Where tokens go: in the tower, after it, at the input of decoder layers."""
    places = []
    if plan.encoder is not None:
        places.append("tower")
    if plan.projector is not None:
        places.append("after the tower")
    if plan.sites:
        first, last = plan.layers[0], plan.layers[-1]
        is_run = len(plan.layers) > 3 and plan.layers == list(range(first, last + 1))
        layers = f"{first} to {last}" if is_run else ", ".join(map(str, plan.layers))
        places.append(f"decoder layer{'s' if first != last else ''} {layers}")
    return " and ".join(places) or "nowhere"


@dataclass(frozen=True)
class Costs:
    """FLOPs of plans on one model and one length of text, as the runtime executes them.

    Attributes:
        shape: The model.
        text_tokens: Rows of a prompt that are not visual.
    """

    shape: ModelShape
    text_tokens: int

    @classmethod
    def of(cls, checkpoint: Path, scorer: Path, data: Path) -> Costs:
        """Of a checkpoint, its CLIP and the mean prompt of a file of questions."""
        config = json.loads((scorer / "config.json").read_text(encoding="utf-8"))["text_config"]
        sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings")
        judge = ScorerShape(*(config[size] for size in sizes))
        encode, records = Encoder(str(checkpoint)), Records(data)
        lengths = []
        for number in range(min(_SAMPLE, len(records))):
            sample = encode(records[number])
            asked = int((sample.labels != -100).nonzero()[0])
            lengths.append(asked - sum(map(len, sample.visual)))
        shape = replace(read_shape(checkpoint), scorer=judge)
        return cls(shape, round(sum(lengths) / len(lengths)))

    def share(self, plan: Plan, average: float) -> float:
        """FLOPs of tower, decoder and scorer up to the first token, as a share of the unpruned.

        Args:
            plan: The plan.
            average: Mean tokens over the decoder's layers, as measured. A plan that adapts is
                counted at it: all tokens before the first site, one number after it.
        """
        if any(site.method == "atp" and site.budget is None for site in plan.sites):
            pruned = self._adaptive(plan, average)
        else:
            pruned = float(self._total(of_plan(self.shape, plan, text_tokens=self.text_tokens)[0]))
        return pruned / self._total(no_pruning(self.shape))

    def _adaptive(self, plan: Plan, average: float) -> float:
        """Between the two whole numbers of tokens that lie around the mean after the first site."""
        before, first = before_decoder(self.shape, plan), plan.layers[0]
        layers = self.shape.text.num_layers
        after = (average * layers - first * before.llm[0]) / (layers - first)
        low = math.floor(after)
        ends = []
        for count in (low, low + 1):
            llm = before.llm[:first] + (count,) * (layers - first)
            ends.append(self._total(replace(before, llm=llm)))
        return ends[0] + (after - low) * (ends[1] - ends[0])

    def _total(self, schedule: Schedule) -> int:
        return cost(self.shape, schedule, self.text_tokens, convention=RUNTIME).flops.total
