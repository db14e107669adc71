"""README.md of a bundle: what it is, and how to run it on a board. The hub shows it as its card.

It is not among the hashed files: people add to it, and the hub writes into it. Whoever removes the
mark keeps their own text when the plan changes.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

from patchsieve.contract.manifest import Manifest
from patchsieve.contract.plan import MethodPlan, Plan, SitePlan
from patchsieve.contract.targets import AHEAD_OF_TIME, WITH_ENGINES

FILE_NAME = "README.md"
QUESTION = "What is in the image?"
Licence = dict[str, str]  # the lines of a card that name it: license, license_name, license_link

_MARK = (
    "<!-- Written by patchsieve. `export --reuse` writes it again, unless this line is removed. -->"
)
_LICENCE = re.compile(
    r"(license|license_name|license_link):[ \t]*['\"]?([\w .:/+()-]{1,200}?)['\"]?"
)
_LARGEST = 4 << 20  # bytes of a card
_ROUGH = str.maketrans({"|": "/", "`": "'", "\n": " ", "\r": " "})  # what would break a table


def licence_of(folder: Path) -> Licence:
    """The licence that a checkpoint's or a bundle's card names, or else its config.json."""
    found: Licence = {}
    for line in _front_matter(folder / FILE_NAME):
        if (match := _LICENCE.fullmatch(line.rstrip())) is not None:
            found.setdefault(match[1], match[2])
    if "license" not in found and (named := _of_config(folder / "config.json")):
        found["license"] = named
    return found if "license" in found else {}


def card(facts: Manifest, licence: Licence) -> str:
    """The text of a bundle's README.md, from its manifest."""
    blocks = [
        "\n".join(
            [
                "---",
                "library_name: patchsieve",
                "pipeline_tag: image-text-to-text",
                *(f"{key}: {value}" for key, value in licence.items()),
                "---",
                _MARK,
            ]
        ),
        f"# {_plain(facts.checkpoint)}, compiled by patchsieve",
        "This folder is a bundle: a vision-language model whose visual tokens are pruned on their "
        "way through the decoder. It is complete, can be copied to a board, and runs without "
        "PyTorch.",
        "## Model",
        _model(facts, licence),
        "## Plans",
        "A plan says what prunes where. A request names one, or gets the default.",
        _plans(facts),
        "## Limits",
        "Requests that exceed these are refused. Other limits need another export.",
        _table(
            ("text tokens", "new tokens", "images"),
            [
                (
                    facts.limits.max_text_tokens,
                    facts.limits.max_new_tokens,
                    facts.limits.max_images,
                )
            ],
        ),
        "## Targets",
        _targets(facts),
        "## Run it",
        "Install patchsieve from a clone (`pip install .`) and the library of the target. Then, "
        "with `BUNDLE` for this folder:",
        _fenced("\n".join(next_commands("BUNDLE", facts))),
        "From Python:",
        _fenced(
            'import patchsieve\n\nmodel = patchsieve.load("BUNDLE")\n'
            f'print(model.generate("photo.jpg", "{QUESTION}").text)',
            "python",
        ),
        "`patchsieve doctor BUNDLE` says whether this machine can run it, `patchsieve inspect "
        "BUNDLE` what it holds and costs, `patchsieve inspect BUNDLE --check` whether it is whole.",
    ]
    return "\n\n".join(blocks) + "\n"


def next_commands(
    bundle: str | Path, facts: Manifest, image: str | Path = "photo.jpg"
) -> list[str]:
    """The commands that make a bundle answer: its engines first, where nothing runs without."""
    words = ["patchsieve", "run", str(bundle), "--image", str(image), "--prompt", QUESTION]
    if set(facts.targets) <= set(WITH_ENGINES):
        build = ["patchsieve", "build", str(bundle)]
        if len(facts.targets) > 1:
            build += ["--target", next(iter(facts.targets))]
            words += build[-2:]
        return [shlex.join(build), shlex.join(words)]
    return [shlex.join(words)]


