"""Whatever ONNX Runtime can run gives the numbers and the survivors of the reference graphs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from patchsieve import manifest
from patchsieve.export.lowering import LOWERINGS
from patchsieve.export.reuse import reuse
from patchsieve.plan import NO_PRUNING, Plan, SitePlan
from patchsieve.runtime.model import Model
from patchsieve.runtime.ort import OrtBackend
from tests.target_bundles import BFLOAT16, MIXED
from tests.tiny_bundles import largest_error, pictures, recorded_logits
from tests.tolerances import LOWERED_FLOAT32

pytest_plugins = ["tests.target_bundles"]

# Caches in place. Those with rows of their own are compared where their runtime is tested.
SAME_CACHES = ("cpu", "tensorrt", "tensorrt10", "tensorrt-rtx")
ATP = Plan((SitePlan(1, "atp", {"theta_r": 0.4, "theta_s": 0.9}),))
PLANS = (NO_PRUNING, "fastv", "atp")


class FullSlots(OrtBackend):
    """Caches as long as an engine's, whatever the plan reserves."""

    def allocate(self, stage: int, slots: int) -> Any:
        return super().allocate(stage, self.facts.stages[stage].slots)


@pytest.fixture(scope="module")
def bundle(bundle_of, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lowerings") / "bundle"
    shutil.copytree(bundle_of("float32"), out)
    reuse(out, ATP, "atp")
    return out


def answers(bundle: Path, target: str) -> list[tuple[list[int], list[list[int]], list[Any]]]:
    """Tokens, survivors and logits for each plan, with one image and with two."""
    model = Model(bundle, target=target, check="size", backend=lambda b: FullSlots(b, threads=1))
    found = []
    for plan in PLANS:
        for images in (1, 2):
            logits = recorded_logits(model)
            result = model.generate(
                pictures(images), "What is on the table?", max_new_tokens=8, plan=plan
            )
            kept = [site.kept for site in result.sites]
            found.append((result.token_ids, kept, logits))
    model.close()
    return found


@pytest.fixture(scope="module")
def expected(bundle: Path) -> list[tuple[list[int], list[list[int]], list[Any]]]:
    return answers(bundle, "reference")


@pytest.mark.parametrize("target", SAME_CACHES)
def test_a_lowering_gives_what_the_reference_gives(bundle: Path, expected, target: str) -> None:
    errors = []
    for (tokens, kept, logits), (same_tokens, same_kept, others) in zip(
        answers(bundle, target), expected, strict=True
    ):
        assert tokens == same_tokens
        assert kept == same_kept
        errors.append(largest_error(logits, others))
    assert max(errors) < LOWERED_FLOAT32
    assert any(len(one) < 16 for _, kept, _ in expected for one in kept)


@pytest.mark.parametrize("precision", ("float32", MIXED[1], BFLOAT16))
def test_full_tensorrt_reads_the_graphs_that_tensorrt_rtx_is_built_from(
    bundle_of, precision: str
) -> None:
    path = bundle_of(precision)
    targets = manifest.read(path).targets
    built = {name: (path / file).read_bytes() for name, file in targets["tensorrt-rtx"].items()}
    for target in ("tensorrt", "tensorrt10"):
        graphs = {name: (path / file).read_bytes() for name, file in targets[target].items()}
        assert graphs == built, target


def test_every_target_of_this_version_is_compared() -> None:
    assert set(LOWERINGS) == {"reference", "jetpack6", "cuda", *SAME_CACHES}
