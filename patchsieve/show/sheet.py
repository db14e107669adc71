"""Draw the same panels as one picture, a contact sheet: Pillow alone, no browser.

Pillow's own font knows Basic Latin and little else; other characters show as boxes.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import cache, partial

from PIL import Image, ImageDraw, ImageFont

from patchsieve.show import colours, panels
from patchsieve.show.colours import Colour
from patchsieve.show.panels import INK, PANEL, PAPER
from patchsieve.show.shown import Answer, Asked, Picture, Place, Shown, View, Word
from patchsieve.tables import size

QUIET, LINE, MARK = (90, 98, 107), (220, 222, 223), (253, 233, 169)
SMALL, NORMAL, LARGE, TITLE = 20, 24, 30, 44  # pixels
GAP, MARGIN, SPACE, NARROWEST = 28, 64, 12, 1200  # pixels
_LEADING = 1.4

Piece = tuple[str, bool]  # a text, and whether it is marked


def draw(shown: Shown) -> bytes:
    """The sheet as PNG: a row for each view, a column for the whole image and for each place."""
    columns = 1 + len(shown.places)
    sheet = _Sheet(max(columns * (PANEL + GAP) - GAP + 2 * MARGIN, NARROWEST))
    sheet.text("Which patches survive", TITLE)
    sheet.text(f"{shown.bundle}, made from {shown.checkpoint}. Plan {shown.plan}.", NORMAL, QUIET)
    sheet.text(shown.machine, SMALL, QUIET)
    for note in shown.notes:
        sheet.text(note, NORMAL)
    for asked in shown.asked:
        _prompt(sheet, shown, asked)
    file = io.BytesIO()
    sheet.cut().save(file, "PNG")
    return file.getvalue()


class _Sheet:
    """A picture that grows downwards; `x` and `width` are the column that is written in.

    Args:
        width: Pixels, margins included.
    """

    def __init__(self, width: int) -> None:
        self.image = Image.new("RGB", (width, MARGIN), PAPER)
        self.x, self.y, self.width = MARGIN, MARGIN, width - 2 * MARGIN

    def room(self, height: int) -> ImageDraw.ImageDraw:
        """Make room below `y` and return what draws there."""
        if self.y + height > self.image.height:
            taller = Image.new("RGB", (self.image.width, 2 * (self.y + height)), PAPER)
            taller.paste(self.image)
            self.image = taller
        return ImageDraw.Draw(self.image)

    def cut(self) -> Image.Image:
        """The picture without the room that was not used."""
        self.room(MARGIN)
        return self.image.crop((0, 0, self.image.width, self.y + MARGIN))

    def text(self, text: str | Sequence[Piece], pixels: int, colour: Colour = INK) -> None:
        """Write a text, or pieces of it that may be marked, in as many lines as it takes."""
        font = _font(pixels)
        leading = round(pixels * _LEADING)
        pieces = [(text, False)] if isinstance(text, str) else text
        for line in _wrap(pieces, font.getlength, self.width):
            pen, at = self.room(leading), float(self.x)
            for piece, is_marked in line:
                length = font.getlength(piece)
                if is_marked and piece.strip():
                    inked = font.getlength(piece.rstrip())
                    pen.rectangle((at, self.y, at + inked, self.y + leading - 4), fill=MARK)
                pen.text((at, self.y), piece, colour, font)
                at += length
            self.y += leading

    def paste(self, image: Image.Image | None) -> None:
        """Put an image, if there is one, and a little space below it."""
        if image is not None:
            self.room(image.height)
            self.image.paste(image, (self.x, self.y))
            self.y += image.height + SPACE

    def rule(self) -> None:
        """A thin line over the whole width."""
        self.y += GAP
        self.room(2).line((self.x, self.y, self.x + self.width, self.y), LINE, 2)
        self.y += GAP

    def side_by_side(self, writers: Sequence[Callable[[], None]], width: int) -> None:
        """Write columns of a width that begin at the same height."""
        x, full, top, lowest = self.x, self.width, self.y, self.y
        self.width = width
        for number, write in enumerate(writers):
            self.x, self.y = x + number * (width + GAP), top
            write()
            lowest = max(lowest, self.y)
        self.x, self.y, self.width = x, lowest, full


@cache
def _font(pixels: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(pixels)


def _prompt(sheet: _Sheet, shown: Shown, asked: Asked) -> None:
    sheet.rule()
    is_alone = len(asked.views) == 1
    words = asked.views[0].words if is_alone else ()
    sheet.text(_pieces(words) if words else asked.prompt, LARGE)
    if is_alone and words:
        sheet.text(asked.views[0].told, SMALL, QUIET)
    sheet.y += SPACE
    answers = [(f"Plan {asked.answer.plan}", asked.answer)]
    if asked.unpruned is not None:
        answers.append(("Unpruned", asked.unpruned))
    writers = [partial(_answer, sheet, title, answer) for title, answer in answers]
    sheet.side_by_side(writers, (sheet.width - GAP) // 2)
    if shown.timing:
        sheet.text(shown.timing, SMALL, QUIET)
    for number, (picture, view) in enumerate(zip(shown.pictures, asked.views, strict=True), 1):
        sheet.y += GAP
        if not is_alone:
            sheet.text(f"Image {number}, {picture.name}", NORMAL, QUIET)
            sheet.text(_pieces(view.words), NORMAL)
            sheet.text(view.told, SMALL, QUIET)
            sheet.y += SPACE
        writers = [partial(_whole, sheet, shown, picture, view)]
        writers += [partial(_place, sheet, shown, picture, place) for place in view.places]
        sheet.side_by_side(writers, PANEL)


def _answer(sheet: _Sheet, title: str, answer: Answer) -> None:
    sheet.text(title, SMALL, QUIET)
    sheet.text(answer.text, NORMAL)
    facts = f"KV cache {size(answer.kv_used)}"
    if answer.ttft_ms is not None:
        facts += f", first token after {answer.ttft_ms:.0f} ms"
    sheet.text(f"{facts}, {answer.num_tokens} new tokens", SMALL, QUIET)


def _pieces(words: Sequence[Word]) -> list[Piece]:
    return [(word.text, word.is_selected) for word in words]


def _whole(sheet: _Sheet, shown: Shown, picture: Picture, view: View) -> None:
    """The column of the whole image: what the model saw, and how deep its patches come."""
    rows, columns = picture.grid
    sheet.text("all tokens", NORMAL)
    sheet.text(f"{shown.num_visual} tokens, {rows} x {columns} patches", SMALL, QUIET)
    sheet.y += SPACE // 2
    sheet.paste(panels.pixels(picture))
    if not view.places:
        return
    sheet.paste(panels.depths(picture, view.places))
    for words, colour, patches in colours.depths(view.places, picture.num_patches):
        if not patches:
            continue
        square = Image.new("RGB", (SMALL - 4, SMALL - 4), colour)
        sheet.room(SMALL)
        sheet.image.paste(square, (sheet.x, sheet.y + 4))
        sheet.x += SMALL + 6
        sheet.text(f"{words}: {len(patches)}", SMALL, QUIET)
        sheet.x -= SMALL + 6


def _place(sheet: _Sheet, shown: Shown, picture: Picture, place: Place) -> None:
    """The column of a place: survivors, and below them scores and merged groups."""
    share = f"{place.num_after / shown.num_visual * 100:.3g} %"
    capped = f", {place.num_wanted} wanted" if place.is_capped else ""
    sheet.text(f"{place.name}, {place.method}", NORMAL)
    counts = f"{place.num_before} to {place.num_after} tokens ({share}){capped}"
    sheet.text(counts, SMALL, QUIET)
    sheet.y += SPACE // 2
    sheet.paste(panels.survivors(picture, place))
    hot = panels.heat(picture, place)
    found = colours.quantiles(place.scores or ())
    if hot is not None and found is not None:
        sheet.paste(hot)
        sheet.paste(panels.ramp(hot.width, 10))
        sheet.y -= SPACE // 2
        low, middle, high = (f"{value:.2g}" for value in found)
        sheet.text(f"score {low} to {high}, median {middle}", SMALL, QUIET)
    merged = panels.groups(picture, place)
    if merged is not None:
        sheet.paste(merged)
        sheet.y -= SPACE // 2
        sheet.text("merged patches", SMALL, QUIET)


def _wrap(
    pieces: Sequence[Piece], length: Callable[[str], float], width: float
) -> list[list[Piece]]:
    """Pieces in lines of at most a width, broken after a space, or anywhere in a longer word."""
    lines: list[list[Piece]] = [[]] if pieces else []
    used = 0.0
    for text, is_marked in pieces:
        for word in " ".join(text.splitlines()).replace(" ", " \n").split("\n"):
            if used and used + length(word.rstrip()) > width:
                lines.append([])
                used = 0.0
            while length(word.rstrip()) > width and len(word) > 1:
                fits = next(
                    n for n in range(len(word) - 1, 0, -1) if n == 1 or length(word[:n]) <= width
                )
                lines[-1].append((word[:fits], is_marked))
                lines.append([])
                word = word[fits:]
            lines[-1].append((word, is_marked))
            used += length(word)
    return lines
