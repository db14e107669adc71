"""The plans that the tables compare, fitted to a model and to an average of tokens.

The average is over all decoder layers, those before the first site included, as ATP-LLaVA's table 2
counts. Where a number of tokens is whole, the nearest average is taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from patchsieve.contract.plan import MethodPlan, Plan, PseudoCls, SitePlan
from patchsieve.pruning.decoder.training import average_tokens
from patchsieve.pruning.recipes import Size, ivtp

KEEP_ALL, OFF = -1.0, 2.0  # a threshold that every score passes, and one that none does


@dataclass(frozen=True)
class Heads:
    """Thresholds that `patchsieve calibrate` makes.

    Attributes:
        method: "atp" learns them, "quantile" fixes constants, "fixed" fixes numbers of tokens.
        sites: Decoder layers.
        target: Mean tokens over all layers.
        options: Further options of the command line.
    """

    method: str
    sites: tuple[int, ...]
    target: int
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """A folder's name."""
        sites = "-".join(map(str, self.sites))
        options = (option.strip("-").replace(",", "-") for option in self.options)
        words = [self.method, sites, str(self.target), *options]
        return "_".join(words)


@dataclass(frozen=True, eq=False)
class Row:
    """One row of a table; two that say the same are still two.

    Attributes:
        label: What the table calls it.
        plan: What prunes; sites of `atp` without thresholds take those of `heads`.
        heads: Thresholds to make first.
        trains: The decoder is trained with the plan first, and its checkpoint asked.
        trains_tower: Tower, projector and decoder are trained together before, after the plan's
            first stage.
        finishes: How many times it is trained further then: with hard masks, or without `heads`
            on what the plan leaves in a bundle of the training before.
        is_blind: Every question is asked about one grey picture.
        not_run: Why the row has no numbers, if it has none.
    """

    label: str
    plan: Plan = field(default_factory=Plan)
    heads: Heads | None = None
    trains: bool = False
    trains_tower: bool = False
    finishes: int = 0
    is_blind: bool = False
    not_run: str = ""

    @property
    def bundle(self) -> str:
        """What bundles that can hold the plan are called.

        They are cut at its sites, and as many layers before each give their queries as it reads.
        """
        groups = [
            site.params.get("group", 1) if site.params.get("fusion") != "single" else 1
            for site in self.plan.sites
        ]
        cuts = "-".join(map(str, self.plan.layers))
        return f"{cuts}-of-{max(groups)}" if cuts else "whole"


@dataclass(frozen=True)
class Budgets:
    """Plans for a model.

    Args:
        size: The model.
        tower_layers: Layers of the tower that run.
    """

    size: Size
    tower_layers: int = 23

    @property
    def near(self) -> int:
        """A quarter of the tokens: 75 % fewer."""
        return round(self.size.num_patches / 4)

    @property
    def far(self) -> int:
        """A ninth of the tokens: 89 % fewer."""
        return round(self.size.num_patches / 9)

    def sites(self, target: int) -> tuple[int, ...]:
        """ATP's sites for an average: 4, 14, 24 of 32 layers, or 1, 13, 25 where it is low.

        All layers before the first site hold every token, which must leave some for the others.
        """
        layers, patches = self.size.num_layers, self.size.num_patches
        chosen = (4, 14, 24) if max(1, round(layers / 8)) * patches < 0.7 * target * layers else ()
        return tuple(max(1, round(i * layers / 32)) for i in chosen or (1, 13, 25))

    def average(self, counts: Sequence[float], sites: Sequence[int]) -> float:
        """Mean tokens over all layers."""
        return float(average_tokens(counts, sites, self.size.num_layers, self.size.num_patches))

    def falling(self, sites: Sequence[int], target: float, ratio: float) -> tuple[int, ...]:
        """Counts n, n r, n r^2, ... after the sites whose average is the target."""
        unit = [ratio**k for k in range(len(sites))]
        base = self.average([0.0] * len(sites), sites)
        first = (target - base) / (self.average(unit, sites) - base)
        return tuple(max(1, math.floor(first * part + 0.5)) for part in unit)

    def in_tower(self, method: str, keep: int, **params: object) -> Plan:
        """A method inside the tower.

        ToMe takes as many away in each layer as in any other, unless so few are left in the end
        that the last layers could not merge them.
        """
        step = (self.size.num_patches - keep) / self.tower_layers
        if method == "tome" and step > keep:
            params |= {"curve": "geometric"}
        return Plan(encoder=MethodPlan(method, {"keep": keep, **params}))

    def after(self, method: str, keep: int, **params: object) -> Plan:
        """A method between tower and decoder."""
        return Plan(projector=MethodPlan(method, {"keep": keep, **params}))

    def fastv(self, layer: int, target: int, rows: str = "last") -> Plan:
        """FastV at a layer."""
        (count,) = self.falling([layer], target, 1.0)
        params = {"keep_ratio": count / self.size.num_patches, "rows": rows}
        return Plan((SitePlan(layer, "fastv", params),))

    def random_at(self, layer: int, target: int) -> Plan:
        """Tokens drawn at a decoder layer: what FastV there has to beat."""
        (site,) = self.fastv(layer, target).sites
        return Plan((SitePlan(layer, "random", {"keep_ratio": site.params["keep_ratio"]}),))

    def fixed(self, sites: Sequence[int], target: int, ratio: float) -> Plan:
        """ATP's scores with fixed numbers instead of thresholds (table 2's pre-defined ratios)."""
        counts = self.falling(sites, target, ratio)
        params = {"theta_r": KEEP_ALL, "theta_s": OFF}
        return Plan(
            tuple(SitePlan(i, "atp", params, n) for i, n in zip(sites, counts, strict=True))
        )

    def atp(self, label: str, heads: Heads, *, trains: bool = False) -> Row:
        """ATP with thresholds that are made for it."""
        return Row(label, Plan(tuple(SitePlan(i, "atp") for i in heads.sites)), heads, trains)

    def ivtp(self, keep: int, **options: object) -> Plan:
        """IVTP with `keep` tokens at its end."""
        return ivtp(self.size, keep, **options)  # type: ignore[arg-type]

    def ivtp_at(self, target: int, **options: object) -> Plan:
        """IVTP with the number at its end whose average comes nearest."""
        plans = [self.ivtp(keep, **options) for keep in range(1, self.size.num_patches)]
        return min(plans, key=lambda plan: abs(self.ivtp_average(plan) - target))

    def ivtp_average(self, plan: Plan) -> float:
        """Mean tokens over all layers of a plan of fixed numbers."""
        assert plan.encoder is not None
        entering = plan.encoder.params["keep"]
        counts = [site.params["num_keep"] for site in plan.sites]
        return average_tokens(counts, plan.layers, self.size.num_layers, entering)

    def plus(self, method: str, keep: int) -> Plan:
        """Table 7's TopK+ and ToMe+: IVTP's schedule, with another method at every place of it.

        TopK+ goes by the visual CLS alone.
        """
        whole = self.ivtp(keep)
        assert whole.encoder is not None
        sites = tuple(
            replace(site, method=method, params={"num_keep": site.params["num_keep"]})
            for site in whole.sites
        )
        tower = MethodPlan(method, {"keep": whole.encoder.params["keep"]})
        pseudo = PseudoCls(text="none") if method == "topk" else None
        return Plan(sites, encoder=tower, pseudo_cls=pseudo)
