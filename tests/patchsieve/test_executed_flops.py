"""The graphs of a bundle do as much work as the cost model says, counted at the shapes of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from patchsieve.contract import names
from patchsieve.contract.manifest import Limits
from patchsieve.contract.plan import NO_PRUNING, MethodPlan, Plan, PseudoCls, SitePlan
from patchsieve.cost import (
    RUNTIME,
    cost,
    from_bundle,
    from_manifest,
    in_decoder,
    no_pruning,
    of_plan,
)
from patchsieve.cost.methods import before_decoder
from patchsieve.export.exporter import ExportOptions, export
from patchsieve.export.reuse import reuse
from patchsieve.pruning.recipes import Size, ivtp
from patchsieve.runtime.bundle import Bundle
from patchsieve.runtime.cache import StageCache
from patchsieve.runtime.model import Model
from patchsieve.runtime.ort.backend import OrtBackend
from patchsieve.verify.recorder import Recorder
from tests.support.bundles import PROMPT, command_json
from tests.support.models import make_checkpoint, tiny_llava
from tests.support.tiny_bundles import pictures
from tests.support.tiny_clip import save_clip
from tests.support.tower_bundles import PLANS, Towers, towers

__all__ = ["towers"]
PRODUCTS = ("MatMul", "Gemm", "Conv", "MultiHeadAttention", "GroupQueryAttention")


@dataclass
class Work:
    """FLOPs of one graph.

    Attributes:
        model: Products with weights, and attention: what the cost model counts.
        decisions: Products of two activations outside attention.
    """

    model: int = 0
    decisions: int = 0


class Shapes(Recorder):
    """A backend that keeps the shapes of what each graph was fed and returned at first."""

    def forget(self) -> None:
        """Start anew, for another request."""
        super().forget()
        self.shapes: dict[str, dict[str, tuple[int, ...]]] = {}

    def run(self, graph: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Run a graph without caches."""
        return self._noted(graph, inputs, super().run(graph, inputs))

    def run_stage(self, stage: int, inputs: Mapping[str, Any], cache: StageCache) -> dict[str, Any]:
        """Run a stage."""
        return self._noted(names.stage(stage), inputs, super().run_stage(stage, inputs, cache))

    def _noted(self, graph: str, inputs: Mapping[str, Any], out: dict[str, Any]) -> dict[str, Any]:
        seen = {**inputs, **out}
        shapes = {name: self.inner.to_numpy(value).shape for name, value in seen.items()}
        self.shapes.setdefault(graph, shapes)
        return out


class Tap:
    """A model whose graphs give the inputs and outputs of every product."""

    def __init__(self, bundle: Path) -> None:
        self.bundle = bundle
        self.graphs: dict[str, onnx.ModelProto] = {}

        def recorder(opened: Bundle) -> Shapes:
            facts = opened.manifest
            graphs = {facts.vision_graph(plan) for plan in facts.plans}
            graphs |= {names.stage(index) for index in range(len(facts.stages))}
            graphs |= {names.SCORER} if facts.scorer is not None else set()
            models = {graph: self._tapped(opened, graph) for graph in graphs}
            self.recorder = Shapes(OrtBackend(opened, threads=1, models=models))
            return self.recorder

        self.model = Model(bundle, backend=recorder, check="size")

    def _tapped(self, opened: Bundle, graph: str) -> bytes:
        model = onnx.load(opened.graph_path(graph), load_external_data=False)
        self.graphs[graph] = onnx.ModelProto()
        self.graphs[graph].CopyFrom(model)
        known = {v.name for v in (*model.graph.output, *model.graph.input)}
        known |= {tensor.name for tensor in model.graph.initializer}
        for node in products(model):
            for name in (*node.input[:3], node.output[0]):
                if name and name not in known:
                    known.add(name)
                    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
        return model.SerializeToString()

    def count(self, graph: str) -> Work:
        """FLOPs of one graph in the last run, two for a multiply-accumulate."""
        work, model = Work(), self.graphs[graph]
        weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
        for node in products(model):
            known = self.recorder.shapes[graph] | weights
            shapes = [known[name] for name in (*node.input[:2], node.output[0])]
            flops = flops_of(node, *shapes)
            if node.input[1] in weights or "Attention" in node.op_type:
                work.model += flops
            else:
                work.decisions += flops
        return work


