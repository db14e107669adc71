"""`patchsieve show`: its data, its page and its picture, without a browser."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import patchsieve
from patchsieve.contract.errors import ShapeError
from patchsieve.show import colours, panels, shapes
from patchsieve.show.agreement import sentences
from patchsieve.show.collect import collect, timed
from patchsieve.show.html import render
from patchsieve.show.sheet import draw
from patchsieve.show.shown import Asked, Picture, Place, Shown, View
from tests.support import pages
from tests.support.bundles import PHOTO, PLAN, PROMPT, command, command_json

pytest_plugins = ["tests.support.bundles"]

PROMPTS = (PROMPT, "Where is the spoon?")


class Parsed(HTMLParser):
    """Elements of a page with their attributes, its texts, and what style and script hold."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.code: dict[str, list[str]] = {"style": [], "script": []}
        self._open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in self.code:
            self.code[tag].append("")
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.code:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open:
            self.code[self._open[-1]][-1] += data
        else:
            self.texts.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.elements if found == tag]


def covered(path: str, columns: int) -> list[int]:
    """Patches that a path of `squares` covers."""
    found = []
    for column, row, count in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\3z", path):
        found += [int(row) * columns + int(column) + step for step in range(int(count))]
    assert re.sub(r"M(\d+) (\d+)h(\d+)v1h-\3z", "", path) == ""
    return found


@pytest.fixture(scope="module")
def shown(tiny_bundle: Path) -> Shown:
    model = patchsieve.load(tiny_bundle, threads=1)
    page = collect(model, [PHOTO], PROMPTS, max_new_tokens=6)
    model.close()
    return page


def test_a_page_shows_what_a_run_decides(shown: Shown, tiny_bundle: Path) -> None:
    model = patchsieve.load(tiny_bundle, threads=1)
    for asked, prompt in zip(shown.asked, PROMPTS, strict=True):
        pruned = model.generate(PHOTO, prompt, max_new_tokens=6)
        full = model.generate(PHOTO, prompt, max_new_tokens=6, plan="none")
        assert (asked.prompt, asked.answer.text) == (prompt, pruned.text)
        assert asked.unpruned is not None and asked.unpruned.text == full.text
        assert asked.answer.kv_used == pruned.kv_bytes["used"] < asked.unpruned.kv_used
        (view,) = asked.views
        assert [list(place.kept) for place in view.places] == [s.kept for s in pruned.sites]
        assert [(p.name, p.method) for p in view.places] == [
            ("before layer 2", "fastv"),
            ("before layer 4", "fastv"),
        ]
    model.close()


def test_scores_stand_at_their_patches(shown: Shown) -> None:
    alive = set(range(16))
    for asked in shown.asked:
        alive = set(range(16))
        for place in asked.views[0].places:
            assert place.scores is not None and len(place.scores) == 16
            assert {patch for patch, s in enumerate(place.scores) if s is not None} == alive
            best = sorted(alive, key=lambda patch: (-place.scores[patch], patch))
            assert sorted(best[: place.num_after]) == list(place.kept)
            alive = set(place.kept)


def test_scores_come_to_the_host_only_when_asked_for(tiny_bundle: Path) -> None:
    model = patchsieve.load(tiny_bundle, threads=1)
    copied: list[Any] = []
    to_numpy = model.backend.to_numpy
    model.backend.to_numpy = lambda tensor: copied.append(0) or to_numpy(tensor)
    counts = []
    for scores in (False, True):
        copied.clear()
        result = model.generate(PHOTO, PROMPT, max_new_tokens=1, scores=scores)
        counts.append(len(copied))
        assert all((site.scores is not None) == scores for site in result.sites)
        assert all(("scores" in site.to_dict()) == scores for site in result.sites)
    model.close()
    assert counts[1] == counts[0] + 2  # one for each site


def test_the_picture_is_what_the_model_saw(shown: Shown, tiny_bundle: Path) -> None:
    model = patchsieve.load(tiny_bundle, threads=1)
    (pixels,) = model.preprocess([PHOTO])
    image = Image.open(io.BytesIO(shown.pictures[0].png))
    assert image.size == (32, 32)
    again = np.asarray(image).transpose(2, 0, 1)  # [3, h, w]
    table = model.bundle.preprocessor._table()
    found = np.stack([table[c][again[c]] for c in range(3)])
    model.close()
    assert np.array_equal(found, pixels)


