"""Print what pruning changed: two results of `patchsieve run --json`, side by side.

python examples/show_answers.py PRUNED.json FULL.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def describe_sites(result: dict[str, Any]) -> list[str]:
    """One line for each image at each pruning site, with the raster ids of its survivors."""
    return [
        f"survivors at layer {site['layer']}, image {site['image']}: "
        f"{site['num_kept']} of {site['num_visual_before']}"
        f"{' (capped by the budget)' if site['capped'] else ''}: "
        + " ".join(map(str, site["kept"]))
        for site in result["sites"]
    ]


def main() -> None:
    """Print both answers, the survivors and the bytes of both key/value caches."""
    pruned, full = (json.loads(Path(path).read_text(encoding="utf-8")) for path in sys.argv[1:3])
    print(f"answer, pruned:   {pruned['text']!r}")
    print(f"answer, unpruned: {full['text']!r}")
    print("(random weights answer with gibberish)")
    print("\n".join(describe_sites(pruned)))
    for kind in ("used", "reserved"):
        less, more = pruned["kv_bytes"][kind], full["kv_bytes"][kind]
        print(f"KV bytes {kind}: {less:,} pruned, {more:,} unpruned ({less / more:.1%})")


if __name__ == "__main__":
    main()
