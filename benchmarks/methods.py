"""Write docs/methods.md and the README's table of methods from the catalogue.

    python -m benchmarks.methods

A test fails while the catalogue says something else than the two files.
"""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path
from textwrap import fill

from patchsieve import cost, plans
from patchsieve.cli.plan_options import default_of
from patchsieve.pruning import catalogue
from patchsieve.pruning.entry import (
    ADAPTS,
    DECODER,
    ENCODER,
    NUMBER,
    PROJECTOR,
    RATIO,
    RECIPE,
    Entry,
    Option,
)
from patchsieve.tables import flops, size

ROOT = Path(__file__).resolve().parents[1]
README, PAGE = ROOT / "README.md", ROOT / "docs" / "methods.md"
WIDTH = 120
TEXT_TOKENS = 64
LLAVA_7B = cost.shape_of_config({"model_type": "llava"})

_WHERE = {
    RECIPE: ("whole system", "The whole system"),
    DECODER: ("in the decoder", "In the decoder"),
    ENCODER: ("in the tower", "In the vision tower"),
    PROJECTOR: ("after the tower", "Between tower and decoder"),
}
_OPTION = {RECIPE: "--method", DECODER: "--method", ENCODER: "--encoder", PROJECTOR: "--projector"}
_LEAVES = {
    RATIO: "It keeps a fixed ratio.",
    NUMBER: "It leaves a fixed number.",
    ADAPTS: "How many stay adapts to the image, within the budget.",
}
_HEAD = (
    "One entry for each method and place, written by `python -m benchmarks.methods` from "
    "`pruning/entries`. `patchsieve export` and `patchsieve cost` take the same options, and "
    "so does `patchsieve.plans.build` with underscores: `--keep-ratio 0.5` is `keep_ratio=0.5`. "
    "One plan may prune at several places; [plan.md](plan.md) explains plans.",
    "Each example is counted on LLaVA-1.5-7B, of which `config.json` is, beside no pruning: "
    f"one image, {TEXT_TOKENS} text tokens, float16, as a bundle executes it.",
)


def table() -> str:
    """The README's table."""
    rows = ["| where | option | methods, each with its paper |", "|---|---|---|"]
    for place, (where, _) in _WHERE.items():
        entries = [entry for entry in catalogue.ENTRIES if entry.place == place]
        named = ", ".join(_linked(entry) for entry in entries if not _is_part(entry))
        rows.append(f"| {where} | `{_OPTION[place]}` | {named} |")
    return "\n".join(rows) + "\n"


def page() -> str:
    """docs/methods.md."""
    parts = ["# Methods\n", *(_wrapped(text) + "\n" for text in _HEAD)]
    for place, entries in groupby(catalogue.ENTRIES, key=lambda entry: entry.place):
        parts.append(f"## {_WHERE[place][1]}\n")
        parts += [_section(entry) for entry in entries]
    return "\n".join(parts)


def _is_part(entry: Entry) -> bool:
    """Whether it is the decoder's part of a recipe, which only plans name."""
    return entry.place == DECODER and catalogue.find(RECIPE, entry.name) is not None


def _linked(entry: Entry) -> str:
    name = f"`{entry.name}`"
    linked = f"[{name}]({entry.papers[0][1]})" if entry.papers else name
    notes = ["adapts"] * (entry.leaves == ADAPTS) + ["merges"] * entry.merges
    return linked + (f" ({', '.join(notes)})" if notes else "")


def _section(entry: Entry) -> str:
    """One method: what it does, its options, an example and what that leaves."""
    papers = ", ".join(f"[{name}]({address})" for name, address in entry.papers)
    summary = entry.summary[0].upper() + entry.summary[1:]
    text = f"{summary}{f' ({papers})' if papers else ''}. {_LEAVES[entry.leaves]}"
    options = "\n".join([*_published(entry), *(_option(entry, each) for each in entry.options)])
    if _is_part(entry):
        title = f"### `{entry.name}` as a site of a plan"
        return "\n\n".join([title, _wrapped(text), options]) + "\n"
    title = f"### `{_OPTION[entry.place]} {entry.name}`"
    example = f"```\n{_command(entry)}\n```"
    return "\n\n".join([title, _wrapped(text), options, example, _wrapped(_counts(entry))]) + "\n"


