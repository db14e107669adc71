"""The papers' tables: which plans each compares, and with whom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from benchmarks.accuracy.plans import OFF, Budgets, Heads, Row
from patchsieve.contract.plan import Plan, PseudoCls, SitePlan


@dataclass(frozen=True)
class Part:
    """Rows under one heading.

    Attributes:
        title: The heading.
        rows: The first of the whole table is the unpruned model.
        champions: Labels whose paired differences to all other rows of the part are reported.
    """

    title: str
    rows: tuple[Row, ...]
    champions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        name: What `--tables` calls it.
        title: What it shows.
        parts: Its parts.
        kinds: Report tokens and accuracy by kind of question too.
    """

    name: str
    title: str
    parts: tuple[Part, ...]
    kinds: bool = False

    @property
    def rows(self) -> list[Row]:
        """All rows."""
        return [row for part in self.parts for row in part.rows]


FULL = Row("none")
BLIND = Row("none, without the picture", is_blind=True)
LEARNED, FIXED = "ATP, learned", "ATP, constants"
TRAINED, IVTP_TRAINED = "ATP, decoder trained", "IVTP, decoder trained"
IVTP_WHOLE = "IVTP, tower and decoder trained"
IVTP_TWICE = "IVTP, tower and decoder trained, for longer"
RANDOM_INSIDE, RANDOM_AFTER = "random in the tower", "random after the tower"
RANDOM_LATE = "random at layer 1"
FINISHED = "ATP, decoder trained, hard at the end"
TWICE = "ATP, decoder trained, hard for longer"


def main_table(to: Budgets) -> Table:
    """Every method at a quarter and at a ninth of the tokens."""
    parts = [Part("no pruning", (FULL, BLIND))]
    for target, words in ((to.near, "75 %"), (to.far, "89 %")):
        title = f"{words} fewer tokens: {target} of {to.size.num_patches}, mean over the layers"
        rows = (*methods(to, target), trained(to, target))
        if target == to.near:
            more = (finished(rows[-1], FINISHED), finished(rows[-1], TWICE, times=2))
        else:
            whole = replace(rows[-1], label=IVTP_WHOLE, trains_tower=True)
            more = (whole, replace(whole, label=IVTP_TWICE, finishes=1))
        rows, champion = (*rows, *more), more[-1].label
        champions = (champion, LEARNED, "IVTP", RANDOM_INSIDE, RANDOM_AFTER, RANDOM_LATE)
        parts.append(Part(title, rows, champions))
    return Table("main", "Every method at the same average number of visual tokens", tuple(parts))


def trained(to: Budgets, target: int) -> Row:
    """The papers' claims: ATP at a quarter, IVTP at a ninth, the decoder trained with them."""
    if target == to.near:
        # Where all tokens stay for one layer alone, more of them are left for the others.
        sites = to.sites(to.far)
        return to.atp(TRAINED, Heads("atp", sites, target), trains=True)
    return Row(IVTP_TRAINED, to.ivtp(target), trains=True)


def finished(row: Row, label: str, times: int = 1) -> Row:
    """A row whose decoder was trained, and then further without soft masks."""
    return replace(row, label=label, finishes=times)


def methods(to: Budgets, target: int) -> list[Row]:
    """Every method at one average."""
    rows = [
        Row(RANDOM_INSIDE, to.in_tower("random", target)),
        Row(RANDOM_AFTER, to.after("random", target)),
        Row("TopK in the tower", to.in_tower("topk", target)),
        Row("TopK after the tower", to.after("topk", target)),
        Row("EViT", to.in_tower("evit", target)),
        Row("ToMe", to.in_tower("tome", target)),
    ]
    if round(target**0.5) ** 2 == target:
        rows.append(Row("pooling", to.after("pooling", target)))
    rows.append(Row("GTP (IVTP in the tower alone)", to.in_tower("gtp", target)))
    for layer in (2, 1):
        if layer * to.size.num_patches < target * to.size.num_layers * 0.9:
            rows.append(Row(f"FastV at layer {layer}", to.fastv(layer, target)))
    rows.append(Row(RANDOM_LATE, to.random_at(1, target)))
    rows.append(Row("IVTP", to.ivtp_at(target)))
    if target == to.far:  # as the paper counts: tokens at the end
        rows.append(Row(f"IVTP, {target} at its end", to.ivtp(target)))
    sites = to.sites(target)
    rows.append(to.atp(FIXED, Heads("quantile", sites, target)))
    rows.append(to.atp(LEARNED, Heads("atp", sites, target)))
    return rows


