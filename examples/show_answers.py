"""Print what pruning changed: two results of `patchsieve run --json`, side by side.

python examples/show_answers.py PRUNED.json FULL.json
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any


def picture(kept: list[int], num_visual: int) -> str:
    """Survivors on the patch grid, as the photograph lies: a square for each patch that is kept."""
    side = math.isqrt(num_visual)
    rows = [range(row * side, (row + 1) * side) for row in range(side)]
    return "\n".join("  " + " ".join("■" if i in kept else "·" for i in row) for row in rows)


def describe_sites(result: dict[str, Any], num_visual: int) -> list[str]:
    """What happened to each image at each pruning site."""
    return [
        f"patches that enter layer {site['layer']}: "
        f"{site['num_kept']} of {site['num_visual_before']}"
        f"{' (capped by the budget)' if site['capped'] else ''}\n"
        + picture(site["kept"], num_visual)
        for site in result["sites"]
    ]


def main() -> None:
    """Print both answers, the survivors and the bytes of both key/value caches."""
    pruned, full = (json.loads(Path(path).read_text(encoding="utf-8")) for path in sys.argv[1:3])
    print(f"answer, pruned:   {pruned['text']!r}")
    print(f"answer, unpruned: {full['text']!r}")
    print("\n".join(describe_sites(pruned, full["visual_tokens"])))
    for kind in ("used", "reserved"):
        less, more = pruned["kv_bytes"][kind], full["kv_bytes"][kind]
        print(f"KV bytes {kind}: {less:,} pruned, {more:,} unpruned ({less / more:.1%})")


if __name__ == "__main__":
    main()
