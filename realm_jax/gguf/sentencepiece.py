"""SentencePiece-type encoding, the `llama` tokenizer model. Called by `tokenizer.py`.

Neighbours are joined while their union is a token, the highest score first and the leftmost among equals;
what is no token in the end becomes byte tokens.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import AnyStr

from realm_jax.errors import GGUFError
from realm_jax.gguf.merging import merge

SPACE = "\u2581"
_CACHED_WORDS = 1 << 17
_CACHED_LENGTH = 64
_UTF8_WIDTH = (1,) * 12 + (2, 2, 3, 4)  # of a character, by the upper half of its first byte


class SentencePieceEncoder:
    """Encodes text without special tokens.

    ids: token text -> id. scores: float32 numbers, one a token. unknown_id stands for a character that has
    neither a token nor byte tokens (None: that is an error).
    """

    def __init__(self, ids: Mapping[str, int], scores: Sequence[float], unknown_id: int | None, source: str):
        self._ids = ids
        self._scores = scores
        self._unknown_id = unknown_id
        self._source = source
        self._byte_ids = [self._byte_id(byte) for byte in range(256)]
        self._words: dict[str, list[int]] = {}
        # A word may begin at any space that no token has inside, behind the same character.
        before_space = {text[i - 1] for text in ids if SPACE in text for i in range(1, len(text)) if text[i] == SPACE}
        behind = f"(?<![{re.escape(''.join(sorted(before_space)))}])" if before_space else ""
        self._word_start = re.compile(f"{behind}(?={SPACE})")

    def _byte_id(self, byte: int) -> int | None:
        id = self._ids.get(f"<0x{byte:02X}>")
        if id is None:
            id = self._ids.get(chr(byte) if byte < 0x80 else chr(0xDC00 + byte))
        return id

    def encode(self, data: bytes) -> list[int]:
        """Token ids of a text as bytes (UTF-8 or not), no special tokens added or looked for."""
        try:
            text = data.decode("utf-8").replace(" ", SPACE)
        except UnicodeDecodeError:
            return self._encode_bytes(data.replace(b" ", SPACE.encode()))
        words, output = self._words, []
        for word in self._word_start.split(text):
            ids = words.get(word)
            if ids is None:
                ids = self._join(self._ids, list(word))
                if len(word) <= _CACHED_LENGTH:
                    if len(words) >= _CACHED_WORDS:
                        words.clear()
                    words[word] = ids
            output += ids
        return output

    @cached_property
    def _ids_by_bytes(self) -> dict[bytes, int]:
        return {text.encode("utf-8", "surrogateescape"): id for text, id in self._ids.items()}

    def _encode_bytes(self, data: bytes) -> list[int]:
        """The same for bytes that are not UTF-8: characters are as long as their first byte says."""
        symbols, position = [], 0
        while position < len(data):
            width = _UTF8_WIDTH[data[position] >> 4]
            symbols.append(data[position : position + width])
            position += width
        return self._join(self._ids_by_bytes, symbols)

    def _join(self, ids: Mapping[AnyStr, int], symbols: list[AnyStr]) -> list[int]:
        scores = self._scores

        def priority(left: AnyStr, right: AnyStr) -> float | None:
            id = ids.get(left + right)
            return None if id is None else -scores[id]

        output = []
        for part in merge(symbols, priority):
            id = ids.get(part)
            output += [id] if id is not None else self._fallback(part)
        return output

    def _fallback(self, part: str | bytes) -> list[int]:
        data = part.encode("utf-8") if isinstance(part, str) else part
        output = [self._byte_ids[byte] for byte in data]
        if None not in output:
            return output
        if self._unknown_id is None:
            raise GGUFError(
                f"{self._source}: the vocabulary has no token for {part!r}: it needs the byte tokens <0x00> to <0xFF> "
                "in tokenizer.ggml.tokens, or tokenizer.ggml.unknown_token_id"
            )
        return [self._unknown_id]