def atp_ratios(to: Budgets) -> Table:
    """ATP-LLaVA's table 2."""
    parts = [Part("no pruning", (FULL,))]
    for target, words in ((to.near, "75 %"), (to.far, "89 %")):
        sites = to.sites(target)
        rows = [Row("fixed, one site at layer 1", to.fixed((1,), target, 1.0))]
        if sites[0] > 1:
            rows.append(Row(f"fixed, one site at layer {sites[0]}", to.fixed(sites[:1], target, 1)))
        for ratio, name in ((1 / 3, "a third"), (1 / 2, "half")):
            label = f"fixed, {name} kept from site to site"
            rows.append(Row(label, to.fixed(sites, target, ratio)))
        rows.append(to.atp(FIXED, Heads("quantile", sites, target)))
        rows.append(to.atp(LEARNED, Heads("atp", sites, target)))
        title = f"{words} fewer tokens, sites {', '.join(map(str, sites))}"
        parts.append(Part(title, tuple(rows), (LEARNED, FIXED)))
    sites = to.sites(to.far)
    halves = ",".join(map(str, to.falling(sites, to.near, 1 / 2)))
    rivals = {
        "fixed, one site": Heads("fixed", sites[:1], to.near),
        # The same share at every site, from all tokens on, comes to a third at these sites.
        "fixed, a third kept from site to site": Heads("fixed", sites, to.near),
        "fixed, half kept from site to site": Heads("fixed", sites, to.near, ("--counts", halves)),
    }
    rows = [to.atp(label, heads, trains=True) for label, heads in rivals.items()]
    title = f"75 % fewer tokens, decoder trained with each, sites {', '.join(map(str, sites))}"
    parts.append(Part(title, (*rows, trained(to, to.near)), (TRAINED,)))
    last = [finished(row, f"{row.label}, hard at the end") for row in parts[-1].rows]
    parts.append(Part(f"{title}, and hard at the end", tuple(last), (FINISHED,)))
    title = "ATP against fixed numbers with its own scores (ATP-LLaVA, table 2)"
    return Table("atp-ratios", title, tuple(parts), kinds=True)


def atp_parts(to: Budgets) -> Table:
    """ATP-LLaVA's tables 3 to 5."""
    target, sites = to.near, to.sites(to.near)
    options = ("--positions", "grid2d")
    grid2d = to.atp("", Heads("atp", to.sites(to.far), target, options), trains=True)
    rows = (
        to.atp(LEARNED, Heads("atp", sites, target)),
        to.atp("redundant pruning alone (constants)", Heads("quantile", sites, target)),
        grids("spatial pruning alone (nested grids)", sites, (0.2, 0.5, 0.9)),
        *(to.atp(f"{words} alone, learned", heads) for words, heads in alone(sites, target)),
        replace(trained(to, target), label="both, decoder trained (table 3)"),
        *(
            to.atp(f"{words} alone, decoder trained", heads, trains=True)
            for words, heads in alone(to.sites(to.far), target)
        ),
        Row("both, decoder trained with 2-D positions (PP)", grid2d.plan, grid2d.heads, True),
    )
    scores = (
        to.atp("self and cross", Heads("quantile", sites, target)),
        to.atp("self alone", Heads("quantile", sites, target, ("--modality", "self"))),
        to.atp("cross alone", Heads("quantile", sites, target, ("--modality", "cross"))),
    )
    parts = (
        Part("no pruning", (FULL,)),
        Part("redundant and spatial pruning (table 4)", rows, (LEARNED,)),
        Part("self and cross scores (table 5), constants", scores, ("self and cross",)),
    )
    return Table("atp-parts", "ATP's parts (ATP-LLaVA, tables 3 to 5)", parts, kinds=True)


def alone(sites: tuple[int, ...], target: int) -> list[tuple[str, Heads]]:
    """Heads that learn with one part of ATP alone."""
    parts = ("redundant", "spatial")
    made = [Heads("atp", sites, target, ("--parts", part)) for part in parts]
    return [(f"{part} pruning", heads) for part, heads in zip(parts, made, strict=True)]


def grids(label: str, sites: Sequence[int], levels: Sequence[float], **options: object) -> Row:
    """Spatial sampling alone, by a theta_s at each site."""
    spatial = {"theta_r": OFF, **options}
    pairs = zip(sites, levels, strict=True)
    return Row(label, Plan(tuple(SitePlan(i, "atp", spatial | {"theta_s": t}) for i, t in pairs)))