def _published(entry: Entry) -> list[str]:
    """The sites that the method's paper has."""
    if entry.published is None:
        return []
    sites = ",".join(map(str, entry.published.sites))
    text = (
        f"- `--sites`: layers at whose input to prune (default: {sites} of "
        f"{entry.published.num_layers}, in proportion in other decoders)"
    )
    return [_wrapped(text, "  ")]


def _option(entry: Entry, option: Option) -> str:
    default = default_of(option)
    notes = [f"`{' | '.join(option.choices)}`"] if option.choices else []
    notes += [f"default: {default}"] if default else []
    where = {True: "plan", False: "plans and Python"}[_is_part(entry)]
    where = "Python" if entry.place == RECIPE else where
    name = f"`{entry.flag(option)}`"
    if option.word is None or _is_part(entry):
        name = f"`{option.name}` ({where})"
    elif option.is_of_plan:
        name += f", in a plan `{option.name}` of `pseudo_cls`"
    elif entry.place != RECIPE:
        name += f", in a plan `{option.name}`"
    return _wrapped(f"- {name}: {option.help}" + (f" ({'; '.join(notes)})" if notes else ""), "  ")


def _command(entry: Entry) -> str:
    """The example as a command."""
    words = ["patchsieve cost --config config.json", _OPTION[entry.place], entry.name]
    for name, value in entry.example.items():
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        words += ["--" + name.replace("_", "-"), text]
    line, request = " ".join(words), f"--text-tokens {TEXT_TOKENS} --convention runtime"
    is_long = len(line) + len(request) >= WIDTH
    return f"{line} \\\n    {request}" if is_long else f"{line} {request}"


def _counts(entry: Entry) -> str:
    """What the example leaves and costs."""
    place = {DECODER: "method", RECIPE: "method"}.get(entry.place, entry.place)
    size_of = plans.Size(LLAVA_7B.vision.num_patches, LLAVA_7B.text.num_layers)
    plan = plans.build(**{place: entry.name}, size=size_of, **entry.example)
    schedule, is_exact = cost.of_plan(LLAVA_7B, plan, text_tokens=TEXT_TOKENS)
    ours, full = (
        cost.cost(LLAVA_7B, each, TEXT_TOKENS, convention=cost.RUNTIME)
        for each in (schedule, cost.no_pruning(LLAVA_7B))
    )
    layers = [f"{len(list(same))} x {count}" for count, same in groupby(ours.llm_tokens)]
    shares = ours.flops.total / full.flops.total, ours.kv_bytes / full.kv_bytes
    of_flops, of_bytes = (f"{share:.0%}".replace("%", " %") for share in shares)
    return (
        f"Layers x visual tokens in the decoder: {', '.join(layers)}"
        f"{'' if is_exact else ', at most'}. FLOPs: {flops(ours.flops.total)} ({of_flops}). "
        f"KV cache: {size(ours.kv_bytes)} ({of_bytes})."
    )


def _wrapped(text: str, indent: str = "") -> str:
    return fill(
        text, WIDTH, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )


def readme(text: str) -> str:
    """The README with the table of today in the place of the one that it has."""
    made, count = re.subn(
        r"\| where \| option \| methods.*?\n(?=\n)", lambda _: table(), text, flags=re.S
    )
    if count != 1:
        raise SystemExit(f"{README} has {count} tables of methods, not one")
    return made


def main() -> None:
    """Write both files."""
    PAGE.write_text(page(), encoding="utf-8")
    README.write_text(readme(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
