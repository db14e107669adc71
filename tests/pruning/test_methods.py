"""Every method against its NumPy reference, and the laws that all of them obey."""

import dataclasses
import importlib
import json

import numpy as np
import pytest
import torch

from patchsieve.contract import reads
from patchsieve.contract.errors import PatchsieveError, ShapeError
from patchsieve.pruning.decoder.atp import ATP
from patchsieve.pruning.decoder.fastv import FastV
from patchsieve.pruning.decoder.ivtp import IVTP
from patchsieve.pruning.decoder.pyramiddrop import PyramidDrop
from patchsieve.pruning.decoder.random import Random
from patchsieve.pruning.decoder.site import Site
from patchsieve.pruning.decoder.sparsevlm import SparseVLM, best_heads, raters
from patchsieve.pruning.decoder.tome import DecoderToMe
from patchsieve.pruning.decoder.topk import DecoderTopK
from patchsieve.pruning.entries.decoder import SPARSEVLM_COUNTS
from patchsieve.pruning.schedules import num_to_keep
from patchsieve.pruning.table import METHODS, modules, settings
from tests.support.pruning_cases import CASES, KEEP_ALL, assert_same_choice
from tests.support.pruning_sites import SITES, make_site

# float32 against float64: a minmax divides the rounding of the scores by their spread.
SCORE_TOLERANCE = 3e-5
BUDGETS = (1, 6, 999)


def decide(method, site, budget=999):
    with torch.no_grad():
        return method.decide(site, torch.tensor(budget))


def may_compare(method, options):
    """Tell whether rounding leaves the scores alone: a near-tie that breaks moves whole ranks."""
    is_ranked = getattr(method, "normalisation", None) == "rank"
    return not (is_ranked and options.get("values") == "small")  # rank has its own test of ties


PAIRS = {
    f"{name}, {label}": (method, options)
    for name, method in CASES.items()
    for label, options in SITES.items()
    if may_compare(method, options)
}


@pytest.mark.parametrize(("method", "options"), PAIRS.values(), ids=PAIRS)
def test_method_decides_as_its_reference(method, options):
    reference = importlib.import_module(f"tests.references.{method.name}")
    has_ties = options.get("values") == "small"
    for seed in range(3):
        site = make_site(seed, **options)
        for budget in BUDGETS:
            keep, scores, num_wanted = (t.numpy() for t in decide(method, site, budget)[:3])
            expected, expected_scores, expected_wanted = reference.decide(method, site, budget)
            np.testing.assert_allclose(scores, expected_scores, atol=SCORE_TOLERANCE)
            differing = assert_same_choice(keep, expected, expected_scores)
            if not has_ties:
                assert differing == 0
                assert (num_wanted == expected_wanted).all()
            elif differing:
                print(f"{differing} survivors differ at a tie, seed {seed}, budget {budget}")


def test_every_method_has_a_case():
    assert {method.name for method in CASES.values()} == set(METHODS) == set(KEEP_ALL)
    for name, method in METHODS.items():
        assert method.name == name
    known = {*reads.TABLE, reads.NEXT_LAYER}
    assert {w.partition(".")[0] for m in CASES.values() for w in m.reads} <= known


@pytest.mark.parametrize("options", SITES.values(), ids=SITES)
@pytest.mark.parametrize("method", CASES.values(), ids=CASES)
def test_at_least_one_token_and_at_most_the_budget_go_on(method, options):
    site = make_site(5, **options)
    wanted = decide(method, site).keep
    for budget in (-3, 0, *BUDGETS):
        keep, scores, num_wanted, *_ = decide(method, site, budget)
        assert keep.dtype == torch.bool
        assert scores.dtype == torch.float32
        assert num_wanted.dtype == torch.int64
        assert keep.shape == scores.shape == (site.query.shape[0], len(site.visual_rows))
        assert torch.equal(num_wanted, wanted.sum(-1))
        assert torch.equal(keep.sum(-1), num_wanted.clamp(max=max(1, budget)))
        assert (wanted | ~keep).all()
        for row, was_wanted, score in zip(keep, wanted, scores, strict=True):
            cut = score[was_wanted & ~row]
            assert cut.numel() == 0 or cut.max() <= score[row].min()


