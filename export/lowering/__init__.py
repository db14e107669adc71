"""From a traced graph to what a target accepts: one file per target, of the target's name.

A lowering says how each operation of `patchsieve.export.graphs.ops` is spelt; what else is known of
its target is a row of `patchsieve.contract.targets`.
"""

from __future__ import annotations

from importlib import import_module

from patchsieve.contract.targets import known
from patchsieve.export.lowering.base import Lowering, lower


def lowering(target: str) -> type[Lowering]:
    """Find the lowering of a target.

    Raises:
        PatchsieveError: There is no such target.
    """
    row = known(target)
    module = import_module(f"{__name__}.{target.replace('-', '_')}")
    return next(each for each in vars(module).values() if getattr(each, "target", None) is row)


__all__ = ["Lowering", "lower", "lowering"]
