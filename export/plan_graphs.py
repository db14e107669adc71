"""The graphs of a plan: its decisions, and its vision graph if it prunes before the decoder."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import torch

from patchsieve.contract import names
from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.model import VisionModel
from patchsieve.contract.plan import TEXTS, Plan
from patchsieve.export.families.specs import DecoderSpec
from patchsieve.export.graphs.decision import decide_graph
from patchsieve.export.graphs.joint import JointCls
from patchsieve.export.graphs.vision import Vision
from patchsieve.export.methods import build_encoder, build_method, build_projector
from patchsieve.export.sites import check_sites, resolve_budgets

Progress = Callable[[str, float], None]


def decide_graphs(
    plan: Plan,
    plan_name: str,
    spec: DecoderSpec,
    vision: VisionModel,
    num_visual: int,
    dtype: torch.dtype,
    progress: Progress = lambda *_: None,
) -> tuple[Plan, dict[str, ir.Model]]:
    """Resolve a plan's budgets and trace its decisions on images of `num_visual` tokens."""
    methods = [build_method(site) for site in plan.sites]
    check_sites(plan, methods)
    plan = resolve_budgets(plan, num_visual)
    graphs = {}
    for done, (site, method) in enumerate(zip(plan.sites, methods, strict=True)):
        progress(f"tracing {site.method} at layer {site.layer}", done / len(methods))
        graphs[names.decide(plan_name, site.layer)] = decide_graph(
            method, site.layer, spec, vision.grid, num_visual, dtype
        )
    return plan, graphs


def plan_vision(
    plan: Plan,
    facts: VisionModel,
    size: int,
    joint_width: int | None,
    out_dtype: torch.dtype | None = None,
) -> Vision:
    """The module of a plan's vision graph.

    Args:
        plan: The plan.
        facts: The tower's measures.
        size: Width of the decoder.
        joint_width: Of the space that the scorer's text lies in, E; None without a scorer.
        out_dtype: Of the features, that of the decoder; by default the tower's own.

    Raises:
        PatchsieveError: A method is unknown, or does not fit the tower; or the plan compares words
            with images and there is no scorer, or no class token.
    """
    joint, pseudo = None, plan.pseudo_cls
    if pseudo is not None and pseudo.needs_scorer:
        others = ", ".join(text for text in TEXTS if text != pseudo.text)
        if not facts.has_cls:
            raise PatchsieveError(
                "a plan cannot compare words with a tower that has no class token",
                found=facts.model_type,
                expected=f"a pseudo_cls with one of the texts {others}",
                do="add --text all",
            )
        if joint_width is None:
            raise PatchsieveError(
                "the plan compares words with images, but there is no scorer",
                expected="the CLIP that the vision tower was taken from",
                do="add --scorer open_clip (or a Hugging Face CLIP directory) to the export of a "
                "new bundle; or do without by --text all or --text none",
            )
        joint = JointCls(facts, joint_width, has_last=pseudo.cls == "last")
    return Vision(
        facts,
        size,
        build_encoder(plan.encoder),
        build_projector(plan.projector, facts.num_layers_run),
        out_dtype=out_dtype,
        has_cls_outputs=pseudo is not None,
        joint=joint,
    )
