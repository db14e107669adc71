"""Plans of a bundle: none is lost without a word, and their JSON says what it seems to say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from patchsieve.cli import main
from patchsieve.contract import files
from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.plan import SitePlan
from patchsieve.export.methods import build_method
from patchsieve.pruning.decoder.thresholds import Thresholds
from patchsieve.pruning.heads import HeadsConfig, save_heads
from tests.support.models import save_checkpoint


def reused(bundle: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """Give a bundle another plan through the command line."""
    assert (
        main(["export", "--reuse", str(bundle), "--sites", "2", "--json", "--quiet", *words]) == 0
    )
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
def test_plans_that_differ_get_names_that_differ(tmp_path: Path, capsys) -> None:
    checkpoint, bundle = str(save_checkpoint(tmp_path / "ck", "llama")), tmp_path / "bundle"
    command = ["export", checkpoint, "-o", str(bundle), "--method", "fastv", "--sites", "2"]
    targets = ["--targets", "cpu,tensorrt-rtx"]
    assert main([*command, "--keep-ratio", "0.5", *targets, "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fits_engines"]
    fastv = ("--method", "fastv", "--keep-ratio", "0.5")
    assert reused(bundle, capsys, *fastv)["plans"] == ["none", "fastv-2-50"]
    mean = reused(bundle, capsys, *fastv, "--rows", "mean")
    assert mean["plan"] == "fastv-2-50-v2" and "fastv-2-50" in mean["plans"]
    atp = ("--method", "atp", "--theta-s", "0.9")
    wide = reused(bundle, capsys, *atp, "--theta-r", "0.4")
    assert wide["plan"] == "atp-2" and not wide["fits_engines"]  # its budget is the whole image
    assert reused(bundle, capsys, *atp, "--theta-r", "0.5")["plan"] == "atp-2-v2"
    again = reused(bundle, capsys, *atp, "--theta-r", "0.4")
    assert again["plan"] == "atp-2"  # the same plan, and the default again
    facts = files.read(bundle)
    assert set(facts.plans) == {"none", "fastv-2-50", "fastv-2-50-v2", "atp-2", "atp-2-v2"}
    files.check_files(bundle, facts)


@pytest.mark.parametrize(
    "site",
    [
        SitePlan(2, "fastv", {"keep_ratio": True}),
        SitePlan(2, "fastv", {"keep_ratio": "0.5"}),
        SitePlan(2, "fastv", {"rows": 1}),
        SitePlan(2, "atp", {"theta_r": 0.5, "theta_s": 0.9, "causal": "false"}),
        SitePlan(2, "atp", {"theta_r": 0.5, "theta_s": 0.9, "granularities": [2.0, 4.0]}),
        SitePlan(2, "atp", {"theta_r": 0.5, "theta_s": 0.9, "heads": None}),
        SitePlan(2, "atp", {"theta_r": None, "theta_s": 0.9}),
    ],
)
def test_a_parameter_of_another_type_is_refused(site: SitePlan) -> None:
    with pytest.raises(PatchsieveError, match="has the wrong type"):
        build_method(site)


def test_options_beside_heads_may_not_contradict_them(tmp_path: Path) -> None:
    tensors = {f"layer.2.{k}": v for k, v in Thresholds(8, (4, 4)).state_dict().items()}
    scores = {"normalisation": "rank", "granularities": [2, 4]}
    save_heads(tmp_path, HeadsConfig((2,), (4, 4), 8, scores=scores), tensors)
    given = {"heads": str(tmp_path)}
    for same in ({}, {"normalisation": "rank"}, {"granularities": (2, 4)}, {"causal": False}):
        method = build_method(SitePlan(2, "atp", given | same))
        assert (method.normalisation, method.granularities) == ("rank", (2, 4))
    for other in ({"normalisation": "minmax"}, {"causal": True}):
        with pytest.raises(PatchsieveError, match="trained with other options"):
            build_method(SitePlan(2, "atp", given | other))
    assert torch.is_tensor(tensors["layer.2.trunk.weight"])


@pytest.mark.slow
def test_an_engine_of_other_weights_is_built_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    import shutil

    from patchsieve.export.exporter import ExportOptions, export
    from patchsieve.runtime.building.build import build
    from patchsieve.runtime.building.build_request import Request

    options = ExportOptions(targets=("tensorrt-rtx",))
    for seed in (0, 1):
        checkpoint = save_checkpoint(tmp_path / f"ck{seed}", "llama", seed=seed, layers=2)
        export(str(checkpoint), tmp_path / f"b{seed}", options)
    assert not any(engine.was_there for engine in build(tmp_path / "b0", Request("tensorrt-rtx")))
    shutil.copytree(tmp_path / "b0" / "engines", tmp_path / "b1" / "engines")
    assert not any(engine.was_there for engine in build(tmp_path / "b1", Request("tensorrt-rtx")))


def test_weights_that_the_manifest_does_not_list_are_refused(tmp_path: Path, capsys) -> None:
    checkpoint, bundle = str(save_checkpoint(tmp_path / "ck", "llama")), tmp_path / "bundle"
    assert main(["export", checkpoint, "-o", str(bundle), "--quiet"]) == 0
    path = bundle / files.FILE_NAME
    data = json.loads(path.read_text())
    del data["files"]["graphs/weights/layers.1.safetensors"]
    path.write_text(json.dumps(data))
    capsys.readouterr()
    assert main(["run", str(bundle), "--prompt", "Hello"]) == 2
    assert "does not list" in capsys.readouterr().err