def products(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Nodes that multiply."""
    for node in model.graph.node:
        if node.op_type in PRODUCTS:
            yield node


def flops_of(node: onnx.NodeProto, left: Any, right: Any, out: Any) -> int:
    """FLOPs of one node from the shapes of its first two inputs and its output."""
    if node.op_type == "Conv":  # kernel [out, in, h, w]
        return 2 * math.prod(out) * math.prod(right[1:])
    if "Attention" in node.op_type:  # all pairs, twice: with the keys and with the values
        return 2 * 2 * left[0] * left[1] * right[1] * left[2]
    return 2 * math.prod(out) * left[-1]


# Plans whose decoder sites fix a number, with a row that judges and without.
JUDGED: dict[str, Plan] = {
    "ivtp": ivtp(Size(16, 3), 4, group=1),
    "pooled": Plan(
        (SitePlan(2, "ivtp", {"num_keep": 3, "group": 1}),),
        projector=MethodPlan("pooling", {"keep": 9}),
        pseudo_cls=PseudoCls(cls="penultimate"),
    ),
    "topk-cls": Plan((SitePlan(1, "topk", {"num_keep": 5}),), pseudo_cls=PseudoCls("none")),
    "topk-last": Plan((SitePlan(1, "random"), SitePlan(2, "topk", {"num_keep": 5, "row": "last"}))),
    "tome-decoder": Plan(
        (SitePlan(1, "tome", {"num_keep": 9}), SitePlan(2, "tome", {"num_keep": 5}))
    ),
}


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tap]:
    """A bundle with a text scorer."""
    folder = tmp_path_factory.mktemp("judged")
    llava, processor = tiny_llava("llama", layers=3)
    make_checkpoint.save_llava(folder / "checkpoint", llava, processor)
    options = ExportOptions(
        plan=JUDGED["ivtp"],
        plan_name="ivtp",
        limits=Limits(64, 8, 2),
        scorer=str(save_clip(folder / "clip", llava)),
    )
    export(str(folder / "checkpoint"), folder / "bundle", options)
    for name in list(JUDGED)[1:]:
        reuse(folder / "bundle", JUDGED[name], name)
    tap = Tap(folder / "bundle")
    yield tap
    tap.model.close()


@pytest.fixture(scope="module")
def tap(towers: Towers) -> Iterator[Tap]:
    tap = Tap(towers.bundle)
    yield tap
    tap.model.close()


@pytest.mark.slow_rows("ivtp")
@pytest.mark.parametrize("plan", [NO_PRUNING, *PLANS, *JUDGED])
def test_executed_shapes_cost_and_inspect_agree(request: pytest.FixtureRequest, plan: str) -> None:
    tap: Tap = request.getfixturevalue("judged" if plan in JUDGED else "tap")
    facts = tap.model.facts
    tap.recorder.forget()
    result = tap.model.generate(pictures(1), PROMPT, plan=plan, max_new_tokens=1)
    text_tokens = result.prompt_tokens - result.visual_tokens
    shape, survivors = from_bundle(tap.bundle, facts), [len(site.kept) for site in result.sites]
    adapts = any(site.method == "atp" for site in facts.plans[plan].sites)
    given = survivors if adapts else None
    schedule, is_exact = of_plan(shape, facts.plans[plan], given, text_tokens=text_tokens)
    assert is_exact and list(schedule.llm[first] for first in facts.plans[plan].layers) == survivors
    # The windows of a scorer are estimated from all of the text; the question alone is executed.
    fed = tap.recorder.shapes.get(names.SCORER, {})
    assert (schedule.windows > 0) == bool(fed)
    executed = replace(schedule, windows=fed[names.TEXT_IDS][0] if fed else 0)
    expected = cost(shape, executed, text_tokens, convention=RUNTIME).flops
    vision = tap.count(facts.vision_graph(plan))
    stages = [tap.count(names.stage(index)) for index in range(len(facts.stages))]
    assert vision.model == expected.vision
    assert sum(stage.model for stage in stages) == expected.llm
    assert not any(stage.decisions for stage in stages)
    assert (tap.count(names.SCORER).model if fed else 0) == expected.scorer
    full = cost(shape, no_pruning(shape), text_tokens, convention=RUNTIME).flops
    if plan == NO_PRUNING:
        assert vision.decisions == 0 and schedule == no_pruning(shape)
    else:
        assert expected.llm < full.llm
    # `inspect` and `cost` of the bundle say the same of this request, and of the largest.
    for words in ((), ("--text-tokens", text_tokens, "--images", 1)):
        counted = command_json("cost", tap.bundle, "--plan", plan, *words)[1]
        if words and not adapts:
            assert (
                counted["flops"]
                == cost(shape, schedule, text_tokens, convention=RUNTIME).flops.to_dict()
            )
        told = command_json("inspect", tap.bundle, "--plan", plan, *words)[1]["plans"][plan]
        assert (told["flops"], told["flops_unpruned"], told["average_tokens"]) == (
            counted["flops"],
            counted["unpruned"]["flops"],
            counted["average_tokens"],
        )
        assert told["kv_bytes"] == counted["kv_bytes_reserved"]
        assert told["is_upper_bound"] == counted["is_upper_bound"] == adapts
    print(f"{plan}: decisions {vision.decisions / vision.model:.1%} of the tower")


def test_decisions_of_rollout_cost_what_the_chain_costs(tap: Tap) -> None:
    facts = tap.model.facts
    tap.recorder.forget()
    tap.model.generate(pictures(1), PROMPT, plan="gtp", max_new_tokens=1)
    places = {1: 37, 3: 21}  # rows of each group's layers
    width, heads = facts.vision.hidden_size, facts.vision.num_heads
    expected = 0
    for rows in places.values():
        first = 2 * rows * width + 2 * heads * rows  # one row of the top layer
        below = 2 * rows * rows * width + 2 * heads * rows * rows  # a column sum of the lower one
        expected += first + below
    assert tap.count(names.vision("gtp")).decisions == expected


def test_a_site_behind_the_tower_is_counted_from_what_enters(towers: Towers) -> None:
    facts = towers.model.facts
    shape, plan = from_manifest(facts), facts.plans["topk"]
    schedule, is_exact = of_plan(shape, plan)
    assert is_exact and schedule.llm == (9, 5)
    assert schedule == in_decoder(shape, [5], [1], before_decoder(shape, plan))
