"""ATP-LLaVA from its equations, token by token, over full maps."""

from fractions import Fraction

import numpy as np

from tests.references.attention import attention_map, logits_map
from tests.references.selection import top, within_budget


def self_scores(site, causal):
    """Eq. 3: mean over visual queries m of A_logits(v_n, v_m), heads averaged; [B, N]."""
    logits = logits_map(site).mean(1)  # [B, L, S]
    cached = site.key.shape[2] - site.query.shape[2]
    rows = site.visual_rows.tolist()
    out = np.zeros((len(logits), len(rows)))
    for n, key_row in enumerate(rows):
        lookers = [m for m in rows if m >= key_row] if causal else rows
        out[:, n] = np.mean([logits[:, m, cached + key_row] for m in lookers], axis=0)
    return out


def cross_scores(site):
    """Eq. 4: mean over text queries of A(v_n, t_m), heads averaged; [B, N]."""
    attention = attention_map(site).mean(1)  # [B, L, S]
    cached = site.key.shape[2] - site.query.shape[2]
    columns = cached + site.visual_rows.numpy()
    return np.mean([attention[:, t][:, columns] for t in site.text_rows.tolist()], axis=0)


def normalised(s, kind, is_cross):
    """One score list [N] brought to the common scale."""
    if kind == "minmax":
        spread = s.max() - s.min()
        return np.full_like(s, 0.5) if spread == 0 else (s - s.min()) / spread
    if kind == "rank":
        out = np.zeros_like(s)
        for place, n in enumerate(sorted(range(len(s)), key=lambda n: (-s[n], n))):
            out[n] = (len(s) - 1 - place + 0.5) / len(s)
        return out
    if kind == "softmax":
        share = s / s.sum() if is_cross else np.exp(s - s.max()) / np.exp(s - s.max()).sum()
        return share / share.max()
    return s


def spatial(site, granularities, spatial_lambda):
    """Eq. 5 on the original grid: 1 - R lambda, the best set a patch is in; [N]."""
    height, width = site.grid
    start = max(granularities) // 2 - 1
    out = np.zeros(len(site.patch_ids))
    for n, patch in enumerate(site.patch_ids.tolist()):
        for s in granularities:

            def hit(p, s=s):
                return (p // width) % s == start % s and (p % width) % s == start % s

            rate = sum(hit(p) for p in range(height * width)) / (height * width)
            if patch >= 0 and hit(patch):
                out[n] = max(out[n], 1 - rate * spatial_lambda)
    return out


def exact(share, number):
    """Recover the fraction (rank + 1/2) / number that a float stands for."""
    return Fraction(share).limit_denominator(2 * number)


def bilinear(image, size):
    """Resize [h, w] by half-pixel bilinear interpolation."""

    def weights(old, new):
        w = np.zeros((new, old))
        for i in range(new):
            x = max((i + 0.5) * old / new - 0.5, 0)
            low = int(x)
            w[i, low] += 1 - (x - low)
            w[i, min(low + 1, old - 1)] += x - low
        return w

    return weights(image.shape[0], size[0]) @ image @ weights(image.shape[1], size[1]).T


def learned_thresholds(module, s_self, s_cross, patch_ids, grid):
    """Eqs. 6-8 for one row of scores [N]: scatter to the grid, one linear, two heads."""
    maps = np.zeros((2, grid[0], grid[1]))
    for n, patch in enumerate(patch_ids.tolist()):
        if patch >= 0:
            maps[:, patch // grid[1], patch % grid[1]] = s_self[n], s_cross[n]
    if tuple(grid) != module.grid:
        maps = np.stack([bilinear(m, module.grid) for m in maps])
    p = {name: value.detach().double().numpy() for name, value in module.named_parameters()}
    z = p["trunk.weight"] @ maps.reshape(-1) + p["trunk.bias"]
    if module.activation == "relu":
        z = np.maximum(z, 0)
    theta_r = p["head_r.weight"] @ z + p["head_r.bias"]
    theta_s = p["head_s.weight"] @ z + p["head_s.bias"]
    return 1 / (1 + np.exp(-theta_r[0])), 1 / (1 + np.exp(-theta_s[0]))


def decide(method, site, budget):
    """Return keep, margins and the number wanted."""
    s_self, s_cross = self_scores(site, method.causal), cross_scores(site)
    s_spatial = spatial(site, method.granularities, method.spatial_lambda)
    keeps, margins, wanted = [], [], []
    for b in range(len(s_self)):
        own = normalised(s_self[b], method.normalisation, False)
        cross = normalised(s_cross[b], method.normalisation, True)
        alone = {"self": own, "cross": cross}.get(method.modality)
        first, second = (own, cross) if alone is None else (alone, alone)
        red = (first + second) / 2
        if method.normalisation == "rank":  # in fractions, because means of ranks tie exactly
            red = np.array(
                [
                    (exact(a, len(own)) + exact(c, len(own))) / 2
                    for a, c in zip(first, second, strict=True)
                ],
                float,
            )
        if hasattr(method.thresholds, "trunk"):
            theta_r, theta_s = learned_thresholds(
                method.thresholds, own, cross, site.patch_ids, site.grid
            )
        else:
            theta_r, theta_s = method.thresholds.theta_r, method.thresholds.theta_s
        by_red, by_place = red > theta_r, s_spatial > theta_s
        if method.parts == "redundant":
            keep, margin, best = by_red, red - theta_r, red
        elif method.parts == "spatial":
            keep, margin, best = by_place, s_spatial - theta_s, s_spatial
        else:
            keep, best = by_red | by_place, red
            margin = np.maximum(red - theta_r, s_spatial - theta_s)
        keep = keep if keep.any() else top(best, 1)
        keeps.append(within_budget(keep, margin, budget))
        margins.append(margin)
        wanted.append(keep.sum())
    return np.stack(keeps), np.stack(margins), np.array(wanted)
