"""Text of an answer while its tokens arrive: no half characters, no halves of stop strings."""

from __future__ import annotations

from collections.abc import Collection

from tokenizers import Tokenizer

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
    - A tail that may begin a stop string is held until it does or does not.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Collection[str] = (),
        skip_ids: Collection[int] = (),
    ) -> None:
        """Start an answer.

        Args:
            tokenizer: The bundle's tokenizer.
            stop: Strings that end the answer, none empty.
            skip_ids: Tokens without text, besides the tokenizer's special ones.
        """
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        added = tokenizer.get_added_tokens_decoder()
        self._skip = {token for token, entry in added.items() if entry.special} | set(skip_ids)
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
        if self._is_stopped or token_id in self._skip:
            return ""
        self._window.append(int(token_id))
        if token_id in self._byte_ids:
            return ""
        return self._release(self._settled_text(), is_last=False)

    def finish(self) -> str:
        """Flush what was held back; the answer is over.

        Returns:
            The last of the text, up to a stop string if one completes here.
        """
        if self._is_stopped:
            return ""
        rest = self._decode(self._window)[self._emitted :]
        self._window, self._emitted = [], 0
        return self._release(rest, is_last=True)

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

    def _release(self, new: str, *, is_last: bool) -> str:
        """Pass `new` through the stop strings."""
        buffer = self._held + new
        self._held = ""
        found = [at for at in (buffer.find(stop) for stop in self._stop) if at >= 0]
        if found:
            buffer = buffer[: min(found)]
            self._is_stopped = True
        elif not is_last:
            keep = len(buffer) - _open_tail(buffer, self._stop)
            buffer, self._held = buffer[:keep], buffer[keep:]
        if buffer:
            self._pieces.append(buffer)
        return buffer


def _open_tail(text: str, stops: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that begins a stop string."""
    for length in range(min(len(text), max(map(len, stops), default=1) - 1), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0


def _byte_fallback_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids of `<0x00>` ... `<0xFF>` where the decoder joins them into characters, else none."""
    if tokenizer.decoder is None or tokenizer.decoder.decode(["<0x41>"]) != "A":
        return frozenset()
    ids = (tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(token for token in ids if token is not None)
