"""The page of `patchsieve show` in a headless Chromium: it moves, it fits, it can be read."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from patchsieve.show.html import render
from tests.support import pages
from tests.support.chromium import Chromium, find

PROMPTS = ("What is on the table, left of the spoon?", "How many people sit in the picture?")
PAPER = {False: (253, 253, 252), True: (21, 24, 27)}

pytestmark = pytest.mark.skipif(
    find() is None, reason="no Chromium on PATH (Debian: apt-get install chromium)"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    opened = Chromium(str(find()), tmp_path_factory.mktemp("profile"))
    yield opened
    assert opened.complaints() == []  # of the last page
    opened.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    made = {
        "one": pages.shown(PROMPTS[:1]),
        "two": pages.shown(PROMPTS, 2),
        "hostile": pages.shown(pages.HOSTILE[:2], 2, pages.HOSTILE[1:]),
        "unpruned": pages.unpruned(),
    }
    for name, page in made.items():
        (folder / f"{name}.html").write_text(render(page), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in made}


VISIBLE = "[...document.querySelectorAll('[data-place]')].filter(e => e.checkVisibility())"
# Pairs of blocks with content of their own that lie on one another.
OVERLAPS = """(() => {
  const blocks = [...document.querySelectorAll(
    'h1, h2, h3, h4, header p, nav output, nav input, nav ol, .answer, .facts, .count, .hint, '
    + '.readout, figure > svg, figcaption')].filter(e => e.checkVisibility());
  const boxes = blocks.map(e => e.getBoundingClientRect());
  const found = [];
  for (let i = 0; i < boxes.length; i++) for (let j = 0; j < i; j++) {
    const a = boxes[i], b = boxes[j];
    if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
        && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1
        && !blocks[i].contains(blocks[j]) && !blocks[j].contains(blocks[i]))
      found.push(`${blocks[j].outerHTML.slice(0, 60)} / ${blocks[i].outerHTML.slice(0, 60)}`);
  }
  return found;
})()"""
# Elements whose content is wider than they are.
SPILLS = """[...document.querySelectorAll('body *')]
  .filter(e => e.checkVisibility() && e.clientWidth && e.scrollWidth > e.clientWidth + 1
    && !e.closest('nav ol, svg')).map(e => e.outerHTML.slice(0, 80))"""
# Colours of every text and of what lies behind it.
TEXTS = """(() => {
  const behind = e => {
    for (; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (colour !== 'rgba(0, 0, 0, 0)') return colour;
    }
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = {};
  for (let node; (node = walker.nextNode());) {
    const e = node.parentElement;
    if (node.data.trim() && e.checkVisibility() && !['SCRIPT', 'STYLE'].includes(e.tagName))
      found[`${getComputedStyle(e).color} ${behind(e)}`] = node.data.trim();
  }
  return found;
})()"""


def contrast(colours: str) -> float:
    """Contrast ratio of WCAG 2 of two CSS colours, "rgb(...) rgb(...)"."""

    def luminance(colour: str) -> float:
        levels = [float(part) / 255 for part in colour.strip(" rgb()").split(",")]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in levels]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    first, second = sorted(luminance(part) for part in colours.split(") "))
    return (second + 0.05) / (first + 0.05)


def screen(browser: Chromium, tmp_path: Path) -> np.ndarray:
    """Pixels of the whole page, [h, w, 3]."""
    browser.screenshot(tmp_path / "screen.png")
    return np.asarray(Image.open(tmp_path / "screen.png").convert("RGB"))


def boxes(browser: Chromium, selector: str) -> list[dict[str, float]]:
    """Boxes of the visible elements of a selector, on the page."""
    return browser.evaluate(
        f"[...document.querySelectorAll({selector!r})].filter(e => e.checkVisibility())"
        ".map(e => e.getBoundingClientRect()).map(b => ({x: b.x + scrollX, y: b.y + scrollY,"
        " w: b.width, h: b.height}))"
    )


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 834, 1280, 1920])
@pytest.mark.parametrize("name", ["one", "two", "hostile", "unpruned"])
def test_a_page_fits_its_window_and_can_be_read(
    name: str, width: int, is_dark: bool, browser: Chromium, files: dict[str, Path]
) -> None:
    browser.show(files[name], width=width, is_dark=is_dark)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    for number in range(len(boxes(browser, "nav li")) or 1):
        browser.evaluate(f"document.querySelectorAll('nav li')[{number}]?.click()")
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        assert browser.evaluate(OVERLAPS) == [] == browser.evaluate(SPILLS)
        faint = {c: t for c, t in browser.evaluate(TEXTS).items() if contrast(c) < 4.5}
        assert faint == {}
    paper = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == f"rgb{PAPER[is_dark]}"
    assert browser.complaints() == []


def test_the_slider_moves_all_panels_by_key(browser: Chromium, files: dict[str, Path]) -> None:
    browser.show(files["two"])
    browser.evaluate("document.getElementById('place').focus()")
    seen = []
    for key in ("Home", "ArrowRight", "ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft"):
        browser.press(key)
        told = browser.evaluate("document.getElementById('named').textContent")
        spoken = browser.evaluate("document.getElementById('place').getAttribute('aria-valuetext')")
        places = browser.evaluate(f"{VISIBLE}.map(e => e.dataset.place)")
        assert told == spoken and len(places) == 2 * 2 and len(set(places)) == 1
        seen.append((told, places[0]))
    assert seen == [
        ("all tokens", "0"),
        ("before the decoder", "1"),
        ("before layer 2", "2"),
        ("before layer 14", "3"),
        ("before layer 14", "3"),
        ("before layer 2", "2"),
    ]
    label = "document.getElementById('place').labels[0].textContent"
    assert browser.evaluate(label) == "Place"


def test_without_script_all_panels_show_and_no_slider(
    browser: Chromium, files: dict[str, Path]
) -> None:
    browser.show(files["one"], has_script=False)
    root = browser.call("DOM.getDocument", depth=-1)["root"]["nodeId"]
    panels = browser.call("DOM.querySelectorAll", nodeId=root, selector="[data-place]")["nodeIds"]
    heights = [browser.call("DOM.getBoxModel", nodeId=panel)["model"]["height"] for panel in panels]
    assert len(heights) == 4 and min(heights) > 100
    (slider,) = browser.call("DOM.querySelectorAll", nodeId=root, selector="nav")["nodeIds"]
    with pytest.raises(AssertionError, match="box model"):  # it has none: it is not laid out
        browser.call("DOM.getBoxModel", nodeId=slider)


def test_two_prompts_stand_side_by_side_and_stacked_on_a_phone(
    browser: Chromium, files: dict[str, Path]
) -> None:
    browser.show(files["two"], width=1280)
    left, right = boxes(browser, "article")
    assert left["y"] == right["y"] and left["x"] + left["w"] < right["x"]
    figures = boxes(browser, "figure > svg")
    half = len(figures) // 2
    assert [f["y"] for f in figures[:half]] == [f["y"] for f in figures[half:]]  # rows line up
    browser.show(files["two"], width=390)
    upper, lower = boxes(browser, "article")
    assert upper["x"] == lower["x"] and upper["y"] + upper["h"] <= lower["y"]


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
def test_dropped_patches_are_dimmed_and_scores_are_coloured(
    is_dark: bool, browser: Chromium, files: dict[str, Path], tmp_path: Path
) -> None:
    shown = pages.shown(PROMPTS[:1])
    place = shown.places[2]
    browser.show(files["one"], is_dark=is_dark)
    browser.evaluate("document.querySelectorAll('nav li')[3].click()")
    pixels = screen(browser, tmp_path).astype(float)
    original = Image.open(io.BytesIO(shown.pictures[0].png)).convert("RGB")
    picture, heat = boxes(browser, "figure > svg")

    def middle(box: dict[str, float], patch: int) -> np.ndarray:
        row, column = divmod(patch, 8)
        return pixels[
            round(box["y"] + (row + 0.5) * box["h"] / 6),
            round(box["x"] + (column + 0.5) * box["w"] / 8),
        ]

    paper = np.array(PAPER[is_dark])
    for patch in range(48):
        row, column = divmod(patch, 8)
        colour = np.array(original.getpixel((column * 8 + 4, row * 8 + 4)))
        if patch not in place.kept:
            colour = 0.16 * colour + 0.84 * paper
        # The browser scales smoothly, so a patch's middle is near its own colour, not at it.
        assert np.abs(middle(picture, patch) - colour).max() < 40
    for patch, share in enumerate(pages.ranks(place)):
        if share is not None:
            assert np.abs(middle(heat, patch) - share).max() <= 2


def test_a_patch_tells_its_score_to_pointer_and_keys(
    browser: Chromium, files: dict[str, Path]
) -> None:
    place = pages.shown(PROMPTS[:1]).places[2]
    best = max(place.kept, key=lambda patch: place.scores[patch])
    row, column = divmod(best, 8)
    browser.show(files["one"])
    browser.evaluate("document.querySelectorAll('nav li')[3].click()")
    browser.evaluate("document.querySelector('.readout').scrollIntoView({block: 'end'})")
    box = boxes(browser, "figure > svg")[0]
    top = browser.evaluate("scrollY")
    browser.move_to(
        box["x"] + (column + 0.5) * box["w"] / 8, box["y"] - top + (row + 0.5) * box["h"] / 6
    )
    told = browser.evaluate("document.querySelector('.readout').textContent")
    count = sum(score is not None for score in place.scores or ())
    assert told.startswith(f"row {row + 1}, column {column + 1} · score ")
    assert f"rank 1 of {count} · kept" in told
    on = "[...document.querySelectorAll('.cursor.is-on')].filter(e => e.checkVisibility()).length"
    assert browser.evaluate(on) == 2
    browser.move_to(1, 1)
    assert browser.evaluate(on) == 0
    browser.evaluate(
        "[...document.querySelectorAll('figure > svg')].find(e => e.checkVisibility()).focus()"
    )
    for key in ("ArrowRight", "ArrowDown", "ArrowDown", "ArrowLeft", "ArrowLeft"):
        browser.press(key)
    told = browser.evaluate("document.querySelector('.readout').textContent")
    assert told.startswith("row 3, column 1 · ")


def test_hostile_texts_run_nothing_and_read_as_they_are(
    browser: Chromium, files: dict[str, Path]
) -> None:
    browser.show(files["hostile"])
    texts = browser.evaluate("[...document.querySelectorAll('.said')].map(e => e.textContent)")
    assert all(text in texts for text in pages.HOSTILE)
    assert not [e for e in browser.events if e["method"] == "Page.javascriptDialogOpening"]
    assert browser.complaints() == []


def test_the_policy_stops_a_script_that_is_not_ours(
    browser: Chromium, files: dict[str, Path], tmp_path: Path
) -> None:
    page = files["one"].read_text(encoding="utf-8")
    foreign = tmp_path / "foreign.html"
    foreign.write_text(page.replace("<main>", "<main><script>document.title = 'x'</script>"))
    browser.show(foreign)
    assert browser.evaluate("document.title") != "x"
    assert any("Content Security Policy" in text for text in browser.complaints())
    browser.events.clear()


def test_print_shows_every_panel(browser: Chromium, files: dict[str, Path]) -> None:
    browser.show(files["one"])
    assert len(browser.evaluate(f"{VISIBLE}.map(e => 1)")) == 1
    browser.call("Emulation.setEmulatedMedia", media="print")
    seen: Any = browser.evaluate(f"{VISIBLE}.map(e => 1)")
    browser.call("Emulation.setEmulatedMedia", media="")
    assert len(seen) == 4