def may_write(bundle: Path) -> bool:
    """Whether a bundle's README.md is absent or ours."""
    path = bundle / FILE_NAME
    return not path.exists() or _MARK in _text(path)


def _model(facts: Manifest, licence: Licence) -> str:
    text, vision = facts.text, facts.vision
    names = [licence.get("license_name"), licence.get("license"), licence.get("license_link")]
    named = ", ".join(name for name in names if name)
    rows, columns = vision.grid
    size = sum(file.size for file in facts.files.values())
    return _table(
        ("", ""),
        [
            ("checkpoint", facts.checkpoint),
            ("licence of the model", named or "not named by the checkpoint; ask its source"),
            (
                "decoder",
                f"{text.model_type}, {text.num_layers} layers x {text.hidden_size}, "
                f"{text.num_heads} heads, {text.num_kv_heads} KV heads",
            ),
            (
                "tower",
                f"{vision.model_type}, {vision.image_size} px, {rows} x {columns} patches, "
                f"{vision.num_visual} visual tokens an image",
            ),
            ("precision", facts.numbers),
            ("size", f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"),
            ("made by", f"patchsieve {facts.patchsieve_version}"),
        ],
    )


def _plans(facts: Manifest) -> str:
    rows = []
    widths = [facts.row_bytes(stage) for stage in facts.stages]
    for name, plan in facts.plans.items():
        kv_bytes = sum(a * b for a, b in zip(facts.slots(name), widths, strict=True))
        rows.append(
            (
                name + (" (default)" if name == facts.default_plan else ""),
                _pruning(plan),
                " / ".join(map(str, facts.budgets(name))),
                f"{kv_bytes / 1e6:.1f} MB",
            )
        )
    stages = ", ".join(f"{stage.first}-{stage.last - 1}" for stage in facts.stages)
    header = ("plan", "prunes", f"most visual tokens an image, layers {stages}", "KV cache")
    return _table(header, rows)


def _pruning(plan: Plan) -> str:
    parts = [
        *([f"in the tower: {_method(plan.encoder)}"] if plan.encoder else []),
        *([f"after the tower: {_method(plan.projector)}"] if plan.projector else []),
        *(f"before layer {site.layer}: {_method(site)}" for site in plan.sites),
    ]
    return "; ".join(parts) or "nothing"


def _method(method: MethodPlan | SitePlan) -> str:
    shown = {key: value for key, value in method.params.items() if key != "heads"}
    return " ".join([method.method, *(f"{key} {_short(value)}" for key, value in shown.items())])


def _targets(facts: Manifest) -> str:
    rows = []
    for target in facts.targets:
        needs = facts.needs.get(target)
        rows.append(
            (
                target,
                "-" if needs is None else f"{needs.library} {needs.versions}",
                "-" if needs is None else needs.where,
                "patchsieve build, on that machine"
                if target in WITH_ENGINES and target not in AHEAD_OF_TIME
                else "patchsieve build"
                if target in WITH_ENGINES
                else "none",
            )
        )
    return _table(("target", "library", "machines", "engines"), rows)


def _table(header: tuple[Any, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(map(_plain, line)) + " |" for line in lines)


def _fenced(text: str, language: str = "sh") -> str:
    return f"```{language}\n{text}\n```"


def _plain(value: Any) -> str:
    return str(value).translate(_ROUGH)


def _short(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text[:60]


def _front_matter(path: Path) -> list[str]:
    """The lines between the two `---` that a card begins with."""
    lines = _text(path).splitlines()
    if not lines or lines[0].strip() != "---":
        return []
    end = next((i for i, line in enumerate(lines[1:], 1) if line.strip() == "---"), 0)
    return lines[1:end]


def _of_config(path: Path) -> str | None:
    try:
        config = json.loads(_text(path))
    except (ValueError, RecursionError):
        return None
    named = config.get("license") if isinstance(config, dict) else None
    is_text = isinstance(named, str) and _LICENCE.fullmatch(f"license: {named}") is not None
    return named if is_text else None


def _text(path: Path) -> str:
    """A small text file; nothing where there is none."""
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST:
            return ""
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
