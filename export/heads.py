"""ATP's learned thresholds: from a directory into a method, and into a bundle."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from patchsieve.contract.errors import PatchsieveError
from patchsieve.contract.plan import Plan, SitePlan
from patchsieve.contract.writing import write_whole
from patchsieve.pruning.catalogue import entry
from patchsieve.pruning.decoder.atp import ATP
from patchsieve.pruning.decoder.thresholds import ConstantThresholds, Thresholds
from patchsieve.pruning.entry import DECODER
from patchsieve.pruning.heads import CONFIG, TENSORS, HeadsConfig, load_heads

HEADS = "heads"  # folder of a bundle


def store_heads(bundle: Path, plan: Plan, written: list[Path]) -> Plan:
    """Copy a plan's heads into a bundle, under a name made from their content.

    Args:
        bundle: The directory.
        plan: Its heads may lie anywhere.
        written: Takes each file before it is written.

    Returns:
        The plan, the paths of its heads relative to the bundle.
    """
    sites = []
    for site in plan.sites:
        if "heads" in site.params:
            parts = [Path(site.params["heads"]) / name for name in (CONFIG, TENSORS)]
            contents = [part.read_bytes() for part in parts]
            folder = f"{HEADS}/{hashlib.sha256(b''.join(contents)).hexdigest()[:12]}"
            (bundle / folder).mkdir(parents=True, exist_ok=True)
            for part, content in zip(parts, contents, strict=True):
                written.append(bundle / folder / part.name)
                write_whole(written[-1], content)
            site = replace(site, params=site.params | {"heads": folder})
        sites.append(site)
    return replace(plan, sites=tuple(sites))


def build_atp(site: SitePlan, folder: Path) -> ATP:
    """Build ATP with the thresholds that a site names: learned ones of a directory, or constants.

    Args:
        site: What the plan says of it.
        folder: What the path of its heads is relative to.

    Raises:
        PatchsieveError: There are none or both, or they do not fit the site.
    """
    params = dict(site.params)
    heads, constants = params.pop("heads", None), ("theta_r", "theta_s")
    given = {name: params.pop(name) for name in constants if name in params}
    if (heads is None) == (not given) or (given and len(given) < 2):
        raise PatchsieveError(
            f"atp at layer {site.layer} needs its thresholds, one way or the other",
            found=", ".join([*(["heads"] if heads else []), *given]) or "none",
            expected="heads (a directory that training made), or both theta_r and theta_s",
            do="train heads for this checkpoint and pass --heads DIR (the format is described in "
            "pruning/heads.py), or fix thresholds by --theta-r 0.5 --theta-s 0.9",
        )
    if given and "parts" in params:
        raise PatchsieveError(
            f"the parameter parts of atp at layer {site.layer} belongs to learned heads",
            found=params["parts"],
            do="remove it: constants of 2 switch a part off, theta_s for redundant pruning alone, "
            "theta_r for spatial pruning alone",
        )
    try:
        if given:
            return ATP(thresholds=ConstantThresholds(**given), **params)
        config, thresholds = _learned(folder / heads, site.layer)
        options = entry(DECODER, site.method)
        trained = {k: config.scores.get(k, options.option(k).default) for k in params}
        other = {k: v for k, v in params.items() if _plain(v) != _plain(trained[k])}
        if other:
            raise PatchsieveError(
                f"the heads for layer {site.layer} were trained with other options",
                found=other,
                expected={k: trained[k] for k in other},
                do="remove these options: heads bring their own",
            )
        return ATP(thresholds=thresholds, **config.scores)
    except TypeError as error:
        raise PatchsieveError(
            f"the parameters of atp at layer {site.layer} do not fit",
            found=error,
            do="correct the parameters in the plan, or learn the heads again",
        ) from error


def _learned(directory: Path, layer: int) -> tuple[HeadsConfig, Thresholds]:
    config, tensors = load_heads(directory)
    if layer not in config.sites:
        raise PatchsieveError(
            f"the heads in {directory} were not learned for layer {layer}",
            expected=f"one of {list(config.sites)}",
            do="remove --sites: the heads' own are taken",
        )
    module = Thresholds(config.hidden, config.grid, config.activation)
    prefix = f"layer.{layer}."
    state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise PatchsieveError(
            f"the tensors in {directory} do not fit its config",
            found=str(error),
            do="copy the heads again, or learn them with patchsieve calibrate",
        ) from error
    return config, module.eval().requires_grad_(False)


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
