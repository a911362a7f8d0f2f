"""Text from token ids one at a time, never half a character. Made by `Tokenizer.stream`."""

import codecs
from collections.abc import Callable


class IncrementalDecoder:
    """Turns token ids into text as they come.

    The texts that `push` and `finish` return, joined, are what `Tokenizer.decode` gives for all ids at once:
    bytes that are no UTF-8 become U+FFFD.
    """

    def __init__(self, render: Callable[[int, bool], tuple[bytes, bool]]):
        """render(id, at_start) -> (the token's bytes, whether the next token is still at the start)."""
        self._render = render
        self._at_start = True
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The text that this token completes, often empty within a character of several tokens."""
        data, self._at_start = self._render(id, self._at_start)
        return self._decoder.decode(data)

    def finish(self) -> str:
        """What is left: U+FFFD where the last character was never completed. The decoder starts anew."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        self._at_start = True
        return rest
