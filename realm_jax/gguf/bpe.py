"""Byte pair encoding, the `gpt2` tokenizer model. Called by `tokenizer.py`.

The merge loop is that of the `tokenizers` library wherever it is exact: every character of the word is a
token, and every merge joins two tokens into a third. Elsewhere `merging.merge` does the same in Python.
"""

from collections.abc import Iterable, Mapping
from functools import cached_property

from tokenizers.models import BPE

from realm_jax.gguf.merging import merge
from realm_jax.gguf.pretokenizer import PreTokenizer
from realm_jax.gguf.unicode import to_byte_characters

_CACHED_WORDS = 1 << 17
_CACHED_LENGTH = 64


class BytePairEncoder:
    """Encodes text without special tokens.

    ids: token text -> id. merges: pairs of token texts, best first.
    """

    def __init__(self, ids: Mapping[str, int], merges: Iterable[tuple[str, str]], pre: PreTokenizer):
        self._ids = ids
        self._pre = pre
        self._merges = list(dict.fromkeys(merges))  # of a pair that is there twice the first counts
        self._alphabet = frozenset(text for text in ids if len(text) == 1)
        self._library = self._build_library()
        self._words: dict[str, list[int]] = {}

    def _build_library(self) -> BPE | None:
        """The library's model, or None where it would join other pairs than llama.cpp."""
        ids = self._ids
        if not all(left in ids and right in ids and left + right in ids for left, right in self._merges):
            return None
        # The library takes no text that is not Unicode. A word is Unicode, so no part of it is such a token.
        if not _is_unicode("".join(ids)):
            ids = {text: id for text, id in ids.items() if _is_unicode(text)}
            if not all(left + right in ids for left, right in self._merges):
                return None
        return BPE(vocab=dict(ids), merges=self._merges)

    @cached_property
    def _ranks(self) -> dict[tuple[str, str], int]:
        return {pair: rank for rank, pair in enumerate(self._merges)}

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, no special tokens added or looked for."""
        if self._pre.escape_spaces:
            text = text.replace(" ", "\u2581")
        words, output = self._words, []
        for word in self._pre.split(text):
            ids = words.get(word)
            if ids is None:
                ids = self._encode_word(word)
                if len(word) <= _CACHED_LENGTH:
                    if len(words) >= _CACHED_WORDS:
                        words.clear()
                    words[word] = ids
            output += ids
        return output

    def _encode_word(self, word: str) -> list[int]:
        whole = self._pre.ignore_merges or (self._pre.whole_newlines and not word.strip("\n"))
        symbols = to_byte_characters(word) if self._pre.byte_level else word
        if whole and symbols in self._ids:
            return [self._ids[symbols]]
        if self._library is not None and self._alphabet.issuperset(symbols):
            return [token.id for token in self._library.tokenize(symbols)]
        output = []
        for part in merge(symbols, lambda left, right: self._ranks.get((left, right))):
            id = self._ids.get(part)
            output += [id] if id is not None else self._fallback(part)
        return output

    def _fallback(self, part: str) -> list[int]:
        """Tokens for the bytes of a part that is no token; bytes without a token are left out."""
        data = part.encode("utf-8", "surrogatepass")
        if self._pre.byte_level:
            names = (chr(byte) if byte < 0x80 else chr(0xDC00 + byte) for byte in data)
        else:
            names = (f"<0x{byte:02X}>" for byte in data)
        return [self._ids[name] for name in names if name in self._ids]


def _is_unicode(text: str) -> bool:
    """Whether a token text was UTF-8 in the file; others cannot be handed to the library."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