@pytest.mark.slow
def test_a_class_token_counts_but_is_no_patch(tiny: Any) -> None:
    model = tiny("clip-full").model(
        [{"layer": 2, "method": "fastv", "params": {"keep_ratio": 0.5}}]
    )
    (asked,) = collect(model, [PHOTO], [PROMPT], max_new_tokens=2).asked
    (place,) = asked.views[0].places
    assert place.num_before == 17
    assert place.num_after - len(place.kept) in (0, 1)
    assert all(score is not None for score in place.scores or (None,))


def test_a_page_is_one_file_that_reaches_for_nothing() -> None:
    page = render(pages.shown(PROMPTS, 3))
    parsed = Parsed(page)
    without_pixels = re.sub(r"base64,[\w+/=]*", "", page)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", without_pixels)
    for _, attributes in parsed.elements:
        for name, value in attributes.items():
            assert not name.startswith("on") and name not in ("src", "srcset", "style", "action")
            assert name != "href" or str(value).startswith(("#", "data:"))
    assert not [tag for tag, _ in parsed.elements if tag in ("iframe", "object", "embed", "form")]


def test_the_policy_allows_this_style_and_this_script_alone() -> None:
    parsed = Parsed(render(pages.shown(pages.HOSTILE)))
    (policy,) = [m["content"] for m in parsed.of("meta") if m.get("http-equiv")]
    (style,), (data, script) = parsed.code["style"], parsed.code["script"]
    for kind, text in (("style", style), ("script", script)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in str(policy)
    assert str(policy).startswith("default-src 'none'; img-src data:;")
    assert data.startswith('{"')


def test_hostile_texts_stay_text() -> None:
    page = render(pages.shown(pages.HOSTILE[:2], 2, pages.HOSTILE[1:]))
    plain = Parsed(render(pages.shown(("plain words", "too"), 2, ("c", "d"))))
    parsed = Parsed(page)
    kinds = {tag for tag, _ in parsed.elements}
    assert kinds == {tag for tag, _ in plain.elements}
    assert len(parsed.of("script")) == 2 and "img" not in kinds
    joined = "".join(parsed.texts)
    for text in pages.HOSTILE:
        assert text in joined


def test_a_file_s_name_and_a_plan_s_are_text_too() -> None:
    base = pages.shown((PROMPT,), 2)
    one = replace(base.pictures[0], name="<b>.jpg")
    odd = replace(base, pictures=(one, base.pictures[1]), checkpoint='<i "a">', notes=("<u>",))
    parsed = Parsed(render(odd))
    joined = "".join(parsed.texts)
    assert all(text in joined for text in ("<b>.jpg", '<i "a">', "<u>"))


def test_without_a_script_every_panel_is_there() -> None:
    parsed = Parsed(render(pages.shown(PROMPTS, 2)))
    panels = [a for _, a in parsed.elements if "data-place" in a]
    assert len(panels) == 2 * 2 * 4  # prompts x images x (all tokens and three places)
    assert not any("hidden" in attributes for attributes in panels)
    assert "hidden" in parsed.of("nav")[0]


def test_a_page_draws_the_survivors_and_the_scores_it_was_given() -> None:
    shown = pages.shown()
    page = render(shown)
    (place,) = [p for p in shown.asked[0].views[0].places if p.layer == 14]
    dropped = re.findall(r'class="dropped" d="([^"]*)"', page)
    lost = [patch for patch in range(48) if patch not in place.kept]
    assert lost in [covered(path, 8) for path in dropped]
    scored = {p for p, score in enumerate(place.scores or ()) if score is not None}
    heat = re.findall(r'<path fill="(#\w+)" d="([^"]*)"', page.split("score of each patch")[1])
    drawn = dict.fromkeys(sum((covered(path, 8) for _, path in heat), []))
    assert scored <= set(drawn)
    best = max(scored, key=lambda patch: place.scores[patch])
    assert best in covered(dict(heat)[colours.css(colours.scale(1.0))], 8)


def test_a_page_of_a_long_run_stays_below_two_megabytes() -> None:
    photo = Image.open(PHOTO).convert("RGB").resize((336, 336))
    file = io.BytesIO()
    photo.save(file, "PNG")
    picture = Picture("photo.jpg", file.getvalue(), (24, 24))
    base = pages.shown(PROMPTS)
    scores = tuple(np.random.default_rng(0).random(576).tolist())
    place = replace(base.places[2], kept=tuple(range(0, 576, 2)), scores=scores)
    views = (View(tuple(replace(place, layer=layer) for layer in (2, 4, 14, 24))),) * 3
    asked = tuple(replace(one, views=views) for one in base.asked)
    page = render(replace(base, pictures=(picture,) * 3, asked=asked))
    assert len(page.encode()) < 2_000_000


def test_words_are_marked_in_the_prompt_or_above_each_image() -> None:
    alone, several = (Parsed(render(pages.shown((PROMPT,), count))) for count in (1, 2))
    marked = ["table?"]  # the words of more than four letters
    for parsed, times in ((alone, 1), (several, 2)):
        assert len(parsed.of("mark")) == times * len(marked)
        assert parsed.of("mark")[0]["title"] == "weight 0.2"
        assert parsed.texts.count("Marked words judged this image.") == times
        assert [text for text in parsed.texts if text in marked] == times * marked
    base = pages.shown((PROMPT,))
    none = [replace(word, is_selected=False) for word in base.asked[0].views[0].words]
    views = (replace(base.asked[0].views[0], words=tuple(none)),)
    page = render(replace(base, asked=(replace(base.asked[0], views=views),)))
    assert "No word passed the threshold" in page and "<mark" not in page


def test_a_plan_that_prunes_nothing_has_no_slider() -> None:
    parsed = Parsed(render(pages.unpruned()))
    assert not parsed.of("nav") and not parsed.of("input")
    assert "nothing pruned" in parsed.texts


@pytest.mark.parametrize("seed", range(5))
def test_squares_cover_their_patches_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    patches = np.flatnonzero(rng.random(35) < rng.random()).tolist()
    assert covered(shapes.squares(patches, 7), 7) == patches


@pytest.mark.parametrize("seed", range(5))
def test_borders_run_where_neighbours_differ(seed: int) -> None:
    labels = np.random.default_rng(seed).integers(0, 3, 30)
    grid = labels.reshape(5, 6)
    expected = {
        *((x, y, x + 1, y) for y in range(1, 5) for x in range(6) if grid[y, x] != grid[y - 1, x]),
        *((x, y, x, y + 1) for y in range(5) for x in range(1, 6) if grid[y, x] != grid[y, x - 1]),
    }
    found = []
    for x0, y0, x1, y1 in shapes.borders(labels.tolist(), 6):
        step = (x1 > x0, y1 > y0)
        for n in range(x1 - x0 + y1 - y0):
            x, y = x0 + n * step[0], y0 + n * step[1]
            found.append((x, y, x + step[0], y + step[1]))
    assert len(found) == len(set(found)) and set(found) == expected


def test_ranks_follow_the_scores_and_share_ties() -> None:
    assert colours.ranks([3.0, 1.0, 2.0]) == [1.0, 0.0, 0.5]
    assert colours.ranks([7.0, 7.0, 7.0]) == [0.5, 0.5, 0.5]
    assert colours.ranks([1.0, 5.0, 5.0, 9.0]) == [0.0, 0.5, 0.5, 1.0]
    nan, inf = float("nan"), float("inf")
    assert colours.ranks([nan, 1.0, None, -inf, 2.0]) == [None, 0.0, None, None, 1.0]
    assert colours.ranks([None, nan]) == [None, None]
    assert colours.ranks([4.0]) == [0.5]


def test_the_scale_s_lightness_rises_evenly() -> None:
    light = [np.dot(colours.scale(x), (0.2126, 0.7152, 0.0722)) for x in np.linspace(0, 1, 32)]
    assert min(np.diff(light)) > 0


def test_neighbouring_groups_have_different_colours() -> None:
    groups = (np.arange(12)[:, None] // 2 * 6 + np.arange(12)[None] // 2).reshape(-1)
    groups[0], groups[5] = 99, -1  # alone, and dropped
    tints = colours.tints(groups.tolist(), 12)
    colour = {patch: one for one, patches in tints.items() for patch in patches}
    assert set(range(144)) - set(colour) == {0, 5}
    for patch, one in colour.items():
        for near in (patch + 1, patch + 12):
            if near in colour and not (near == patch + 1 and near % 12 == 0):
                assert (colour[near] == one) == (groups[near] == groups[patch])


def test_every_patch_has_one_depth() -> None:
    places = pages.shown().places
    depths = colours.depths(places, 48)
    assert sorted(patch for _, _, patches in depths for patch in patches) == list(range(48))
    assert depths[0][0] == "dropped before the decoder" and depths[0][2] == [3]
    assert depths[-1][2] == list(places[-1].kept)


@pytest.mark.parametrize(
    "change",
    [{"kept": (3, 1)}, {"kept": (48,)}, {"kept": (-1, 2)}, {"scores": (1.0,)}, {"groups": (0, 0)}],
)
def test_data_of_another_grid_are_refused(change: dict[str, Any]) -> None:
    page = pages.shown()
    view = page.asked[0].views[0]
    bad = replace(view, places=(*view.places[:2], replace(view.places[2], **change)))
    with pytest.raises(ShapeError, match="does not fit the image's patches"):
        replace(page, asked=(replace(page.asked[0], views=(bad,)),))


def test_views_of_other_places_are_refused() -> None:
    page = pages.shown(PROMPTS)
    short = replace(page.asked[1], views=(View(page.asked[1].views[0].places[:1]),))
    with pytest.raises(ShapeError, match="different places"):
        replace(page, asked=(page.asked[0], short))


def test_a_panel_is_pale_where_patches_are_dropped() -> None:
    shown = pages.shown()
    picture, place = shown.pictures[0], shown.places[2]
    before = np.asarray(panels.pixels(picture)).astype(float)
    after = np.asarray(panels.survivors(picture, place)).astype(float)
    side = after.shape[1] // 8
    for patch in range(48):
        row, column = divmod(patch, 8)
        at = np.s_[
            row * side + 2 : (row + 1) * side - 2, column * side + 2 : (column + 1) * side - 2
        ]
        if patch in place.kept:
            assert np.array_equal(after[at], before[at])
        else:
            pale = 0.16 * before[at] + 0.84 * np.array(panels.PAPER)
            assert np.abs(after[at] - pale).max() < 2  # 8-bit rounding of share and colour


def test_a_heat_map_has_the_colour_of_each_rank() -> None:
    shown = pages.shown()
    picture, place = shown.pictures[0], shown.places[2]
    image = panels.heat(picture, place)
    assert image is not None
    side = image.width // 8
    for colour, patches in colours.levels(place.scores or ()).items():
        for patch in patches:
            row, column = divmod(patch, 8)
            at = (column * side + side // 2, row * side + side // 2)
            assert image.getpixel(at) == colour
    assert panels.heat(picture, shown.places[1]) is None


def test_a_sheet_of_anything_is_a_picture() -> None:
    heights = []
    for page in (pages.unpruned(), pages.shown(), pages.shown(pages.HOSTILE, 2, pages.HOSTILE)):
        image = Image.open(io.BytesIO(draw(page)))
        image.load()
        heights.append(image.height)
        # The margins hold nothing: no text and no panel runs out of the sheet.
        edge = np.asarray(image.convert("RGB"))
        assert (edge[:, -60:] == panels.PAPER).all() and (edge[:, :60] == panels.PAPER).all()
        assert (edge[-60:] == panels.PAPER).all()
    assert heights == sorted(heights)


class Clocked:
    """A model that answers at once; its clock says what runs of each plan are said to take."""

    def __init__(self, times: dict[str, list[float]]) -> None:
        self.times, self.asked = times, list[str]()

    def __call__(self, plan: str) -> Any:
        self.asked.append(plan)
        took = self.times[plan].pop(0)
        return SimpleNamespace(timings_ms={"ttft": took, "total": 10 * took})


def test_times_are_medians_of_runs_in_turn_and_never_of_the_first() -> None:
    """A slow run, of one plan or of both, changes no ratio."""
    answers = [replace(pages.answer("a", plan), ttft_ms=None, total_ms=None) for plan in "pn"]
    model = Clocked({"p": [50.0, 999.0, 52.0], "n": [100.0, 101.0, 900.0]})
    measured = timed(answers, model, 3)
    assert model.asked == ["p", "n"] * 3
    assert [answer.ttft_ms for answer in measured] == [52, 101]
    assert [answer.total_ms for answer in measured] == [520, 1010]
    assert [answer.text for answer in measured] == ["a", "a"]
    assert timed(answers, model, 0) == answers and len(model.asked) == 6


def test_a_page_says_how_it_was_timed_or_shows_no_times(shown: Shown, tiny_bundle: Path) -> None:
    page = render(shown)
    assert "Times: median of 3 runs, both plans in turn, after an untimed run of each." in page
    assert "time to first token" in page
    model = patchsieve.load(tiny_bundle, threads=1)
    bare = collect(model, [PHOTO], [PROMPT], max_new_tokens=2, timed_runs=0)
    one = collect(model, [PHOTO], [PROMPT], max_new_tokens=2, timed_runs=1, plan="none")
    model.close()
    assert bare.asked[0].answer.ttft_ms is None and bare.summary()["timed_runs"] == 0
    assert "time to first token" not in render(bare) and "Times:" not in render(bare)
    assert "KV cache" in render(bare) and draw(bare)
    assert one.timing == "Times: one run, after an untimed run of each."


def of_kept(*kept: Sequence[int], layer: int | None = 2, method: str = "fastv") -> list[Asked]:
    """Prompts that keep these of 144 patches at one place."""
    return [
        Asked(
            f"question {number}",
            pages.answer("a"),
            None,
            (View((Place(layer, method, 144, len(ids), len(ids), tuple(ids)),)),),
        )
        for number, ids in enumerate(kept)
    ]


def test_survivors_that_questions_have_in_common_are_counted() -> None:
    """What the page measured, and where it is nearly all, that the question hardly matters."""
    grid = [pages.picture(grid=(12, 12))]
    first, alike, other = range(38, 52), [*range(38, 50), 66, 67], [*range(38, 41), *range(80, 91)]
    (told,) = sentences(of_kept(first, alike), grid)
    assert told == (
        "12 of 14 patches kept before layer 2 are the same for both questions: which of them is "
        "asked hardly changes this plan's choice"
    )
    (told,) = sentences(of_kept(first, other), grid)
    assert told == "3 of 14 patches kept before layer 2 are the same for both questions"
    (told,) = sentences(of_kept(first, alike, range(42, 58)), grid)
    assert told.startswith("All 3 questions keep 8 patches in common before layer 2 (of 14, 14 and")
    (told,) = sentences(of_kept(range(6), [5, *range(40, 80)]), grid)
    assert told == "Both questions keep 1 patch in common before layer 2 (of 6 and 41)"
    # By chance 120 of 144 patches have 100 in common: that alone says nothing of the scores.
    (told,) = sentences(of_kept(range(120), range(24, 144)), grid)
    assert told.startswith("96 of 120") and "hardly" not in told
    assert not sentences(of_kept(first), grid)
    asked = of_kept(first, first)
    assert not sentences([asked[0], asked[0]], grid)  # the same question twice
    assert not sentences(of_kept(range(144), range(144)), grid)


def test_survivors_along_the_edge_are_counted() -> None:
    """As FastV keeps on the demo model: attention goes there whatever the corner shows."""
    grid = [pages.picture(grid=(12, 12))]
    edge = (83, 84, 95, 107, 119, 120, 126, 127, 128, 131, 138, 139, 140, 143)
    (told,) = sentences(of_kept(edge), grid)
    assert told == (
        "11 of 14 patches kept before layer 2 lie on the picture's edge, where 44 of all 144 are"
    )
    assert not sentences(of_kept(range(144)), grid)
    assert "draws" in sentences(of_kept(edge, method="random"), grid)[0]
    assert len(sentences(of_kept(edge, method="random"), grid)) == 1
    small = [pages.picture(grid=(4, 4))]  # most of its patches are on the edge
    assert not sentences(of_kept(range(4)), small)


def test_places_that_read_no_question_are_said_to() -> None:
    grid = [pages.picture(grid=(12, 12))]
    (told,) = sentences(of_kept(range(14), layer=None, method="gtp"), grid)
    assert told.startswith("gtp acts before the question is read")
    (told,) = sentences(of_kept(range(14), range(14), method="random"), grid)
    assert "draws patches before layer 2" in told
    named = [replace(one, views=one.views * 2) for one in of_kept(range(26, 34), range(26, 34))]
    told_all = sentences(named, grid * 2)
    assert [text[:9] for text in told_all] == ["image 1: ", "image 2: "]


@pytest.mark.parametrize("suffix", [".html", ".PNG"])
def test_the_command_writes_a_file_and_says_what_is_in_it(
    suffix: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / f"page{suffix}"
    given = ("show", tiny_bundle, "--image", PHOTO, "--prompt", PROMPT, "--max-new-tokens", 4)
    code, said = command_json(*given, "--prompt", "Where?", "-o", out, "--threads", 1)
    assert (code, said["schema_version"], said["output"]) == (0, 1, str(out))
    assert list(tmp_path.iterdir()) == [out]  # nothing temporary is left
    content = out.read_bytes()
    assert said["bytes"] == len(content)
    assert content.startswith(b"<!doctype html>" if suffix == ".html" else b"\x89PNG")
    assert said["plan"] == PLAN and said["images"] == [{"name": "photo.jpg", "grid": [4, 4]}]
    assert [asked["prompt"] for asked in said["prompts"]] == [PROMPT, "Where?"]
    places = said["prompts"][0]["images"][0]["places"]
    assert [(p["layer"], p["num_before"], p["num_after"]) for p in places] == [
        (2, 16, 8),
        (4, 8, 4),
    ]
    code, out_text, _ = command(*given, "-o", out, "--threads", 1)
    assert code == 0 and "prompt 1, image 1, layer 4" in out_text


def test_an_unpruned_plan_is_shown_and_said(tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    given = ("--image", PHOTO, "--prompt", PROMPT, "--plan", "none", "--max-new-tokens", 2)
    code, said = command_json("show", tiny_bundle, *given, "-o", out, "--timed-runs", 0)
    assert code == 0 and said["prompts"][0]["answer"]["ttft_ms"] is None
    assert said["prompts"][0]["unpruned"] is None
    assert said["notes"] == ["the plan none prunes nothing: every token reaches every layer"]
    assert said["notes"][0] in out.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--image", PHOTO, "--prompt", PROMPT, "-o", "{tmp}/page.pdf"), ".html or .png"),
        (("--image", PHOTO, "--prompt", PROMPT, "-o", "{tmp}/no/page.html"), "no folder"),
        (("--image", PHOTO, "--prompt", "word " * 200, "-o", "{tmp}/p.html"), "--max-text-tokens"),
        (("--image", PHOTO, "--prompt", "", "-o", "{tmp}/p.html", "--raw"), "the prompt is empty"),
        (("--image", "/no/such.jpg", "--prompt", PROMPT, "-o", "{tmp}/p.html"), "/no/such.jpg"),
        (
            ("--image", PHOTO, "--prompt", PROMPT, "-o", "{tmp}/p.png", "--plan", "x"),
            "no such plan",
        ),
    ],
)
def test_what_cannot_be_shown_is_one_line_and_no_file(
    arguments: tuple[str, ...], told: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    given = [text.format(tmp=tmp_path) for text in arguments]
    code, out, err = command("show", tiny_bundle, *given)
    assert (code, out) == (2, "")
    assert told in err.splitlines()[-1] and "Traceback" not in err
    assert not list(tmp_path.iterdir())