@pytest.mark.parametrize("options", SITES.values(), ids=SITES)
@pytest.mark.parametrize("method", KEEP_ALL.values(), ids=KEEP_ALL)
def test_keeping_all_is_the_identity(method, options):
    site = make_site(6, **options)
    keep, _, num_wanted, *_ = decide(method, site)
    assert keep.all()
    assert (num_wanted == len(site.visual_rows)).all()


@pytest.mark.parametrize("method", CASES.values(), ids=CASES)
def test_rows_of_a_batch_do_not_see_each_other(method):
    both = make_site(7, batch=2)
    together = decide(method, both, 6)
    for b in range(2):
        alone = dataclasses.replace(
            both,
            query=both.query[b : b + 1],
            key=both.key[b : b + 1],
            value=both.value[b : b + 1],
            lower=tuple((q[b : b + 1], k[b : b + 1]) for q, k in both.lower),
            noise=both.noise[b : b + 1],
            hidden=both.hidden[b : b + 1],
            embeddings=both.embeddings[b : b + 1],
            sizes=both.sizes[b : b + 1],
        )
        apart = decide(method, alone, 6)
        assert torch.equal(apart.keep[0], together.keep[b])
        if together.hidden is not None:
            torch.testing.assert_close(apart.hidden[0], together.hidden[b])


# The layer at the site knows none of the rows that were cached before.
HERE = {name: method for name, method in CASES.items() if reads.NEXT_LAYER not in method.reads}