def ivtp_table(to: Budgets) -> Table:
    """IVTP's tables 4 to 8, training-free."""
    keep, whole = to.far, "IVTP"
    row = Row(whole, to.ivtp(keep))

    def of(label: str, **options: object) -> Row:
        return Row(label, to.ivtp(keep, **options))

    maps = (row, of("CLS row of the top layer", fusion="single"), of("layer by layer", group=1))
    fusions = (row, *(of(f, fusion=f) for f in ("mean", "max", "multiply")))
    texts = (
        row,
        of("visual CLS alone", pseudo_cls=PseudoCls(text="none")),
        of("all words", pseudo_cls=PseudoCls(text="all")),
        of("words like the visual CLS", pseudo_cls=PseudoCls(text="similarity")),
    )
    plan = to.ivtp(keep)
    assert plan.encoder is not None
    stages = (
        row,
        Row("TopK", to.in_tower("topk", keep)),
        Row("TopK+", to.plus("topk", keep)),
        Row("ToMe", to.in_tower("tome", keep)),
        Row("ToMe+", to.plus("tome", keep)),
        Row("IVTP-V", to.in_tower("gtp", keep)),
    )
    groups = (row, *(of(f"groups of {g}", group=g) for g in (2, 4, 6)))
    groups += (of("one group", group=to.size.num_layers - 1),)
    parts = (
        Part("no pruning", (FULL,)),
        Part("attention maps (table 4)", maps, (whole,)),
        Part("joining a group's layers (table 5)", fusions, (whole,)),
        Part("guidance by the question (table 6)", texts, (whole,)),
        Part("pruning in the decoder (table 7)", stages, (whole,)),
        Part("layers of a group (table 8)", groups, (whole,)),
    )
    title = f"IVTP's ablations, {keep} of {to.size.num_patches} tokens at the end (tables 4 to 8)"
    return Table("ivtp", title, parts)


def curves(to: Budgets) -> Table:
    """Every method from few tokens to many."""
    whole = to.size.num_patches
    targets = [round(whole * share) for share in (1 / 9, 1 / 4, 4 / 9)]
    rows: dict[str, list[Row]] = {}
    for target in targets:
        for row in methods(to, target):
            extra = ("TopK after the tower", LEARNED, "FastV at layer 2", RANDOM_LATE)
            is_extra = row.label in extra or "at its end" in row.label
            lowest = to.average([1.0] * 3, to.sites(target))
            is_out_of_reach = row.heads is not None and target < lowest + 2
            if not (is_extra or is_out_of_reach):
                rows.setdefault(str(target), []).append(row)
    parts = tuple(Part(f"{target} tokens", tuple(found)) for target, found in rows.items())
    return Table("curves", "Accuracy against tokens", (Part("no pruning", (FULL,)), *parts))


def options(to: Budgets) -> Table:
    """What the papers leave open and the exporter offers."""
    target = to.near
    sites = to.sites(target)

    def constants(label: str, *words: str) -> Row:
        return to.atp(label, Heads("quantile", sites, target, words))

    scores = (
        constants("min-max (default)"),
        constants("min-max, causal pairs", "--causal"),
        *(constants(n, "--normalisation", n) for n in ("rank", "softmax")),
        Row("none", not_run="not run: S_self is unbounded, and constants lie in (0, 1)"),
    )
    nested = (
        grids("2, 4, 8 (default)", sites, (0.2, 0.5, 0.5)),
        grids("3, 6, 12", sites, (0.5, 0.5, 0.5), granularities=[3, 6, 12]),
    )
    gtp = to.in_tower("gtp", target)
    contiguous = Plan(encoder=gtp.encoder, position_rule="contiguous")
    places = (Row("original (default)", gtp), Row("contiguous", contiguous))
    pooled = (
        Row("before the projection (default)", to.after("pooling", target)),
        Row("after the projection", to.after("pooling", target, place="after")),
    )
    late = PseudoCls(cls="penultimate")
    states = (
        Row("last layer, visual block (default)", to.ivtp(to.far)),
        Row("penultimate layer", to.ivtp(to.far, pseudo_cls=late)),
        Row("block with what is before the image", to.ivtp(to.far, block="prefix")),
        Row("state kept (carry); repool", not_run="not run: the exporter has carry alone"),
    )
    rows = (
        Row("last row (default)", to.fastv(2, target)),
        Row("the question's rows", to.fastv(2, target, rows="mean")),
    )
    cosine = (
        Row("attention (default)", to.in_tower("topk", target)),
        Row("cosine", to.in_tower("topk", target, score="cosine")),
    )
    parts = (
        Part("no pruning", (FULL,)),
        Part("ATP: normalisation and causal mode, constants", scores, ("min-max (default)",)),
        Part("ATP: granularities, spatial sampling alone", nested, ("2, 4, 8 (default)",)),
        Part("positions after GTP", places, ("original (default)",)),
        Part("IVTP: pseudo-CLS", states, ("last layer, visual block (default)",)),
        Part("FastV: whose attention", rows, ("last row (default)",)),
        Part("TopK: score", cosine, ("attention (default)",)),
        Part("pooling", pooled, ("before the projection (default)",)),
    )
    return Table("options", "What the papers leave open", parts)


TABLES: dict[str, Callable[[Budgets], Table]] = {
    "main": main_table,
    "atp-ratios": atp_ratios,
    "atp-parts": atp_parts,
    "ivtp": ivtp_table,
    "curves": curves,
    "options": options,
}
