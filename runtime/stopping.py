"""Stop strings, looked for in what the model says: special tokens count with their text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

_UNKNOWN = b"\xff"  # of an id without a token: no stop string holds this byte


class TokenBytes:
    """The bytes that each token writes inside a text; a special token writes its own name.

    A token of a byte-level tokenizer may hold half a character, and a byte token (`<0x..>`) holds
    one byte. Every other token holds its text with the space before it, also where it begins an
    answer, of which tokenizers show no leading space.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = {}
        self._anchor = tokenizer.encode("a", add_special_tokens=False).tokens
        self._bytes = _byte_alphabet() if self._decode(["\u0120"]) == " " else {}
        self._has_byte_tokens = self._decode(["<0x41>"]) == "A"

    def __getitem__(self, token_id: int) -> bytes:
        """The bytes of a token."""
        if token_id not in self._known:
            token = self._tokenizer.id_to_token(token_id)
            self._known[token_id] = _UNKNOWN if token is None else self._read(token)
        return self._known[token_id]

    def _read(self, token: str) -> bytes:
        if self._bytes and all(letter in self._bytes for letter in token):
            return bytes(self._bytes[letter] for letter in token)
        if self._has_byte_tokens and len(token) == 6 and token.startswith("<0x"):
            return bytes.fromhex(token[3:5])
        before = self._decode(self._anchor)
        return self._decode([*self._anchor, token])[len(before) :].encode()

    def _decode(self, tokens: list[str]) -> str:
        decoder = self._tokenizer.decoder
        return " ".join(tokens) if decoder is None else decoder.decode(tokens)


@dataclass(frozen=True)
class Stop:
    """Where a stop string begins.

    Attributes:
        before: Shown bytes of earlier tokens that belong to it.
        kept: Bytes of the last token that come before it.
        cut: Bytes of the last token from its beginning on.
    """

    before: int
    kept: bytes
    cut: bytes


class StopStrings:
    """Looks for stop strings in the bytes of an answer.

    An answer ends with the first token that completes one, as `generate(stop_strings=...)` of
    Hugging Face ends it: in the bytes of the tokens, special ones included. Where a token completes
    several, the one that begins first counts. Differs from Hugging Face: the prompt is not looked
    at, so a stop string that begins there and ends in the answer does not stop.

    Args:
        tokenizer: The bundle's tokenizer.
        stops: The strings, none empty.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._stops = [stop.encode() for stop in stops]
        self._most = max(map(len, self._stops)) - 1  # bytes that a stop string may have begun with
        self._token_bytes = TokenBytes(tokenizer)
        self._said = bytearray()  # the last of what was said
        self._is_shown = bytearray()  # of each of these bytes: 1 where its token is shown
        self.open = b""  # shown bytes that may begin a stop string, at the end of what was said

    def push(self, token_id: int, is_shown: bool) -> Stop | None:
        """Take the next token.

        Args:
            token_id: Its id.
            is_shown: It is no special token, so its text is part of the answer's.

        Returns:
            Where a stop string begins that this token completes; None without.
        """
        new = self._token_bytes[token_id]
        said, first = bytes(self._said) + new, len(self._said)
        found = [at for at in map(said.find, self._stops) if at >= 0]
        if found:
            at, inside = min(found), max(min(found) - first, 0)
            return Stop(sum(self._is_shown[at:]), new[:inside], new[inside:])
        self._said += new
        self._is_shown += bytes([is_shown]) * len(new)
        excess = max(len(self._said) - self._most, 0)
        del self._said[:excess], self._is_shown[:excess]
        self.open = self._open()
        return None

    def _open(self) -> bytes:
        for start in range(len(self._said)):
            tail = bytes(self._said[start:])
            if any(stop.startswith(tail) for stop in self._stops):
                shown = self._is_shown[start:]
                return bytes(byte for byte, keep in zip(tail, shown, strict=True) if keep)
        return b""


def _byte_alphabet() -> dict[str, int]:
    """The letter that byte-level tokenizers write for each byte (GPT-2)."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    letters = [*map(chr, printed), *(chr(256 + number) for number in range(len(others)))]
    return dict(zip(letters, [*printed, *others], strict=True))
