"""Text of an answer while its tokens arrive: no half characters, no halves of stop strings."""

from __future__ import annotations

from collections.abc import Collection

from tokenizers import Tokenizer

from patchsieve.runtime.stopping import Stop, StopStrings

_REPLACEMENT = "\ufffd"  # stands for bytes that are not, or not yet, a character
_MOST_PENDING = 32  # tokens; an unfinished character has at most 3 bytes, so more are final


class TextStream:
    """Decodes one answer token by token.

    When no stop string matched, `text` after `finish()` equals
    `tokenizer.decode(ids, skip_special_tokens=True)`. Each token costs two decodes of a short
    window, whatever the length of the answer.

    - Byte-level tokenizers: the last character is held while it may still be completed.
    - Byte fallback (`<0x..>` tokens): one bad byte turns the whole run of byte tokens into
      replacement characters, so a run is held until it ends. In a script that the vocabulary lacks,
      text therefore arrives by the word.
    - A tail that may begin a stop string is held until it does or does not. Stop strings are looked
      for in what the model says, so they may hold special tokens, which the text leaves out.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Collection[str] = ()) -> None:
        """Start an answer.

        Args:
            tokenizer: The bundle's tokenizer.
            stop: Strings that end the answer, none empty.
        """
        self._tokenizer = tokenizer
        self._stop = StopStrings(tokenizer, tuple(stop)) if stop else None
        added = tokenizer.get_added_tokens_decoder()
        self._skip = {token for token, entry in added.items() if entry.special}
        self._byte_ids = _byte_fallback_ids(tokenizer)
        self._window: list[int] = []  # one token of context, then the undecided ones
        self._emitted = 0  # characters of the window's text that left the window
        self._held = ""  # whole characters that may begin a stop string
        self._pieces: list[str] = []
        self._is_stopped = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended the answer."""
        return self._is_stopped

    @property
    def text(self) -> str:
        """Everything that was returned so far."""
        return "".join(self._pieces)

    def push(self, token_id: int) -> str:
        """Take the next token.

        Args:
            token_id: Id of the token.

        Returns:
            The new text that is safe to show, often empty.
        """
        if self._is_stopped:
            return ""
        is_shown = token_id not in self._skip
        if self._stop is not None and (stop := self._stop.push(int(token_id), is_shown)):
            return self._end(stop, int(token_id), is_shown)
        new = ""
        if is_shown:
            self._window.append(int(token_id))
            if token_id not in self._byte_ids:
                new = self._settled_text()
        return self._release(new)

    def finish(self) -> str:
        """Flush what was held back; the answer is over.

        Returns:
            The last of the text.
        """
        if self._is_stopped:
            return ""
        return self._show(self._held + self._decode(self._window)[self._emitted :])

    def _end(self, stop: Stop, token_id: int, is_shown: bool) -> str:
        """The last of the text before a stop string that `token_id` completes."""
        self._is_stopped = True
        text = self._decode(self._window)
        undecided = self._undecided_bytes()
        if stop.before > undecided:  # undecided bytes are part of the stop string
            return self._show(_drop(self._held, stop.before - undecided))
        if stop.before:  # it begins in a run of byte tokens, of one byte each
            text = self._decode(self._window[: -stop.before])
        elif stop.kept and is_shown:
            text = self._decode([*self._window, token_id])
            text = text[: len(text) - len(stop.cut.decode(errors="replace"))]
        return self._show(self._held + text[self._emitted :])

    def _undecided_bytes(self) -> int:
        """How many of the last bytes, if they may belong to a stop string, gave no text yet."""
        assert self._stop is not None
        run = 0
        while run < len(self._window) and self._window[-1 - run] in self._byte_ids:
            run += 1
        known = len(self._window) - run
        if not self._decode(self._window[:known])[self._emitted :]:
            return run
        tail = self._stop.open[: len(self._stop.open) - run]  # ends in the undecided character
        return run + next((n for n in (3, 2, 1) if _is_one_character(tail[-n:], n)), 0)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True) if ids else ""

    def _settled_text(self) -> str:
        """New characters of the window that later tokens cannot change; slides the window."""
        text = self._decode(self._window)
        if not text.endswith(_REPLACEMENT):
            new = text[self._emitted :]
            # The last token stays as context: only the first token of a text loses its space
            self._window = self._window[-1:]
            self._emitted = len(self._decode(self._window))
            return new
        # An unfinished character shows as exactly one replacement character, at the end
        new = text[self._emitted : -1]
        self._emitted = max(self._emitted, len(text) - 1)
        if len(self._window) > _MOST_PENDING:
            self._cut(text)
        return new

    def _cut(self, text: str) -> None:
        """Drop the front of a window that never ends in a whole character.

        A cut where both halves decode to the whole's text, with four or more tokens (so four bytes)
        after it, leaves the decoder in the same state: bytes further back cannot matter.
        """
        for start in range(len(self._window) - 4, 0, -1):
            # One token of context on each side, so that no half begins the text
            front = self._decode(self._window[:start])
            back = self._decode(self._window[start - 1 :])
            lead = self._decode(self._window[start - 1 : start])
            if front + back[len(lead) :] == text and back.startswith(lead):
                self._emitted -= len(front) - len(lead)
                self._window = self._window[start - 1 :]
                return

    def _release(self, new: str) -> str:
        """Show what cannot belong to a stop string any more, and hold the rest."""
        text, shown = self._held + new, self._held + new
        if self._stop is not None and self._stop.open:
            shown = _drop(text, len(self._stop.open) - self._undecided_bytes())
        self._held = text[len(shown) :]
        return self._show(shown)

    def _show(self, text: str) -> str:
        if text:
            self._pieces.append(text)
        return text


def _is_one_character(tail: bytes, size: int) -> bool:
    return len(tail) == size and tail.decode(errors="replace") == _REPLACEMENT


def _drop(text: str, count: int) -> str:
    """A text without the characters that its last `count` bytes belong to."""
    while count > 0 and text:
        count -= len(text[-1].encode())
        text = text[:-1]
    return text


def _byte_fallback_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids of `<0x00>` ... `<0xFF>` where the decoder joins them into characters, else none."""
    if tokenizer.decoder is None or tokenizer.decoder.decode(["<0x41>"]) != "A":
        return frozenset()
    ids = (tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(token for token in ids if token is not None)
