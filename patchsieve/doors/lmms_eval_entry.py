"""Where lmms-eval finds the model: the entry point `lmms_eval.models` of setup.py."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """What `--model patchsieve` is; its module is imported when it is asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        "patchsieve", simple_class_path="patchsieve.doors.lmms_eval.PatchsieveModel"
    )