@pytest.mark.parametrize("method", HERE.values(), ids=HERE)
def test_rows_cached_before_the_prefill_count_as_if_fed_now(method):
    fed = make_site(8, system=6)
    cached = dataclasses.replace(
        fed,
        query=fed.query[:, :, 4:],
        lower=tuple((q[:, :, 4:], k) for q, k in fed.lower),
        visual_rows=fed.visual_rows - 4,
        text_rows=fed.text_rows - 4,
        side_row=fed.side_row - 4,
        last_row=fed.last_row - 4,
        hidden=fed.hidden[:, 4:],
        embeddings=fed.embeddings[:, 4:],
    )
    whole, split = decide(method, fed), decide(method, cached)
    assert torch.equal(whole.keep, split.keep)
    torch.testing.assert_close(whole.scores, split.scores, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", CASES.values(), ids=CASES)
def test_half_precision_is_computed_in_float32(method):
    site = make_site(9)

    def cast(given, dtype):
        named = ("query", "key", "value", "hidden", "embeddings")
        states = {name: getattr(given, name).to(dtype) for name in named}
        lower = tuple((q.to(dtype), k.to(dtype)) for q, k in given.lower)
        return dataclasses.replace(given, **states, lower=lower)

    half = cast(site, torch.float16)
    again = cast(half, torch.float32)
    for got, expected in zip(decide(method, half), decide(method, again), strict=True):
        assert got is expected is None or torch.equal(got, expected.to(got.dtype))


@pytest.mark.parametrize("method", CASES.values(), ids=CASES)
def test_half_precision_keeps_the_same_tokens(method):
    same = total = 0
    for seed in range(40):
        whole = make_site(seed, tokens=36)
        states = ("query", "key", "value", "hidden", "embeddings")
        named = {n: getattr(whole, n).half() for n in states}
        lower = tuple((q.half(), k.half()) for q, k in whole.lower)
        keep = decide(method, whole).keep
        same += int(
            (keep & decide(method, dataclasses.replace(whole, lower=lower, **named)).keep).sum()
        )
        total += int(keep.sum())
    # A word whose share is near the mean rates or does not, and moves every score with it.
    assert same >= (0.97 if method.name == "sparsevlm" else 0.99) * total


@pytest.mark.parametrize("method", CASES.values(), ids=CASES)
def test_a_method_reads_only_what_it_says(method):
    site = make_site(10)
    others = ("noise", "value", "side_row", "hidden", "sizes", "embeddings")
    read = set(method.reads)
    read |= set(reads.NEXT_LAYER_READS) if reads.NEXT_LAYER in read else set()
    unread = {name: None for name in others if name not in read}
    for name in ("query", "key"):
        if name not in method.reads:
            unread[name] = getattr(site, name) * torch.nan
    depth = sum(word.startswith("query.") for word in method.reads)
    unread["lower"] = site.lower[:depth]
    blind = decide(method, dataclasses.replace(site, **unread))
    assert torch.equal(blind.keep, decide(method, site).keep)


MERGING = {name: method for name, method in CASES.items() if method.merges}


@pytest.mark.parametrize("options", SITES.values(), ids=SITES)
@pytest.mark.parametrize("method", MERGING.values(), ids=MERGING)
def test_what_merges_is_the_mean_of_its_parts_and_nothing_is_lost(method, options):
    reference = importlib.import_module(f"tests.references.{method.name}")
    site = make_site(12, **options)
    rows, count = site.hidden[:, site.visual_rows], len(site.visual_rows)
    method = dataclasses.replace(method, num_keep=count)  # the budget alone says how many
    for budget in {method.fewest_left(count), count - count // 4, 999}:
        keep, _, _, hidden, moved = decide(method, site, budget)
        stays = moved == torch.arange(count)
        assert torch.equal(keep, stays)  # what does not go on went somewhere
        assert keep.gather(1, moved).all()  # and that goes on
        expected, expected_moved = reference.merged(method, site, budget)
        if options.get("values") != "small":  # whose pairs tie
            np.testing.assert_array_equal(moved, expected_moved)
            np.testing.assert_allclose(hidden[keep], expected[keep.numpy()], atol=1e-5)
        sizes = torch.zeros_like(site.sizes).scatter_add(1, moved, site.sizes)
        assert torch.equal(sizes.sum(-1), site.sizes.sum(-1))
        before = (rows * site.sizes[:, :, None]).sum(1)
        torch.testing.assert_close(
            (hidden * sizes[:, :, None]).sum(1), before, atol=1e-4, rtol=1e-5
        )
        alone = stays & (sizes == site.sizes)
        assert torch.equal(hidden[alone], rows[alone])  # to the last bit
    assert torch.equal(decide(KEEP_ALL[method.name], site).hidden, rows)


@pytest.mark.parametrize("method", CASES.values(), ids=CASES)
def test_settings_are_json_and_rebuild_the_method(method):
    options = json.loads(json.dumps(settings(method)))
    assert METHODS[method.name](**options, **modules(method)) == method


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda: Random(0), "keep_ratio"),
        (lambda: FastV(1.2), "keep_ratio"),
        (lambda: FastV(float("nan")), "keep_ratio"),
        (lambda: FastV(rows="first"), "rows"),
        (lambda: PyramidDrop(0.0), "keep_ratio"),
        (lambda: SparseVLM(over_heads="14"), "over_heads"),
        (lambda: ATP(thresholds=0.5), "ConstantThresholds"),
        (lambda: ATP(normalisation="zscore"), "normalisation"),
        (lambda: ATP(modality="text"), "modality"),
        (lambda: ATP(parts="text"), "parts"),
        (lambda: ATP(granularities=(2, 3)), "granularities"),
        (lambda: ATP(granularities=()), "granularities"),
        (lambda: ATP(granularities=(1, 2)), "spatial score"),
        (lambda: ATP(spatial_lambda=5.0), "spatial score"),
        (lambda: IVTP(0), "num_keep"),
        (lambda: IVTP(True), "num_keep"),
        (lambda: IVTP(group=0), "group"),
        (lambda: IVTP(fusion="sum"), "fusion"),
        (lambda: IVTP(block="text"), "block"),
        (lambda: DecoderTopK(row="first"), "row"),
        (lambda: DecoderToMe(0), "num_keep"),
    ],
)
def test_wrong_options_are_refused_with_what_to_do(build, word):
    with pytest.raises(PatchsieveError, match=word) as error:
        build()
    assert "what to do" in str(error.value)


