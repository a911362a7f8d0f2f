"""The text of a row as it grows: decoding token by token, and ending it before a stop string. Host code.

Called by `decode.generate`, and meant for the engine. A stop string is looked for in the text, so it may begin and end
inside tokens; text that might still turn out to begin one is held back.
"""

from collections.abc import Sequence
from typing import Protocol


class TokenDecoder(Protocol):
    """What turns tokens into text piece by piece, whole characters only (`Tokenizer.stream()`)."""

    def push(self, token: int, /) -> str:
        """The characters that this token completes."""

    def finish(self) -> str:
        """Whatever is left of an unfinished character."""


def find_stop(text: str, stops: Sequence[str], start: int = 0) -> int | None:
    """Where in `text` the stop string that is complete first begins (the longest of those that end together).

    Reading character by character gives the same answer as reading at once. `start`: where to begin to look.
    """
    found = [(text.find(stop, start), stop) for stop in stops]
    ends = [(at + len(stop), at) for at, stop in found if at >= 0]
    return min(ends)[1] if ends else None


def held_back(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of `text` might be the beginning of a stop string."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for n in range(min(longest, len(text)), 0, -1):
        if any(len(stop) > n and text.endswith(stop[:n]) for stop in stops):
            return n
    return 0


class RowText:
    """The text of one row, fed with its tokens in order.

    text: what the tokens spell, cut before the stop string if one was found. tokens: those whose text begins before
    the cut. stopped: whether a stop string was found; further tokens are then ignored. Without a decoder there is no
    text, only tokens.
    """

    def __init__(self, decoder: TokenDecoder | None, stops: Sequence[str] = ()):
        self.text = ""
        self.tokens: list[int] = []
        self.stopped = False
        self._decoder = decoder
        self._stops = tuple(stops)
        self._longest = max((len(stop) for stop in stops), default=0)
        self._starts: list[int] = []
        self._shown = 0

    def push(self, token: int) -> str:
        """Take one more token; returns the text that is now certain to be part of the result and was not before."""
        if self.stopped:
            return ""
        self.tokens.append(token)
        self._starts.append(len(self.text))
        return self._extend(self._decoder.push(token)) if self._decoder else ""

    def finish(self) -> str:
        """No more tokens will come; returns the rest of the text, what was held back included."""
        certain = "" if self.stopped or not self._decoder else self._extend(self._decoder.finish())
        return certain + self._show(len(self.text))

    def _extend(self, piece: str) -> str:
        known = len(self.text)
        self.text += piece
        cut = find_stop(self.text, self._stops, max(0, known - self._longest + 1))
        if cut is None:
            return self._show(len(self.text) - held_back(self.text, self._stops))
        self.stopped = True
        self.text = self.text[:cut]
        self.tokens = [token for token, start in zip(self.tokens, self._starts, strict=True) if start < cut]
        return self._show(cut)

    def _show(self, end: int) -> str:
        shown, self._shown = self.text[self._shown : end], end
        return shown