def test_a_site_of_wrong_shapes_is_refused():
    site = make_site(0)
    for change in (
        {"key": site.key[0]},
        {"query": site.query[:, :3]},
        {"key": site.key[..., :4]},
        {"grid": (0, 6)},
    ):
        with pytest.raises(ShapeError):
            dataclasses.replace(site, **change)
    with pytest.raises(ShapeError, match="noise"):
        decide(Random(), dataclasses.replace(site, noise=None))
    for method, absent in (
        (CASES["ivtp"], {"value": None}),
        (CASES["ivtp"], {"side_row": None}),
        (CASES["ivtp"], {"lower": site.lower[:1]}),
        (CASES["topk cls"], {"side_row": None}),
    ):
        with pytest.raises(ShapeError, match="side row|pseudo-CLS"):
            decide(method, dataclasses.replace(site, **absent))
    with pytest.raises(ShapeError, match="next layer"):
        decide(PyramidDrop(), dataclasses.replace(site, hidden=None))
    with pytest.raises(ShapeError, match="hidden"):
        decide(CASES["tome"], dataclasses.replace(site, hidden=None))
    with pytest.raises(ShapeError, match="embeddings"):
        decide(CASES["sparsevlm"], dataclasses.replace(site, embeddings=None))
    with pytest.raises(ShapeError, match="rank"):
        decide(CASES["atp rank"], dataclasses.replace(site, num_visual=5000))


def test_a_site_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_site(0).grid = (1, 1)
    assert isinstance(make_site(0), Site)


def test_an_image_that_ends_the_prompt_is_judged_by_its_last_row():
    site = make_site(11, text=1, after=0)
    site = dataclasses.replace(site, visual_rows=site.visual_rows + 1)  # up to row L-1
    last, mean = (decide(FastV(rows=rows), site) for rows in ("last", "mean"))
    torch.testing.assert_close(mean.scores, last.scores)
    assert mean.scores.isfinite().all()


def test_fastv_mean_is_moved_by_the_instruction_alone():
    site = make_site(12)
    others = torch.ones(site.query.shape[2], dtype=torch.bool)
    others[site.text_rows] = False
    rows = others[None, None, :, None]
    blind = dataclasses.replace(site, query=torch.where(rows, torch.nan, site.query))
    method = FastV(0.25, rows="mean")
    torch.testing.assert_close(decide(method, blind).scores, decide(method, site).scores)
    deaf = dataclasses.replace(site, query=torch.where(rows, site.query, -site.query))
    assert not torch.allclose(decide(method, deaf).scores, decide(method, site).scores)


def test_fastv_all_is_moved_by_every_row_that_sees_the_image_and_by_no_side_row():
    site = make_site(13, other_image=3)
    method = FastV(0.25, rows="all")
    before = decide(method, site).scores
    for row in range(site.query.shape[2]):
        query = site.query.clone()
        query[:, :, row] *= -1.0
        after = decide(method, dataclasses.replace(site, query=query)).scores
        sees = int(site.visual_rows[0]) <= row <= int(site.last_row)
        assert torch.allclose(after, before, atol=1e-7) != sees, row


def test_sparsevlm_is_moved_by_its_raters_alone():
    site = make_site(14, text=8)
    method = SparseVLM(0.5, over_heads="all")
    rates = raters(*(site.embeddings[:, rows] for rows in (site.visual_rows, site.text_rows)))[0]
    assert 0 < int(rates.sum()) < 8
    before = decide(method, site).scores
    for row, is_rater in zip(site.text_rows, rates, strict=True):
        query = site.query.clone()
        query[:, :, row] *= -1.0
        after = decide(method, dataclasses.replace(site, query=query)).scores
        assert torch.equal(after, before) != is_rater


def test_raters_are_above_the_mean_and_all_of_them_where_none_is():
    visual = torch.tensor([[[4.0, 0.0], [4.0, 0.0]]])
    text = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]])
    assert raters(visual, text).tolist() == [[True, False, False]]
    assert raters(visual, text[:, :1]).tolist() == [[True]]
    assert raters(0 * visual, text).tolist() == [[True, True, True]]


def test_the_published_lists_are_kept_of_576_tokens():
    for counts in SPARSEVLM_COUNTS.values():
        assert [num_to_keep(count / 576, 576) for count in counts] == list(counts)
        printed = [float(f"{count / 576:.4g}") for count in counts]  # as docs/methods.md has them
        assert [num_to_keep(ratio, 576) for ratio in printed] == list(counts)
    assert [best_heads(heads) for heads in (1, 4, 32, 40)] == [1, 2, 14, 18]
